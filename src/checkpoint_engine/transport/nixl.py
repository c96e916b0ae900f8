"""Peer reads through NIXL, over UCX: TCP, or what `UCX_TLS` and `UCX_NET_DEVICES` say.

Where neither is set, UCX keeps to TCP on the interface of this host's address, where it listens,
too. What an agent says of itself travels in the way, and is a secret: UCX asks nobody who they are,
and over TCP trusts every address that it is sent, so that whoever has connected can read and write
the process's memory. So each segment that is read has an agent of its own, which ends with the last
way to it, as do its connections, and its thread, which spins; and so has each read.

    way = exporter("10.0.0.1").export(segment)
    for arrived in reader(own_segment, "10.0.0.2").read(way, ranges, timeout_seconds=60): ...
"""

from __future__ import annotations

import fcntl
import importlib
import importlib.util
import ipaddress
import os
import secrets
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import msgspec

from checkpoint_engine.errors import MALFORMED, PeerLost, ProtocolError, TransferError
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.library import LibraryExporter, LibraryReader, address_of
from checkpoint_engine.transport.peer import Range, Way

__all__ = [
    "NixlExporter",
    "NixlReader",
    "exporter",
    "missing",
    "preferred",
    "reader",
    "start_agent",
]

PACKAGES = ("nixl", "nixl_cu12")
SIOCGIFADDR, SIOCGIFNETMASK = 0x8915, 0x891B
ADDRESS_IN_ANSWER = slice(20, 24)
# Eight KiB, the default, were slower over TCP in some runs.
SEGMENT_VARIABLES = ("UCX_TCP_TX_SEG_SIZE", "UCX_TCP_RX_SEG_SIZE")
SEGMENT_BYTES = str(1 << 20)


class _Detail(msgspec.Struct, frozen=True, array_like=True):
    """Where the segment lies in the source, and what its agent says of itself."""

    address: int
    agent: bytes


class _Agent:
    """A NIXL agent that has registered one piece of memory."""

    def __init__(self, host: str, memory: memoryview) -> None:
        self.start = address_of(memory)
        self._memory = memory  # keeps it
        self.nixl: Any = start_agent(host)
        with _translated("cannot start"):
            registered = [(self.start, len(memory), 0, "")]
            self._registered = self.nixl.register_memory(registered, "DRAM")

    def describe(self) -> bytes:
        """What another agent needs to reach this one."""
        with _translated("cannot describe itself"):
            return bytes(self.nixl.get_partial_agent_metadata(self._registered, True, ["UCX"]))

    def close(self) -> None:
        """Ends its thread and its connections."""
        self.nixl = self._registered = self._memory = None  # type: ignore[assignment]


class NixlExporter(LibraryExporter):
    """One agent for each segment that is read; see `Exporter`."""

    transport: ClassVar[str] = "nixl"

    def open(self, segment: Segment) -> tuple[Way, _Agent]:
        """Register the segment with an agent of its own."""
        agent = _Agent(self.address, segment.memory)
        detail = msgspec.msgpack.encode(_Detail(agent.start, agent.describe()))
        return Way(transport=self.transport, address=self.address, detail=detail), agent


class NixlReader(LibraryReader):
    """One agent for each read; see `Reader`."""

    transport: ClassVar[str] = "nixl"

    def connect(self, way: Way, timeout_seconds: float) -> _Connection:
        """An agent of this read alone, which knows the source's."""
        try:
            detail = msgspec.msgpack.decode(way.detail, type=_Detail)
        except MALFORMED as error:
            raise ProtocolError(f"the source at {way.address} gave no agent: {error}") from error
        return _Connection(_Agent(self.address, self.memory), way.address, detail)


