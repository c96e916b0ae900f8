"""A broadcast to several hosts through our pipeline, next to a bare loop over the same buckets.

Three processes on this machine stand for three hosts: the first has all bytes, the others lack
them. Both ways use gloo over loopback and the same buckets, and receive into memory that exists.
Only ours checks the digests of what is sent and of what arrives.

    samples = measure_broadcast(num_bytes, rounds=15, warmups=2, tell=print)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from datetime import timedelta

import msgspec
import torch
import torch.distributed as dist

from checkpoint_engine.bench.link import FarHost
from checkpoint_engine.bench.measure import Samples, Tell, run_rounds
from checkpoint_engine.bench.ranks import Place, free_port, in_step, run_ranks
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.address import LOOPBACK
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.sessions import Door
from checkpoint_engine.update.staging import deliver
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["measure_broadcast"]

NUM_HOSTS = 3
TENSOR_BYTES = 8 << 20
TIMEOUT_SECONDS = 60.0
TOTAL_SECONDS = 300.0


class _Job(msgspec.Struct, frozen=True):
    """What a rank is told on its command line."""

    rank: int
    num_hosts: int
    address: str
    port: int
    num_bytes: int
    rounds: int
    warmups: int


def measure_broadcast(
    num_bytes: int, *, rounds: int, warmups: int, tell: Tell, far: FarHost | None = None
) -> Samples:
    """The seconds of "broadcast", "bare" and "bare again" in every round.

    Args:
        num_bytes: of the version.
        rounds: how many are counted.
        warmups: rounds before those.
        tell: called at the beginning and the end.
        far: whence to send to this host alone; default from one to two, all on this host.

    Raises:
        PeerLost: a rank died; its last words are in the message.
        DeadlineExceeded: the ranks did not end.
    """
    tell("broadcast", 0, 1)
    num_hosts, address = (2, far.address) if far else (NUM_HOSTS, LOOPBACK)
    port = free_port()
    jobs = [
        _Job(rank, num_hosts, address, port, num_bytes, rounds, warmups)
        for rank in range(num_hosts)
    ]
    places = _places(far) if far else ()
    outputs = run_ranks(
        __name__, jobs, "the broadcast", timeout_seconds=TOTAL_SECONDS, places=places
    )
    tell("broadcast", 1, 1)
    return msgspec.json.decode(outputs[0], type=Samples)


def _places(far: FarHost) -> list[Place]:
    """Torch's own group, too, must meet over the link."""
    near = Place(variables={"GLOO_SOCKET_IFNAME": far.near_interface})
    return [Place(far.command, {"GLOO_SOCKET_IFNAME": far.interface}), near]


class _Rank:
    """One process of the broadcast."""

    def __init__(self, job: _Job) -> None:
        self._rendezvous = Rendezvous.of_environment(job.rank, job.num_hosts, job.address, job.port)
        self._bare = self._rendezvous.group_store("bare")
        self._store = Store()
        self._door = Door(self._store.segment)
        self._version = self._gather(job)
        self._collective = Collective(self._rendezvous, index=job.rank, size=job.num_hosts)
        self._collective.connect("bench", TIMEOUT_SECONDS)
        dist.init_process_group(
            "gloo",
            store=self._bare,
            rank=job.rank,
            world_size=job.num_hosts,
            timeout=timedelta(seconds=TIMEOUT_SECONDS),
        )
        flat = torch.ones(self._version.num_bytes, dtype=torch.uint8)
        self._buckets = torch.split(flat, DEFAULT_BUCKET_BYTES)

    def measure(self, job: _Job) -> Samples:
        operations = [
            in_step(self._rendezvous, "broadcast", self._deliver),
            in_step(self._rendezvous, "bare", self._broadcast_bare),
            in_step(self._rendezvous, "bare again", self._broadcast_bare),
        ]
        return run_rounds(
            operations, rounds=job.rounds, warmups=job.warmups, tell=lambda *progress: None
        )

    def close(self) -> None:
        self._rendezvous.barrier("close", TIMEOUT_SECONDS)
        dist.destroy_process_group()
        self._bare.close()
        self._collective.abandon()
        self._door.close()
        self._store.close()
        self._rendezvous.close()

    def _gather(self, job: _Job) -> Version:
        """Rank 0 registers everything; every rank calls itself a host of its own."""
        manifest, segment = Manifest.of(()), ""
        if job.rank == 0:
            tensors = {
                f"tensor-{number}": torch.full((TENSOR_BYTES,), number % 256, dtype=torch.uint8)
                for number in range(job.num_bytes // TENSOR_BYTES)
            }
            shard = self._store.register("bench", TensorSource(tensors))
            manifest, segment = shard.manifest, shard.segment.name
        meta = RankMeta(
            rank=job.rank,
            host=f"host {job.rank}",
            address=self._door.address,
            device_uuid="",
            segment=segment,
            manifest=manifest,
        )
        metas = self._rendezvous.gather("metas", msgspec.msgpack.encode(meta), TIMEOUT_SECONDS)
        return Version.of([msgspec.msgpack.decode(one, type=RankMeta) for one in metas])

    def _deliver(self) -> None:
        received, _ = deliver(
            self._version,
            self._rendezvous.rank,
            self._store,
            self._collective,
            Timeline("bench"),
            timeout_seconds=TIMEOUT_SECONDS,
        )
        if received is not None:
            received.release()

    def _broadcast_bare(self) -> None:
        for bucket in self._buckets:
            dist.broadcast(bucket, src=0)


def _main(arguments: Iterable[str]) -> None:
    (argument,) = arguments
    job = msgspec.json.decode(argument, type=_Job)
    rank = _Rank(job)
    samples = rank.measure(job)
    rank.close()
    sys.stdout.buffer.write(msgspec.json.encode(samples) + b"\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
