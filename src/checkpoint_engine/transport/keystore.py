"""Keys and values that the ranks of one server share, kept by a thread of rank 0.

A rank sets, gets, adds, deletes, and waits for what another sets; the server answers a wait when
the key is set. All of it is encrypted, and only who knows the ranks' secret is let in
(`transport.secret`). Every operation has a deadline, and a server that has died is noticed at once
(`transport.line`): the operation fails, and the next one connects again.

    server = KeyServer("10.0.0.1", 4711, credentials)
    store = KeyClient(f"10.0.0.1:{server.port}", credentials)
    store.set("name", b"value")
    store.get("other", timeout_seconds=10)
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from typing import Annotated, Protocol

import msgspec
import zmq

from checkpoint_engine.errors import (
    MALFORMED,
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    UsageError,
)
from checkpoint_engine.transport.line import Context, Line
from checkpoint_engine.transport.responder import Responder
from checkpoint_engine.transport.secret import Credentials

__all__ = ["KeyClient", "KeyServer", "KeyStore", "LocalKeyStore"]

MAX_VALUE_BYTES = 256 << 20
MAX_MESSAGE_BYTES = MAX_VALUE_BYTES + (64 << 10)
MAX_WAIT_MILLISECONDS = 7 * 24 * 3600 * 1000
ANSWER_SECONDS = 10.0
UNNOTICED_SECONDS = 1.0
GRACE_SECONDS = 1.0  # for the answer that a wait was in vain
SLOWEST_BYTES_PER_SECOND = 1e6
ZAP = "inproc://zeromq.zap.01"  # where ZeroMQ asks who may come in


class KeyStore(Protocol):
    """Shared keys and values, as one thread at a time uses them."""

    def set(self, key: str, value: bytes) -> None:
        """Give a key a value, whatever it had."""
        ...

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """Wait until a key is set; returns its value.

        Raises:
            DeadlineExceeded: nobody set it in time.
        """
        ...

    def add(self, key: str, amount: int) -> int:
        """Add to a counter, which begins at 0 and is written in decimal; returns its new value."""
        ...

    def append(self, key: str, value: bytes) -> int:
        """Set the next of "key/1", "key/2" ..., which "key/length" counts; returns its number."""
        ...

    def delete(self, *keys: str) -> int:
        """Forget keys, in one step; returns how many of them there were."""
        ...

    def fork(self) -> KeyStore:
        """The same keys for another thread, which closes what it gets."""
        ...

    def close(self) -> None:
        """Let go of the keys."""
        ...


class _Values:
    """The keys themselves."""

    def __init__(self) -> None:
        self.of: dict[str, bytes] = {}

    def add(self, key: str, amount: int) -> int:
        total = int(self.of.get(key, b"0")) + amount
        self.of[key] = str(total).encode()
        return total

    def append(self, key: str, value: bytes) -> int:
        number = self.add(f"{key}/length", 1)
        self.of[f"{key}/{number}"] = value
        return number

    def delete(self, keys: Iterable[str]) -> int:
        return sum(self.of.pop(key, None) is not None for key in keys)


class LocalKeyStore:
    """The keys of ranks that are one process, for any of its threads."""

    def __init__(self) -> None:
        self._values = _Values()
        self._changed = threading.Condition()

    def __len__(self) -> int:
        """The number of keys."""
        return len(self._values.of)

    def set(self, key: str, value: bytes) -> None:
        """See `KeyStore`, as for all of these."""
        with self._changed:
            self._values.of[key] = value
            self._changed.notify_all()

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """Wait until a key is set; returns its value."""
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._values.of, timeout_seconds):
                raise _nobody_set(key, timeout_seconds)
            return self._values.of[key]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value."""
        with self._changed:
            total = self._values.add(key, amount)
            self._changed.notify_all()
            return total

    def append(self, key: str, value: bytes) -> int:
        """Add to a list; returns the entry's number."""
        with self._changed:
            number = self._values.append(key, value)
            self._changed.notify_all()
            return number

    def delete(self, *keys: str) -> int:
        """Forget keys."""
        with self._changed:
            return self._values.delete(keys)

    def fork(self) -> LocalKeyStore:
        """Itself."""
        return self

    def close(self) -> None:
        """Nothing to let go of."""


