"""Reads from one and from four peers, next to the same library moving the same bytes bare.

Sources are processes of their own, each with the whole version; the reader is this process, and
reads into memory that exists. Ours asks for every range, leases what it reads and checks each
chunk. Bare, a source that is told to begin sends everything as fast as the library takes it; what
arrived is checked when the clock has stopped.

    samples = measure_peers(num_bytes, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from typing import ClassVar, NoReturn

import msgspec
import numpy as np
import torch
import zmq

from checkpoint_engine.bench.link import FarHost
from checkpoint_engine.bench.measure import Operation, Samples, Stopwatch, Tell, run_rounds
from checkpoint_engine.children import next_line, say
from checkpoint_engine.codec.digest import check_bucket
from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.peer import Exporter, Way
from checkpoint_engine.transport.transports import exporters
from checkpoint_engine.update.fetch import fetch
from checkpoint_engine.update.shelf import Shelf
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["Bare", "Move", "PeerReader", "measure_peers", "peer_reader"]

NUM_SOURCES = 4
TENSOR_BYTES = 8 << 20
FRAME_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0
SPOILT = 0xFF  # in every page before a bare read; no tensor holds it

Move = Callable[[], None]
"""Moves all bytes, and returns when they are there."""


class _Job(msgspec.Struct, frozen=True):
    """What a source is told on its command line.

    Attributes:
        by_library: whether a library exports it for bare reads, as `$CKPT_ENGINE_TRANSPORT` says.
    """

    rank: int
    num_bytes: int
    by_library: bool


class Bare(ABC):
    """What moves bytes by itself: no lease, no plan, no digests.

    Args:
        memory: to read into, as long as a version.
    """

    by_library: ClassVar[bool] = True

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory

    @abstractmethod
    def connected(self, ways: Sequence[Way]) -> AbstractContextManager[Move]:
        """Do whatever comes before the bytes; gives what reads an equal share by every way.

        Raises:
            PeerLost, DeadlineExceeded, TransferError: a source is not reached; so may `Move`.
        """

    def shares(self, ways: Sequence[Way]) -> Iterator[tuple[Way, int, int]]:
        """Each way with where its share starts and how long it is."""
        length = len(self.memory) // len(ways)
        for number, way in enumerate(ways):
            yield way, number * length, length

    def close(self) -> None:
        """Let go of the memory, and of all else."""
        self.memory = memoryview(b"")


def measure_peers(
    num_bytes: int, *, rounds: int, warmups: int, tell: Tell, far: FarHost | None = None
) -> Samples:
    """The seconds of "p2p" and "bare p2p", and of both "from 4", in every round.

    Args:
        num_bytes: of the version.
        rounds: how many are counted.
        warmups: rounds before those.
        tell: called before every round.
        far: where the only source is; default four, on this host.

    Raises:
        PeerLost: a source died; its last words are above.
        DeadlineExceeded: it says or sends nothing.
    """
    with peer_reader(num_bytes, _BareZeroMq, far) as reader:
        operations = reader.operations("p2p", "bare p2p")
        return run_rounds(operations, rounds=rounds, warmups=warmups, tell=tell)


# ── the sources, as the reader sees them ────────────────────────────────────────────────────


class _Source:
    """A process of its own, which is waited for when it is asked for its meta."""

    def __init__(self, job: _Job, far: FarHost | None) -> None:
        command = far.command if far else ()
        address = {"CKPT_ENGINE_ADDRESS": far.address} if far else {}
        self._who = f"source {job.rank} of the benchmark"
        self._process = subprocess.Popen(  # noqa: S603 - our own module, typed arguments
            [*command, sys.executable, "-m", __name__, msgspec.json.encode(job).decode()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **address, "OMP_NUM_THREADS": "1"},
        )

    def meta(self) -> RankMeta:
        """What it says when it can be read, once."""
        return msgspec.json.decode(self._hear(), type=RankMeta)

    @contextmanager
    def exported(self) -> Iterator[Way]:
        """The way of bare reads, which a library may burn processor time for while there is one."""
        way = msgspec.json.decode(self._ask(b"export\n"), type=Way)
        try:
            yield way
        finally:
            self._ask(b"withdraw\n")

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _ask(self, word: bytes) -> bytes:
        assert self._process.stdin is not None, "its input is a pipe"
        self._process.stdin.write(word)
        self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> bytes:
        return next_line(self._process, TIMEOUT_SECONDS, self._who)


# ── the reader ──────────────────────────────────────────────────────────────────────────────


@contextmanager
def peer_reader(
    num_bytes: int, bare: type[Bare], far: FarHost | None = None
) -> Iterator[PeerReader]:
    """What reads a version of so many bytes, and the sources that it reads from.

    Raises:
        TransferError: the library does not start here.
        PeerLost, DeadlineExceeded: a source does not start.
    """
    with ExitStack() as stack:
        store = Store()
        stack.callback(store.close)
        flat = store.allocate(num_bytes, pooled=False)
        alone = stack.enter_context(closing(bare(flat.memory[:num_bytes])))
        sources = [
            stack.enter_context(closing(_Source(_Job(rank, num_bytes, bare.by_library), far)))
            for rank in range(1 if far else NUM_SOURCES)
        ]
        yield PeerReader(store, sources, alone)


class PeerReader:
    """This process: reads all bytes from one source, or a part from each."""

    def __init__(self, store: Store, sources: Sequence[_Source], bare: Bare) -> None:
        self._store, self._sources, self._bare = store, sources, bare
        self._metas = [source.meta() for source in sources]

    def operations(self, ours: str, bare: str) -> list[Operation]:
        """Both ways to read, under these names, from one source and, where there are, from all."""
        found = []
        for num_sources in sorted({1, len(self._sources)}):
            suffix = f" from {num_sources}" if num_sources > 1 else ""
            found += [
                self._operation(ours + suffix, num_sources, self._fetching),
                self._operation(bare + suffix, num_sources, self._moving),
            ]
        return found

    def _operation(
        self,
        name: str,
        num_sources: int,
        ready: Callable[[int], AbstractContextManager[Move]],
    ) -> Operation:
        def timed() -> Mapping[str, float]:
            watch = Stopwatch()
            with ready(num_sources) as move, watch.time(name):
                move()
            return watch.seconds

        return Operation(frozenset({name}), timed)

    @contextmanager
    def _fetching(self, num_sources: int) -> Iterator[Move]:
        def move() -> None:
            received, _ = fetch(
                self._version(num_sources),
                0,
                self._store,
                Timeline("bench"),
                timeout_seconds=TIMEOUT_SECONDS,
            )
            assert received is not None, "nothing was on this host before"
            received.release()

        yield move

    @contextmanager
    def _moving(self, num_sources: int) -> Iterator[Move]:
        np.frombuffer(self._bare.memory, dtype=np.uint8)[:: mmap.PAGESIZE] = SPOILT
        with ExitStack() as stack:
            ways = [
                stack.enter_context(source.exported()) for source in self._sources[:num_sources]
            ]
            yield stack.enter_context(self._bare.connected(ways))
        version = self._version(num_sources)
        for _, bucket in version.buckets(version.share(0)):
            arrived = self._bare.memory[bucket.offset : bucket.offset + bucket.length]
            check_bucket(bucket, arrived, "after a bare read")

    def _version(self, num_sources: int) -> Version:
        own = RankMeta(
            rank=0, host="reader", address="", device_uuid="", segment="", manifest=Manifest.of(())
        )
        return Version.of(self._metas[:num_sources]).read_by([own])


class _BareZeroMq(Bare):
    """Frames as fast as they go; a source is connected to, and told to begin, within the clock."""

    by_library: ClassVar[bool] = False

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self._context = zmq.Context()
        self._pool = ThreadPoolExecutor(NUM_SOURCES)

    @contextmanager
    def connected(self, ways: Sequence[Way]) -> Iterator[Move]:
        def move() -> None:
            jobs = [self._pool.submit(self._receive, *share) for share in self.shares(ways)]
            for job in jobs:
                job.result()

        yield move

    def close(self) -> None:
        super().close()
        self._pool.shutdown()
        self._context.destroy(linger=0)

    def _receive(self, way: Way, start: int, length: int) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * TIMEOUT_SECONDS))
        socket.connect(f"tcp://{way.address}")
        socket.send(msgspec.json.encode((start, length)))
        try:
            for at in range(start, start + length, FRAME_BYTES):
                socket.recv_into(self.memory[at : min(at + FRAME_BYTES, start + length)])
        except zmq.Again as error:
            raise DeadlineExceeded("a source of the benchmark sends nothing") from error
        finally:
            socket.close(linger=0)


# ── the source process ──────────────────────────────────────────────────────────────────────


class _BareExporter:
    """Sends all of a share at once to whoever names it; there is one segment."""

    transport: ClassVar[str] = "bare"

    def __init__(self, address: str) -> None:
        self._socket = zmq.Context().socket(zmq.ROUTER)
        self._address = f"{address}:{self._socket.bind_to_random_port(f'tcp://{address}')}"
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._thread: threading.Thread | None = None

    def export(self, segment: Segment) -> Way:
        if self._thread is None:
            arguments = (segment.memory, self._socket)
            self._thread = threading.Thread(target=_serve_bare, args=arguments, daemon=True)
            self._thread.start()
        return Way(transport=self.transport, address=self._address, detail=b"")

    def withdraw(self, way: Way) -> None:
        """It goes on: it costs nothing."""

    def close(self) -> None:
        """It ends with the process."""


def _serve_bare(memory: memoryview, socket: zmq.Socket[bytes]) -> None:
    while True:
        peer, request = socket.recv_multipart()
        start, length = msgspec.json.decode(request, type=tuple[int, int])
        for at in range(start, start + length, FRAME_BYTES):
            frame = memory[at : min(at + FRAME_BYTES, start + length)]
            socket.send_multipart([peer, frame], copy=False)


def _exporter(job: _Job) -> Exporter:
    if not job.by_library:
        return _BareExporter(own_address())
    chosen, *others = exporters(own_address())
    for other in others:
        other.close()
    return chosen


def _main(arguments: Iterable[str]) -> NoReturn:
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    store, exporter = Store(), _exporter(job)
    shelf = Shelf(store)
    tensors = {
        f"tensor-{number}": torch.full((TENSOR_BYTES,), number % SPOILT, dtype=torch.uint8)
        for number in range(job.num_bytes // TENSOR_BYTES)
    }
    shard = store.register("bench", TensorSource(tensors))
    meta = RankMeta(
        rank=job.rank,
        host=f"source {job.rank}",
        address="",
        device_uuid="",
        segment=shard.segment.name,
        manifest=shard.manifest,
        peer=shelf.peer,
    )
    say(meta)
    for _ in sys.stdin.buffer:
        way = exporter.export(shard.segment)
        say(way)
        sys.stdin.buffer.readline()
        exporter.withdraw(way)
        say("withdrawn")
    os._exit(0)  # whatever threads a library has


if __name__ == "__main__":
    _main(sys.argv[1:])
