"""The sender's side of one cycle: fill ∥ announce ∥ move ∥ land, over a ring of buckets.

Tensors are asked for, copied and digested on the event loop, one at a time, so a generator may use
a tensor's memory again as soon as it is asked for the next. What waits for others has threads. A
bucket is announced as soon as it is full, so receivers find memory for it while those before it are
still on their way; it moves when all of them have, whether or not the one before has landed.

Whatever fails here ends the cycle for everybody, with the reason; the next begins anew.

    report = await Sending(link, lines).run(model.named_parameters(), label="step-120")
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, wait
from functools import partial
from typing import NamedTuple

import msgspec
import torch

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
    SourceError,
    TransferError,
    UsageError,
)
from checkpoint_engine.streaming.base import StreamReport, Weights
from checkpoint_engine.streaming.carriers import NUM_SLOTS, Landed
from checkpoint_engine.streaming.compression import Compressor
from checkpoint_engine.streaming.link import Cycle, Link
from checkpoint_engine.streaming.messages import (
    FROM_RECEIVER,
    Bucket,
    Ear,
    End,
    Failed,
    Hello,
    Over,
    Plan,
    Voice,
    decode_hello,
)
from checkpoint_engine.streaming.packing import Ledger, OpenBucket, cuts, named, weight_of
from checkpoint_engine.streaming.threads import Worker, ended_by, in_thread
from checkpoint_engine.streaming.watch import Lines, Watch, died, named_ranks

__all__ = ["Sending"]

POLL_SECONDS = 0.2


class _Stage:
    """Seconds spent within."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._start


class _Moving(NamedTuple):
    """Bytes of a bucket on their way since then."""

    num_bytes: int
    begun_at: float
    landed: Landed


