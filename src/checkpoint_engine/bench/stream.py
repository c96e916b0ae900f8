"""Named tensors streamed from a trainer to two samplers, next to the same done bare.

Three processes on this machine: a trainer and two samplers, one of which can be slow. Bare, tensors
are packed into one bucket after the other, and each is broadcast by gloo into memory that exists;
or each tensor is broadcast by itself; or nothing is packed at all, and bytes are broadcast that lie
there already. Nothing of that is checked. Ray's object store is given the state dict, and two
actors take it out.

    samples = measure_streams(num_bytes, rounds=15, warmups=2, tell=print)
    samples = measure_ray(num_bytes, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.bench.measure import Samples, Tell, Unavailable, run_rounds
from checkpoint_engine.bench.ranks import free_port, in_step, run_ranks
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.streaming import new_engine
from checkpoint_engine.transport.address import LOOPBACK
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["measure_ray", "measure_streams"]

NUM_RANKS = 3
LARGE_BYTES, SMALL_BYTES = 8 << 20, 16 << 10
NUM_SMALL = 500  # norms, biases, scales
SLOW_SECONDS = 0.01  # more than a large tensor takes on its way
TIMEOUT_SECONDS = 60.0
TOTAL_SECONDS = 600.0

Move = Callable[[], None]


class _Job(msgspec.Struct, frozen=True):
    """What a rank is told on its command line."""

    rank: int
    port: int
    num_bytes: int
    rounds: int
    warmups: int
    by_ray: bool


def measure_streams(num_bytes: int, *, rounds: int, warmups: int, tell: Tell) -> Samples:
    """The seconds of "stream" and what it is compared with, in every round.

    Args:
        num_bytes: of the version.
        rounds: how many are counted.
        warmups: rounds before those.
        tell: called at the beginning and the end.

    Raises:
        PeerLost: a rank died; its last words are in the message.
        DeadlineExceeded: the ranks did not end.
    """
    return _measure("streams", num_bytes, rounds, warmups, tell, by_ray=False)


def measure_ray(num_bytes: int, *, rounds: int, warmups: int, tell: Tell) -> Samples:
    """The seconds of "Ray object store", and of "stream beside Ray"; else as `measure_streams`.

    Raises:
        Unavailable: Ray is not installed.
    """
    if find_spec("ray") is None:
        raise Unavailable("Ray is not installed: pip install ray")
    return _measure("streams beside Ray", num_bytes, rounds, warmups, tell, by_ray=True)


def _measure(
    what: str, num_bytes: int, rounds: int, warmups: int, tell: Tell, *, by_ray: bool
) -> Samples:
    tell(what, 0, 1)
    port = free_port()
    jobs = [_Job(rank, port, num_bytes, rounds, warmups, by_ray) for rank in range(NUM_RANKS)]
    outputs = run_ranks(__name__, jobs, "the stream", timeout_seconds=TOTAL_SECONDS)
    tell(what, 1, 1)
    return msgspec.json.decode(outputs[0], type=Samples)


# ── in each rank ────────────────────────────────────────────────────────────────────────────


class _Stream:
    """An engine among these ranks, and one version by it; one of the others takes no part."""

    def __init__(self, kind: str, rendezvous: Rendezvous, ranks: list[int]) -> None:
        self._index = ranks.index(rendezvous.rank) if rendezvous.rank in ranks else None
        engine: Any = new_engine(kind, timeout=TIMEOUT_SECONDS, is_master=self._index == 0)
        metadata = msgspec.json.encode(engine.prepare())
        found = rendezvous.gather("prepared", metadata, TIMEOUT_SECONDS)[0]
        if self._index is not None:
            engine.init_process_group(self._index, len(ranks), msgspec.json.decode(found))
        self._engine = engine

    def move(self, weights: Mapping[str, torch.Tensor], pause_seconds: float) -> None:
        """Send or receive, whichever this rank does, using each tensor for so long."""
        if self._index == 0:
            asyncio.run(self._engine.send_weights(weights))
        elif self._index is not None:
            asyncio.run(self._take(pause_seconds))

    async def _take(self, pause_seconds: float) -> None:
        async for _, tensor in self._engine.receive_weights():
            if pause_seconds and tensor.nbytes == LARGE_BYTES:
                time.sleep(pause_seconds)

    def close(self) -> None:
        self._engine.finalize()


class _Rank:
    """One process."""

    def __init__(self, job: _Job) -> None:
        self._rendezvous = Rendezvous.of_environment(job.rank, NUM_RANKS, LOOPBACK, job.port)
        self._bare = self._rendezvous.group_store("bare")
        self._weights = _weights(job.num_bytes)
        num_bytes = sum(tensor.nbytes for tensor in self._weights.values())
        self._flat = torch.ones(num_bytes, dtype=torch.uint8)
        self._bucket = torch.ones(DEFAULT_BUCKET_BYTES, dtype=torch.uint8)
        dist.init_process_group(
            "gloo",
            store=self._bare,
            rank=job.rank,
            world_size=NUM_RANKS,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        self._ray = _Ray() if job.by_ray and job.rank == 0 else None
        self._gloo = _Stream("gloo", self._rendezvous, [0, 1, 2])
        self._shm = _Stream("shm", self._rendezvous, [0, 1, 2])
        self._to_slow = _Stream("gloo", self._rendezvous, [0, 2])

    def measure(self, job: _Job) -> Samples:
        slow = SLOW_SECONDS if job.rank == 2 else 0.0
        moves: dict[str, Move] = {
            "stream": lambda: self._gloo.move(self._weights, 0.0),
            "stream by shm": lambda: self._shm.move(self._weights, 0.0),
            "stream to slow and fast": lambda: self._gloo.move(self._weights, slow),
            "stream to slow": lambda: self._to_slow.move(self._weights, slow),
            "bare buckets": self._broadcast_buckets,
            "bare bytes": self._broadcast_bytes,
            "tensor by tensor": self._broadcast_tensors,
        }
        if job.by_ray:
            moves = {
                "stream beside Ray": moves["stream"],
                "Ray object store": self._move_by_ray,
            }
        operations = [in_step(self._rendezvous, name, move) for name, move in moves.items()]
        return run_rounds(
            operations, rounds=job.rounds, warmups=job.warmups, tell=lambda *progress: None
        )

    def close(self) -> None:
        self._rendezvous.barrier("close", TIMEOUT_SECONDS)
        for stream in (self._gloo, self._shm, self._to_slow):
            stream.close()
        if self._ray is not None:
            self._ray.close()
        dist.destroy_process_group()
        self._bare.close()
        self._rendezvous.close()

    def _move_by_ray(self) -> None:
        if self._ray is not None:
            self._ray.move(self._weights)

    def _broadcast_buckets(self) -> None:
        """Pack, broadcast, and again; the tensors that arrive would be views of the bucket."""
        end = 0
        for tensor in self._weights.values():
            if end + tensor.nbytes > len(self._bucket):
                dist.broadcast(self._bucket[:end], src=0)
                end = 0
            if self._rendezvous.rank == 0:
                self._bucket[end : end + tensor.nbytes].copy_(tensor)
            end += tensor.nbytes
        dist.broadcast(self._bucket[:end], src=0)

    def _broadcast_bytes(self) -> None:
        for piece in torch.split(self._flat, DEFAULT_BUCKET_BYTES):
            dist.broadcast(piece, src=0)

    def _broadcast_tensors(self) -> None:
        for tensor in self._weights.values():
            dist.broadcast(tensor, src=0)


class _Ray:
    """A Ray of its own, and an actor for each sampler."""

    def __init__(self) -> None:
        self._ray: Any = import_module("ray")
        self._ray.init(
            num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False
        )
        taker = self._ray.remote(num_cpus=0)(_Taker)
        self._takers = [taker.remote() for _ in range(NUM_RANKS - 1)]

    def move(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put the state dict in the store, and have everybody take it out."""
        stored = self._ray.put(weights)
        self._ray.get([taker.take.remote([stored]) for taker in self._takers])

    def close(self) -> None:
        self._ray.shutdown()


class _Taker:
    """Takes weights out of the object store."""

    def take(self, stored: list[Any]) -> int:
        """How many tensors there were."""
        return len(import_module("ray").get(stored[0]))


def _weights(num_bytes: int) -> dict[str, torch.Tensor]:
    """As a model's: most bytes in large tensors, most tensors small."""
    num_large = (num_bytes - NUM_SMALL * SMALL_BYTES) // LARGE_BYTES
    sizes = [LARGE_BYTES] * num_large + [SMALL_BYTES] * NUM_SMALL
    return {
        f"tensor-{number}": torch.full((size,), number % 256, dtype=torch.uint8)
        for number, size in enumerate(sizes)
    }


def _main(arguments: Iterable[str]) -> None:
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    rank = _Rank(job)
    samples = rank.measure(job)
    rank.close()
    sys.stdout.buffer.write(msgspec.json.encode(samples) + b"\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
