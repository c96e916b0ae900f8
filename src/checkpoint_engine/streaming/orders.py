"""What a trainer tells its samplers of a version, beside its tensors: what it is, how it ended."""

from __future__ import annotations

import msgspec

from checkpoint_engine.errors import RemoteError, UpdateFailed
from checkpoint_engine.manifest import Version
from checkpoint_engine.update.protocol import Report, explain

__all__ = ["PATIENCE", "Ending", "Order", "raise_failed"]

PATIENCE = 4  # timeouts: all that happens between an order and its end has a deadline of its own


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent.

    Attributes:
        kind: "weights" of a whole model, "merged" with adapters, a "base" without, or an "adapter".
        version: what it is; of an adapter `parent` is the base that it is made for.
        adapter: its name; of a base, that of the adapter for which it is sent.
    """

    kind: str
    version: Version
    adapter: str = ""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a version ended; `more`: another comes in the same call."""

    report: Report | None = None
    error: RemoteError | None = None
    more: bool = False


def raise_failed(ending: Ending) -> Report:
    """The report of a version that is served; raises UpdateFailed of one that is not."""
    report = ending.report
    if report is None:
        raise UpdateFailed(ending.error.message if ending.error else "it ended without a report")
    if report.outcome != "published":
        raise UpdateFailed(explain(report), report)
    return report
