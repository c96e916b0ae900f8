"""Reads of one process's memory by another, in which the source takes no part.

A source exports a segment and goes on with its own work; a reader that was given the `Way` to it
fetches byte ranges into memory of its own. What moves the bytes is one of several transports, each
a file beside this one; the source offers all that it has, and the reader takes the first that it
has too. Who may read is settled before, over an encrypted connection (`transport.peers`): a way is
a secret, and is good for one reader and one lease.

    way = exporter.export(segment)                                  # at the source
    for arrived in reader.read(way, ranges, timeout_seconds=60):    # at the reader
        check(memory[arrived.place : arrived.place + arrived.length])
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar, Protocol

import msgspec

from checkpoint_engine.store import Segment

__all__ = ["Exporter", "Range", "Reader", "Way"]


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """How to reach the bytes of one segment: plain data, made by an exporter for a reader.

    Attributes:
        transport: which one understands it.
        address: host and port of the source.
        detail: what else that transport needs, such as a ticket or registered addresses.
    """

    transport: str
    address: str
    detail: bytes


class Range(msgspec.Struct, frozen=True):
    """`length` bytes from `start` in the source's segment, to `place` in the reader's."""

    start: int
    place: int
    length: int


class Exporter(Protocol):
    """One transport at a source. Its methods may be called from several threads."""

    transport: ClassVar[str]

    def export(self, segment: Segment) -> Way:
        """Let one more reader reach a segment, which the caller has leased until `withdraw`.

        Raises:
            TransferError: the library refuses the memory.
        """
        ...

    def withdraw(self, way: Way) -> None:
        """This way leads nowhere any more."""
        ...

    def close(self) -> None:
        """End all ways, and stop listening."""
        ...


class Reader(Protocol):
    """One transport at a receiver, reading into one segment, which the caller has leased.

    `read` may be called from several threads, for different sources.
    """

    transport: ClassVar[str]

    def read(self, way: Way, ranges: Sequence[Range], timeout_seconds: float) -> Iterator[Range]:
        """Fetch ranges, and yield each once all of it has arrived.

        Nothing is checked: a range may hold anything. After a failure nothing more is written by
        this call.

        Args:
            way: to the source's segment.
            ranges: in the order in which they are wanted.
            timeout_seconds: the longest wait for the next range.

        Raises:
            PeerLost: the source is gone, or has withdrawn the way.
            DeadlineExceeded: no range arrived in time.
            TransferError: anything else; the message says what the library said.
        """
        ...

    def close(self) -> None:
        """Let go of the segment."""
        ...
