"""What all streaming engines share: meeting, cycles, and their end; only how bytes travel differs.

    class GlooCheckpointEngine(StreamingEngine):
        name = "gloo"
        def make_carrier(self, rendezvous): return CollectiveCarrier(rendezvous, "gloo", CPU)

Rank 0 keeps the shared keys through which everybody meets: at `$MASTER_PORT` + 2 if the environment
names it, else at any port of its own, which `prepare` returns. They are encrypted, and let in who
knows the secret of `transport.secret`: on one host it is found, between hosts it is given.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from abc import abstractmethod
from collections.abc import AsyncGenerator, Mapping
from typing import Any, ClassVar

import torch

from checkpoint_engine.errors import CheckpointEngineError, UsageError
from checkpoint_engine.manifest import CHUNK_BYTES, Version
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.streaming.base import CheckpointEngine, StreamReport, Weights
from checkpoint_engine.streaming.carriers import Carrier
from checkpoint_engine.streaming.compression import check_compression
from checkpoint_engine.streaming.link import Link, Settings
from checkpoint_engine.streaming.packing import named
from checkpoint_engine.streaming.places import Places
from checkpoint_engine.streaming.receiving import Arrived, Receiving
from checkpoint_engine.streaming.sending import Sending
from checkpoint_engine.streaming.threads import in_thread
from checkpoint_engine.streaming.watch import Lines, Presence
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.meeting import Keeper, Meeting, number_of
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["StreamingEngine"]

CLOSING_TURNS = 10  # of the event loop, of which it takes three
LONGEST_TIMEOUT = 366 * 24 * 3600.0  # beyond which deadlines overflow
PORTS_AFTER_MASTER = 2  # MASTER_PORT is the trainer's own group's, the next a parameter server's
CPU = torch.device("cpu")


class StreamingEngine(CheckpointEngine):
    """See `CheckpointEngine`; all calls come from one thread.

    Args:
        bucket_size: bytes of a bucket, at least 4 MiB; the smallest of all processes counts. The
            sender has four, and each receiver, which needs room for the largest tensor besides if
            that is larger.
        timeout: seconds of the longest wait for another process: to come, to send or take a bucket.
        compression: "none", or "zstd" where it pays.
        rebuild_group: make the way of bytes anew in each cycle, not only after an error.
        is_master: as the attribute.

    Attributes:
        name: in the registry of engines.
        compressions: that it takes.
        device: where tensors are received.
        version: what was sent or received last, if anything was.

    Raises:
        UsageError: a setting cannot be.
    """

    name: ClassVar[str]
    compressions: ClassVar[tuple[str, ...]] = ("none",)
    device: torch.device = CPU

    def __init__(
        self,
        bucket_size: int = DEFAULT_BUCKET_BYTES,
        *,
        timeout: float = 600.0,
        compression: str = "none",
        rebuild_group: bool = False,
        is_master: bool = False,
    ) -> None:
        if not isinstance(bucket_size, int) or bucket_size < CHUNK_BYTES:
            raise UsageError(
                f"bucket_size={bucket_size!r}: a bucket has a number of bytes, "
                f"{CHUNK_BYTES} or more"
            )
        if not isinstance(timeout, (int, float)) or not 0 < timeout <= LONGEST_TIMEOUT:
            raise UsageError(f"timeout={timeout!r}: a wait takes some seconds, or a year at most")
        check_compression(compression)
        if compression not in self.compressions:
            raise UsageError(f"compression={compression!r} is not for the engine {self.name!r}")
        self.is_master = is_master
        self.version: Version | None = None
        self._settings = Settings(
            engine=self.name,
            bucket_bytes=bucket_size,
            timeout_seconds=timeout,
            compression=compression,
            rebuild_group=rebuild_group,
        )
        self._rank: int | None = None
        self._place: tuple[int, Mapping[str, Any] | None] | None = None
        self._keeper: Keeper | None = None
        self._metadata: dict[str, Any] = {}
        self._link: Link | None = None
        self._lines: Lines | None = None
        self._presence: Presence | None = None
        self._places = Places(self.device)
        self._is_busy = False

    @abstractmethod
    def make_carrier(self, rendezvous: Rendezvous) -> Carrier:
        """How bytes travel between these ranks."""

    @property
    def rank(self) -> int | None:
        """This process's, once it has met the others; -1 of a trainer's that does not send."""
        return self._rank

    @property
    def link(self) -> Link:
        """This process's part in the stream; raises UsageError before it has met the others."""
        return self._met()

    @property
    def settings(self) -> Settings:
        """What it was made with."""
        return self._settings

    def is_let_in(self) -> bool:
        """Whether rank 0 is there, and knows this process: one that came back may not."""
        if self._link is None or self._rank == 0:
            return self._link is not None
        keys = self._link.rendezvous.fork()
        try:
            keys.add("met", 1)
        except CheckpointEngineError:
            return False
        finally:
            keys.give_back()
        return True

    def lost(self) -> list[int]:
        """Which receivers have died, as far as rank 0 has noticed."""
        return self._lines.broken() if self._lines is not None else []

    def prepare(self) -> dict[str, Any]:
        """Begin to listen, if this is the master. May be called again.

        Returns:
            The master's `master_addr` and `master_port`, for the others' `init_process_group`.

        Raises:
            UsageError: it cannot listen there.
        """
        if self.is_master and not self._metadata:
            self._keeper = self.meeting(None).keep()
            host, _, port = self._keeper.address.rpartition(":")
            self._metadata = {"master_addr": host, "master_port": int(port)}
        return dict(self._metadata)

    def init_process_group(
        self,
        rank: int,
        world_size: int,
        master_metadata: Mapping[str, Any] | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> None:
        """See `CheckpointEngine`. Waits for rank 0 only; the others may come later.

        Args:
            rank: as there.
            world_size: as there.
            master_metadata: as there.
            timeout_seconds: the longest wait for it; default that of every wait.

        Raises:
            UsageError: the numbers contradict, nothing says where the master is, or it has another
                secret.
            DeadlineExceeded: it cannot be reached.
        """
        if not -1 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of world size {world_size}")
        place = (world_size, None if rank == 0 else master_metadata or {})
        if self._link is not None:
            if self._rank != rank:
                raise UsageError(f"this process is rank {self._rank} already, not {rank}")
            if self._place == place and self.is_let_in():
                return
            if rank == 0:
                raise UsageError("finalize() comes before meeting another number of receivers")
        self._leave()
        self._rank, self._place = rank, place
        if rank != 0 and self.is_master:
            raise UsageError(f"rank {rank} cannot be the master, which is rank 0")
        if rank < 0:
            return
        if rank == 0:
            self.is_master = True
            self.prepare()
            master_metadata = self._metadata
        meeting = self.meeting(master_metadata)
        if timeout_seconds is None:
            timeout_seconds = self._settings.timeout_seconds
        if rank == 0:
            self._lines = Lines()
        else:
            self._presence = Presence(meeting.address)
        rendezvous = Rendezvous.at(
            meeting, rank, world_size, self._keeper, timeout_seconds=timeout_seconds
        )
        self._keeper = None  # which the rendezvous has now
        self._link = Link(rendezvous, self.make_carrier(rendezvous), self._settings)

    async def send_weights(self, weights: Weights, *, label: str = "") -> StreamReport | None:
        """Send one version to every receiver, and return when all of them have taken it.

        Each tensor is copied before the next is asked for, and none may change meanwhile. Tied
        tensors are sent under each of the names that are given.

        Args:
            weights: names and tensors: a state dict, `named_parameters()`, a generator, an async
                generator. A process of rank -1 goes through it, and sends nothing.
            label: what to call the version; default "sync-1", "sync-2", and so on.

        Raises:
            SourceError: a tensor cannot be sent, or is given twice.
            DeadlineExceeded: a receiver does not come, hangs or reads too slowly; says which.
            PeerLost: a receiver died; says which.
            CheckpointEngineError: a receiver gave up; says which, and why.
        """
        if self._rank == -1:
            async for _ in named(weights):
                pass
            return None
        link = self._met()
        if self._lines is None:
            raise UsageError(f"rank {link.rank} receives; only rank 0 sends")
        with self._busy():
            report = await Sending(link, self._lines).run(weights, label)
        self.version = Version(label=report.label, digest=report.digest)
        return report

    async def receive_weights(
        self, *, copy: bool = False
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        """The names and tensors of the next version, each checked, in the order of the sender.

        A tensor is a view of memory that is used again: it is valid until the next one is asked
        for, and may be written into. The loop ends when every receiver has taken all; whoever
        leaves it before ends the cycle for everybody.

        Args:
            copy: give tensors that may be kept.

        Raises:
            VerificationError: what arrived is not what was sent.
            DeadlineExceeded: nothing is sent, or another receiver is late; says which.
            PeerLost: the sender died, or another receiver did; says which.
            CheckpointEngineError: the sender gave up; says why.
        """
        link = self._met()
        if self._presence is None:
            raise UsageError("rank 0 sends; ranks from 1 receive")
        for _ in range(CLOSING_TURNS):
            if self._is_busy:  # a loop that was left: asyncio closes its generator in a moment
                await asyncio.sleep(0)
        with self._busy():
            receiving = Receiving(link, self._presence, self._places)
            link.under_way.add(receiving.give_up)
            try:
                await in_thread(receiving.join)
                while isinstance(arrived := await in_thread(receiving.next), Arrived):
                    try:
                        for name, tensor in arrived.tensors:
                            yield name, tensor.clone() if copy else tensor
                    finally:
                        if self.device.type != "cpu":  # what its consumer has queued reads it
                            torch.accelerator.current_stream(self.device).synchronize()
                    arrived.release()
                version = arrived
                await in_thread(lambda: receiving.finish(version))
            except (GeneratorExit, asyncio.CancelledError):
                receiving.give_up(UsageError("its consumer left before the last tensor"))
                raise
            except BaseException as error:
                if (cause := receiving.give_up(error)) is error:
                    raise
                raise cause from error
            finally:
                link.under_way.discard(receiving.give_up)
        self.version = version

    def cancel(self, error: CheckpointEngineError) -> None:
        """End a cycle that another thread is in, if any; it raises this, and so do the others."""
        if self._link is not None:
            self._link.cancel(error)

    def finalize(self) -> None:
        """See `CheckpointEngine`. The master waits a moment for the others to leave."""
        self._leave()
        if self._keeper is not None:
            self._keeper.close()
        self._keeper, self._metadata, self._rank = None, {}, None
        self._places = Places(self.device)
        if self.device.type != "cpu":  # what was received into is the device's again
            torch.get_device_module(self.device).empty_cache()

    def meeting(self, metadata: Mapping[str, Any] | None) -> Meeting:
        """Where the master is: as it says, else as the environment does, else on this host."""
        if metadata:
            try:
                host, port = str(metadata["master_addr"]), int(metadata["master_port"])
            except (KeyError, TypeError, ValueError) as error:
                raise UsageError(
                    f"master_metadata={metadata!r} is not what the master's prepare() returned, a "
                    "dict of master_addr and master_port"
                ) from error
            return Meeting(host, port, by_launcher=False)
        if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ:
            port = number_of("MASTER_PORT", 0) + PORTS_AFTER_MASTER
            return Meeting(os.environ["MASTER_ADDR"], port, by_launcher=False)
        if not self.is_master:
            raise UsageError(
                "nothing says where the master is: pass master_metadata=, what its prepare() "
                "returned, or set MASTER_ADDR and MASTER_PORT in every process"
            )
        return Meeting(own_address(), 0, by_launcher=False)

    def _leave(self) -> None:
        if self._link is not None:
            self._link.close()  # which ends a cycle, and what watches the lines
        if self._lines is not None:
            self._lines.close()
        if self._presence is not None:
            self._presence.close()
        self._link = self._lines = self._presence = None

    def _met(self) -> Link:
        if self._link is None:
            raise UsageError("prepare() and init_process_group(rank, world_size) come first")
        return self._link

    @contextlib.contextmanager
    def _busy(self) -> Any:
        if self._is_busy:
            raise UsageError(
                "this engine sends or receives already, and does so with one version after the "
                "other; a loop that is left over a named generator is ended by contextlib.aclosing"
            )
        self._is_busy = True
        try:
            yield
        finally:
            self._is_busy = False
