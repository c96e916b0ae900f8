"""Typed messages over one Unix socket, descriptors included.

A channel carries the control messages of one session. A frame is a length and a msgpack-encoded
envelope (update id, epoch, sequence, body); a body is one of the structs that the channel was
made for, so whatever else arrives is refused before anything is built from it. Nothing is
unpickled.

One stream socket does what a message queue and a second socket for descriptors would do, and
tells what those cannot: the kernel reports at once when the peer dies, and who it is.

    channel = Channel(connect(address, 5), receives=FromRank)
    channel.send(Hello(...))
    offer = channel.receive(timeout_seconds=30)
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec

from checkpoint_engine.errors import (
    MALFORMED,
    DeadlineExceeded,
    ForeignPeer,
    PeerLost,
    ProtocolError,
)
from checkpoint_engine.transport.sockets import peer_name

__all__ = ["Channel"]

MAX_FRAME_BYTES = 256 << 20
MAX_DESCRIPTORS = 4
LENGTH = struct.Struct("<I")
ZEROMQ = b"\xff\0\0\0\0"  # how its greeting begins; no frame does, which goes on with an array

Body = TypeVar("Body")


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """What surrounds every body, so that late, replayed and reordered messages are noticed."""

    update: str
    epoch: int
    sequence: int
    body: msgspec.Raw


class Channel(Generic[Body]):
    """One end of a session. Owns its socket.

    `send` may be called from any thread, `receive` from one.

    Args:
        connection: a connected stream socket.
        receives: the union of message structs that the peer may send.
    """

    def __init__(self, connection: socket.socket, receives: Any) -> None:
        connection.setblocking(False)
        self._socket = connection
        self._decoder: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(receives)
        self._envelopes = msgspec.msgpack.Decoder(_Envelope)
        self._lock = threading.Lock()
        self._num_sent = self._num_received = 0
        self._descriptors: list[int] = []
        self._received = bytearray()  # of the frame that is coming in
        self._cut = False  # whether a part of a frame was sent, and not the rest
        self.update, self.epoch = "", 0

    @property
    def ended(self) -> bool:
        """Whether the peer is gone, or has sent something that nobody waited for."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def bind(self, update: str, epoch: int) -> None:
        """Carry only messages of this update from here on; the peer is bound by the next one."""
        self.update, self.epoch = update, epoch

    def send(
        self, body: msgspec.Struct, descriptors: Sequence[int] = (), timeout_seconds: float = 30
    ) -> None:
        """Send one message, and copies of `descriptors` with it.

        Raises:
            PeerLost: the peer is gone.
            DeadlineExceeded: the peer does not read.
        """
        with self._lock:
            raw = msgspec.Raw(msgspec.msgpack.encode(body))
            envelope = _Envelope(self.update, self.epoch, self._num_sent, raw)
            frame = msgspec.msgpack.encode(envelope)
            assert len(frame) <= MAX_FRAME_BYTES, "no message is as large as this"
            self._num_sent += 1
            self._write(LENGTH.pack(len(frame)) + frame, descriptors, timeout_seconds)

    def receive(self, timeout_seconds: float) -> Body:
        """The next message.

        Raises:
            PeerLost: the peer closed the connection or died.
            ProtocolError: what arrived is malformed, replayed, or of another update or epoch.
            ForeignPeer: the peer speaks ZeroMQ.
            DeadlineExceeded: nothing whole arrived in time.
        """
        deadline = time.monotonic() + timeout_seconds
        self._fill(LENGTH.size, deadline)
        (length,) = LENGTH.unpack(self._received[: LENGTH.size])
        if length > MAX_FRAME_BYTES:
            raise ProtocolError(f"a frame of {length} bytes is larger than any message")
        self._fill(LENGTH.size + length, deadline)
        frame, self._received = bytes(self._received[LENGTH.size :]), bytearray()
        return self._open(frame)

    def take_descriptor(self) -> int:
        """The oldest descriptor received and not yet taken; the caller owns it.

        Raises:
            ProtocolError: the peer sent none.
        """
        if not self._descriptors:
            raise ProtocolError("the peer sent no descriptor with its message")
        return self._descriptors.pop(0)

    def close(self) -> None:
        """Close the socket, which the peer notices at once, and descriptors not taken."""
        while self._descriptors:
            os.close(self._descriptors.pop())
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes a thread that waits in receive
        self._socket.close()

    def _open(self, frame: bytes) -> Body:
        try:
            envelope = self._envelopes.decode(frame)
            body = self._decoder.decode(envelope.body)
        except MALFORMED as error:
            raise ProtocolError(f"a malformed message: {error}") from error
        if envelope.sequence != self._num_received:
            raise ProtocolError(
                f"message {envelope.sequence} arrived where {self._num_received} was due"
            )
        if self.update and (envelope.update, envelope.epoch) != (self.update, self.epoch):
            raise ProtocolError(
                f"a message of update {envelope.update!r} (epoch {envelope.epoch}) arrived in "
                f"{self.update!r} (epoch {self.epoch})"
            )
        self._num_received += 1
        self.update, self.epoch = envelope.update, envelope.epoch
        return body

    def _write(self, frame: bytes, descriptors: Sequence[int], timeout_seconds: float) -> None:
        deadline = time.monotonic() + timeout_seconds
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        unsent = memoryview(frame)
        if self._cut:
            raise PeerLost("an earlier message was cut off by its deadline")
        self._cut = True
        while unsent:
            self._wait(select.POLLOUT, deadline)
            try:
                sent = self._socket.sendmsg([unsent], rights if descriptors else [])
            except OSError as error:
                raise PeerLost(f"the peer is gone: {error}") from error
            unsent, descriptors = unsent[sent:], ()
        self._cut = False

    def _wait(self, event: int, deadline: float) -> None:
        """Poll rather than use the socket's own timeout, which both directions would share."""
        poll = select.poll()
        try:
            poll.register(self._socket, event)
        except ValueError as error:
            raise PeerLost("the connection is closed") from error
        if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise DeadlineExceeded("the peer neither sent nor read anything in time")

    def _fill(self, length: int, deadline: float) -> None:
        """Receive until the frame has `length` bytes; what came stays after a deadline."""
        space = socket.CMSG_SPACE(MAX_DESCRIPTORS * array.array("i").itemsize)
        while len(self._received) < length:
            self._wait(select.POLLIN, deadline)
            try:
                data, ancillary, flags, _ = self._socket.recvmsg(
                    min(length - len(self._received), 1 << 20), space, socket.MSG_CMSG_CLOEXEC
                )
            except OSError as error:
                raise PeerLost(f"the connection to the peer broke: {error}") from error
            self._keep_descriptors(ancillary, flags)
            if not data:
                raise PeerLost("the peer closed the connection or died")
            self._received += data
            if self._received.startswith(ZEROMQ):
                raise ForeignPeer(
                    f"{peer_name(self._socket)} speaks ZeroMQ, as MoonshotAI's checkpoint-engine "
                    "does: use this package on both sides"
                )

    def _keep_descriptors(self, ancillary: Sequence[tuple[int, int, bytes]], flags: int) -> None:
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                self._descriptors.extend(received)
        if flags & socket.MSG_CTRUNC or len(self._descriptors) > MAX_DESCRIPTORS:
            raise ProtocolError("the peer sent more descriptors than any message has")
