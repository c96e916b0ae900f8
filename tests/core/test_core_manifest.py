"""What a version is called depends on its content alone."""

from __future__ import annotations

import itertools

import msgspec
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

import checkpoint_engine.store
from checkpoint_engine.errors import ManifestError
from checkpoint_engine.manifest import (
    Chunk,
    Manifest,
    TensorMeta,
    align,
    decode_manifest,
    num_chunks,
)
from checkpoint_engine.store import Store

# 8 values a tensor, so as many bytes as a value has bits.
EVERY_DTYPE: Weights = {
    f"model.{dtype.lower()}": Weight(dtype, (2, 4), pattern(bits, number))
    for number, (dtype, bits) in enumerate(sorted(BITS.items()))
}
FIXED: dict[str, tuple[Weights, str]] = {
    "nothing": (
        {},
        "b50b4b30ab3647db5c7b21b924b483179e2bef4d089ee65d0c60201d69194880",
    ),
    "every dtype": (
        EVERY_DTYPE,
        "0c2e516ebea490d116c80c91ea9cd673bd9894ba7b812cb9025b406a2558e02f",
    ),
    "scalar and empty": (
        {"scalar": Weight("F32", (), pattern(4)), "empty": Weight("BF16", (3, 0, 2), b"")},
        "98baad6461c1ec7d4dc43a08a8ac24bd8725f1f8fa45d78963299d47da28dced",
    ),
    "unicode": (
        {"ä.weight": u8(3, 1), "z": u8(3, 2), "\U0001f642": u8(3, 3)},
        "0d2b244ee25329bf72c29e06880e42d35986a7f7e1726ae34dc921df10def6f7",
    ),
    "around a chunk": (
        {f"w{n}": u8(n, n) for n in (4 * MIB - 1, 4 * MIB, 4 * MIB + 1, 9 * MIB)},
        "e55dda15d57b7ba4e34440f171f556afe419703457cf84a896c2b2e28c3db457",
    ),
}


@pytest.mark.parametrize(("weights", "golden"), list(FIXED.values()), ids=FIXED)
def test_golden_digests(weights: Weights, golden: str) -> None:
    manifest, _ = placed(BytesSource(weights))
    assert manifest.digest == golden
    assert digest_by_recipe(weights) == golden


@PROPERTY
@given(some_weights)
def test_the_digest_is_the_documented_one(weights: Weights) -> None:
    assert placed(BytesSource(weights))[0].digest == digest_by_recipe(weights)


@PROPERTY
@given(some_weights, names, some_weight(), some_weight())
def test_whatever_differs_changes_the_digest(
    weights: Weights, name: str, one: Weight, other: Weight
) -> None:
    digests = [placed(BytesSource({**weights, name: weight}))[0].digest for weight in (one, other)]
    assert (digests[0] == digests[1]) == (one == other)


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_the_order_of_tensors_changes_nothing(order: tuple[str, ...]) -> None:
    weights = {name: u8(300, ord(name)) for name in order}
    assert placed(BytesSource(weights))[0] == placed(BytesSource(dict(sorted(weights.items()))))[0]


