"""Attacks on a handle by a process of the same user: what is no message ends the connection."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import msgspec
import pytest
from attack_tools import envelope, everything_said, framed, knock, nothing_changes
from core_tools import TIMEOUT_SECONDS, Background, num_fds, wait_until
from e2e_server import Server

from checkpoint_engine import ParameterServer, engine_requests
from checkpoint_engine.errors import ProtocolError, RemoteError, UpdateFailed
from checkpoint_engine.manifest import Version
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.handover import Hold, LetGo
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    Deadlines,
    FromSession,
    Hello,
    Offer,
    Proceed,
    Ready,
    Vote,
    Withdrawn,
)
from checkpoint_engine.update.relay import Relay

HELLO = Hello(protocol=PROTOCOL, replica="r", engine="e", rank=0, world_size=1)
READY = Ready(way_back="none")
APPLIED = Applied(digest="0" * 64, served_digest="0" * 64)
WITHDRAWN = Withdrawn(error=RemoteError(type="T", message="no"))
OFFER = Offer(
    update="u", epoch=1, version=Version(label="v", digest="d"), manifest=b"", parts=(),
    deadlines=Deadlines.of(60, 0),
)  # fmt: skip
GREETING = envelope(HELLO)
TAGGED = b"\x82\xa4type\xa5Ready\xa8way_back"  # {"type": "Ready", "way_back": ...

REFUSED: dict[str, tuple[bytes, str]] = {
    "too long": (struct.pack("<I", (256 << 20) + 1), "larger than any message"),
    "longest": (b"\xff" * 4, "larger than any message"),
    "empty": (framed(b""), "malformed"),
    "no envelope": (framed(b"\xc0"), "malformed"),
    "a pickle": (
        framed(b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00\x8c\x01x\x94."),
        "malformed",
    ),
    "short envelope": (framed(msgspec.msgpack.encode(("", 0, 0))), "malformed"),
    "trailing bytes": (framed(GREETING[4:] + b"\xc0"), "malformed"),
    "update of a wrong type": (envelope(HELLO, update=1), "malformed"),
    "epoch of a wrong type": (envelope(HELLO, epoch="1"), "malformed"),
    "sequence of a wrong type": (envelope(HELLO, sequence=None), "malformed"),
    "no body": (envelope(None), "malformed"),
    "a body of another direction": (envelope(Proceed(step="publish")), "malformed"),
    "a body of no kind": (envelope({"way_back": "none"}), "malformed"),
    "a field of a wrong type": (envelope({"type": "Ready", "way_back": 5}), "malformed"),
    "a missing field": (envelope({"type": "Ready"}), "malformed"),
    "no utf-8": (envelope(None, raw=TAGGED + b"\xa1\xff"), "malformed"),
    "no utf-8 around it": (framed(b"\x94\xa1\xff\x00\x00\xc0"), "malformed"),
    "a body that claims too much": (envelope(None, raw=TAGGED + b"\xdb\xff\xff\xff\xffx"), "malf"),
    "deep nesting": (
        envelope(None, raw=b"\x82\xa4type\xa5Ready\xa4more" + b"\x91" * 100_000 + b"\xc0"),
        "malformed",
    ),
    "deep nesting around it": (framed(b"\x91" * 100_000 + b"\xc0"), "malformed"),
    "one too early": (envelope(HELLO, sequence=1), "message 1 arrived where 0 was due"),
    "a negative sequence": (envelope(HELLO, sequence=-1), "where 0 was due"),
}


@pytest.fixture
def ends() -> Iterator[tuple[Channel[Any], socket.socket]]:
    """A rank's channel, and the bare socket of its peer."""
    one, other = socket.socketpair()
    channel: Channel[Any] = Channel(one, FromSession | Hold | LetGo)
    yield channel, other
    channel.close()
    other.close()


# What the channel says of it


@pytest.mark.parametrize("name", REFUSED)
def test_a_frame_that_is_no_message(ends: tuple[Channel[Any], socket.socket], name: str) -> None:
    channel, peer = ends
    frame, message = REFUSED[name]
    peer.sendall(frame)
    with pytest.raises(ProtocolError, match=message):
        channel.receive(TIMEOUT_SECONDS)


def test_replayed_and_reordered_messages(ends: tuple[Channel[Any], socket.socket]) -> None:
    channel, peer = ends
    for number in range(3):
        peer.sendall(envelope(HELLO, sequence=number))
        channel.receive(TIMEOUT_SECONDS)
    for number in (2, 0, 4):
        peer.sendall(envelope(HELLO, sequence=number))
        with pytest.raises(ProtocolError, match=f"message {number} arrived where 3 was due"):
            channel.receive(TIMEOUT_SECONDS)


@pytest.mark.parametrize(("update", "epoch"), [("other", 7), ("mine", 6), ("mine", 8), ("", 0)])
def test_messages_of_another_update(
    ends: tuple[Channel[Any], socket.socket], update: str, epoch: int
) -> None:
    channel, peer = ends
    channel.bind("mine", 7)
    peer.sendall(envelope(HELLO, update="mine", epoch=7))
    assert channel.receive(TIMEOUT_SECONDS) == HELLO
    peer.sendall(envelope(HELLO, update=update, epoch=epoch, sequence=1))
    with pytest.raises(ProtocolError, match=f"of update {update!r} .epoch {epoch}. arrived in"):
        channel.receive(TIMEOUT_SECONDS)


def pipe_ends(num_pipes: int) -> list[int]:
    return [end for _ in range(num_pipes) for end in os.pipe()]


def send_with(peer: socket.socket, data: bytes, descriptors: Sequence[int]) -> None:
    rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))
    peer.sendmsg([data], [rights])


