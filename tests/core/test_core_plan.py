"""Where tensors lie, what travels in which bucket, and how ranks' shards make one version."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from core_tools import (
    BITS,
    MIB,
    PROPERTY,
    BytesSource,
    Weight,
    Weights,
    digest_by_recipe,
    names,
    pattern,
    placed,
    some_weight,
    some_weights,
    u8,
)
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.codec.digest import (
    chunk_digest,
    chunk_digests,
    first_mismatch,
)
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.manifest import Manifest, decode_manifest
from checkpoint_engine.manifest import cut_chunks as chunks_of
from checkpoint_engine.memory import byte_workers
from checkpoint_engine.plan.buckets import plan_buckets
from checkpoint_engine.plan.layout import TensorSpec, lay_out, share
from checkpoint_engine.plan.merge import Run, merge

# Layout


def spec(name: str, *aliases: str, num_bytes: int = 1) -> TensorSpec:
    return TensorSpec(names=(name, *aliases), dtype="U8", shape=(num_bytes,))


@PROPERTY
@given(st.dictionaries(names, st.integers(0, 2000), max_size=8), st.randoms())
def test_the_layout_depends_on_names_and_sizes_alone(
    sizes: dict[str, int], rng: random.Random
) -> None:
    specs = [spec(name, num_bytes=size) for name, size in sizes.items()]
    tensors = lay_out(specs)
    rng.shuffle(specs)
    assert lay_out(specs) == tensors
    end = 0
    for tensor in tensors:
        assert tensor.offset == -(-end // 256) * 256
        end = tensor.end
    assert [tensor.name for tensor in tensors] == sorted(sizes)


def test_tied_names_share_the_place_of_the_first() -> None:
    tensors = lay_out([spec("m", num_bytes=300), spec("a", "z", num_bytes=5)])
    assert [(tensor.name, tensor.offset) for tensor in tensors] == [("a", 0), ("z", 0), ("m", 256)]


def test_a_contradiction_is_the_sources_fault() -> None:
    with pytest.raises(SourceError, match="'a' is given twice"):
        lay_out([spec("a"), spec("b", "a")])
    with pytest.raises(SourceError, match="'a': unknown dtype 'U9'"):
        lay_out([TensorSpec(names=("a",), dtype="U9", shape=(1,))])


@PROPERTY
@given(st.lists(st.integers(0, 2000), max_size=8), st.integers(1, 5))
def test_shares_are_all_tensors_once_and_about_equal(sizes: list[int], num_shares: int) -> None:
    specs = [spec(f"w{number}", num_bytes=size) for number, size in enumerate(sizes)]
    shares = [share(specs, index, num_shares) for index in range(num_shares)]
    assert [one for part in shares for one in part] == specs
    for part in shares:
        excess = sum(one.shape[0] for one in part) - sum(sizes) / num_shares
        assert excess <= max(sizes, default=0)


# Buckets


@st.composite
def some_layout(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors around the sizes where chunks and buckets begin; nothing is allocated for them."""
    edges = st.sampled_from([4 * MIB, 8 * MIB, 20 * MIB])
    sizes = st.integers(0, 3000) | st.builds(int.__add__, edges, st.integers(-300, 300))
    found = draw(st.dictionaries(names, sizes, max_size=12))
    return [spec(name, f"{name}-tied", num_bytes=size) for name, size in found.items()]


@PROPERTY
@given(some_layout(), st.sampled_from([4 * MIB, 4 * MIB + 1, 5 * MIB, 8 * MIB, 32 * MIB]))
def test_buckets_cover_every_byte_of_every_tensor_once(
    specs: list[TensorSpec], bucket_bytes: int
) -> None:
    tensors = lay_out(specs)
    buckets = plan_buckets(chunks_of(tensors), bucket_bytes)
    assert [bucket.index for bucket in buckets] == list(range(len(buckets)))
    assert all(0 < bucket.length <= bucket_bytes for bucket in buckets)
    assert all(one.end <= following.offset for one, following in itertools.pairwise(buckets))
    for bucket in buckets:
        assert (bucket.offset, bucket.end) == (bucket.chunks[0].offset, bucket.chunks[-1].end)
        assert all(chunk.length <= 4 * MIB for chunk in bucket.chunks)
    covered = [(chunk.offset, chunk.end) for bucket in buckets for chunk in bucket.chunks]
    assert covered == sorted(covered)
    expected = [
        (start, min(start + 4 * MIB, offset + length))
        for offset, length in sorted({(tensor.offset, tensor.length) for tensor in tensors})
        for start in range(offset, offset + length, 4 * MIB)
    ]
    assert covered == expected
    assert buckets == plan_buckets(chunks_of(lay_out(specs[::-1])), bucket_bytes)


