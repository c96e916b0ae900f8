"""Peer reads through Mooncake's transfer engine: RDMA where there are devices, else TCP.

Engines find each other by a handshake with the source. Their ports are open on all interfaces,
whatever address they are given, and they ask nobody who they are: whoever reaches them may read
what is exported. Over TCP the source exports a read-only map, so that nobody writes there; over
RDMA the library insists on memory that can be written.

What shapes this file: the library takes 1,024 requests in a batch, and writes some of a larger one
after it has refused it, so each range is a batch of one. Its waits spin, so they are not used. It
waits for the handshake with a source that hangs without end, so that is done for a byte of no
importance, in a thread that can be left behind. To end an engine stops Python for a second, so
engines are kept for the next read; only one that may still write is ended.

    way = exporter("10.0.0.1").export(segment)
    for arrived in reader(own_segment, "10.0.0.2").read(way, ranges, timeout_seconds=60): ...
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import mmap
import os
import sys
import threading
from collections import defaultdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, ClassVar

import msgspec
import numpy as np

from checkpoint_engine.errors import (
    MALFORMED,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    TransferError,
)
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.devices import devices_of_rank, rdma_devices
from checkpoint_engine.transport.library import (
    LibraryExporter,
    LibraryReader,
    address_of,
    wait_until,
)
from checkpoint_engine.transport.peer import Range, Way

__all__ = [
    "MooncakeExporter",
    "MooncakeReader",
    "exporter",
    "missing",
    "preferred",
    "reader",
    "start_engine",
]

SAYS = "; it says why on standard error"
NO_BATCH = (0, (1 << 64) - 1)
# In the order in which they need each other.
VERBS = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1")
IDLE: defaultdict[str, list[_Engine]] = defaultdict(list)


class _Detail(msgspec.Struct, frozen=True, array_like=True):
    """Where the segment lies in the source, which is what the library goes by."""

    address: int


class _Engine:
    """A transfer engine of this process; ends when nobody refers to it."""

    def __init__(self, host: str) -> None:
        self._engine: Any = start_engine(host)
        self.host, self.address = host, f"{host}:{self._engine.get_rpc_port()}"
        self._scratch = np.zeros(mmap.PAGESIZE, dtype=np.uint8)
        self._met: set[str] = set()
        self.register(self._scratch.ctypes.data, len(self._scratch))

    def register(self, address: int, num_bytes: int) -> None:
        """Let the library read and write memory, which the caller keeps until `unregister`."""
        if status := self._engine.register_memory(address, num_bytes):
            raise TransferError(f"Mooncake refuses {num_bytes} bytes of memory: {status}{SAYS}")

    def unregister(self, address: int) -> None:
        """What is under way may go on, with the bytes as they are by then."""
        self._engine.unregister_memory(address)

    def meet(self, target: str, source: int, timeout_seconds: float) -> None:
        """Make the acquaintance of a source by reading a byte of it.

        Raises:
            PeerLost: it is gone, or exports nothing there.
            DeadlineExceeded: it does not answer; the engine must not be used again.
        """
        if target in self._met:
            return
        answers: SimpleQueue[int] = SimpleQueue()

        def read_byte() -> None:
            answers.put(self.start(target, self._scratch.ctypes.data, source, 1))

        threading.Thread(target=read_byte, name="ckpt-mooncake", daemon=True).start()
        try:
            batch = answers.get(timeout=timeout_seconds)
        except Empty:
            raise DeadlineExceeded(
                f"the source at {target} said nothing for {timeout_seconds:.0f} s"
            ) from None
        if batch in NO_BATCH:
            raise PeerLost(f"Mooncake does not reach the source at {target}{SAYS}")
        wait_until(lambda: self.arrived(target, batch), timeout_seconds, target)
        self._met.add(target)

    def start(self, target: str, into: int, source: int, num_bytes: int) -> int:
        """Begin a transfer: its number, or one of `NO_BATCH`."""
        return int(self._engine.batch_transfer_async_read(target, [into], [source], [num_bytes]))

    def arrived(self, target: str, batch: int) -> bool:
        """Whether a transfer has ended well.

        Raises:
            PeerLost: it has failed.
        """
        if (status := self._engine.transfer_check_status(batch)) < 0:
            raise PeerLost(
                f"the source at {target} is gone, or has ended the lease: Mooncake's status "
                f"{status}{SAYS}"
            )
        return bool(status == 1)


class MooncakeExporter(LibraryExporter):
    """One engine for all segments; see `Exporter`."""

    transport: ClassVar[str] = "mooncake"

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self._engine: _Engine | None = _Engine(address)

    def open(self, segment: Segment) -> tuple[Way, _Export]:
        """Register the segment, read-only where the network allows it."""
        assert self._engine is not None, "nothing is exported after the end"
        export = _Export(self._engine, segment)
        detail = msgspec.msgpack.encode(_Detail(export.start))
        return Way(transport=self.transport, address=self._engine.address, detail=detail), export

    def close(self) -> None:
        """End all ways, and the engine."""
        super().close()
        self._engine = None


class _Export:
    """A segment that peers may read."""

    def __init__(self, engine: _Engine, segment: Segment) -> None:
        self._engine = engine
        self._memory = segment.memory if _devices() else _read_only(segment)
        self.start = address_of(self._memory)
        engine.register(self.start, segment.capacity_bytes)

    def close(self) -> None:
        self._engine.unregister(self.start)


class MooncakeReader(LibraryReader):
    """Engines are this process's; see `Reader`."""

    transport: ClassVar[str] = "mooncake"

    def connect(self, way: Way, timeout_seconds: float) -> _Connection:
        """Take an engine, and meet the source with it."""
        try:
            detail = msgspec.msgpack.decode(way.detail, type=_Detail)
        except MALFORMED as error:
            raise ProtocolError(f"the source at {way.address} gave no address: {error}") from error
        try:
            engine = IDLE[self.address].pop()
        except IndexError:
            engine = _Engine(self.address)
        engine.meet(way.address, detail.address, timeout_seconds)
        return _Connection(engine, self.memory, way.address, detail.address)