class Sending:
    """One version on its way.

    Args:
        link: this process's.
        lines: to the receivers, kept for the next cycle.
    """

    def __init__(self, link: Link, lines: Lines) -> None:
        self._link, self._lines, self._carrier = link, lines, link.carrier
        self._settings = link.settings
        self._ranks = range(1, link.rendezvous.world_size)
        self._stopped = threading.Event()
        self._meeting, self._ending = threading.Lock(), threading.Lock()
        self._cause: BaseException | None = None
        self._awaited: list[int] = []  # of the receivers, while they come
        self._cycle: Cycle | None = None
        self._voice: Voice | None = None
        self._watch: Watch | None = None
        self._announcer, self._mover = Worker("ckpt-announce"), Worker("ckpt-move")
        self._lander = Worker("ckpt-land")
        self._moves: deque[Future[None]] = deque()
        self._compressor = Compressor() if self._settings.compression == "zstd" else None
        self._stages = {name: _Stage() for name in ("meet", "generate", "fill", "move")}
        self._ledger = Ledger()
        self._num_buckets = self._sent_bytes = 0
        self._landed_at = 0.0

    async def run(self, weights: Weights, label: str) -> StreamReport:
        """Send it.

        Raises:
            SourceError: a tensor cannot be sent, or is given twice.
            DeadlineExceeded: a receiver does not come, or hangs, or reads too slowly; says which.
            PeerLost: one died; says which.
            CheckpointEngineError: one gave up, for a reason of its own.
        """
        start = time.monotonic()
        self._link.under_way.add(self._end)
        try:
            with self._stages["meet"]:
                bucket_bytes = await in_thread(self._meet)
            if not isinstance(label, str):
                raise UsageError(f"label={label!r} is no text: pass f'step-{{step}}', say")
            await self._pack(weights, self._carrier.slots(bucket_bytes))
            if not self._ledger.num_tensors:
                raise SourceError(
                    "there is no tensor to send; a generator that was gone through gives none"
                )
            while self._moves:
                await asyncio.wrap_future(self._moves.popleft())
            label = label or f"sync-{self._the_cycle.number}"
            digest = self._ledger.digest()
            await in_thread(lambda: self._finish(label, digest))
        except BaseException as error:
            cause = await in_thread(partial(self._give_up, error))
            if cause is error:
                raise
            raise cause from error
        finally:
            self._announcer.close()
            self._mover.close()
            self._lander.close()
        return StreamReport(
            label=label,
            digest=digest,
            num_tensors=self._ledger.num_tensors,
            num_buckets=self._num_buckets,
            num_bytes=self._ledger.num_bytes,
            sent_bytes=self._sent_bytes,
            seconds={
                **{name: stage.seconds for name, stage in self._stages.items()},
                "total": time.monotonic() - start,
            },
        )

    @property
    def _the_cycle(self) -> Cycle:
        assert self._cycle is not None, "a cycle begins with the meeting"
        return self._cycle

    def _meet(self) -> int:
        """Begin the cycle, once every receiver takes part; returns the size of its buckets."""
        with self._meeting:
            if self._is_over():  # nobody would end the cycle, which has not begun
                raise TransferError("the cycle was given up")
            return self._begin()

    def _begin(self) -> int:
        cycle = self._cycle = self._link.begin()
        self._voice = Voice(cycle.speaking.log("sent"))
        hellos = self._greeted(cycle)
        kinds = {rank: hello.engine for rank, hello in hellos.items()}
        if wrong := [rank for rank, kind in kinds.items() if kind != self._settings.engine]:
            raise UsageError(
                f"{named_ranks(wrong)} receives with another engine ({kinds[wrong[0]]}) than this "
                f"one, {self._settings.engine}: use the same in every process"
            )
        self._carrier.check(hellos)
        sizes = [hello.bucket_bytes for hello in hellos.values()]
        bucket_bytes = min([self._settings.bucket_bytes, *sizes])
        way = self._carrier.plan(
            f"stream-{cycle.number}",
            [hello.kept for hello in hellos.values()],
            bucket_bytes,
            rebuild=self._settings.rebuild_group,
        )
        ear = Ear(cycle.hearing.log("heard"), FROM_RECEIVER)
        # Bytes that are on their way to one that died would be waited for.
        watch = self._watch = Watch(ear, self._lines, self._ranks, self._carrier.abandon)
        world_size = self._link.rendezvous.world_size
        self._voice.say(Plan(bucket_bytes=bucket_bytes, way=way, world_size=world_size))
        with ended_by(self._carrier.abandon, when=lambda: watch.has_failed or self._is_over()):
            self._carrier.join(way, self._settings.timeout_seconds)
        return bucket_bytes

    def _greeted(self, cycle: Cycle) -> dict[int, Hello]:
        deadline = time.monotonic() + self._settings.timeout_seconds
        hellos: dict[int, Hello] = {}
        while missing := [rank for rank in self._ranks if rank not in hellos]:
            self._awaited = missing
            if gone := [rank for rank in self._lines.broken() if rank in hellos]:
                raise died(gone)
            if self._is_over() or time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{named_ranks(missing)} of {len(self._ranks)} receivers did not come in "
                    f"{self._settings.timeout_seconds:.0f} s: is it up, does it receive, and was "
                    "it given the same CKPT_ENGINE_SECRET, or on one host CKPT_ENGINE_SOCKET_DIR?"
                )
            for rank in missing:
                wait_seconds = POLL_SECONDS if rank == missing[0] else 0.0
                with contextlib.suppress(DeadlineExceeded):
                    hellos[rank] = decode_hello(cycle.hearing.get(f"hello/{rank}", wait_seconds))
                    self._lines.hold(rank, hellos[rank])
        self._awaited = []
        return hellos

    def _is_over(self) -> bool:
        return self._stopped.is_set() or self._link.stopped.is_set()

    async def _pack(self, weights: Weights, slots: list[torch.Tensor]) -> None:
        bucket_bytes = len(slots[0])
        bucket = await self._free_bucket(slots)
        pairs = named(weights)
        while True:
            with self._stages["generate"]:
                pair = await anext(pairs, None)
            if self._stopped.is_set():
                raise TransferError("the cycle was given up")
            if pair is None:
                break
            weight = weight_of(*pair)
            for start, length in cuts(weight, bucket_bytes):
                is_part = length < len(weight.data)
                if bucket.num_parts and (is_part or not bucket.fits(length)):
                    self._send(bucket)
                    bucket = await self._free_bucket(slots)
                with self._stages["fill"]:
                    self._ledger.add(bucket.put(weight, start, length))
                if is_part:
                    self._send(bucket)
                    bucket = await self._free_bucket(slots)
        if bucket.num_parts:
            self._send(bucket)

    async def _free_bucket(self, slots: list[torch.Tensor]) -> OpenBucket:
        """The next bucket, once what was in its slot is where it belongs."""
        if len(self._moves) == NUM_SLOTS:
            await asyncio.wrap_future(self._moves.popleft())
        else:
            await asyncio.sleep(0)
        return OpenBucket(self._num_buckets, slots[self._num_buckets % NUM_SLOTS])

    def _send(self, full: OpenBucket) -> None:
        bucket = full.closed()
        self._num_buckets += 1
        data = full.memory[: bucket.length]
        announced = self._announcer.submit(lambda: self._announce(bucket, data))
        moving = self._mover.submit(lambda: self._move(bucket, announced.result()))
        self._moves.append(self._lander.submit(lambda: self._land(moving)))

    def _announce(self, bucket: Bucket, data: torch.Tensor) -> torch.Tensor:
        assert self._voice is not None, "a cycle begins with the meeting"
        packed = self._compressor.pack(data) if self._compressor else data
        if packed is not data:
            bucket = msgspec.structs.replace(bucket, packed=len(packed))
        self._voice.say(bucket)
        return packed

    def _move(self, bucket: Bucket, data: torch.Tensor) -> _Moving:
        watch, timeout_seconds = self._watch, self._settings.timeout_seconds
        assert watch is not None, "a cycle begins with the meeting"
        landed = self._carrier.send(
            data, lambda: watch.wait_ready(bucket.index, timeout_seconds), timeout_seconds
        )
        return _Moving(len(data), time.monotonic(), landed)

    def _land(self, begun: Future[_Moving]) -> None:
        with self._stages["move"]:
            moving = self._begun(begun)
            moving.landed()
        self._sent_bytes += moving.num_bytes
        start, self._landed_at = max(moving.begun_at, self._landed_at), time.monotonic()
        if self._compressor:
            self._compressor.moved(moving.num_bytes, self._landed_at - start)

    def _begun(self, begun: Future[_Moving]) -> _Moving:
        """A device's first broadcast meets the others', and knows no deadline."""
        assert self._watch is not None, "a cycle begins with the meeting"
        deadline = time.monotonic() + 2 * self._settings.timeout_seconds  # one is for their room
        while not wait([begun], POLL_SECONDS).done:
            if self._watch.has_failed or self._is_over():
                raise TransferError("the cycle was given up")
            if time.monotonic() > deadline:
                raise TransferError("a bucket's way to the receivers did not begin")
        return begun.result()

    def _finish(self, label: str, digest: str) -> None:
        assert self._voice is not None, "a cycle begins with the meeting"
        assert self._watch is not None, "a cycle begins with the meeting"
        with self._unless_given_up():
            self._voice.say(End(label=label, digest=digest, num_tensors=self._ledger.num_tensors))
        self._watch.wait_done(digest, self._settings.timeout_seconds)
        with self._unless_given_up():
            self._watch.close()
            self._voice.say(Over())
            self._link.end(self._the_cycle)
            self._link.under_way.discard(self._end)

    @contextlib.contextmanager
    def _unless_given_up(self) -> Iterator[None]:
        """Nobody ends the cycle within; raises why if somebody has."""
        with self._ending:
            if self._cause is not None:
                raise self._cause
            yield

    def _give_up(self, error: BaseException) -> BaseException:
        """Tell everybody that the cycle failed, once; returns what is behind the error."""
        self._stopped.set()
        with self._ending:
            if self._end not in self._link.under_way:
                return self._cause or error
            with self._meeting:  # a task may be cancelled before that is over
                self._announcer.stop()
            cause = error
            if self._watch is not None:
                if isinstance(error, TransferError):
                    cause = self._watch.cause(error)
                self._watch.close()  # which ends what still waits to move
            if self._cycle is not None and self._voice is not None:
                with contextlib.suppress(PeerLost, DeadlineExceeded):  # nobody is left to be told
                    self._voice.say(Failed(rank=0, error=RemoteError.of(cause)))
                    self._link.end(self._cycle)
            self._carrier.abandon()
            self._link.under_way.discard(self._end)
            self._cause = cause
            return cause

    def _end(self, error: CheckpointEngineError) -> None:
        """From another thread, for a reason that is not this cycle's."""
        awaited = f"; {named_ranks(self._awaited)} had not come" if self._awaited else ""
        self._give_up(type(error)(f"{error}{awaited}"))
