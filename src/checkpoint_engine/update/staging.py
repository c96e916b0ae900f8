"""Getting every byte of a version to every host.

A host needs the whole version once, whatever the number of its ranks. What its own ranks
registered is there already, in their segments; one rank of the host, the lead, receives the rest
and sends, on behalf of its host, what the others lack. On a single host nothing moves at all.

Buckets are checked by the sender before they leave and by each receiver as they arrive, so that bad
memory is told from a bad link.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from checkpoint_engine.codec.digest import chunk_digest
from checkpoint_engine.errors import TransferError, VerificationError
from checkpoint_engine.manifest import Manifest, check_manifest
from checkpoint_engine.pipeline import run_pipeline
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES, Bucket, plan_buckets
from checkpoint_engine.plan.merge import Run, merge
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.handover import Attachment, Part

__all__ = ["Hosts", "RankMeta", "Version", "deliver", "parts_on"]


class RankMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank tells the others about its shard of a checkpoint: plain data.

    Attributes:
        host: equal for ranks whose processes can hand each other descriptors.
        address: where the rank listens; also the handle that its engine is given.
        device_uuid: of the device whose engine looks for that handle.
        segment: name of the segment that holds the shard; "" if it registered nothing.
        files: name of the files that hold it instead; "" unless it is to be streamed.
        why: what decided between the two.
    """

    rank: int
    host: str
    address: str
    device_uuid: str
    segment: str
    manifest: Manifest
    files: str = ""
    why: str = ""


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a host; hosts are numbered in the order of their first rank."""

    names: tuple[str, ...]
    of_rank: tuple[int, ...]

    @classmethod
    def of(cls, metas: Sequence[RankMeta]) -> Hosts:
        """The hosts of all ranks."""
        names = tuple(dict.fromkeys(meta.host for meta in metas))
        return cls(names, tuple(names.index(meta.host) for meta in metas))

    def lead(self, host: int) -> int:
        """The rank that sends and receives for a host."""
        return self.of_rank.index(host)


@dataclass(frozen=True)
class Version:
    """A gathered version: what it is, whose runs it is made of, and where those ranks are.

    Without a manifest it is one that the replicas keep themselves: nothing is staged for it.
    """

    digest: str
    num_bytes: int
    manifest: Manifest | None
    runs: tuple[Run, ...]
    metas: tuple[RankMeta, ...]
    hosts: Hosts

    @classmethod
    def of(cls, metas: Sequence[RankMeta]) -> Version:
        """Put the ranks' shards together.

        Raises:
            ManifestError: a rank's manifest contradicts itself.
            UsageError: the ranks contradict each other.
        """
        for meta in metas:
            check_manifest(meta.manifest)
        manifest, runs = merge([meta.manifest for meta in metas])
        hosts = Hosts.of(metas)
        return cls(manifest.digest, manifest.num_bytes, manifest, runs, tuple(metas), hosts)

    @classmethod
    def kept(cls, digest: str, num_bytes: int, metas: Sequence[RankMeta]) -> Version:
        """A version that every replica still has in memory from before."""
        return cls(digest, num_bytes, None, (), tuple(metas), Hosts.of(metas))

    @property
    def mode(self) -> str:
        """Where engines find it: "staged" in memory, "streamed" from files, "kept" by them."""
        if self.manifest is None:
            return "kept"
        return "streamed" if any(meta.files for meta in self.metas) else "staged"

    @property
    def why(self) -> str:
        """What decided that."""
        return next((meta.why for meta in self.metas if meta.why), "")

    def foreign_runs(self, host: int) -> list[tuple[Run, int]]:
        """The runs that a host must receive, each with its place in the memory they go to."""
        placed, start = [], 0
        for run in self.runs:
            if self.hosts.of_rank[run.rank] != host:
                placed.append((run, start))
                start += run.length
        return placed


def parts_on(version: Version, host: int, received: str) -> tuple[Part, ...]:
    """Where the version's bytes lie on a host, once its lead has received `received`."""
    if version.mode == "streamed":
        return ()
    lead = version.metas[version.hosts.lead(host)]
    places = {run.offset: start for run, start in version.foreign_runs(host)}
    parts = []
    for run in version.runs:
        owner = version.metas[run.rank]
        address, segment, start = owner.address, owner.segment, run.start
        if run.offset in places:
            address, segment, start = lead.address, received, places[run.offset]
        parts.append(
            Part(
                address=address,
                segment=segment,
                start=start,
                offset=run.offset,
                length=run.length,
            )
        )
    return tuple(parts)


