"""Reads from one and from four peers, next to the same library moving the same bytes bare.

Sources are processes of their own, each with the whole version; the reader is this process, and
reads into memory that exists. Ours asks for every range, leases what it reads and checks each
chunk; bare, a source that is told to begin sends everything as fast as the library takes it.

    samples = measure_peers(num_bytes, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import msgspec
import torch
import zmq

from checkpoint_engine.bench.link import FarHost
from checkpoint_engine.bench.measure import Operation, Samples, Stopwatch, Tell, run_rounds
from checkpoint_engine.errors import DeadlineExceeded, PeerLost
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.update.fetch import fetch
from checkpoint_engine.update.shelf import Shelf
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["measure_peers"]

NUM_SOURCES = 4
TENSOR_BYTES = 8 << 20
FRAME_BYTES = 1 << 20
TIMEOUT_SECONDS = 60.0


class _Job(msgspec.Struct, frozen=True):
    """What a source is told on its command line."""

    rank: int
    num_bytes: int


class _Ready(msgspec.Struct, frozen=True):
    """What a source says when it can be read."""

    meta: RankMeta
    bare_address: str


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
        PeerLost: a source died; its last words are in the message.
    """
    with ExitStack() as stack:
        jobs = [_Job(rank, num_bytes) for rank in range(1 if far else NUM_SOURCES)]
        sources = [stack.enter_context(_source(job, far)) for job in jobs]
        reader = stack.enter_context(_reader(sources, num_bytes))
        return run_rounds(reader.operations(), rounds=rounds, warmups=warmups, tell=tell)


@contextmanager
def _source(job: _Job, far: FarHost | None) -> Iterator[_Ready]:
    command = far.command if far else ()
    address = {"CKPT_ENGINE_ADDRESS": far.address} if far else {}
    process = subprocess.Popen(  # noqa: S603 - our own module, typed arguments
        [*command, sys.executable, "-m", __name__, msgspec.json.encode(job).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **address, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert process.stdout is not None, "its output is a pipe"
        line = process.stdout.readline()
        if not line:
            raise PeerLost(f"source {job.rank} of the benchmark ended before it served")
        yield msgspec.json.decode(line, type=_Ready)
    finally:
        process.kill()
        process.communicate()


@contextmanager
def _reader(sources: Sequence[_Ready], num_bytes: int) -> Iterator[_Reader]:
    reader = _Reader(sources, num_bytes)
    try:
        yield reader
    finally:
        reader.close()


class _Reader:
    """This process: reads all bytes from one source, or a part from each."""

    def __init__(self, sources: Sequence[_Ready], num_bytes: int) -> None:
        self._sources = sources
        self._store = Store()
        self._flat = self._store.allocate(num_bytes, pooled=False)
        self._num_bytes = num_bytes
        self._context = zmq.Context()
        self._pool = ThreadPoolExecutor(len(sources))

    def operations(self) -> list[Operation]:
        one, four = self._sources[:1], self._sources
        alone = [
            self._operation("p2p", lambda: self._fetch(one)),
            self._operation("bare p2p", lambda: self._receive(one)),
        ]
        if len(four) == 1:
            return alone
        return [
            *alone,
            self._operation(f"p2p from {NUM_SOURCES}", lambda: self._fetch(four)),
            self._operation(f"bare p2p from {NUM_SOURCES}", lambda: self._receive(four)),
        ]

    def close(self) -> None:
        self._pool.shutdown()
        self._context.destroy(linger=0)
        self._store.close()

    def _operation(self, name: str, run: Callable[[], None]) -> Operation:
        def timed() -> Mapping[str, float]:
            watch = Stopwatch()
            with watch.time(name):
                run()
            return watch.seconds

        return Operation(frozenset({name}), timed)

    def _fetch(self, sources: Sequence[_Ready]) -> None:
        own = RankMeta(
            rank=0, host="reader", address="", device_uuid="", segment="", manifest=Manifest.of(())
        )
        version = Version.of([source.meta for source in sources]).read_by([own])
        received, _ = fetch(
            version, 0, self._store, Timeline("bench"), timeout_seconds=TIMEOUT_SECONDS
        )
        assert received is not None, "nothing was on this host before"
        received.release()

    def _receive(self, sources: Sequence[_Ready]) -> None:
        share = self._num_bytes // len(sources)
        jobs = [
            self._pool.submit(self._receive_from, source, number * share, share)
            for number, source in enumerate(sources)
        ]
        for job in jobs:
            job.result()

    def _receive_from(self, source: _Ready, start: int, length: int) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, int(1000 * TIMEOUT_SECONDS))
        socket.connect(f"tcp://{source.bare_address}")
        socket.send(msgspec.json.encode((start, length)))
        memory = self._flat.memory
        try:
            for at in range(start, start + length, FRAME_BYTES):
                socket.recv_into(memory[at : min(at + FRAME_BYTES, start + length)])
        except zmq.Again as error:
            raise DeadlineExceeded("a source of the benchmark sends nothing") from error
        finally:
            socket.close(linger=0)


def _serve_bare(memory: memoryview, socket: zmq.Socket[bytes]) -> None:
    while True:
        peer, request = socket.recv_multipart()
        start, length = msgspec.json.decode(request, type=tuple[int, int])
        for at in range(start, start + length, FRAME_BYTES):
            frame = memory[at : min(at + FRAME_BYTES, start + length)]
            socket.send_multipart([peer, frame], copy=False)


def _main(arguments: Iterable[str]) -> None:
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    store = Store()
    tensors = {
        f"tensor-{number}": torch.full((TENSOR_BYTES,), number % 256, dtype=torch.uint8)
        for number in range(job.num_bytes // TENSOR_BYTES)
    }
    shard = store.register("bench", TensorSource(tensors))
    socket = zmq.Context().socket(zmq.ROUTER)
    port = socket.bind_to_random_port(f"tcp://{own_address()}")
    socket.setsockopt(zmq.SNDHWM, 0)
    threading.Thread(target=_serve_bare, args=(shard.segment.memory, socket), daemon=True).start()
    shelf = Shelf(store)
    meta = RankMeta(
        rank=job.rank,
        host=f"source {job.rank}",
        address="",
        device_uuid="",
        segment=shard.segment.name,
        manifest=shard.manifest,
        peer=shelf.peer,
    )
    sys.stdout.buffer.write(msgspec.json.encode(_Ready(meta, f"{own_address()}:{port}")) + b"\n")
    sys.stdout.buffer.flush()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _main(sys.argv[1:])
