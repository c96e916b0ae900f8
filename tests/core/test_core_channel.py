"""Typed messages over a stream socket: whole, in order, once, and nothing leaks."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from core_tools import PROPERTY, TIMEOUT_SECONDS, Background, num_fds, pattern
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import DeadlineExceeded, PeerLost, ProtocolError
from checkpoint_engine.transport.channel import Channel

pytestmark = pytest.mark.usefixtures("no_garbage")


class Text(msgspec.Struct, frozen=True, tag=True):
    text: str


class Numbers(msgspec.Struct, frozen=True, tag=True):
    numbers: tuple[int, ...]
    blob: bytes = b""


Message = Text | Numbers


def envelope(body: Any, sequence: int = 0) -> bytes:
    """A frame as a channel sends it."""
    content = msgspec.msgpack.encode(("", 0, sequence, msgspec.Raw(msgspec.msgpack.encode(body))))
    return struct.pack("<I", len(content)) + content


HELLO = envelope(Text("hello"))


@pytest.fixture
def ends() -> Iterator[tuple[Channel[Message], socket.socket]]:
    """A channel, and the bare socket of its peer."""
    one, other = socket.socketpair()
    channel: Channel[Message] = Channel(one, Message)
    yield channel, other
    channel.close()
    other.close()


@pytest.fixture
def channels() -> Iterator[tuple[Channel[Message], Channel[Message]]]:
    one, other = socket.socketpair()
    pair: tuple[Channel[Message], Channel[Message]] = Channel(one, Message), Channel(other, Message)
    yield pair
    for channel in pair:
        channel.close()


# Round trips


@PROPERTY
@given(st.lists(st.builds(Text, st.text()) | st.builds(Numbers, st.tuples(st.integers(0, 9)))))
def test_messages_arrive_whole_and_in_order(messages: list[Message]) -> None:
    one, other = socket.socketpair()
    sender: Channel[Message] = Channel(one, Message)
    receiver: Channel[Message] = Channel(other, Message)
    sender.bind("update", 7)
    for message in messages:
        sender.send(message)
        assert receiver.receive(TIMEOUT_SECONDS) == message
        assert (receiver.update, receiver.epoch) == ("update", 7), "bound by its peer"
    sender.close()
    receiver.close()


def test_a_message_larger_than_the_sockets_buffers(
    channels: tuple[Channel[Message], Channel[Message]],
) -> None:
    sender, receiver = channels
    message = Numbers((1, 2), pattern(20 << 20))
    sending = Background(lambda: sender.send(message))
    assert receiver.receive(TIMEOUT_SECONDS) == message
    sending.result()


def test_both_directions_at_once(channels: tuple[Channel[Message], Channel[Message]]) -> None:
    one, other = channels
    big = Numbers((), pattern(4 << 20))
    sending = [Background(lambda channel=channel: channel.send(big)) for channel in channels]
    assert one.receive(TIMEOUT_SECONDS) == other.receive(TIMEOUT_SECONDS) == big
    for done in sending:
        done.result()


def test_many_threads_may_send(channels: tuple[Channel[Message], Channel[Message]]) -> None:
    sender, receiver = channels

    def send(number: int) -> None:
        for count in range(50):
            sender.send(Numbers((number, count), pattern(3000)))

    sending = [Background(lambda number=number: send(number)) for number in range(4)]
    received = [receiver.receive(TIMEOUT_SECONDS) for _ in range(200)]
    for done in sending:
        done.result()
    for number in range(4):
        counts = [
            message.numbers[1]
            for message in received
            if isinstance(message, Numbers) and message.numbers[0] == number
        ]
        assert counts == list(range(50))


@pytest.mark.parametrize("split", range(1, len(HELLO)))
def test_frames_may_arrive_in_pieces(
    ends: tuple[Channel[Message], socket.socket], split: int
) -> None:
    channel, peer = ends
    peer.sendall(HELLO[:split])
    receiving = Background(lambda: channel.receive(TIMEOUT_SECONDS))
    peer.sendall(HELLO[split:] + envelope(Text("again"), sequence=1)[:3])
    assert receiving.result() == Text("hello")


def pipe_ends(num_pipes: int) -> list[int]:
    return [end for _ in range(num_pipes) for end in os.pipe()]


def test_descriptors_arrive_as_copies_in_order(
    channels: tuple[Channel[Message], Channel[Message]],
) -> None:
    sender, receiver = channels
    fds = num_fds()
    read, write = os.pipe()
    sender.send(Text("two"), (read, write))
    os.close(read)
    os.close(write)
    assert receiver.receive(TIMEOUT_SECONDS) == Text("two")
    read, write = receiver.take_descriptor(), receiver.take_descriptor()
    assert not os.get_inheritable(read)
    os.write(write, b"through")
    assert os.read(read, 10) == b"through"
    os.close(read)
    os.close(write)
    assert num_fds() == fds
    with pytest.raises(ProtocolError, match="sent no descriptor"):
        receiver.take_descriptor()


def test_a_message_sent_in_many_pieces_brings_its_descriptors_once(
    channels: tuple[Channel[Message], Channel[Message]],
) -> None:
    sender, receiver = channels
    message = Numbers((), pattern(20 << 20))
    sending = Background(lambda: sender.send(message, (0,)))
    assert receiver.receive(TIMEOUT_SECONDS) == message
    sending.result()
    os.close(receiver.take_descriptor())
    with pytest.raises(ProtocolError, match="sent no descriptor"):
        receiver.take_descriptor()


def test_close_closes_descriptors_that_nobody_took(
    channels: tuple[Channel[Message], Channel[Message]],
) -> None:
    sender, receiver = channels
    ends = pipe_ends(2)
    sender.send(Text("four"), ends)
    fds = num_fds()
    assert receiver.receive(TIMEOUT_SECONDS) == Text("four")
    assert num_fds() == fds + 4
    receiver.close()
    receiver.close()
    assert num_fds() == fds - 1
    for end in ends:
        os.close(end)


# Deadlines and deaths


def test_silence(ends: tuple[Channel[Message], socket.socket]) -> None:
    with pytest.raises(DeadlineExceeded, match="neither sent nor read"):
        ends[0].receive(0.01)


@pytest.mark.parametrize("split", [1, 4, 5, len(HELLO) - 1])
def test_a_deadline_in_the_middle_of_a_frame_loses_nothing(
    ends: tuple[Channel[Message], socket.socket], split: int
) -> None:
    """Leases poll: the next call must go on where the last one gave up."""
    channel, peer = ends
    peer.sendall(HELLO[:split])
    with pytest.raises(DeadlineExceeded):
        channel.receive(0.01)
    peer.sendall(HELLO[split:])
    assert channel.receive(1) == Text("hello")


def test_a_peer_that_does_not_read(ends: tuple[Channel[Message], socket.socket]) -> None:
    channel, _ = ends
    with pytest.raises(DeadlineExceeded, match="neither sent nor read"):
        channel.send(Numbers((), pattern(4 << 20)), timeout_seconds=0.05)


def test_nothing_follows_half_a_message(ends: tuple[Channel[Message], socket.socket]) -> None:
    """Half a frame is on its way: whatever were sent after it would be read as its rest."""
    channel, peer = ends
    with pytest.raises(DeadlineExceeded):
        channel.send(Numbers((), pattern(4 << 20)), timeout_seconds=0.05)
    peer.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while peer.recv(1 << 20):
            pass
    with pytest.raises(PeerLost):
        channel.send(Text("after"), timeout_seconds=1)


@pytest.mark.parametrize("sent", [b"", HELLO[:2], HELLO[:4], HELLO[:-1]], ids=len)
def test_a_peer_that_dies_in_the_middle(
    ends: tuple[Channel[Message], socket.socket], sent: bytes
) -> None:
    channel, peer = ends
    peer.sendall(sent)
    peer.close()
    with pytest.raises(PeerLost, match="closed the connection or died"):
        channel.receive(TIMEOUT_SECONDS)


def test_a_peer_that_dies_is_noticed_while_one_waits(
    ends: tuple[Channel[Message], socket.socket],
) -> None:
    channel, peer = ends
    receiving = Background(lambda: channel.receive(TIMEOUT_SECONDS))
    peer.close()
    with pytest.raises(PeerLost):
        receiving.result()


def test_sending_to_a_peer_that_is_gone(ends: tuple[Channel[Message], socket.socket]) -> None:
    channel, peer = ends
    peer.close()
    with pytest.raises(PeerLost, match="the peer is gone"):
        channel.send(Text("hello"))


def test_closing_wakes_who_waits(ends: tuple[Channel[Message], socket.socket]) -> None:
    channel, _ = ends
    receiving = Background(lambda: channel.receive(TIMEOUT_SECONDS))
    assert not receiving.is_done(within_seconds=0.05)
    channel.close()
    with pytest.raises(PeerLost):
        receiving.result()


def test_a_closed_channel(ends: tuple[Channel[Message], socket.socket]) -> None:
    channel, _ = ends
    channel.close()
    with pytest.raises(PeerLost):
        channel.receive(1)
    with pytest.raises(PeerLost):
        channel.send(Text("hello"))
