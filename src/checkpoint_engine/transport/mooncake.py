"""Peer reads through Mooncake's transfer engine: RDMA where there are devices, else TCP.

Engines find each other without a metadata server, by a handshake with the source. Ports of an
engine are open on all interfaces, whatever address it is given, and it asks nobody who they are:
whoever reaches them may read what is exported. Over TCP the source exports a read-only map, so
nobody writes there; over RDMA the library insists on memory that can be written.

Of the library: it takes 1,024 requests in a batch at most, and writes some bytes of a larger one
after it has refused it, so each range is a batch of one; its own waits spin, so they are not used.

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
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from checkpoint_engine.errors import MALFORMED, PeerLost, ProtocolError, TransferError
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.devices import devices_of_rank, rdma_devices
from checkpoint_engine.transport.library import LibraryExporter, LibraryReader, address_of
from checkpoint_engine.transport.peer import Range, Way

__all__ = ["MooncakeExporter", "MooncakeReader", "exporter", "missing", "preferred", "reader"]

_SAYS = "; it says why on standard error"
NO_BATCH = (0, (1 << 64) - 1)
# In the order in which they need each other.
VERBS = ("libnl-3.so.200", "libnl-route-3.so.200", "libibverbs.so.1")


class _Detail(msgspec.Struct, frozen=True, array_like=True):
    """Where the segment lies in the source, which is what the library goes by."""

    address: int


class _Engine:
    """A transfer engine that has registered one piece of memory."""

    def __init__(self, host: str, address: int, num_bytes: int, owner: object) -> None:
        devices = _devices()
        self._owner = owner  # keeps the memory
        self._engine: Any = _load().TransferEngine()
        protocol = "rdma" if devices else "tcp"
        if self._engine.initialize(host, "P2PHANDSHAKE", protocol, ",".join(devices)):
            raise TransferError(f"Mooncake cannot start with {protocol} on {host}{_SAYS}")
        if status := self._engine.register_memory(address, num_bytes):
            raise TransferError(f"Mooncake refuses {num_bytes} bytes of memory: {status}{_SAYS}")
        self.address = f"{host}:{self._engine.get_rpc_port()}"

    def read(self, target: str, into: int, start: int, length: int) -> int:
        """Begin one transfer; its number, or none of `NO_BATCH`."""
        return int(self._engine.batch_transfer_async_read(target, [into], [start], [length]))

    def status(self, batch: int) -> int:
        """1: it has arrived; 0: not yet; less: it never will."""
        return int(self._engine.transfer_check_status(batch))

    def close(self) -> None:
        """Ends its threads, and with them every transfer."""
        self._engine = self._owner = None


class MooncakeExporter(LibraryExporter):
    """One engine for each segment that is read; see `Exporter`."""

    transport: ClassVar[str] = "mooncake"

    def open(self, segment: Segment) -> tuple[Way, _Engine]:
        """Register the segment, read-only where the network allows it."""
        memory = segment.memory if _devices() else _read_only(segment)
        address = address_of(memory)
        engine = _Engine(self.address, address, segment.capacity_bytes, memory)
        detail = msgspec.msgpack.encode(_Detail(address))
        return Way(transport=self.transport, address=engine.address, detail=detail), engine


class MooncakeReader(LibraryReader):
    """One engine for each read; see `Reader`."""

    transport: ClassVar[str] = "mooncake"

    def connect(self, way: Way) -> _Connection:
        """An engine of this read alone; the source is met with the first range."""
        try:
            detail = msgspec.msgpack.decode(way.detail, type=_Detail)
        except MALFORMED as error:
            raise ProtocolError(f"the source at {way.address} gave no address: {error}") from error
        return _Connection(self.memory, self.address, way.address, detail.address)


class _Connection:
    def __init__(self, memory: memoryview, host: str, target: str, source: int) -> None:
        self._target, self._source, self._into = target, source, address_of(memory)
        self._engine = _Engine(host, self._into, len(memory), memory)

    def start(self, wanted: Range) -> int:
        batch = self._engine.read(
            self._target, self._into + wanted.place, self._source + wanted.start, wanted.length
        )
        if batch in NO_BATCH:
            raise PeerLost(f"Mooncake does not reach the source at {self._target}{_SAYS}")
        return batch

    def done(self, batch: int) -> bool:
        status = self._engine.status(batch)
        if status < 0:
            raise PeerLost(
                f"the source at {self._target} is gone, or has ended the lease: Mooncake's status "
                f"{status}{_SAYS}"
            )
        return status == 1

    def close(self) -> None:
        self._engine.close()


def _read_only(segment: Segment) -> mmap.mmap:
    return mmap.mmap(segment.descriptor, segment.capacity_bytes, prot=mmap.PROT_READ)


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
    if "nixl" in sys.modules:
        return "leave NIXL to another process: both in one crash at its end"
    return ""


def preferred() -> bool:
    """Whether it is better here than ZeroMQ: over TCP it is not."""
    return bool(_devices())


def _devices() -> tuple[str, ...]:
    return devices_of_rank(
        rdma_devices(os.environ),
        local_rank=int(os.environ.get("LOCAL_RANK", "0")),
        num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
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