def test_small_tensors_share_a_bucket_and_large_ones_are_split() -> None:
    tensors = lay_out([spec("a"), spec("b"), spec("c", num_bytes=9 * MIB), spec("d")])
    buckets = plan_buckets(chunks_of(tensors), 8 * MIB)
    found = [[(chunk.tensor, chunk.length) for chunk in bucket.chunks] for bucket in buckets]
    assert found == [
        [("a", 1), ("b", 1), ("c", 4 * MIB)],
        [("c", 4 * MIB), ("c", 1 * MIB), ("d", 1)],
    ]


def test_a_bucket_is_filled_to_its_last_byte() -> None:
    tensors = lay_out([spec("a", num_bytes=4 * MIB), spec("b", num_bytes=4 * MIB)])
    assert len(plan_buckets(chunks_of(tensors), 8 * MIB)) == 1
    assert len(plan_buckets(chunks_of(tensors), 8 * MIB - 1)) == 2


def test_a_bucket_holds_at_least_a_chunk() -> None:
    assert plan_buckets([], 4 * MIB) == ()
    with pytest.raises(UsageError, match="at least one chunk of 4194304 bytes"):
        plan_buckets([], 4 * MIB - 1)


# Digests in memory


@pytest.mark.parametrize("num_bytes", [0, 1, 4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB])
def test_chunk_digests(num_bytes: int) -> None:
    data = memoryview(pattern(num_bytes))
    digests = chunk_digests(data)
    assert [digests[i : i + 16] for i in range(0, len(digests), 16)] == [
        chunk_digest(data[start : start + 4 * MIB]) for start in range(0, num_bytes, 4 * MIB)
    ]


def test_the_first_mismatch() -> None:
    weights: Weights = {"a": u8(300, 1), "b": u8(9 * MIB, 2), "c": u8(5, 3), "e": u8(0)}
    manifest, memory = placed(BytesSource(weights))

    def wrong() -> str | None:
        with byte_workers() as pool:
            found = first_mismatch(
                manifest.chunks(), lambda start, end: memoryview(memory)[start:end], pool
            )
        return found and f"{found.tensor} at {found.offset}"

    assert wrong() is None
    memory[300] ^= 1
    assert wrong() is None, "padding belongs to no tensor"
    memory[512 + 9 * MIB] ^= 0x80
    assert wrong() == f"c at {512 + 9 * MIB}"
    memory[512 + 8 * MIB] ^= 1
    assert wrong() == f"b at {512 + 8 * MIB}"
    memory[0] ^= 1
    assert wrong() == "a at 0"


# Merging the shards of ranks


def memory_of(version: Manifest, runs: Sequence[Run], shards: Sequence[bytearray]) -> bytearray:
    """The version's byte space, put together as the runs say."""
    memory = bytearray(version.num_bytes)
    end = 0
    for run in runs:
        assert run.offset == end, "runs follow each other"
        assert run.length > 0
        part = shards[run.rank][run.start : run.start + run.length]
        assert len(part) == run.length, "a run lies within its shard"
        memory[run.offset : run.end] = part
        end = run.end
    assert end == version.num_bytes
    return memory


def check_merge(weights: Weights, shards: Sequence[BytesSource]) -> tuple[Manifest, list[Run]]:
    """Merge the shards and hold the outcome against the weights that they make up."""
    made = [placed(shard) for shard in shards]
    version, runs = merge([manifest for manifest, _ in made])
    assert version.digest == digest_by_recipe(weights)
    assert decode_manifest(version.to_json()) == version
    memory = memory_of(version, runs, [memory for _, memory in made])
    assert {tensor.name for tensor in version.tensors} == set(weights)
    for tensor in version.tensors:
        assert memory[tensor.offset : tensor.end] == weights[tensor.name].data
    return version, list(runs)


