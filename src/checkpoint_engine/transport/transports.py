"""Which transports there are between peers, and which of them this process uses.

ZeroMQ is always there, and always offered. Of the others, the first that is installed and better
here is offered before it; `$CKPT_ENGINE_TRANSPORT` names one that is used whether it is better or
not. A library is loaded when it is used, not before. Third parties add transports by entry points
of the group `checkpoint_engine.transports`, each a module with the functions of `Transport`.

    for exporter in exporters("10.0.0.1"): ways.append(exporter.export(segment))
    way = next(way for way in ways if missing(way.transport) == "")
    reader(way.transport, segment, "10.0.0.2").read(way, ...)
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from importlib.metadata import entry_points
from typing import Protocol, cast

from checkpoint_engine.errors import ProtocolError, UsageError
from checkpoint_engine.store import Segment
from checkpoint_engine.transport.peer import Exporter, Reader, Way

__all__ = ["Transport", "exporters", "missing", "passable", "reader"]

GROUP = "checkpoint_engine.transports"
VARIABLE = "CKPT_ENGINE_TRANSPORT"
BUILT_IN = {name: f"checkpoint_engine.transport.{name}" for name in ("mooncake", "nixl", "zeromq")}
LAST = "zeromq"


class Transport(Protocol):
    """What a transport's module has."""

    def exporter(self, address: str) -> Exporter:
        """Of a source at this address of this host."""
        ...

    def reader(self, segment: Segment, address: str) -> Reader:
        """Into a segment, of a process at this address of this host."""
        ...

    def missing(self) -> str:
        """What is to be done before it can be used here; "" if nothing. Loads nothing."""
        ...

    def preferred(self) -> bool:
        """Whether it is to be used here unasked."""
        ...


def exporters(address: str) -> list[Exporter]:
    """What a source at this address offers, best first.

    Raises:
        UsageError: `$CKPT_ENGINE_TRANSPORT` names what is not there.
        TransferError: what is to be used does not start.
    """
    chosen = _chosen()
    best = [chosen] if chosen else [name for name in _names() if _is_better(name)][:1]
    return [_transport(name).exporter(address) for name in dict.fromkeys([*best, LAST])]


def reader(transport: str, segment: Segment, address: str) -> Reader:
    """What takes a way of this transport.

    Raises:
        UsageError: it is not there.
        TransferError: it does not start.
    """
    if reason := missing(transport):
        raise UsageError(f"the transport {transport!r} cannot be used here: {reason}")
    return _transport(transport).reader(segment, address)


def missing(transport: str) -> str:
    """What is to be done before this host can take a way; "" if it can. Loads nothing.

    Raises:
        UsageError: `$CKPT_ENGINE_TRANSPORT` names what is not there.
    """
    chosen = _chosen()
    if chosen and transport not in (chosen, LAST):
        return f"set {VARIABLE}={transport}"
    return _missing(transport)


def passable(ways: Iterable[Way]) -> Way:
    """The first way that this host can take.

    Raises:
        ProtocolError: there is none.
        UsageError: as `missing`.
    """
    for way in ways:
        if not missing(way.transport):
            return way
    raise ProtocolError("the source offers no way to its bytes that can be taken here")


def _chosen() -> str:
    name = os.environ.get(VARIABLE, "")
    if name and (reason := _missing(name)):
        raise UsageError(f"{VARIABLE}={name} cannot be used here: {reason}")
    return name


def _missing(name: str) -> str:
    names = _names()
    return _transport(name).missing() if name in names else f"known are {', '.join(names)}"


def _is_better(name: str) -> bool:
    return name != LAST and not _missing(name) and _transport(name).preferred()


def _names() -> list[str]:
    """Those of third parties first: whoever installs one wants it."""
    return [*(found.name for found in entry_points(group=GROUP)), *BUILT_IN]


def _transport(name: str) -> Transport:
    if name in BUILT_IN:
        return cast(Transport, importlib.import_module(BUILT_IN[name]))
    (found,) = entry_points(group=GROUP, name=name)
    return cast(Transport, found.load())
