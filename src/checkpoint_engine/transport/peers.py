"""Who may read this process's memory: a source's control, and the client that asks it.

A source listens at one address, encrypted with ZeroMQ's CURVE. Its peers know its public key and
its ticket from the metas that they were given; whoever does not is not answered. They ask what is
published, and lease segments: while a lease is renewed, the bytes are neither overwritten nor
freed, and the ways that come with it lead to them. All this is done by one thread, whatever the
source's own threads do.

    server = PeerServer(own_address(), store.segment, describe)
    ...
    with PeerClient(server.peer) as client:
        description = client.describe()
        lease = client.lease(segment)          # renewed while the client is open
"""

from __future__ import annotations

import contextlib
import hmac
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import zmq

from checkpoint_engine.errors import (
    MALFORMED,
    CheckpointEngineError,
    HandoverError,
    ProtocolError,
    StoreError,
)
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.line import Context, Line
from checkpoint_engine.transport.peer import Exporter, Way
from checkpoint_engine.transport.responder import Responder
from checkpoint_engine.transport.transports import exporters

__all__ = ["Leased", "Peer", "PeerClient", "PeerServer"]

LEASE_SECONDS = 30.0  # without a word from its holder
RENEW_SECONDS = 5
GOODBYE_MILLISECONDS = 200
ANSWER_SECONDS = 10.0
MAX_REQUEST_BYTES = 4096
MAX_ANSWER_BYTES = 256 << 20


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """Where a source is asked, and the secrets that it takes: plain data, to be kept secret.

    Attributes:
        address: host and port.
        key: its public CURVE key, as ZeroMQ writes it.
        ticket: whoever knows it may read all that is registered there.
    """

    address: str
    key: str
    ticket: str


