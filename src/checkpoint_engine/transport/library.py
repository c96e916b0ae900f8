"""What peer reads through a library have in common, whatever the library.

A source opens each segment once for all ways that lead to it, and closes it with the last of them.
A reader has a connection for each read. It starts transfers and asks about them now and then, so
that deadlines are ours and the library's threads have the processor. Once a connection is closed
nothing is written any more, whatever was under way.

    class CopperExporter(LibraryExporter):
        def open(self, segment): return way, export
    class CopperReader(LibraryReader):
        def connect(self, way, timeout_seconds): return connection
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from functools import partial
from mmap import mmap
from typing import Any, ClassVar, Protocol

import numpy as np

from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.peer import Range, Way

__all__ = ["Connection", "LibraryExporter", "LibraryReader", "address_of", "wait_until"]

NUM_RANGES_UNDER_WAY = 16
POLL_SECONDS = 0.0005


class Closable(Protocol):
    """A segment that peers may read."""

    def close(self) -> None:
        """They may not any more."""
        ...


class Connection(Protocol):
    """To one source, for one read."""

    def start(self, wanted: Range) -> Any:
        """Begin a transfer; what is returned stands for it. Raises what `Reader.read` raises."""
        ...

    def done(self, transfer: Any) -> bool:
        """Whether a transfer has ended well; once true, not asked again. Raises likewise."""
        ...

    def close(self) -> None:
        """End it: nothing is written any more."""
        ...


class LibraryExporter(ABC):
    """Every segment that ways lead to is open once; see `Exporter`."""

    transport: ClassVar[str]

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._ways: dict[str, tuple[Way, Closable]] = {}
        self._num_ways: dict[Way, int] = {}

    @abstractmethod
    def open(self, segment: Segment) -> tuple[Way, Closable]:
        """Let peers read a segment: the way to it, and what ends it.

        Raises:
            TransferError: the library refuses.
        """

    def export(self, segment: Segment) -> Way:
        """The way of everybody who reads this segment at present; see `Exporter`."""
        with self._lock:
            if segment.name not in self._ways:
                self._ways[segment.name] = self.open(segment)
            way, _ = self._ways[segment.name]
            self._num_ways[way] = self._num_ways.get(way, 0) + 1
            return way

    def withdraw(self, way: Way) -> None:
        """End the way, unless it is another lease's too, which keeps the bytes."""
        with self._lock:
            if way not in self._num_ways:
                return
            self._num_ways[way] -= 1
            if not self._num_ways[way]:
                self._end(way)

    def close(self) -> None:
        """End all ways."""
        with self._lock:
            for way in tuple(self._num_ways):
                self._end(way)

    def _end(self, way: Way) -> None:
        del self._num_ways[way]
        name = next(name for name, (known, _) in self._ways.items() if known == way)
        _, export = self._ways.pop(name)
        export.close()


class LibraryReader(ABC):
    """A connection for each read; see `Reader`."""

    transport: ClassVar[str]

    def __init__(self, segment: Segment, address: str) -> None:
        self.memory, self.address = segment.memory, address

    @abstractmethod
    def connect(self, way: Way, timeout_seconds: float) -> Connection:
        """A connection to a source, which may write into `memory`.

        Raises:
            PeerLost, DeadlineExceeded, TransferError, ProtocolError: see `Reader.read`.
        """

    def read(self, way: Way, ranges: Sequence[Range], timeout_seconds: float) -> Iterator[Range]:
        """Fetch ranges, in order; see `Reader`."""
        with closing(self.connect(way, timeout_seconds)) as connection:
            unasked, asked = deque(ranges), deque[tuple[Range, Any]]()
            while asked or unasked:
                while unasked and len(asked) < NUM_RANGES_UNDER_WAY:
                    wanted = unasked.popleft()
                    asked.append((wanted, connection.start(wanted)))
                wanted, transfer = asked.popleft()
                wait_until(partial(connection.done, transfer), timeout_seconds, way.address)
                yield wanted

    def close(self) -> None:
        """Let go of the segment."""
        self.memory = memoryview(b"")


def wait_until(arrived: Callable[[], bool], timeout_seconds: float, address: str) -> None:
    """Ask now and then, in the reader's thread.

    Raises:
        DeadlineExceeded: it was never true.
    """
    deadline = time.monotonic() + timeout_seconds
    while not arrived():
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"nothing whole came from the source at {address} for {timeout_seconds:.0f} s"
            )
        time.sleep(POLL_SECONDS)


def address_of(memory: memoryview | mmap) -> int:
    """Where memory lies, as libraries want it; valid as long as somebody keeps the memory."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
