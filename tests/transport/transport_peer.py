"""A source or a reader of peer reads, in a process of its own."""

from __future__ import annotations

import base64
import hashlib
import os
import random
import signal
import threading
from pathlib import Path

import msgspec

from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport.peer import Exporter, Range, Reader, Way
from checkpoint_engine.transport.transports import exporters, reader
from children import say, serve

ADDRESS = "127.0.0.1"


def pattern(seed: int, num_bytes: int) -> bytes:
    """The bytes of a source."""
    return random.Random(seed).randbytes(num_bytes)


class Peer:
    """What the tests ask for."""

    def __init__(self) -> None:
        self._store = Store()
        self._exporter: Exporter
        self._segment: Segment
        self._into: Segment
        self._reader: Reader

    def export(self, seed: int, num_bytes: int) -> str:
        self._segment = self._store.allocate(num_bytes, pooled=False)
        self._segment.memory[:num_bytes] = pattern(seed, num_bytes)
        self._exporter, last = exporters(ADDRESS)
        last.close()
        return self.again()

    def again(self) -> str:
        """One more way to the same segment."""
        return base64.b64encode(
            msgspec.msgpack.encode(self._exporter.export(self._segment))
        ).decode()

    def withdraw(self, way: str) -> None:
        self._exporter.withdraw(_way(way))

    def lists(self, chosen: str) -> list[str]:
        """The transports that a source would offer."""
        os.environ["CKPT_ENGINE_TRANSPORT"] = chosen
        found = exporters(ADDRESS)
        for exporter in found:
            exporter.close()
        return [exporter.transport for exporter in found]

    def block(self) -> None:
        """Compute until there is a signal, and hold the interpreter as Python code does."""
        done = threading.Event()
        signal.signal(signal.SIGUSR1, lambda *_: done.set())
        say(event="blocked")
        while not done.is_set():
            sum(range(1000))

    def open(self, transport: str, num_bytes: int) -> None:
        """Make the memory that is read into, and what reads."""
        self._into = self._store.allocate(num_bytes, pooled=False)
        self._into.memory[:] = bytes(self._into.capacity_bytes)
        self._reader = reader(transport, self._into, ADDRESS)

    def read(self, way: str, ranges: list[list[int]], timeout_seconds: float = 20) -> int:
        """Read, and say when each range is there; how often another thread ran meanwhile."""
        ticks, done = [0], threading.Event()

        def tick() -> None:
            while not done.wait(0.001):
                ticks[0] += 1

        thread = threading.Thread(target=tick)
        thread.start()
        try:
            wanted = [Range(*one) for one in ranges]
            for arrived in self._reader.read(_way(way), wanted, timeout_seconds):
                say(event="arrived", place=arrived.place)
        finally:
            done.set()
            thread.join()
        return ticks[0]

    def misread(self, way: str, detail: str) -> None:
        """Read by a way that is none."""
        wrong = msgspec.structs.replace(_way(way), detail=bytes.fromhex(detail))
        list(self._reader.read(wrong, [Range(0, 0, 1)], 5))

    def digest(self, start: int, end: int) -> str:
        return hashlib.sha256(self._into.memory[start:end]).hexdigest()

    def loaded(self) -> list[str]:
        """Which of the libraries are mapped into this process."""
        maps = Path("/proc/self/maps").read_text()
        return [name for name in ("mooncake", "nixl") if f"/{name}" in maps]


def _way(text: str) -> Way:
    return msgspec.msgpack.decode(base64.b64decode(text), type=Way)


if __name__ == "__main__":
    serve(Peer())
