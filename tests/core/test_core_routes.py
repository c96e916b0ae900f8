"""Who reads what from whom: every bucket once, from somebody who has it, nobody above its share."""

from __future__ import annotations

import random

import pytest
from core_tools import MIB, PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import TransferError
from checkpoint_engine.manifest import Manifest, TensorMeta, align
from checkpoint_engine.plan.buckets import Bucket, plan_buckets
from checkpoint_engine.plan.merge import merge
from checkpoint_engine.plan.routes import Holding, holdings, plan_routes, shares

sizes = st.lists(st.integers(1, 9 * MIB), min_size=1, max_size=12)


def shard(tensors: dict[str, int]) -> Manifest:
    """Tensors of these sizes one after the other, each with digests of its own."""
    metas, end = [], 0
    for name, size in tensors.items():
        digests = bytes(range(16)) * (-(-size // (4 * MIB)))
        metas.append(
            TensorMeta(
                name=name, dtype="U8", shape=(size,), offset=end, length=size,
                chunk_digests=digests,
            )
        )  # fmt: skip
        end = align(end + size)
    return Manifest.of(metas)


def buckets_of(manifest: Manifest) -> tuple[Bucket, ...]:
    return plan_buckets(manifest.chunks(), 8 * MIB)


@PROPERTY
@given(sizes, st.integers(1, 6), st.integers(0, 40))
def test_no_source_gives_more_than_its_share_and_one_bucket(
    lengths: list[int], num_sources: int, first: int
) -> None:
    manifest = shard({f"t{n}": length for n, length in enumerate(lengths)})
    held = holdings(manifest, {n: (f"s{n}", manifest) for n in range(num_sources)})
    buckets = buckets_of(manifest)
    routes = plan_routes(buckets, held, hosts=dict.fromkeys(range(num_sources), "a"), first=first)
    given_by = {s: sum(r.bucket.length for r in found) for s, found in routes.items()}
    total, largest = sum(b.length for b in buckets), max(b.length for b in buckets)
    assert max(given_by.values()) <= total / num_sources + largest
    routed = [route.bucket for found in routes.values() for route in found]
    assert sorted(routed, key=lambda bucket: bucket.offset) == list(buckets)


@PROPERTY
@given(sizes, st.integers(1, 4), st.randoms())
def test_every_bucket_is_read_where_it_lies(
    lengths: list[int], num_sources: int, rng: random.Random
) -> None:
    """Each source holds some of the tensors, at places of its own."""
    names = {f"t{n}": length for n, length in enumerate(lengths)}
    parts = [{n: s for n, s in names.items() if rng.random() < 0.7} for _ in range(num_sources)]
    parts.append(names)  # so that somebody has each
    shards = [shard(part) for part in parts]
    manifest, runs = merge(shards)
    at = {n: {t.name: t.offset for t in one.tensors} for n, one in enumerate(shards)}
    held = holdings(manifest, {n: (f"s{n}", one) for n, one in enumerate(shards) if one.tensors})
    for run in runs:
        inside = [c for c in manifest.chunks() if run.offset <= c.offset < run.end]
        hosts = {n: f"h{n % 2}" for n in range(len(shards))}
        for source, routes in plan_routes(plan_buckets(inside, 8 * MIB), held, hosts=hosts).items():
            for route in routes:
                assert route.segment == f"s{source}"
                for chunk in route.bucket.chunks:
                    tensor = next(t for t in manifest.tensors if t.name == chunk.tensor)
                    place_there = at[source][chunk.tensor] + chunk.offset - tensor.offset
                    assert route.start + chunk.offset - route.bucket.offset == place_there


def test_tied_and_empty_tensors_do_not_break_a_stretch() -> None:
    digest = bytes(16)
    tensors = [
        TensorMeta(name="a", dtype="U8", shape=(100,), offset=0, length=100, chunk_digests=digest),
        TensorMeta(name="a2", dtype="U8", shape=(100,), offset=0, length=100, chunk_digests=digest),
        TensorMeta(name="b", dtype="U8", shape=(5,), offset=256, length=5, chunk_digests=digest),
        TensorMeta(name="e", dtype="U8", shape=(0,), offset=512, length=0),
    ]
    manifest = Manifest.of(tensors)
    assert holdings(manifest, {0: ("s", manifest)}) == [
        Holding(source=0, segment="s", start=0, offset=0, length=512)
    ]


def test_who_can_be_spared_is_spared() -> None:
    """Source 1 alone has the second half, so source 0 gives all of the first."""
    buckets = buckets_of(shard({f"t{n}": 8 * MIB for n in range(4)}))
    held = [
        Holding(source=0, segment="s0", start=0, offset=0, length=16 * MIB),
        Holding(source=1, segment="s1", start=0, offset=0, length=32 * MIB),
    ]
    routes = plan_routes(buckets, held, hosts={0: "a", 1: "b"})
    assert {s: [r.bucket.index for r in found] for s, found in routes.items()} == {
        0: [0, 1], 1: [2, 3],
    }  # fmt: skip


def test_hosts_share_the_work_where_sources_tie() -> None:
    buckets = buckets_of(shard({f"t{n}": 8 * MIB for n in range(2)}))
    held = [Holding(source=n, segment="s", start=0, offset=0, length=16 * MIB) for n in range(3)]
    routes = plan_routes(buckets, held, hosts={0: "a", 1: "a", 2: "b"})
    assert sorted(routes) == [0, 2]


def test_receivers_begin_with_different_sources() -> None:
    buckets = buckets_of(shard({f"t{n}": 8 * MIB for n in range(4)}))
    held = [Holding(source=n, segment="s", start=0, offset=0, length=32 * MIB) for n in range(4)]
    hosts = {n: f"h{n}" for n in range(4)}
    begins = [next(iter(plan_routes(buckets, held, hosts=hosts, first=n))) for n in range(4)]
    assert begins == [0, 1, 2, 3]


def test_without_those_that_are_lost() -> None:
    buckets = buckets_of(shard({"t": 8 * MIB}))
    held = [Holding(source=n, segment="s", start=0, offset=0, length=8 * MIB) for n in range(2)]
    assert list(plan_routes(buckets, held, hosts={0: "a", 1: "b"}, lost={0})) == [1]
    with pytest.raises(TransferError, match="'t': no source that has it is left"):
        plan_routes(buckets, held, hosts={0: "a", 1: "b"}, lost={0, 1})


@PROPERTY
@given(sizes, st.integers(1, 9), st.randoms())
def test_the_ranks_of_a_host_share_what_it_lacks(
    lengths: list[int], num_receivers: int, rng: random.Random
) -> None:
    names = {f"t{n}": length for n, length in enumerate(lengths)}
    some = shard({name: length for name, length in names.items() if rng.random() < 0.5})
    manifest, runs = merge([some, shard(names)])
    lacking = [run for run in runs if run.rank == 1]
    cut = shares(lacking, manifest.tensors, num_receivers)
    assert len(cut) == num_receivers
    total = sum(run.length for run in lacking)
    for mine in cut:
        ends = [0, *(piece.place + piece.length for piece in mine)]
        assert [piece.place for piece in mine] == ends[:-1], "one after the other"
        assert ends[-1] <= total / num_receivers + 4 * MIB + 256
    pieces = [piece for mine in cut for piece in mine]
    covered = {at for run in lacking for at in (run.offset, run.end)}
    begins = {c.offset for c in manifest.chunks()} | covered
    assert all(piece.offset in begins and piece.length for piece in pieces)
    joined = [(piece.offset, piece.offset + piece.length) for piece in pieces]
    for run in lacking:
        at = run.offset
        while at < run.end:
            at = dict(joined)[at]
        assert at == run.end
    assert sum(piece.length for piece in pieces) == total
