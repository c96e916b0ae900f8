"""What a sender and its receivers tell each other during a cycle, beside the bytes.

A cycle is one version. Each has two logs in the ranks' shared keys, which are encrypted: in one the
sender speaks, in the other the receivers do. Entries are msgpack; nothing is unpickled.

    sender:     Plan, Bucket, Bucket, ..., End, Over    or Failed, at any point
    receiver:   Ready, Ready, ..., Done                 or Failed
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Generic, TypeAlias, TypeVar

import msgspec

from checkpoint_engine.errors import (
    MALFORMED,
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    RemoteError,
    SourceError,
    TransferError,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import CHUNK_BYTES
from checkpoint_engine.transport.rendezvous import Log

__all__ = [
    "FROM_RECEIVER",
    "FROM_SENDER",
    "Bucket",
    "Done",
    "Ear",
    "End",
    "Failed",
    "FromReceiver",
    "FromSender",
    "Hello",
    "Over",
    "Part",
    "Plan",
    "Ready",
    "Voice",
    "decode_hello",
    "raised",
    "with_sender",
]

Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 46)]
BucketBytes = Annotated[int, msgspec.Meta(ge=CHUNK_BYTES, le=1 << 46)]


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """Receiver to sender, before the plan: I take part in this cycle.

    Attributes:
        bucket_bytes: the most that it has memory for in one bucket.
        engine: the kind of its engine.
        host: equal for processes of one host.
        kept: what it still has of the way on which bytes came last; "" for nothing.
        address, key: where the sender notices that it is gone.
    """

    bucket_bytes: BucketBytes
    engine: str
    host: str
    kept: str
    address: str
    key: bytes


class Plan(msgspec.Struct, frozen=True, tag=True):
    """How bytes will come, and to how many: in buckets of at most so many, on this way."""

    bucket_bytes: BucketBytes
    way: str
    world_size: Count


class Part(msgspec.Struct, frozen=True, array_like=True):
    """Bytes [start, start + length) of a tensor, which begin at `offset` of a bucket.

    `dtype` and `shape` are the whole tensor's; `digests` are those of the chunks in this part.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: Count
    length: Count
    offset: Count
    digests: bytes


class Bucket(msgspec.Struct, frozen=True, tag=True):
    """A bucket of `length` bytes, which travel as `packed` compressed ones, if that is not 0.

    A part of a tensor that is larger than a bucket has its bucket to itself.
    """

    index: Count
    length: Count
    packed: Count
    parts: tuple[Part, ...]


class End(msgspec.Struct, frozen=True, tag=True):
    """That was all: what the version is, and is called."""

    label: str
    digest: str
    num_tensors: Count


class Over(msgspec.Struct, frozen=True, tag=True):
    """Every receiver has taken all."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """It is over: this went wrong. Rank 0 is the sender."""

    rank: int
    error: RemoteError


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Receiver `rank` has memory for this bucket, or has taken it out of memory that is shared."""

    rank: int
    bucket: int


class Done(msgspec.Struct, frozen=True, tag=True):
    """Receiver `rank` has taken all, and this is what it was."""

    rank: int
    digest: str


FromSender: TypeAlias = Plan | Bucket | End | Over | Failed
FromReceiver: TypeAlias = Ready | Done | Failed
FROM_SENDER: msgspec.msgpack.Decoder[FromSender] = msgspec.msgpack.Decoder(FromSender)
FROM_RECEIVER: msgspec.msgpack.Decoder[FromReceiver] = msgspec.msgpack.Decoder(FromReceiver)
_HELLO = msgspec.msgpack.Decoder(Hello)

Heard = TypeVar("Heard")


@contextmanager
def with_sender() -> Iterator[None]:
    """The shared keys are lost with rank 0, which sends: say so."""
    try:
        yield
    except PeerLost as error:
        raise PeerLost(f"the sender is gone: {error}") from error


class Voice:
    """Speaks in a log, from any thread."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._lock = threading.Lock()

    def say(self, entry: msgspec.Struct) -> None:
        """Append an entry; raises PeerLost if the sender is gone."""
        with self._lock, with_sender():
            self._log.append(msgspec.msgpack.encode(entry))


class Ear(Generic[Heard]):
    """Hears what is said in a log; for one thread."""

    def __init__(self, log: Log, decoder: msgspec.msgpack.Decoder[Heard]) -> None:
        self._log, self._decoder = log, decoder

    def next(self, timeout_seconds: float) -> Heard | None:
        """The next entry; None if there is none in time.

        Raises:
            PeerLost: the sender is gone.
            ProtocolError: it is none.
        """
        try:
            with with_sender():
                entry = self._log.next(timeout_seconds)
        except DeadlineExceeded:
            return None
        try:
            return self._decoder.decode(entry)
        except MALFORMED as error:
            raise ProtocolError(f"a malformed entry of the stream: {error}") from error


def decode_hello(entry: bytes) -> Hello:
    """A receiver's greeting; raises ProtocolError if it is none."""
    try:
        return _HELLO.decode(entry)
    except MALFORMED as error:
        raise ProtocolError(f"a malformed greeting: {error}") from error


_KINDS: dict[str, type[CheckpointEngineError]] = {
    kind.__name__: kind
    for kind in (DeadlineExceeded, PeerLost, SourceError, UsageError, VerificationError)
}


def raised(failed: Failed) -> CheckpointEngineError:
    """What to raise here because of what went wrong there: of the same kind where it is ours."""
    who = "the sender" if failed.rank == 0 else f"rank {failed.rank}"
    kind = _KINDS.get(failed.error.type, TransferError)
    said = failed.error.message if kind is not TransferError else str(failed.error)
    return kind(f"{who} gave up: {said}")
