"""What peer reads through a library have in common, whatever the library.

A source has one engine of the library for each segment that ways lead to, and ends it with the
last of them: whoever still reads is cut off before the memory is used again. A reader has one
engine for each read, and ends it before the read ends, whatever its outcome: nothing is written
afterwards. Transfers are started, and asked about now and then, so that a deadline is ours and the
threads of the library have the processor.

    class CopperExporter(LibraryExporter):
        def open(self, segment): return way, engine         # closed by us
    class CopperReader(LibraryReader):
        def connect(self, way): return connection
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from mmap import mmap
from typing import Any, ClassVar, Protocol

import numpy as np

from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.peer import Range, Way

__all__ = ["Closable", "Connection", "LibraryExporter", "LibraryReader", "address_of"]

NUM_RANGES_UNDER_WAY = 16
POLL_SECONDS = 0.0005


class Closable(Protocol):
    """An engine of a library."""

    def close(self) -> None:
        """End it: nobody reads or writes through it any more."""
        ...


class Connection(Protocol):
    """A reader's engine, connected to one source."""

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
    """An engine for each segment that ways lead to; see `Exporter`."""

    transport: ClassVar[str]

    def __init__(self, address: str) -> None:
        self.address = address
        self._lock = threading.Lock()
        self._ways: dict[str, tuple[Way, Closable]] = {}
        self._num_ways: dict[Way, int] = {}

    @abstractmethod
    def open(self, segment: Segment) -> tuple[Way, Closable]:
        """An engine that lets peers read a segment, and the way to it.

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
        """Cut off whoever reads, unless another lease of the segment keeps its bytes."""
        with self._lock:
            if way not in self._num_ways:
                return
            self._num_ways[way] -= 1
            if not self._num_ways[way]:
                self._end(way)

    def close(self) -> None:
        """Cut off everybody."""
        with self._lock:
            for way in tuple(self._num_ways):
                self._end(way)

    def _end(self, way: Way) -> None:
        del self._num_ways[way]
        name = next(name for name, (known, _) in self._ways.items() if known == way)
        _, engine = self._ways.pop(name)
        engine.close()


class LibraryReader(ABC):
    """An engine for each read; see `Reader`."""

    transport: ClassVar[str]

    def __init__(self, segment: Segment, address: str) -> None:
        self.memory, self.address = segment.memory, address

    @abstractmethod
    def connect(self, way: Way) -> Connection:
        """An engine that may write into `memory`, connected to a source.

        Raises:
            PeerLost, TransferError, ProtocolError: see `Reader.read`.
        """

    def read(self, way: Way, ranges: Sequence[Range], timeout_seconds: float) -> Iterator[Range]:
        """Fetch ranges, in order; see `Reader`."""
        with closing(self.connect(way)) as connection:
            unasked, asked = deque(ranges), deque[tuple[Range, Any]]()
            while asked or unasked:
                while unasked and len(asked) < NUM_RANGES_UNDER_WAY:
                    wanted = unasked.popleft()
                    asked.append((wanted, connection.start(wanted)))
                wanted, transfer = asked.popleft()
                deadline = time.monotonic() + timeout_seconds
                while not connection.done(transfer):
                    if time.monotonic() > deadline:
                        raise DeadlineExceeded(
                            f"the source at {way.address} sent {wanted.length} bytes not within "
                            f"{timeout_seconds:.0f} s"
                        )
                    time.sleep(POLL_SECONDS)
                yield wanted

    def close(self) -> None:
        """Let go of the segment."""
        self.memory = memoryview(b"")


def address_of(memory: memoryview | mmap) -> int:
    """Where memory lies, as libraries want it; valid as long as somebody keeps the memory."""
    return int(np.frombuffer(memory, dtype=np.uint8).ctypes.data)