class _Connection:
    """An engine, which is kept for the next read if all that was started has ended well."""

    def __init__(self, engine: _Engine, memory: memoryview, target: str, source: int) -> None:
        self._target, self._source, self._into = target, source, address_of(memory)
        self._engine, self._num_under_way = engine, 0
        engine.register(self._into, len(memory))

    def start(self, wanted: Range) -> int:
        self._num_under_way += 1
        into, source = self._into + wanted.place, self._source + wanted.start
        batch = self._engine.start(self._target, into, source, wanted.length)
        if batch in NO_BATCH:
            raise PeerLost(f"Mooncake does not reach the source at {self._target}{SAYS}")
        return batch

    def done(self, batch: int) -> bool:
        arrived = self._engine.arrived(self._target, batch)
        self._num_under_way -= arrived
        return arrived

    def close(self) -> None:
        if self._num_under_way == 0:
            self._engine.unregister(self._into)
            IDLE[self._engine.host].append(self._engine)
        del self._engine


def _read_only(segment: Segment) -> mmap.mmap:
    return mmap.mmap(segment.descriptor, segment.capacity_bytes, prot=mmap.PROT_READ)


def start_engine(host: str) -> Any:
    """A bare engine of the library's own, which listens on this host; ends like `_Engine`.

    Raises:
        TransferError: the library does not load, or does not start.
    """
    devices = _devices()
    protocol = "rdma" if devices else "tcp"
    engine: Any = _load().TransferEngine()
    if engine.initialize(host, "P2PHANDSHAKE", protocol, ",".join(devices)):
        raise TransferError(f"Mooncake cannot start with {protocol} on {host}{SAYS}")
    return engine


def exporter(address: str) -> MooncakeExporter:
    """Of the process at this address."""
    return MooncakeExporter(address)


def reader(segment: Segment, address: str) -> MooncakeReader:
    """Of the process at this address."""
    return MooncakeReader(segment, address)


def missing() -> str:
    """What is to be done before this can be used here; "" if nothing. Loads nothing."""
    if importlib.util.find_spec("mooncake") is None:
        return "pip install 'ckpt-engine[mooncake]'"
    if "nixl_cu12" in sys.modules or "nixl" in sys.modules:
        return "leave NIXL to another process: both in one crash at its end"
    return ""


def preferred() -> bool:
    """Whether it is better here than ZeroMQ: over TCP it is not."""
    return bool(_devices())


def _devices() -> tuple[str, ...]:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    num_local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    return devices_of_rank(
        rdma_devices(os.environ), local_rank=local_rank, num_local_ranks=num_local_ranks
    )


def _load() -> Any:
    """The library, which needs one of the system's: taken from beside Python if it is there."""
    os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # else it tells of every connection
    try:
        for name in VERBS:
            for found in Path(sys.prefix, "lib", "debian").rglob(name):
                ctypes.CDLL(str(found), ctypes.RTLD_GLOBAL)
        return importlib.import_module("mooncake.engine")
    except (ImportError, OSError) as error:
        raise TransferError(
            f"Mooncake does not load: {error}; Debian and Ubuntu: apt install libibverbs1"
        ) from error
