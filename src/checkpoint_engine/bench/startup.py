"""Ranks that start with a checkpoint in a file: one that reads all of it, and two that share it.

Each is a process of its own on this host, with half of its cores. It copies its part into memory
that is fresh every time, as it is at a start, digests it, and tells the other what it has.

    samples = measure_startup(file, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec

from checkpoint_engine.bench.measure import Operation, Samples, Tell, run_rounds
from checkpoint_engine.children import next_line, say
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import SafetensorsSource, Share
from checkpoint_engine.transport.address import LOOPBACK

__all__ = ["measure_startup"]

NAMES = {1: "start-up of one", 2: "start-up of two ranks"}
TIMEOUT_SECONDS = 120.0

Start = Callable[[], float]


class _Job(msgspec.Struct, frozen=True):
    """What a rank is told on its command line."""

    rank: int
    world_size: int
    port: int
    file: str


def measure_startup(file: Path, *, rounds: int, warmups: int, tell: Tell) -> Samples:
    """The seconds of "start-up of one" and "start-up of two ranks" in every round.

    Args:
        file: a safetensors file.
        rounds: how many are counted.
        warmups: rounds before those.
        tell: called before every round.

    Raises:
        PeerLost: a rank died; its last words are above.
        DeadlineExceeded: a rank is not done.
    """
    with ExitStack() as stack:
        operations = [
            _operation(name, stack.enter_context(_ranks(world_size, file)))
            for world_size, name in NAMES.items()
        ]
        return run_rounds(operations, rounds=rounds, warmups=warmups, tell=tell)


def _operation(name: str, start: Start) -> Operation:
    def timed() -> Mapping[str, float]:
        return {name: start()}

    return Operation(frozenset({name}), timed)


@contextmanager
def _ranks(world_size: int, file: Path) -> Iterator[Start]:
    """Processes; yields what makes them read, and gives the seconds of the slowest."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    ranks = [_spawn(_Job(rank, world_size, port, str(file))) for rank in range(world_size)]

    def start() -> float:
        for process in ranks:
            assert process.stdin is not None, "its input is a pipe"
            process.stdin.write(b"start\n")
            process.stdin.flush()
        return max(
            msgspec.json.decode(next_line(process, TIMEOUT_SECONDS, f"rank {rank}"), type=float)
            for rank, process in enumerate(ranks)
        )

    try:
        yield start
    finally:
        for process in ranks:
            process.kill()
            process.communicate()


def _spawn(job: _Job) -> subprocess.Popen[bytes]:
    return subprocess.Popen(  # noqa: S603 - our own module, typed arguments
        [sys.executable, "-m", __name__, msgspec.json.encode(job).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def _take_cores(rank: int) -> None:
    """Half of them, alone or not: a rank that has a host's cores to itself uses them all."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[rank :: len(NAMES)] or cores)


def _main(arguments: Iterable[str]) -> None:
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    _take_cores(job.rank)
    server = ParameterServer(
        rank=job.rank, world_size=job.world_size, master_addr=LOOPBACK, master_port=job.port
    )
    for _ in sys.stdin.buffer:
        start = time.perf_counter()
        whole = SafetensorsSource([job.file])
        server.register_source("bench", Share(whole, job.rank, job.world_size), mode="staged")
        server.gather_metas("bench")
        seconds = time.perf_counter() - start
        server.unregister_checkpoint("bench")
        say(seconds)


if __name__ == "__main__":
    _main(sys.argv[1:])
