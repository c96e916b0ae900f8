"""The ranks of a benchmark: processes of one module, which measure together.

    outputs = run_ranks(__name__, jobs, "the broadcast", timeout_seconds=300)
    samples = msgspec.json.decode(outputs[0], type=Samples)

    in_step(rendezvous, "broadcast", self._deliver)     # an operation of every rank

Each is given its job as JSON, its only argument, and what it writes last is a line of JSON.
"""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from checkpoint_engine.bench.measure import Operation, Stopwatch
from checkpoint_engine.errors import DeadlineExceeded, PeerLost
from checkpoint_engine.transport.address import LOOPBACK
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["Place", "free_port", "in_step", "run_ranks"]

STEP_SECONDS = 60.0


@dataclass(frozen=True)
class Place:
    """Where a rank runs: behind a command, and with variables, of its own."""

    command: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)


def free_port() -> int:
    """A port of loopback that is free now."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port: int = probe.getsockname()[1]
    return port


def run_ranks(
    module: str,
    jobs: Sequence[msgspec.Struct],
    what: str,
    *,
    timeout_seconds: float,
    places: Sequence[Place] = (),
) -> list[bytes]:
    """The last line of each rank, once all have ended; none is left running.

    Args:
        module: run as a script, for each job.
        jobs: one for each rank.
        what: they do, for errors.
        timeout_seconds: for each.
        places: one for each rank; default all here.

    Raises:
        PeerLost: a rank failed; its last words are in the message.
        DeadlineExceeded: a rank did not end.
    """
    own = {"OMP_NUM_THREADS": "1", "CKPT_ENGINE_SECRET": secrets.token_hex(32)}
    processes = [
        subprocess.Popen(  # noqa: S603 - our own module, typed arguments
            [*place.command, sys.executable, "-m", module, msgspec.json.encode(job).decode()],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **own, **place.variables},
        )
        for job, place in zip(jobs, places or [Place()] * len(jobs), strict=True)
    ]
    try:
        return [
            _last_line(rank, process, what, timeout_seconds)
            for rank, process in enumerate(processes)
        ]
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=timeout_seconds)


def in_step(rendezvous: Rendezvous, name: str, run: Callable[[], None]) -> Operation:
    """What all ranks do together, timed from when all are ready until all are done."""

    def timed() -> Mapping[str, float]:
        watch = Stopwatch()
        rendezvous.barrier("begin", STEP_SECONDS)
        with watch.time(name):
            run()
            rendezvous.barrier("end", STEP_SECONDS)
        return watch.seconds

    return Operation(frozenset({name}), timed)


def _last_line(
    rank: int, process: subprocess.Popen[bytes], what: str, timeout_seconds: float
) -> bytes:
    try:
        output, errors = process.communicate(timeout=timeout_seconds)
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"rank {rank} is not done in {timeout_seconds:.0f} s") from error
    if process.returncode:
        raise PeerLost(f"rank {rank} of {what} failed: {errors.decode()[-2000:]}")
    return output.splitlines()[-1] if output else b""