class _Request(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    number: int


class _OfKey(_Request, frozen=True):
    key: str


class Set(_OfKey, frozen=True):
    """Give a key a value; answered with an empty one."""

    value: bytes


class Get(_OfKey, frozen=True):
    """A key's value, as soon as there is one; answered with none if there is none in time."""

    milliseconds: Annotated[int, msgspec.Meta(ge=0, le=MAX_WAIT_MILLISECONDS)]


class Add(_OfKey, frozen=True):
    """Add to a counter; answered with its new value, or none if it is no counter."""

    amount: int


class Append(_OfKey, frozen=True):
    """Add to a list; answered with the entry's number, or none if its length is no counter."""

    value: bytes


class Delete(_Request, frozen=True):
    """Forget keys; answered with how many of them there were."""

    keys: tuple[str, ...]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """To the request of the same number."""

    number: int
    value: bytes | None


REQUESTS = msgspec.msgpack.Decoder(Set | Get | Add | Append | Delete)
ANSWERS = msgspec.msgpack.Decoder(Answer)


class _Wait(msgspec.Struct, frozen=True):
    number: int
    key: str
    until: float


class KeyServer:
    """Keeps the keys, in a thread of its own, and listens at one address.

    Args:
        address: of this host, as the other ranks reach it.
        port: there; 0 for any that is free.
        credentials: of the ranks.

    Raises:
        UsageError: it cannot listen there.
    """

    def __init__(self, address: str, port: int, credentials: Credentials) -> None:
        self._admitted = credentials.client.public
        self._values = _Values()
        self._waits: dict[bytes, _Wait] = {}  # of each client the last
        self._responder = Responder(
            name="ckpt-keys",
            max_request_bytes=MAX_MESSAGE_BYTES,
            private_key=credentials.server.private,
        )
        self._responder.socket.zap_domain = b"ckpt-engine"
        self._gate = self._responder.context.socket(zmq.REP)
        self._gate.bind(ZAP)
        self._responder.start(
            address,
            self._respond,
            port=port,
            on_turn=self._expire,
            milliseconds=self._next_milliseconds,
            gate=(self._gate, self._admit),
        )
        self.address = self._responder.address
        self.port = int(self.address.rpartition(":")[2])

    def close(self) -> None:
        """Stop listening, and forget all keys."""
        self._responder.close()

    def _respond(self, client: bytes, frames: Sequence[bytes]) -> None:
        if len(frames) == 1:
            self._perform(client, frames[0])

    def _admit(self, frames: Sequence[bytes]) -> None:
        """Answer ZeroMQ's question (RFC 27) whether a client of this key may come in."""
        version, request, _domain, _address, _identity, _mechanism, *keys = frames
        known = [zmq.utils.z85.encode(key) for key in keys] == [self._admitted]
        status = (b"200", b"OK") if known else (b"400", b"another secret")
        self._gate.send_multipart([version, request, *status, b"", b""])

    def _perform(self, client: bytes, frame: bytes) -> None:
        """Do what is asked; what is malformed changes nothing and is not answered."""
        try:
            request = REQUESTS.decode(frame)
        except MALFORMED:
            return
        self._waits.pop(client, None)
        if isinstance(request, Delete):
            num_deleted = self._values.delete(request.keys)
            self._answer(client, request.number, str(num_deleted).encode())
            return
        key, number, value = request.key, request.number, self._values.of.get(request.key)
        if isinstance(request, Get) and value is None and request.milliseconds:
            until = time.monotonic() + request.milliseconds / 1000
            self._waits[client] = _Wait(number, key, until)
            return
        if isinstance(request, Set):
            self._values.of[key] = request.value
            self._wake(key)
            value = b""
        elif isinstance(request, Add):
            value = self._add(key, request.amount)
        elif isinstance(request, Append):
            value = self._append(key, request.value)
        self._answer(client, number, value)

    def _add(self, key: str, amount: int) -> bytes | None:
        try:
            self._values.add(key, amount)
        except ValueError:  # no counter
            return None
        self._wake(key)
        return self._values.of[key]

    def _append(self, key: str, value: bytes) -> bytes | None:
        try:
            number = self._values.append(key, value)
        except ValueError:  # no counter
            return None
        self._wake(f"{key}/length")
        self._wake(f"{key}/{number}")
        return str(number).encode()

    def _wake(self, key: str) -> None:
        """Answer everybody who waits for a key that was set now."""
        for client, wait in tuple(self._waits.items()):
            if wait.key == key:
                del self._waits[client]
                self._answer(client, wait.number, self._values.of[key])

    def _expire(self) -> None:
        now = time.monotonic()
        for client, wait in tuple(self._waits.items()):
            if wait.until <= now:
                del self._waits[client]
                self._answer(client, wait.number, None)

    def _next_milliseconds(self) -> int | None:
        """How long there is nothing to do, unless somebody asks; None for ever."""
        if not self._waits:
            return None
        until = min(wait.until for wait in self._waits.values())
        return max(0, int(1000 * (until - time.monotonic())) + 1)

    def _answer(self, client: bytes, number: int, value: bytes | None) -> None:
        answer = msgspec.msgpack.encode(Answer(number=number, value=value))
        self._responder.send(client, answer)


class KeyClient:
    """A connection to the keys that rank 0 keeps; made on first use, and again once it broke.

    Any operation raises PeerLost if rank 0 is gone and DeadlineExceeded if it does not answer;
    whether it was done is then unknown.

    Args:
        address: host and port of the server.
        credentials: of the ranks.
        context: of the client that this one is forked from.
    """

    def __init__(
        self,
        address: str,
        credentials: Credentials,
        context: zmq.Context[zmq.Socket[bytes]] | None = None,
    ) -> None:
        self.address, self._credentials = address, credentials
        self._context, self._is_fork = context or Context(), context is not None
        self._line: Line | None = None
        self._num_requests = 0

    def set(self, key: str, value: bytes) -> None:
        """Give a key a value.

        Raises:
            UsageError: it is larger than a message may be.
        """
        seconds = _seconds_for(key, value)
        self._ask(Set(number=self._next(), key=key, value=value), seconds)

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """Wait until a key is set; returns its value."""
        milliseconds = min(max(0, int(1000 * timeout_seconds)), MAX_WAIT_MILLISECONDS)
        request = Get(number=self._next(), key=key, milliseconds=milliseconds)
        value = self._ask(request, milliseconds / 1000 + GRACE_SECONDS)
        if value is None:
            raise _nobody_set(key, timeout_seconds)
        return value

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value."""
        total = self._ask(Add(number=self._next(), key=key, amount=amount), ANSWER_SECONDS)
        if total is None:
            raise ProtocolError(f"{key!r} is no counter")
        return int(total)

    def append(self, key: str, value: bytes) -> int:
        """Add to a list; returns the entry's number; else as `set`."""
        seconds = _seconds_for(key, value)
        number = self._ask(Append(number=self._next(), key=key, value=value), seconds)
        if number is None:
            raise ProtocolError(f"'{key}/length' is no counter")
        return int(number)

    def delete(self, *keys: str) -> int:
        """Forget keys; returns how many there were."""
        num_deleted = self._ask(Delete(number=self._next(), keys=keys), ANSWER_SECONDS)
        if num_deleted is None:
            raise ProtocolError("rank 0 does not say how many keys it has deleted")
        return int(num_deleted)

    def fork(self) -> KeyClient:
        """The same keys over a connection of its own, which must be closed before this one."""
        return KeyClient(self.address, self._credentials, self._context)

    def close(self) -> None:
        """Disconnect."""
        self._disconnect()
        if not self._is_fork:
            self._context.destroy(linger=0)

    def _next(self) -> int:
        self._num_requests += 1
        return self._num_requests

    def _ask(self, request: _Request, timeout_seconds: float) -> bytes | None:
        """Ask; and once more over a new connection, where the old one had broken unnoticed.

        A host that forgot a connection while nobody used it, as when the link was down, says so at
        once when it is used again. Asking twice must be the same as asking once.
        """
        asked_at, is_new = time.monotonic(), self._line is None
        try:
            return self._ask_once(request, asked_at + timeout_seconds)
        except PeerLost:
            was_unnoticed = time.monotonic() - asked_at < UNNOTICED_SECONDS
            if is_new or not was_unnoticed or isinstance(request, (Add, Append)):
                raise
            return self._ask_once(request, asked_at + timeout_seconds)

    def _ask_once(self, request: _Request, deadline: float) -> bytes | None:
        try:
            line = self._connected()
            line.socket.send(msgspec.msgpack.encode(request))
            while True:
                answer = _decoded(line.receive(deadline - time.monotonic()), self.address)
                if answer.number == request.number:  # else to what was given up
                    return answer.value
        except CheckpointEngineError:
            self._disconnect()
            raise

    def _connected(self) -> Line:
        if self._line is not None and self._line.is_broken():
            self._disconnect()
        if self._line is None:
            self._line = Line(
                self._context,
                self.address,
                max_message_bytes=MAX_MESSAGE_BYTES,
                server_key=self._credentials.server.public,
                own_keys=self._credentials.client,
                peer="rank 0",
            )
        return self._line

    def _disconnect(self) -> None:
        if self._line is not None:
            self._line.close()
            self._line = None


def _seconds_for(key: str, value: bytes) -> float:
    """The longest that a value may take on its way."""
    if len(value) > MAX_VALUE_BYTES:
        raise UsageError(f"{key!r}: {len(value)} bytes are more than {MAX_VALUE_BYTES}")
    return ANSWER_SECONDS + len(value) / SLOWEST_BYTES_PER_SECOND


def _decoded(frame: bytes, address: str) -> Answer:
    try:
        return ANSWERS.decode(frame)
    except MALFORMED as error:
        raise ProtocolError(f"rank 0 at {address} answered nonsense: {error}") from error


def _nobody_set(key: str, timeout_seconds: float) -> DeadlineExceeded:
    return DeadlineExceeded(f"no rank set {key!r} in {timeout_seconds:.1f} s")