@PROPERTY
@given(some_weights.filter(bool), st.integers(1, 5), st.data())
def test_any_split_over_ranks_makes_the_same_version(
    weights: Weights, num_ranks: int, draw: st.DataObject
) -> None:
    """Tensors that several ranks hold count once."""
    ranks = st.sets(st.integers(0, num_ranks - 1), min_size=1, max_size=3)
    holders = {name: draw.draw(ranks) for name in weights}
    shards = [
        BytesSource({name: weight for name, weight in weights.items() if rank in holders[name]})
        for rank in range(num_ranks)
    ]
    version, runs = check_merge(weights, shards)
    assert version.num_bytes == placed(BytesSource(weights))[0].num_bytes
    assert sum(run.length for run in runs) == version.num_bytes


@PROPERTY
@given(some_weights, names, some_weight(), st.data())
def test_tied_tensors_over_ranks(
    weights: Weights, name: str, tied: Weight, draw: st.DataObject
) -> None:
    """A rank may hold both names of one tensor, another rank only one of them."""
    other = f"{name}-tied"
    whole = {**weights, name: tied, other: tied}
    shards = [BytesSource({key: whole[key] for key in weights})]
    for _ in range(draw.draw(st.integers(1, 3))):
        kind = draw.draw(st.sampled_from(["both", "tied", name, other]))
        if kind == "tied":
            shards.append(BytesSource({name: tied}, {name: [other]}))
        elif kind == "both":
            shards.append(BytesSource({name: tied, other: tied}))
        else:
            shards.append(BytesSource({kind: tied}))
    shards.append(BytesSource({name: tied}, {name: [other]}))
    check_merge(whole, draw.draw(st.permutations(shards)))


def test_large_tensors_over_ranks() -> None:
    weights: Weights = {"a": u8(5 * MIB, 1), "b": u8(300, 2), "c": u8(9 * MIB, 3)}
    shards = [BytesSource({"a": weights["a"]}), BytesSource({}), BytesSource(dict(weights))]
    version, runs = check_merge(weights, shards)
    assert runs == [
        Run(rank=0, start=0, offset=0, length=5 * MIB),
        Run(rank=2, start=5 * MIB, offset=5 * MIB, length=version.num_bytes - 5 * MIB),
    ]


def test_a_run_stops_where_another_rank_gave_the_tensor() -> None:
    weights: Weights = {name: u8(256, ord(name)) for name in "abcd"}
    shards = [BytesSource({"b": weights["b"]}), BytesSource(dict(weights))]
    _, runs = check_merge(weights, shards)
    assert [(run.rank, run.start, run.length) for run in runs] == [
        (0, 0, 256),
        (1, 0, 256),
        (1, 512, 512),
    ]


def test_one_rank_alone_is_its_own_version() -> None:
    manifest, _ = placed(BytesSource({"a": u8(3), "b": u8(700)}))
    assert merge([manifest]) == (manifest, (Run(rank=0, start=0, offset=0, length=1024),))


@pytest.mark.parametrize(
    "other",
    [Weight("U8", (4,), b"abcX"), Weight("I8", (4,), b"abcd"), Weight("U8", (2, 2), b"abcd")],
    ids=["content", "dtype", "shape"],
)
def test_ranks_that_contradict_each_other(other: Weight) -> None:
    shards = [
        placed(BytesSource(weights))[0]
        for weights in ({}, {"w": Weight("U8", (4,), b"abcd")}, {"v": u8(1)}, {"w": other})
    ]
    with pytest.raises(UsageError, match="ranks 1 and 3 registered different tensors as 'w'"):
        merge(shards)


def test_nobody_registered_anything() -> None:
    nothing = placed(BytesSource({}))[0]
    for shards in ([], [nothing], [nothing, nothing]):
        with pytest.raises(UsageError, match="no rank registered any tensor"):
            merge(shards)


def test_every_dtype_in_one_version() -> None:
    weights: Weights = {
        dtype: Weight(dtype, (8,), pattern(bits, bits)) for dtype, bits in BITS.items()
    }
    for num_ranks in (1, 2, 5):
        shards = [dict(list(weights.items())[rank::num_ranks]) for rank in range(num_ranks)]
        check_merge(weights, [BytesSource(shard) for shard in shards])
