"""Tensors into buckets and out of them: nothing is lost, moved or taken for something else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import msgspec
import pytest
import torch
from core_tools import PROPERTY, some_weights
from hypothesis import given
from hypothesis import strategies as st
from stream_weights import MIB, equal, weights

from checkpoint_engine.dtypes import DTYPE_BITS, torch_dtype, torch_shape
from checkpoint_engine.errors import ProtocolError, SourceError, UsageError, VerificationError
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import digest_in_place
from checkpoint_engine.streaming.compression import pays
from checkpoint_engine.streaming.messages import FROM_SENDER, Bucket
from checkpoint_engine.streaming.packing import (
    Ledger,
    OpenBucket,
    check_arrived,
    cuts,
    named,
    view,
    weight_of,
    whole_tensors,
)

BUCKET_BYTES = 4 * MIB
Packed = list[tuple[Bucket, torch.Tensor]]


def pack(tensors: Iterable[tuple[str, torch.Tensor]], bucket_bytes: int = BUCKET_BYTES) -> Packed:
    """As a sender does, with as many buckets as it takes."""
    packed: Packed = []
    bucket = OpenBucket(0, torch.zeros(bucket_bytes, dtype=torch.uint8))

    def close() -> None:
        nonlocal bucket
        if bucket.num_parts:
            closed = bucket.closed()
            packed.append((closed, bucket.memory[: closed.length]))
        bucket = OpenBucket(len(packed), torch.zeros(bucket_bytes, dtype=torch.uint8))

    for name, tensor in tensors:
        weight = weight_of(name, tensor)
        for start, length in cuts(weight, bucket_bytes):
            if not bucket.fits(length) or length < len(weight.data):
                close()
            bucket.put(weight, start, length)
            if length < len(weight.data):
                close()
    close()
    return packed


def unpack(packed: Packed) -> tuple[dict[str, torch.Tensor], str]:
    found: dict[str, torch.Tensor] = {}
    ledger, parts = Ledger(), []
    for bucket, memory in packed:
        check_arrived(bucket, memory)
        for part in bucket.parts:
            ledger.add(part)
        if ledger.is_within or parts:
            parts.append(memory)
            if not ledger.is_within:
                found[bucket.parts[0].name] = view(bucket.parts[0], torch.cat(parts))
                parts = []
        else:
            found |= whole_tensors(bucket, memory)
    return found, ledger.digest()


VIEWABLE = {name for name in DTYPE_BITS if not name.startswith("F6") and name != "F4"}


@given(some_weights)
@PROPERTY
def test_any_tensors_come_out_as_they_went_in(given_weights: Any) -> None:
    tensors = {
        name: torch.frombuffer(bytearray(weight.data) or bytearray(1), dtype=torch.uint8)[
            : len(weight.data)
        ]
        .view(torch_dtype(weight.dtype))
        .view(torch_shape(weight.dtype, weight.shape))
        for name, weight in given_weights.items()
        if weight.dtype in VIEWABLE
    }
    found, digest = unpack(pack(tensors.items()))
    assert list(found) == list(tensors)
    assert all(equal(found[name], tensor) for name, tensor in tensors.items())
    assert digest == digest_in_place(TensorSource(tensors)).digest


@given(st.lists(st.integers(0, 3 * BUCKET_BYTES), max_size=6), st.sampled_from([4, 5, 8, 9]))
@PROPERTY
def test_any_sizes_fill_buckets_of_any_size(sizes: list[int], mib: int) -> None:
    tensors = {
        f"{n}": torch.full((size,), n + 1, dtype=torch.uint8) for n, size in enumerate(sizes)
    }
    packed = pack(tensors.items(), mib * MIB)
    assert all(bucket.length <= mib * MIB for bucket, _ in packed)
    found, digest = unpack(packed)
    assert all(equal(found[name], tensor) for name, tensor in tensors.items())
    assert digest == digest_in_place(TensorSource(tensors)).digest


def test_the_digest_is_that_of_a_version_at_rest_whatever_the_buckets() -> None:
    tensors = weights(1)
    digests = {unpack(pack(tensors.items(), mib * MIB))[1] for mib in (4, 7, 64)}
    assert digests == {digest_in_place(TensorSource(tensors)).digest}


@given(st.data())
@PROPERTY
def test_a_flipped_bit_is_noticed_and_named(data: st.DataObject) -> None:
    (bucket, memory), *_ = pack({"a": torch.arange(1000), "b": torch.ones(77)}.items())
    part = data.draw(st.sampled_from(bucket.parts))
    place = part.offset + data.draw(st.integers(0, part.length - 1))
    memory[place] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(VerificationError, match=f"tensor '{part.name}'"):
        check_arrived(bucket, memory)


def test_parts_out_of_order_are_refused() -> None:
    packed = pack({"large": torch.ones(9 * MIB, dtype=torch.uint8)}.items())
    with pytest.raises(ProtocolError, match="'large' is out of order"):
        unpack(packed[1:])
    with pytest.raises(ProtocolError, match="'large' is out of order"):
        unpack([packed[0], packed[2]])
    with pytest.raises(ProtocolError, match="the rest of 'large' never came"):
        unpack(packed[:2])


@pytest.mark.parametrize(
    "changed",
    [
        {"dtype": "F33"},
        {"shape": (3,)},
        {"shape": (1 << 60,)},
        {"name": ""},
        {"digests": b""},
        {"offset": 1},
        {"offset": 1 << 40},
        {"length": 5},
        {"start": 256},
    ],
)
def test_a_header_that_cannot_be_is_refused(changed: dict[str, Any]) -> None:
    ((bucket, memory),) = pack({"a": torch.arange(1000)}.items())
    part = msgspec.structs.replace(bucket.parts[0], **changed)
    wrong = msgspec.structs.replace(bucket, parts=(part,))
    with pytest.raises((ProtocolError, SourceError, UsageError, VerificationError)):
        unpack([(wrong, memory)])


def test_a_header_survives_the_wire() -> None:
    (bucket, _), *_ = pack(weights(1).items())
    assert FROM_SENDER.decode(msgspec.msgpack.encode(bucket)) == bucket


def test_a_name_that_is_given_twice_is_refused() -> None:
    with pytest.raises(SourceError, match="'a' is given twice"):
        unpack(pack([("a", torch.ones(2)), ("a", torch.ones(2))]))


@pytest.mark.parametrize("kind", ["sparse", "meta", "unnamed"])
def test_what_has_no_bytes_is_refused(kind: str) -> None:
    tensor = {
        "sparse": lambda: torch.ones(2, 2).to_sparse(),
        "meta": lambda: torch.ones(2, device="meta"),
        "unnamed": lambda: torch.ones(2, dtype=torch.complex128),
    }[kind]()
    with pytest.raises(SourceError, match="'a'"):
        weight_of("a", tensor)


def test_weights_may_come_in_any_way() -> None:
    given_weights = {"a": torch.ones(2), "b": torch.zeros(3)}

    def generator() -> Iterator[tuple[str, torch.Tensor]]:
        yield from given_weights.items()

    async def slowly() -> AsyncIterator[tuple[str, torch.Tensor]]:
        for pair in generator():
            await asyncio.sleep(0)
            yield pair

    async def names(found: Any) -> list[str]:
        return [name async for name, _ in named(found)]

    for found in (given_weights, generator(), slowly(), list(generator())):
        assert asyncio.run(names(found)) == ["a", "b"]


def test_compression_pays_where_the_link_is_slow() -> None:
    sample = {"sample_bytes": 1_000_000, "packed_bytes": 780_000, "pack_seconds": 0.0033}
    assert pays(**sample, bytes_per_second=30e6)
    assert not pays(**sample, bytes_per_second=1e9)
