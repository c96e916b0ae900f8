"""Getting every byte of a version to every host by broadcast.

One rank of each host, the lead, receives what the host lacks, and sends, on behalf of its host,
what the others lack (`update.versions` says what that is). On a single host nothing moves at all.

Buckets are checked by the sender before they leave and by each receiver as they arrive, so that bad
memory is told from a bad link.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from checkpoint_engine.codec.digest import check_bucket
from checkpoint_engine.errors import TransferError
from checkpoint_engine.pipeline import run_pipeline
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES, Bucket
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.handover import Attachment
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["deliver"]


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
    foreign = [piece for _, piece in version.received(host)]
    num_received = sum(piece.length for piece in foreign)
    received = store.allocate(num_received, pooled=True) if num_received else None
    attachments: dict[int, Attachment] = {}
    try:
        memories = {piece.offset: received.memory[piece.place :] for piece in foreign if received}
        for run in version.runs:
            if run.offset not in memories:
                owner = version.sources[run.rank]
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
    """Every host plans the same."""
    buckets: list[Bucket] = []
    hauls: list[_Haul] = []
    for run, bucket in version.buckets(version.runs, bucket_bytes):
        start = bucket.offset - run.offset
        memory = memories[run.offset][start : start + bucket.length]
        root = version.hosts.names.index(version.sources[run.rank].host)
        buckets.append(bucket)
        hauls.append(_Haul(memory, root))
    return buckets, hauls


def _haul(
    buckets: Sequence[Bucket],
    hauls: Sequence[_Haul],
    collective: Collective,
    timeline: Timeline,
    timeout_seconds: float,
) -> None:
    landed: dict[int, Callable[[], None]] = {}

    def fill(bucket: Bucket, slot: int) -> None:
        haul = hauls[bucket.index]
        if haul.root == collective.index:
            check_bucket(bucket, haul.memory, "in the sender's memory")
        landed[slot] = collective.begin(haul.memory, haul.root, timeout_seconds)

    def move(bucket: Bucket, slot: int) -> None:
        landed[slot]()
        del landed[slot]

    def arrive(bucket: Bucket, slot: int) -> None:
        if hauls[bucket.index].root != collective.index:
            check_bucket(bucket, hauls[bucket.index].memory, "on arrival")

    try:
        run_pipeline(
            buckets,
            {"fill": fill, "move": move, "arrive": arrive},
            timeline,
            timeout_seconds=timeout_seconds,
        )
    except BaseException:
        collective.abandon()
        for wait in list(landed.values()):  # the memory will be used again
            with contextlib.suppress(TransferError):
                wait()
        raise