class _Request(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int
    ticket: str


class Describe(_Request, frozen=True):
    """What is there to read."""

    topic: str


class Lease(_Request, frozen=True):
    """Keep this segment as it is, and tell me the ways to it."""

    segment: str


class Renew(_Request, frozen=True):
    """I still read."""

    lease: str


class Return(_Request, frozen=True):
    """I have read enough."""

    lease: str


class _Answer(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int


class Described(_Answer, frozen=True):
    """The source's own words."""

    description: bytes


class Leased(_Answer, frozen=True):
    """A lease, and the ways to its bytes, best first."""

    lease: str
    ways: tuple[Way, ...]


class Done(_Answer, frozen=True):
    """So be it."""


class Refused(_Answer, frozen=True):
    """It cannot be, and why."""

    reason: str


Answer = Described | Leased | Done | Refused
REQUESTS = msgspec.msgpack.Decoder(Describe | Lease | Renew | Return)
ANSWERS: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)
Found = TypeVar("Found", bound=_Answer)


@dataclass
class _Holder:
    segment: Segment
    ways: list[tuple[Exporter, Way]]
    heard_at: float


class PeerServer:
    """A source's control, at a port of its own on one address.

    Args:
        address: of this host, as its peers reach it.
        segment: finds a segment of the store by name.
        describe: what to answer to `describe(topic)`; called from the server's thread.
    """

    def __init__(
        self,
        address: str,
        segment: Callable[[str], Segment | None],
        describe: Callable[[str], bytes],
    ) -> None:
        self._host, self._segment, self._describe = address, segment, describe
        self._exporters: list[Exporter] | None = None
        self._holders: dict[str, _Holder] = {}
        public, private = zmq.curve_keypair()
        self._responder = Responder(
            name="ckpt-peer", max_request_bytes=MAX_REQUEST_BYTES, private_key=private
        )
        self._responder.start(
            address,
            self._respond,
            on_turn=self._expire,
            milliseconds=lambda: 1000 * RENEW_SECONDS,
            on_end=self._end_all,
        )
        ticket = secrets.token_hex(32)
        self.peer = Peer(address=self._responder.address, key=public.decode(), ticket=ticket)

    def close(self) -> None:
        """Stop listening, and end every lease."""
        self._responder.close()

    def _respond(self, peer: bytes, frames: Sequence[bytes]) -> None:
        answer = self._answer(frames[0]) if len(frames) == 1 else None
        if answer is not None:
            self._responder.send(peer, msgspec.msgpack.encode(answer))

    def _expire(self) -> None:
        silent_since = time.monotonic() - LEASE_SECONDS
        for name, holder in tuple(self._holders.items()):
            if holder.heard_at < silent_since:
                self._end(name)

    def _end_all(self) -> None:
        for name in tuple(self._holders):
            self._end(name)
        for exporter in self._exporters or ():
            exporter.close()

    def _answer(self, frame: bytes) -> Answer | None:
        """None for whoever does not know the ticket, or does not speak this."""
        try:
            request = REQUESTS.decode(frame)
        except MALFORMED:
            return None
        if not hmac.compare_digest(request.ticket.encode(), self.peer.ticket.encode()):
            return None
        try:
            return self._perform(request)
        except (CheckpointEngineError, OSError) as error:
            return Refused(number=request.number, reason=str(error))

    def _perform(self, request: _Request) -> Answer:
        number = request.number
        if isinstance(request, Describe):
            return Described(number=number, description=self._describe(request.topic))
        if isinstance(request, Lease):
            return self._lease(number, request.segment)
        assert isinstance(request, (Renew, Return)), "there is no other request"
        if request.lease not in self._holders:
            return Refused(number=number, reason="the lease has ended")
        if isinstance(request, Renew):
            self._holders[request.lease].heard_at = time.monotonic()
        else:
            self._end(request.lease)
        return Done(number=number)

    def _lease(self, number: int, name: str) -> Leased:
        segment = self._segment(name)
        if segment is None:
            raise StoreError("the segment is gone: its version was unregistered")
        if self._exporters is None:
            self._exporters = exporters(self._host)
        segment.acquire()
        lease = secrets.token_hex(16)
        holder = self._holders[lease] = _Holder(segment, [], time.monotonic())
        try:
            for exporter in self._exporters:
                holder.ways.append((exporter, exporter.export(segment)))
        except BaseException:
            self._end(lease)
            raise
        return Leased(number=number, lease=lease, ways=tuple(way for _, way in holder.ways))

    def _end(self, lease: str) -> None:
        holder = self._holders.pop(lease)
        for exporter, way in holder.ways:
            exporter.withdraw(way)
        holder.segment.release()


class PeerClient:
    """A connection to a source. Its leases are renewed by a thread, and end with it.

    Args:
        peer: the source.
        timeout_seconds: the longest wait for an answer.
    """

    def __init__(self, peer: Peer, timeout_seconds: float = ANSWER_SECONDS) -> None:
        self.peer = peer
        self._timeout_seconds = timeout_seconds
        self._lock = threading.Lock()
        self._num_requests = 0
        self._leases: list[str] = []
        self._closed = threading.Event()
        self._renewing: threading.Thread | None = None
        self._context = Context()
        try:
            self._line = Line(
                self._context,
                peer.address,
                max_message_bytes=MAX_ANSWER_BYTES,
                server_key=peer.key.encode(),
            )
        except HandoverError:
            self._context.destroy(linger=0)
            raise

    def __enter__(self) -> PeerClient:
        """The client itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def describe(self, topic: str = "") -> bytes:
        """What the source says of itself.

        Raises:
            PeerLost: it is gone, or has another key.
            DeadlineExceeded: it does not answer: it hangs, or does not know the ticket.
        """
        return self._ask(Described, Describe, topic=topic).description

    def lease(self, segment: str) -> Leased:
        """Lease a segment until the client is closed.

        Raises:
            HandoverError: the source does not have it any more, or cannot export it.
            PeerLost, DeadlineExceeded: as for `describe`.
        """
        leased = self._ask(Leased, Lease, segment=segment)
        self._leases.append(leased.lease)
        if self._renewing is None:
            self._renewing = threading.Thread(target=self._renew, name="ckpt-renew", daemon=True)
            self._renewing.start()
        return leased

    def close(self) -> None:
        """Return the leases, and disconnect."""
        self._closed.set()
        if self._renewing is not None:
            self._renewing.join(self._timeout_seconds)  # of the answer that it waits for
        self._line.socket.setsockopt(zmq.LINGER, GOODBYE_MILLISECONDS)
        for lease in self._leases:
            self._send(Return, lease=lease)
        self._line.close()
        self._context.term()

    def _renew(self) -> None:
        while not self._closed.wait(RENEW_SECONDS):
            with contextlib.suppress(CheckpointEngineError):  # whoever reads finds out by itself
                for lease in tuple(self._leases):
                    self._ask(Done, Renew, lease=lease)

    def _ask(self, expected: type[Found], kind: type[_Request], **fields: str) -> Found:
        with self._lock:
            number = self._send(kind, **fields)
            answer = self._receive(number)
        if isinstance(answer, Refused):
            raise HandoverError(f"the source at {self.peer.address}: {answer.reason}")
        if not isinstance(answer, expected):
            raise ProtocolError(f"the source at {self.peer.address} answered something else")
        return answer

    def _send(self, kind: type[_Request], **fields: str) -> int:
        self._num_requests += 1
        request = kind(number=self._num_requests, ticket=self.peer.ticket, **fields)
        self._line.socket.send(msgspec.msgpack.encode(request))
        return self._num_requests

    def _receive(self, number: int) -> Answer:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            frame = self._line.receive(deadline - time.monotonic())
            try:
                answer = ANSWERS.decode(frame)
            except MALFORMED as error:
                raise ProtocolError(
                    f"the source at {self.peer.address} answered nonsense: {error}"
                ) from error
            if answer.number == number:  # others are late answers to what was given up
                return answer
