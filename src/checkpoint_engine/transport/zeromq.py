"""Peer reads over ZeroMQ: the transport that is always there.

A thread of the source answers requests for byte ranges with frames that point into the segment:
nothing is copied there, and ZeroMQ's own thread sends them. A reader has a bounded number of
requests under way, so neither side ever buffers more than that. Every request carries the ticket
of one lease. The bytes travel in the clear, and are checked by whoever reads them.

    exporter = ZeroMqExporter("10.0.0.1")
    way = exporter.export(segment)
    for arrived in ZeroMqReader(own_segment).read(way, ranges, timeout_seconds=60): ...
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator, Sequence
from typing import ClassVar

import msgspec
import zmq

from checkpoint_engine.errors import (
    MALFORMED,
    PeerLost,
    ProtocolError,
    TransferError,
    UsageError,
)
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.line import Context, Line
from checkpoint_engine.transport.peer import Range, Way
from checkpoint_engine.transport.responder import Responder

__all__ = ["ZeroMqExporter", "ZeroMqReader", "exporter", "missing", "preferred", "reader"]

PIECE_BYTES = 1 << 20
NUM_PIECES_UNDER_WAY = 16
MAX_REQUEST_BYTES = 1024


class _Read(msgspec.Struct, frozen=True, array_like=True):
    """Reader to source: `length` bytes from `start` of the segment that the ticket is for."""

    ticket: bytes
    start: int
    length: int


class ZeroMqExporter:
    """Answers reads at a port of its own on `address`, in a thread of its own."""

    transport: ClassVar[str] = "zeromq"

    def __init__(self, address: str) -> None:
        self._segments: dict[bytes, Segment] = {}
        self._responder = Responder(name="ckpt-peer-data", max_request_bytes=MAX_REQUEST_BYTES)
        try:
            self._responder.start(address, self._respond)
        except UsageError as error:
            raise TransferError(str(error)) from error

    def export(self, segment: Segment) -> Way:
        """A way with a new ticket; see `Exporter`."""
        ticket = secrets.token_bytes(16)
        self._segments[ticket] = segment
        return Way(transport=self.transport, address=self._responder.address, detail=ticket)

    def withdraw(self, way: Way) -> None:
        """Forget the ticket; frames that are being sent go out as the bytes are by then."""
        self._segments.pop(way.detail, None)

    def close(self) -> None:
        """End the thread and the socket."""
        self._responder.close()
        self._segments.clear()

    def _respond(self, peer: bytes, frames: Sequence[bytes]) -> None:
        self._responder.send(peer, *self._answer(frames))

    def _answer(self, frames: Sequence[bytes]) -> list[bytes | memoryview]:
        """The request again and its bytes; the request alone if it is refused."""
        request = frames[0] if len(frames) == 1 else b""
        try:
            wanted = msgspec.msgpack.decode(request, type=_Read)
        except MALFORMED:
            return [request]
        segment = self._segments.get(wanted.ticket)
        within = segment is not None and 0 <= wanted.start <= segment.capacity_bytes - wanted.length
        if segment is None or not within or not 0 < wanted.length <= PIECE_BYTES:
            return [request]
        return [request, segment.memory[wanted.start : wanted.start + wanted.length]]


class ZeroMqReader:
    """Reads into one segment; every call of `read` has a connection of its own."""

    transport: ClassVar[str] = "zeromq"

    def __init__(self, segment: Segment) -> None:
        self._memory = segment.memory
        self._context = Context()

    def read(self, way: Way, ranges: Sequence[Range], timeout_seconds: float) -> Iterator[Range]:
        """Fetch ranges in pieces, in order; see `Reader`."""
        line = Line(self._context, way.address, max_message_bytes=PIECE_BYTES)
        try:
            unasked = deque(_pieces(ranges))
            asked: deque[tuple[bytes, Range, Range | None]] = deque()
            while asked or unasked:
                while unasked and len(asked) < NUM_PIECES_UNDER_WAY:
                    piece, ends = unasked.popleft()
                    request = msgspec.msgpack.encode(_Read(way.detail, piece.start, piece.length))
                    line.socket.send(request)
                    asked.append((request, piece, ends))
                request, piece, ends = asked.popleft()
                into = self._memory[piece.place : piece.place + piece.length]
                _receive(line, request, into, timeout_seconds)
                if ends is not None:
                    yield ends
        finally:
            line.close()

    def close(self) -> None:
        """Let go of the segment."""
        self._memory = memoryview(b"")
        self._context.destroy(linger=0)


def exporter(address: str) -> ZeroMqExporter:
    """Listens at this address."""
    return ZeroMqExporter(address)


def reader(segment: Segment, address: str) -> ZeroMqReader:
    """Reads from wherever the way leads."""
    return ZeroMqReader(segment)


def missing() -> str:
    """Nothing."""
    return ""


def preferred() -> bool:
    """It is what the others are measured by."""
    return False


def _receive(line: Line, request: bytes, into: memoryview, timeout_seconds: float) -> None:
    """The answer to the oldest request that has none; written where it belongs."""
    if line.receive(timeout_seconds) != request:
        raise ProtocolError(f"the source at {line.address} answered what was not asked")
    if not line.socket.getsockopt(zmq.RCVMORE):
        raise PeerLost(f"the source at {line.address} has ended the lease")
    num_bytes = line.socket.recv_into(into)
    if num_bytes != len(into) or line.socket.getsockopt(zmq.RCVMORE):
        raise ProtocolError(f"the source at {line.address} sent another length than was asked")


def _pieces(ranges: Sequence[Range]) -> Iterator[tuple[Range, Range | None]]:
    """Ranges in pieces, each with the range that it completes, if it does."""
    for wanted in ranges:
        for done in range(0, wanted.length, PIECE_BYTES):
            length = min(PIECE_BYTES, wanted.length - done)
            piece = Range(wanted.start + done, wanted.place + done, length)
            yield piece, wanted if done + length == wanted.length else None
