"""Who reads which bucket from whom, when sources hold the same bytes and take no part.

A version may lie in many places: ranks that registered the same tensors, and hosts that received
them in an earlier update. Every receiver plans by itself, from the same description, and spreads
its buckets so that no source, and as far as that allows no host, gives more than its share. If a
source fails, what is missing is planned again without it.

    held = holdings(manifest, shards)                      # once a version
    for source, routes in plan_routes(buckets, held, first=receiver).items():
        ...                                                # one reader for each source
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import msgspec

from checkpoint_engine.errors import TransferError
from checkpoint_engine.manifest import CHUNK_BYTES, Manifest, TensorMeta, align
from checkpoint_engine.plan.buckets import Bucket
from checkpoint_engine.plan.merge import Run

__all__ = ["Holding", "Piece", "Route", "holdings", "plan_routes", "shares"]


class Holding(msgspec.Struct, frozen=True, kw_only=True):
    """A source has bytes [offset, offset + length) of a version, from `start` of a segment on."""

    source: int
    segment: str
    start: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the last, in the version's space."""
        return self.offset + self.length


class Route(msgspec.Struct, frozen=True):
    """A bucket, and where in which of its source's segments it lies."""

    bucket: Bucket
    segment: str
    start: int


class Piece(msgspec.Struct, frozen=True):
    """Bytes [offset, offset + length) of a version go to `place` in a receiver's memory."""

    offset: int
    length: int
    place: int


def holdings(manifest: Manifest, shards: Mapping[int, tuple[str, Manifest]]) -> list[Holding]:
    """Which stretches of a version lie contiguously in which shards.

    Args:
        manifest: of the version, merged from the shards or from others with the same tensors.
        shards: by source, the name of its segment and what is in it.
    """
    places = {tensor.name: tensor.offset for tensor in manifest.tensors}
    found: list[Holding] = []
    for source, (segment, shard) in shards.items():
        start = offset = end = -1  # of the stretch that is growing; the end in the version's space
        for tensor in shard.tensors:
            at = places[tensor.name]
            if not tensor.length or (at - offset == tensor.offset - start and offset <= at < end):
                continue  # nothing of its own: empty, or tied to a tensor that was taken
            if at != end or at - offset != tensor.offset - start:
                if end > offset:
                    found.append(_holding(source, segment, start, offset, end))
                start, offset = tensor.offset, at
            end = at + align(tensor.length)
        if end > offset:
            found.append(_holding(source, segment, start, offset, end))
    return found


def _holding(source: int, segment: str, start: int, offset: int, end: int) -> Holding:
    return Holding(source=source, segment=segment, start=start, offset=offset, length=end - offset)


def shares(
    runs: Sequence[Run], tensors: Sequence[TensorMeta], num_receivers: int
) -> list[list[Piece]]:
    """Runs of a version cut into about equal shares, for the ranks of a host that read together.

    Cuts are made where digest chunks begin. Each rank puts its pieces one after the other.

    Args:
        runs: sorted by offset, each a multiple of the alignment long.
        tensors: of the version, sorted by offset.
        num_receivers: how many share the work.
    """
    total = sum(run.length for run in runs)
    found: list[list[Piece]] = []
    rest = list(runs)
    before = 0
    for receiver in range(1, num_receivers + 1):
        mine: list[Piece] = []
        wanted = total * receiver // num_receivers - before
        while rest and wanted > 0:
            run = rest.pop(0)
            cut = run.end if wanted >= run.length else _chunk_end(tensors, run.offset + wanted)
            cut = min(cut, run.end)
            end = mine[-1].place + mine[-1].length if mine else 0
            mine.append(Piece(run.offset, cut - run.offset, end))
            before, wanted = before + cut - run.offset, wanted - (cut - run.offset)
            if cut < run.end:
                start = run.start + cut - run.offset
                rest.insert(0, Run(rank=run.rank, start=start, offset=cut, length=run.end - cut))
        found.append(mine)
    return found


def _chunk_end(tensors: Sequence[TensorMeta], at: int) -> int:
    """The first place from `at` on where a digest chunk, or a tensor, begins."""
    tensor = tensors[bisect_right(tensors, at, key=lambda one: one.offset) - 1]
    chunk = tensor.offset - (tensor.offset - at) // CHUNK_BYTES * CHUNK_BYTES
    return chunk if chunk < tensor.end else max(at, align(tensor.end))


def plan_routes(
    buckets: Sequence[Bucket],
    held: Sequence[Holding],
    *,
    hosts: Mapping[int, str],
    first: int = 0,
    lost: Collection[int] = (),
) -> dict[int, list[Route]]:
    """A source for each bucket: of those that have it, the one that gives least so far.

    Where all sources have everything, none gives more than its share by more than one bucket.

    Args:
        buckets: what one receiver wants.
        held: what every source has.
        hosts: the host of each source; sources that tie are chosen by what their host gives.
        first: the number of this receiver; receivers begin with different sources.
        lost: sources that have failed.

    Returns:
        By source, its routes in the order of `buckets`.

    Raises:
        TransferError: nobody is left who has a bucket; names a tensor in it.
    """
    candidates = _candidates(buckets, [one for one in held if one.source not in lost])
    sources = sorted({one.source for one in held})
    turn = {source: (at - first) % len(sources) for at, source in enumerate(sources)}
    given: dict[int, int] = defaultdict(int)
    given_by_host: dict[str, int] = defaultdict(int)
    chosen: dict[int, Holding] = {}
    # Who has little choice goes first, or those that others could spare would be taken.
    for index in sorted(range(len(buckets)), key=lambda index: len(candidates[index])):
        bucket = buckets[index]
        if not candidates[index]:
            raise TransferError(
                f"tensor {bucket.chunks[0].tensor!r}: no source that has it is left; start one "
                "again, or update from a checkpoint"
            )
        holding = min(
            candidates[index],
            key=lambda one: (
                given[one.source], given_by_host[hosts[one.source]], turn[one.source]
            ),
        )  # fmt: skip
        given[holding.source] += bucket.length
        given_by_host[hosts[holding.source]] += bucket.length
        chosen[index] = holding
    routes: dict[int, list[Route]] = defaultdict(list)
    for index, bucket in enumerate(buckets):
        holding = chosen[index]
        start = holding.start + bucket.offset - holding.offset
        routes[holding.source].append(Route(bucket, holding.segment, start))
    return {source: routes[source] for source in sorted(routes, key=lambda source: turn[source])}


def _candidates(buckets: Sequence[Bucket], held: Sequence[Holding]) -> list[list[Holding]]:
    """For each bucket the holdings that contain all of it, one a source: a sweep over offsets."""
    found: list[list[Holding]] = [[] for _ in buckets]
    opening = sorted(held, key=lambda one: one.offset)
    active: list[Holding] = []
    following = 0
    for index in sorted(range(len(buckets)), key=lambda index: buckets[index].offset):
        bucket = buckets[index]
        while following < len(opening) and opening[following].offset <= bucket.offset:
            active.append(opening[following])
            following += 1
        active = [one for one in active if one.end > bucket.offset]
        found[index] = list({o.source: o for o in active if o.end >= bucket.end}.values())
    return found
