"""What a stream's sender and receivers say is one of their messages, or refused."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch
from fuzz_tools import altered, fuzzed, mutated
from hypothesis import strategies as st

from checkpoint_engine.errors import (
    ProtocolError,
    RemoteError,
    SourceError,
    StoreError,
    UsageError,
    VerificationError,
)
from checkpoint_engine.streaming.messages import (
    FROM_RECEIVER,
    FROM_SENDER,
    Bucket,
    Done,
    Ear,
    End,
    Failed,
    Over,
    Plan,
    Ready,
)
from checkpoint_engine.streaming.packing import (
    Ledger,
    OpenBucket,
    check_arrived,
    weight_of,
    whole_tensors,
)
from checkpoint_engine.streaming.places import Places
from checkpoint_engine.transport.keystore import LocalKeyStore
from checkpoint_engine.transport.rendezvous import Rendezvous

FAILED = Failed(rank=1, error=RemoteError(type="T", message="m"))
MEMORY = torch.zeros(4 << 20, dtype=torch.uint8)
PACKED = OpenBucket(0, MEMORY)
for name, tensor in {"a": torch.arange(40), "b": torch.ones(3, 5).bfloat16()}.items():
    weight = weight_of(name, tensor)
    PACKED.put(weight, 0, len(weight.data))
BUCKET = PACKED.closed()
SAID = [Plan(bucket_bytes=4 << 20, way="w", world_size=2), BUCKET, End("v", "d", 2), Over(), FAILED]
ANSWERED = [Ready(1, 0), Done(1, "d"), FAILED]


def plain(messages: list[Any]) -> list[Any]:
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(message)) for message in messages]


def encode(tree: Any) -> bytes:
    try:
        return msgspec.msgpack.encode(tree)
    except OverflowError:
        return msgspec.msgpack.encode(repr(tree))


@pytest.mark.parametrize(
    ("decoder", "valid"),
    [(FROM_SENDER, SAID), (FROM_RECEIVER, ANSWERED)],
    ids=["sender", "receiver"],
)
@fuzzed(st.data())
def test_entries_of_a_stream(decoder: Any, valid: list[Any], case: st.DataObject) -> None:
    encoded = [msgspec.msgpack.encode(message) for message in valid]
    data = case.draw(altered(plain(valid)).map(encode) | mutated(encoded))
    log = Rendezvous(LocalKeyStore(), 0, 1).log("said")
    log.append(data)
    try:
        heard = Ear(log, decoder).next(0)
    except ProtocolError:
        assert data not in encoded
    else:
        assert decoder.decode(msgspec.msgpack.encode(heard)) == heard


@fuzzed(altered(plain([BUCKET])).map(encode))
def test_a_bucket_is_what_was_sent_or_refused(case: bytes) -> None:
    try:
        bucket = msgspec.msgpack.decode(case, type=Bucket)
    except msgspec.DecodeError:
        return
    places, ledger = Places(torch.device("cpu")), Ledger()
    places.begin(4 << 20)
    try:
        place = places.find(bucket, lambda: True)
        assert place is not None
        place.data.copy_(MEMORY[: len(place.data)])
        check_arrived(bucket, place.data)
        for part in bucket.parts:
            ledger.add(part)
        found = dict(whole_tensors(bucket, place.data))
        ledger.digest()
    except (ProtocolError, SourceError, StoreError, UsageError, VerificationError):
        assert bucket != BUCKET
    else:
        assert set(found) == {part.name for part in bucket.parts}
