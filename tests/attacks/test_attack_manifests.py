"""A manifest from a peer that lies is refused before anything is allocated for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from core_tools import BytesSource, Weight, pattern, placed, u8

from checkpoint_engine.errors import ManifestError
from checkpoint_engine.manifest import decode_manifest

HONEST, _ = placed(
    BytesSource(
        {
            "a": Weight("F32", (2, 3), pattern(24)),
            "b": Weight("BF16", (), pattern(2)),
            "c": u8(300, seed=1),
            "e": Weight("U8", (0,), b""),
        },
        {"c": ["d"]},
    )
)


def field(number: int, **values: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces fields of one tensor."""
    return lambda manifest: manifest["tensors"][number].update(values)


def top(**values: Any) -> Callable[[dict[str, Any]], None]:
    """Replaces fields of the manifest itself."""
    return lambda manifest: manifest.update(values)


def swap(manifest: dict[str, Any]) -> None:
    manifest["tensors"][0:2] = reversed(manifest["tensors"][0:2])


def move_all(manifest: dict[str, Any]) -> None:
    for tensor in manifest["tensors"]:
        tensor["offset"] += 1 << 20
    manifest["num_bytes"] += 1 << 20


# a, b, c, d and e lie at 0, 256, 512, 512 and 1024 of 1024 bytes; c and d are tied.
LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "overlap": (field(1, offset=0), "'b' overlaps"),
    "overlap within a tensor": (
        field(4, offset=768, shape=[1], length=1, chunk_digests=bytes(16)),
        "'e' overlaps",
    ),
    "tied with another shape": (field(3, shape=[3, 100]), "'d' overlaps"),
    "tied with another dtype": (field(3, dtype="I8"), "'d' overlaps"),
    "tied with another digest": (field(3, chunk_digests=bytes(16)), "'d' overlaps"),
    "length too long": (field(0, length=25), "'a': 25 bytes for F32"),
    "length too short": (field(0, length=0), "'a': 0 bytes for F32"),
    "negative length": (field(0, length=-24), "'a': -24 bytes"),
    "negative dims": (field(0, shape=[-2, -3]), "'a': impossible shape"),
    "huge dim": (field(0, shape=[1 << 48]), "'a': impossible shape"),
    "huge dims": (field(0, shape=[1 << 47] * 64), "'a': 24 bytes for F32"),
    "huge dim in an empty tensor": (field(4, shape=[0, 1 << 63]), "'e': impossible shape"),
    "too many dims": (field(0, shape=[1] * 65), "'a': impossible shape"),
    "negative offset": (field(0, offset=-256), "'a': impossible offset"),
    "huge offset": (field(2, offset=1 << 46), "'c': impossible offset"),
    "offset of no multiple": (field(1, offset=257), "'b': impossible offset"),
    "a name twice": (field(1, name="a"), "a name occurs twice"),
    "no name": (field(0, name=""), "a name has 1 to 1024 bytes"),
    "a name too long": (field(0, name="ä" * 513), "a name has 1 to 1024 bytes"),
    "unsorted": (swap, "not sorted"),
    "unsorted names": (field(3, name="bb"), "not sorted"),
    "absurd size": (top(num_bytes=1 << 60), "has 1152921504606846976 bytes but"),
    "negative size": (top(num_bytes=-256), "has -256 bytes but"),
    "size that is no multiple": (top(num_bytes=1023), "has 1023 bytes but"),
    "tensors cut off": (lambda manifest: manifest["tensors"].clear(), "but its tensors end at 0"),
    "a hole": (move_all, "bytes for 1024 bytes of tensors"),
    "a hole before an empty tensor": (field(4, offset=1 << 30), "but its tensors end at"),
    "unknown dtype": (field(0, dtype="F33"), "'a': unknown dtype 'F33'"),
    "half a byte": (field(4, dtype="F4", shape=[1]), "'e': F4 of shape"),
    "no chunk digest": (field(0, chunk_digests=b""), "'a': wrong number of chunk digests"),
    "half a chunk digest": (field(0, chunk_digests=bytes(15)), "'a': wrong number of chunk"),
    "two chunk digests": (field(0, chunk_digests=bytes(32)), "'a': wrong number of chunk"),
    "a digest for nothing": (field(4, chunk_digests=bytes(16)), "'e': wrong number of chunk"),
    "another version's digest": (top(digest="0" * 64), "digest is not that of its tensors"),
    "another tensor's content": (
        field(0, chunk_digests=bytes(16)),
        "digest is not that of its tensors",
    ),
    "another name": (field(0, name="A"), "digest is not that of its tensors"),
    "another shape": (field(0, shape=[3, 2]), "digest is not that of its tensors"),
    "tensors of a wrong type": (top(tensors={}), "not a manifest"),
    "a tensor of a wrong type": (top(tensors=[None]), "not a manifest"),
    "a shape of a wrong type": (field(0, shape="23"), "not a manifest"),
    "a fractional dim": (field(0, shape=[2.5]), "not a manifest"),
    "a digest of a wrong type": (top(digest=None), "not a manifest"),
    "a size of a wrong type": (top(num_bytes="1024"), "not a manifest"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str) -> None:
    change, message = LIES[lie]
    told = msgspec.msgpack.decode(HONEST.to_msgpack())
    assert decode_manifest(msgspec.msgpack.encode(told), msgpack=True) == HONEST
    change(told)
    with pytest.raises(ManifestError, match=message):
        decode_manifest(msgspec.msgpack.encode(told), msgpack=True)
    with pytest.raises(ManifestError, match=message):
        decode_manifest(msgspec.json.encode(told))


@pytest.mark.parametrize("key", ["tensors", "num_bytes", "digest"])
def test_a_missing_field(key: str) -> None:
    told = msgspec.json.decode(HONEST.to_json())
    del told[key]
    with pytest.raises(ManifestError, match=f"missing required field `{key}`"):
        decode_manifest(msgspec.json.encode(told))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"{",
        b"not json",
        b"\xff\xfe{}",
        b'{"digest":"\xff"}',
        b'{"digest":"\\ud800"}',
        b'{"digest":"\xed\xa0\x80"}',
        b'{"num_bytes":1' + b"0" * 10_000 + b"}",
        b"[" * 100_000,
        b'{"more":' + b"[" * 100_000,
        b'{"more":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_json_of_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestError, match="not a manifest"):
        decode_manifest(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x81\xa7tensors\xdd\xff\xff\xff\xff\xc0",
        b"\x81\xa7tensors\x91\x81\xa5shape\xdd\x7f\xff\xff\xff\x01",
        b"\x81\xa6digest\xdb\xff\xff\xff\xffx",
        b"\x81\xa6digest\xa1\xff",
        b"\xd6\xff\xff\xff\xff\xff",
        b"\x81\xa4more" + b"\x91" * 100_000 + b"\xc0",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_no_msgpack_of_a_manifest(data: bytes) -> None:
    with pytest.raises(ManifestError, match="not a manifest"):
        decode_manifest(data, msgpack=True)


def test_the_messages_stay_short() -> None:
    """They go into logs and over the wire, and the peer chose what is quoted in them."""
    for values in ({"name": "n" * 100_000}, {"shape": [7] * 10_000}, {"dtype": "D" * 100_000}):
        told = msgspec.json.decode(HONEST.to_json())
        told["tensors"][0].update(values)
        with pytest.raises(ManifestError) as refusal:
            decode_manifest(msgspec.json.encode(told))
        assert len(str(refusal.value)) < 1000
