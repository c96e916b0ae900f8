"""Whatever comes through a socket or a log is a message, or one of three errors."""

from __future__ import annotations

import array
import contextlib
import socket
import struct
from typing import Any

import msgspec
import pytest
from core_tools import BytesSource, num_fds, placed, u8
from fuzz_tools import altered, fuzzed, mutated
from hypothesis import strategies as st

from checkpoint_engine.errors import (
    DeadlineExceeded,
    ManifestError,
    PeerLost,
    ProtocolError,
    RemoteError,
    UsageError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources.files import OpenFile
from checkpoint_engine.timeline import Span
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.files import FilesAt, Handed, NoFiles, Open
from checkpoint_engine.transport.handover import Held, Hold, LetGo, Part, Refused
from checkpoint_engine.update import protocol
from checkpoint_engine.update.versions import RankMeta
from checkpoint_engine.update.versions import Version as Gathered

MANIFEST, _ = placed(BytesSource({"a": u8(300), "b": u8(0)}, {"a": ["c"]}))
SPANS = (Span(stage="apply", lane="r", start=1.0, seconds=2.0),)
ERROR = RemoteError(type="T", message="m", where="w", traceback="t")
HELLO = protocol.Hello(protocol=1, replica="r", engine="e", rank=0, world_size=1, base="b")
READY = protocol.Ready(way_back="none", spans=SPANS)
REPORT = protocol.Report(
    update="u", epoch=1, version="v", digest="d", base=None, mode="staged", outcome="published",
    bytes=1, bytes_sent=0, seconds={"apply": 1.0}, pause_seconds=0.5, verified=True,
    replicas=(protocol.ReplicaReport(name="r", rank=0, outcome="lost", error=ERROR),),
)  # fmt: skip

FROM_SESSION = [
    HELLO,
    READY,
    protocol.Applied(digest="d", served_digest=None, spans=SPANS),
    protocol.Confirmed(pause_seconds=0.5, error=ERROR),
    protocol.Withdrawn(error=ERROR, torn=True),
    Hold("segment"),
    LetGo(),
    Open("files"),
]
FROM_RANK = [
    protocol.Offer(
        update="u", epoch=1, version=Version(label="v", digest=MANIFEST.digest),
        manifest=MANIFEST.to_msgpack(),
        parts=(Part(address="ipc:///x", segment="s", start=0, offset=0, length=300),),
        deadlines=protocol.Deadlines.of(60, 300),
        files=(FilesAt(address="ipc:///x", name="f"),),
    ),
    protocol.Proceed(step="apply"),
    protocol.Stop(reason="r", quarantine=True),
]  # fmt: skip
EVENTS = [
    protocol.Staged(rank=0, error=ERROR, spans=SPANS),
    protocol.Joined(session="0.0", rank=0, hello=HELLO),
    protocol.Voted(session="0.0", vote=READY),
    protocol.Left(session="0.0", error=ERROR),
    protocol.Returned(rank=0, request=1),
]
DECISIONS = [
    protocol.Decision(step="apply", proceed=("0.0",), quarantine=("0.1",)),
    protocol.Decision(step="end", report=REPORT),
]
FILE = OpenFile(path="/p", num_bytes=300, modified_ns=1, positions={"a": 0, "b": 300})
META = RankMeta(
    rank=0, host="h", address="ipc:///x", device_uuid="GPU-0", segment="s", manifest=MANIFEST
)


def plain(messages: list[Any]) -> list[Any]:
    """As a decoder that knows no type sees them."""
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(message)) for message in messages]


def framed(content: bytes) -> bytes:
    return struct.pack("<I", len(content)) + content


def envelope(update: Any, epoch: Any, sequence: Any, body: Any) -> bytes:
    return framed(msgspec.msgpack.encode([update, epoch, sequence, body], enc_hook=str))


def encode(tree: Any) -> bytes:
    """As msgpack; integers that it does not have as text."""
    try:
        return msgspec.msgpack.encode(tree)
    except OverflowError:
        return msgspec.msgpack.encode(repr(tree))


def receive_all(data: bytes, kinds: Any, num_descriptors: int = 0) -> list[Any]:
    """The messages that a channel makes of these bytes, until it refuses some or they end."""
    fds = num_fds()
    one, peer = socket.socketpair()
    channel: Channel[Any] = Channel(one, kinds)
    found: list[Any] = []
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [0] * num_descriptors))
    if data:
        peer.sendmsg([data], [rights] if num_descriptors else [])
    peer.close()
    with contextlib.suppress(ProtocolError, PeerLost, DeadlineExceeded):
        while True:
            found.append(channel.receive(0))
    channel.close()
    assert num_fds() == fds, "every descriptor is closed"
    return found


def is_valid(message: Any, kinds: Any) -> bool:
    """Encoded and decoded again it is the same, so every field is of its type."""
    data = msgspec.msgpack.encode(message)
    return bool(msgspec.msgpack.encode(msgspec.msgpack.decode(data, type=kinds)) == data)


FRAMES = [
    b"".join(envelope("u", 1, number, body) for number, body in enumerate(plain(FROM_SESSION))),
    envelope("", 0, 0, plain([HELLO])[0]),
    envelope("u", 1, 0, plain([READY])[0]),
]
TO_RANK = protocol.FromSession | Hold | LetGo | Open


@fuzzed(st.tuples(mutated(FRAMES) | st.binary(max_size=64), st.integers(0, 6)))
def test_frames(case: tuple[bytes, int]) -> None:
    assert all(is_valid(message, TO_RANK) for message in receive_all(case[0], TO_RANK, case[1]))


@pytest.mark.parametrize(
    ("kinds", "valid"),
    [
        (TO_RANK, FROM_SESSION),
        (protocol.FromRank, FROM_RANK),
        (Held | Refused, [Held(True), Refused("no")]),
        (Handed | NoFiles, [Handed(file=FILE, num_left=1), NoFiles()]),
    ],
    ids=["from a session", "from a rank", "from an owner", "with files"],
)
@fuzzed(st.data())
def test_bodies(kinds: Any, valid: list[Any], case: st.DataObject) -> None:
    body = case.draw(altered(plain(valid)))
    sequence = case.draw(st.sampled_from([0, 0, 0, 1, -1, None]))
    data = encode(body)
    found = receive_all(framed(encode(["u", 1, sequence, msgspec.Raw(data)])), kinds)
    assert all(is_valid(message, kinds) for message in found)
    is_honest = sequence == 0 and data in map(msgspec.msgpack.encode, valid)
    assert len(found) == 1 or not is_honest, "what is valid is taken"


@pytest.mark.parametrize(
    ("kind", "valid"),
    [(protocol.Event, EVENTS), (protocol.Decision, DECISIONS)],
    ids=["event", "decision"],
)
@fuzzed(st.data())
def test_entries_of_a_log(kind: Any, valid: list[Any], case: st.DataObject) -> None:
    encoded = [msgspec.msgpack.encode(message) for message in valid]
    data = case.draw(altered(plain(valid)).map(encode) | mutated(encoded))
    try:
        message = protocol.decode(data, kind)
    except ProtocolError:
        assert data not in encoded
    else:
        assert is_valid(message, kind)


@fuzzed(altered(plain([META])).map(encode) | mutated([msgspec.msgpack.encode(META)]))
def test_what_a_rank_tells_of_its_shard(case: bytes) -> None:
    try:
        version = Gathered.of([protocol.decode(case, RankMeta)])
    except (ProtocolError, ManifestError, UsageError):
        assert case != msgspec.msgpack.encode(META)
    else:
        assert version.manifest.digest == MANIFEST.digest, "content cannot be changed unnoticed"