@dataclass(frozen=True)
class _Haul:
    """A bucket's bytes on this host, and the host that sends them."""

    memory: memoryview
    root: int


def deliver(
    version: Version,
    rank: int,
    store: Store,
    collective: Collective | None,
    timeline: Timeline,
    *,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    timeout_seconds: float,
) -> tuple[Segment | None, int]:
    """Receive what this rank's host lacks, and send what it has, if this rank is the lead.

    Returns:
        The segment received into, leased once to the caller (None if nothing was), and the
        number of bytes sent.

    Raises:
        TransferError: a bucket did not arrive, or not as it was; names the bucket.
        StoreError: no memory for what is to be received.
    """
    host = version.hosts.of_rank[rank]
    if collective is None or version.manifest is None or version.hosts.lead(host) != rank:
        return None, 0
    foreign = version.foreign_runs(host)
    num_received = sum(run.length for run, _ in foreign)
    received = store.allocate(num_received, pooled=True) if num_received else None
    attachments: dict[int, Attachment] = {}
    try:
        memories = {run.offset: received.memory[at:] for run, at in foreign if received}
        for run in version.runs:
            if run.offset not in memories:
                owner = version.metas[run.rank]
                own = store.segment(owner.segment) if owner.rank == rank else None
                memory = own.memory if own else _sibling_memory(owner, attachments)
                memories[run.offset] = memory[run.start :]
        buckets, hauls = _plan_hauls(version, memories, bucket_bytes)
        _haul(buckets, hauls, collective, timeline, timeout_seconds)
    except BaseException:
        if received is not None:
            received.release()
        raise
    finally:
        for attachment in attachments.values():
            attachment.close()
    return received, sum(bucket.length for bucket in buckets if hauls[bucket.index].root == host)


def _sibling_memory(meta: RankMeta, attachments: dict[int, Attachment]) -> memoryview:
    """What another rank of this host registered, in this rank's view of its segment."""
    if meta.rank not in attachments:
        attachments[meta.rank] = Attachment.open(meta.address, meta.segment)
    return attachments[meta.rank].memory


def _plan_hauls(
    version: Version, memories: dict[int, memoryview], bucket_bytes: int
) -> tuple[list[Bucket], list[_Haul]]:
    """Buckets within runs, numbered through: every host plans the same."""
    buckets: list[Bucket] = []
    hauls: list[_Haul] = []
    assert version.manifest is not None, "what replicas keep is not sent"
    chunks = list(version.manifest.chunks())
    for run in version.runs:
        inside = (chunk for chunk in chunks if run.offset <= chunk.offset < run.end)
        for bucket in plan_buckets(inside, bucket_bytes):
            start = bucket.offset - run.offset
            memory = memories[run.offset][start : start + bucket.length]
            buckets.append(msgspec.structs.replace(bucket, index=len(buckets)))
            hauls.append(_Haul(memory, version.hosts.of_rank[run.rank]))
    return buckets, hauls


def _haul(
    buckets: Sequence[Bucket],
    hauls: Sequence[_Haul],
    collective: Collective,
    timeline: Timeline,
    timeout_seconds: float,
) -> None:
    def fill(bucket: Bucket, slot: int) -> None:
        if hauls[bucket.index].root == collective.index:
            _check(bucket, hauls[bucket.index].memory, "in the sender's memory")

    def move(bucket: Bucket, slot: int) -> None:
        haul = hauls[bucket.index]
        collective.broadcast(haul.memory, haul.root, timeout_seconds)

    def arrive(bucket: Bucket, slot: int) -> None:
        if hauls[bucket.index].root != collective.index:
            _check(bucket, hauls[bucket.index].memory, "on arrival")

    try:
        run_pipeline(
            buckets,
            {"fill": fill, "move": move, "arrive": arrive},
            timeline,
            timeout_seconds=timeout_seconds,
        )
    except TransferError:
        collective.abandon()
        raise


def _check(bucket: Bucket, memory: memoryview, where: str) -> None:
    for chunk in bucket.chunks:
        start = chunk.offset - bucket.offset
        if chunk_digest(memory[start : start + chunk.length]) != chunk.digest:
            raise VerificationError(
                f"tensor {chunk.tensor!r}: bytes differ from the manifest {where}"
            )