@pytest.mark.usefixtures("no_garbage")
@pytest.mark.parametrize("num_pipes", [3, 20])
def test_more_descriptors_than_any_message_has(
    ends: tuple[Channel[Any], socket.socket], num_pipes: int
) -> None:
    channel, peer = ends
    fds = num_fds()
    sent = pipe_ends(num_pipes)
    send_with(peer, GREETING, sent)
    for end in sent:
        os.close(end)
    with pytest.raises(ProtocolError, match="more descriptors than any message has"):
        channel.receive(TIMEOUT_SECONDS)
    channel.close()
    assert num_fds() == fds - 1


@pytest.mark.usefixtures("no_garbage")
def test_descriptors_that_nobody_takes_do_not_pile_up(
    ends: tuple[Channel[Any], socket.socket],
) -> None:
    channel, peer = ends
    fds = num_fds()
    sent = pipe_ends(1)

    def flood() -> None:
        for number in range(10):
            send_with(peer, envelope(HELLO, sequence=number), sent)
            channel.receive(TIMEOUT_SECONDS)

    with pytest.raises(ProtocolError, match="more descriptors than any message has"):
        flood()
    assert num_fds() < fds + 10
    channel.close()
    for end in sent:
        os.close(end)
    assert num_fds() == fds - 1


# What it does to a real server


def num_sessions() -> int:
    return sum(thread.name == "ckpt-session" for thread in threading.enumerate())


@pytest.mark.parametrize("name", REFUSED)
def test_a_server_hangs_up_and_keeps_what_it_has(server: ParameterServer, name: str) -> None:
    before = server.get_metas()
    with knock(before[0]["address"]) as connection:
        connection.sendall(REFUSED[name][0])
        assert everything_said(connection) == b""
    wait_until(lambda: num_sessions() == 0)
    assert server.get_metas() == before


@pytest.mark.parametrize(
    "segment", ["", "../../etc/passwd", "/etc/passwd", "0", "\0", "x" * 10_000]
)
def test_a_lease_of_what_is_no_segment(server: ParameterServer, segment: str) -> None:
    with knock(server.get_metas()[0]["address"]) as connection:
        connection.sendall(envelope(Hold(segment)))
        data, rights, _, _ = connection.recvmsg(1 << 16, 1 << 10)
        assert b"the segment is gone" in data
        assert rights == []
        assert everything_said(connection) == b""
    wait_until(lambda: num_sessions() == 0)


@pytest.mark.parametrize(
    "vote",
    [Ready(way_back="none"), Applied(digest=None, served_digest=None), Confirmed(pause_seconds=0)],
    ids=lambda vote: type(vote).__name__,
)
def test_a_vote_in_no_update(server: ParameterServer, vote: msgspec.Struct) -> None:
    with knock(server.get_metas()[0]["address"]) as connection:
        connection.sendall(envelope(vote))
        assert b"no update is under way at this handle" in everything_said(connection)


def throw_everything(address: str) -> None:
    for frame, _ in REFUSED.values():
        with knock(address) as connection:
            connection.sendall(frame)
            assert everything_said(connection) == b""
    with knock(address) as connection:
        connection.sendall(GREETING[:-1])  # and dies


def test_an_update_goes_through_in_the_middle_of_it(
    server: ParameterServer, unguarded: Server
) -> None:
    call = honest_call(unguarded)

    def attacked(handles: Any) -> None:
        throw_everything(handles[0][1])
        call(handles)
        throw_everything(handles[0][1])

    report = server.update("v1", attacked, weight_version="attacked")
    assert report.outcome == "published"
    assert [replica.outcome for replica in report.replicas] == ["published"]
    info = unguarded.info()
    assert (info["weight_version"], info["digest"]) == ("attacked", report.digest)


@pytest.mark.parametrize(
    "vote",
    [
        READY,
        APPLIED,
        Confirmed(pause_seconds=0),
        HELLO,
    ],
    ids=lambda vote: type(vote).__name__,
)
def test_votes_out_of_order_publish_nothing(
    server: ParameterServer, unguarded: Server, vote: msgspec.Struct
) -> None:
    """A worker that never applied says that it has, and goes; the other keeps its version."""
    call = honest_call(unguarded)

    def attacked(handles: Any) -> None:
        honest = Background(lambda: call(handles))
        with knock(handles[0][1]) as connection:
            connection.sendall(GREETING)
            (length,) = struct.unpack("<I", connection.recv(4, socket.MSG_WAITALL))
            offer = msgspec.msgpack.decode(connection.recv(length, socket.MSG_WAITALL))
            wait_until(lambda: num_sessions() >= 2)
            for sequence in (1, 2, 3):
                sent = envelope(vote, update=offer[0], epoch=offer[1], sequence=sequence)
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(sent)
        honest.result()

    with nothing_changes(unguarded), pytest.raises(UpdateFailed, match=r"aborted|rolled back"):
        server.update("v1", attacked, timeout=timedelta(seconds=60))


@pytest.mark.parametrize("before", [[], [READY], [READY, APPLIED]], ids=len)
@pytest.mark.parametrize("vote", [READY, APPLIED, WITHDRAWN], ids=lambda vote: type(vote).__name__)
def test_nobody_votes_after_a_no(before: list[Vote], vote: Vote) -> None:
    relay = Relay(0, OFFER)
    name, _ = relay.joined(HELLO)
    for one in (*before, WITHDRAWN):
        relay.voted(name, one)
    with pytest.raises(ProtocolError, match="came after a no"):
        relay.voted(name, vote)
    assert relay.is_open(name), "it is still to hear whether it is quarantined"


def honest_call(replica: Server) -> Callable[[Any], None]:
    (call,) = engine_requests([replica.endpoint], rank=0, world_size=1, timeout_seconds=60)
    return call