class _Connection:
    def __init__(self, agent: _Agent, address: str, detail: _Detail) -> None:
        self._agent, self._address, self._source = agent, address, detail.address
        with _translated(f"does not reach the source at {address}"):
            self._peer = agent.nixl.add_remote_agent(detail.agent)

    def start(self, wanted: Range) -> Any:
        nixl = self._agent.nixl
        into = [(self._agent.start + wanted.place, wanted.length, 0)]
        source = [(self._source + wanted.start, wanted.length, 0)]
        with _translated(f"does not read from the source at {self._address}"):
            transfer = nixl.initialize_xfer(
                "READ",
                nixl.get_xfer_descs(into, "DRAM"),
                nixl.get_xfer_descs(source, "DRAM"),
                self._peer,
            )
            nixl.transfer(transfer)
        return transfer

    def done(self, transfer: Any) -> bool:
        with _translated(f"lost the source at {self._address}, or its lease has ended"):
            state = self._agent.nixl.check_xfer_state(transfer)
            if state == "DONE":
                transfer.release()
        if state == "ERR":
            raise PeerLost(f"NIXL lost the source at {self._address}, or its lease has ended")
        return bool(state == "DONE")

    def close(self) -> None:
        self._agent.close()


def start_agent(host: str) -> Any:
    """A bare agent of the library's own at an address of this host; ends when nobody refers to it.

    Raises:
        TransferError: the library does not load, or does not start.
    """
    library = _load()
    with _translated("cannot start"):
        agent = library.nixl_agent(secrets.token_hex(8), library.nixl_agent_config(backends=[]))
        agent.create_backend("UCX", _options(host))
        return agent


def exporter(address: str) -> NixlExporter:
    """Of the process at this address."""
    return NixlExporter(address)


def reader(segment: Segment, address: str) -> NixlReader:
    """Of the process at this address."""
    return NixlReader(segment, address)


def missing() -> str:
    """What is to be done before this can be used here; "" if nothing. Loads nothing."""
    if _package() is None:
        return "pip install 'ckpt-engine[nixl]'"
    if "mooncake.engine" in sys.modules:
        return "leave Mooncake to another process: both in one crash at its end"
    return ""


def preferred() -> bool:
    """Whether it is better here than ZeroMQ: over TCP it is not."""
    return "UCX_TLS" in os.environ


def _package() -> str | None:
    """The one that chooses a build by the CUDA that is there, else a build, which needs none."""
    return next((name for name in PACKAGES if importlib.util.find_spec(name) is not None), None)


def _load() -> Any:
    os.environ.setdefault("NIXL_LOG_LEVEL", "WARN")
    os.environ.setdefault("UCX_LOG_LEVEL", "error")
    os.environ.setdefault("UCX_LOG_FILE", "stderr")  # else it is standard output
    for variable in SEGMENT_VARIABLES:
        os.environ.setdefault(variable, SEGMENT_BYTES)
    try:
        return importlib.import_module(f"{_package()}._api")
    except (ImportError, OSError) as error:
        raise TransferError(f"NIXL does not load: {error}") from error


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Its errors, which have no base of their own, as ours."""
    bindings = importlib.import_module(f"{_package()}._bindings")
    kinds = [kind for kind in vars(bindings).values() if isinstance(kind, type)]
    try:
        yield
    except bindings.nixlRemoteDisconnectError as error:
        raise PeerLost(f"NIXL {what}: {error}") from error
    except tuple(kind for kind in kinds if issubclass(kind, Exception)) as error:
        raise TransferError(f"NIXL {what}: {error}") from error


def _options(host: str) -> dict[str, str]:
    """UCX for this agent alone; what the user has set stands."""
    options = {"UCX_TLS": "TLS=tcp", "UCX_NET_DEVICES": f"NET_DEVICES={_interface(host)}"}
    return {
        "engine_config": ",".join(
            option for variable, option in options.items() if variable not in os.environ
        )
    }


def _interface(host: str) -> str:
    """The network interface whose network an IPv4 address of this host belongs to."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            question = struct.pack("256s", name.encode())
            try:
                address, mask = (
                    ipaddress.IPv4Address(fcntl.ioctl(asked, what, question)[ADDRESS_IN_ANSWER])
                    for what in (SIOCGIFADDR, SIOCGIFNETMASK)
                )
            except OSError:
                continue  # it has no IPv4 address
            if ipaddress.ip_address(host) in ipaddress.ip_network(
                f"{address}/{mask}", strict=False
            ):
                return name
    raise TransferError(f"no interface of this host has the address {host}")