@pytest.mark.parametrize("num_threads", [1, 4, 16])
def test_the_number_of_threads_changes_nothing(
    num_threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights, golden = FIXED["around a chunk"]
    monkeypatch.setattr(checkpoint_engine.store, "num_byte_workers", lambda: num_threads)
    store = Store()
    assert store.register("version", BytesSource(weights)).manifest.digest == golden
    store.close()


@PROPERTY
@given(some_weights, names, st.sets(names, min_size=1, max_size=3), some_weight())
def test_tied_tensors_have_one_digest_stored_once_or_twice(
    weights: Weights, name: str, others: set[str], tied: Weight
) -> None:
    weights = {other: weight for other, weight in weights.items() if other not in others}
    aliases = sorted(others - {name})
    once, _ = placed(BytesSource({**weights, name: tied}, {name: aliases}))
    twice, _ = placed(BytesSource({**weights, name: tied, **dict.fromkeys(aliases, tied)}))
    assert once.digest == twice.digest
    places = {meta.offset for meta in once.tensors if meta.name in {name, *aliases}}
    assert len(places) == 1, "they are stored once"
    assert decode_manifest(once.to_json()) == once


@PROPERTY
@given(some_weights)
def test_every_tensor_lies_at_a_multiple_of_256_bytes(weights: Weights) -> None:
    manifest, memory = placed(BytesSource(weights))
    assert {meta.name for meta in manifest.tensors} == set(weights)
    for meta in manifest.tensors:
        assert meta.offset % 256 == 0
        assert memory[meta.offset : meta.end] == weights[meta.name].data
    ends = [meta.end for meta in manifest.tensors]
    assert manifest.num_bytes == len(memory) == align(max(ends, default=0))


@pytest.mark.parametrize(
    ("num_bytes", "expected"),
    [(0, 0), (1, 1), (4 * MIB, 1), (4 * MIB + 1, 2), (9 * MIB, 3)],
)
def test_chunks_of_four_mebibytes(num_bytes: int, expected: int) -> None:
    assert num_chunks(num_bytes) == expected
    manifest, memory = placed(BytesSource({"first": u8(1), "w": u8(num_bytes)}))
    chunks = [chunk for chunk in manifest.chunks() if chunk.tensor == "w"]
    assert len(chunks) == expected
    assert b"".join(memory[chunk.offset : chunk.end] for chunk in chunks) == pattern(num_bytes)
    assert all(chunk.length == 4 * MIB for chunk in chunks[:-1])


def test_tied_tensors_share_their_chunks() -> None:
    manifest, _ = placed(BytesSource({"b": u8(5), "a": u8(5, 1)}, {"a": ["z"]}))
    (a, b, z) = sorted(manifest.tensors, key=lambda meta: meta.name)
    assert list(manifest.chunks()) == [
        Chunk(0, 5, a.chunk_digests, "a"),
        Chunk(256, 5, b.chunk_digests, "b"),
    ]
    assert (z.offset, z.chunk_digests) == (a.offset, a.chunk_digests)


# On the wire

SMALL = BytesSource(
    {
        "b": Weight("BF16", (2, 3), bytes(range(12))),
        "a": Weight("F32", (), b"\0\0\x80?"),
        "e": Weight("U8", (0, 4), b""),
    },
    {"b": ["tied"]},
)
SMALL_JSON = (
    b'{"tensors":['
    b'{"name":"a","dtype":"F32","shape":[],"offset":0,"length":4,'
    b'"chunk_digests":"5vmsymiTyutZHvTpY+Eg1A=="},'
    b'{"name":"b","dtype":"BF16","shape":[2,3],"offset":256,"length":12,'
    b'"chunk_digests":"OPkiR6f3PMV3gOsxGY8Tyg=="},'
    b'{"name":"tied","dtype":"BF16","shape":[2,3],"offset":256,"length":12,'
    b'"chunk_digests":"OPkiR6f3PMV3gOsxGY8Tyg=="},'
    b'{"name":"e","dtype":"U8","shape":[0,4],"offset":512,"length":0,"chunk_digests":""}'
    b'],"num_bytes":512,'
    b'"digest":"13afdcb15ae57fbf21836513eac0a1aef1bfda9829d2e9c31491da578aac71bc"}'
)


def test_golden_json() -> None:
    manifest, _ = placed(SMALL)
    assert manifest.to_json() == SMALL_JSON
    assert decode_manifest(SMALL_JSON) == manifest


@PROPERTY
@given(some_weights)
def test_json_and_msgpack_round_trip(weights: Weights) -> None:
    manifest, _ = placed(BytesSource(weights))
    assert decode_manifest(manifest.to_json()) == manifest
    assert decode_manifest(manifest.to_msgpack(), msgpack=True) == manifest
    assert msgspec.json.decode(manifest.to_json()).keys() == {"tensors", "num_bytes", "digest"}


def test_of_sorts_and_refuses() -> None:
    manifest, _ = placed(SMALL)
    assert Manifest.of(reversed(manifest.tensors)) == manifest
    with pytest.raises(ManifestError, match="wrong number of chunk digests"):
        Manifest.of([TensorMeta(name="a", dtype="U8", shape=(1,), offset=0, length=1)])
    with pytest.raises(ManifestError, match="a name occurs twice"):
        Manifest.of([*manifest.tensors, manifest.tensors[-1]])


@pytest.mark.parametrize(
    ("name", "dim"), [("w", -1), ("w", 1 << 70), ("\ud800", 0)], ids=["negative", "huge", "text"]
)
def test_of_refuses_what_has_no_digest(name: str, dim: int) -> None:
    """Dims and names that cannot even be packed for the digest."""
    meta = TensorMeta(name=name, dtype="U8", shape=(dim, 0), offset=0, length=0)
    with pytest.raises(ManifestError):
        Manifest.of([meta])
