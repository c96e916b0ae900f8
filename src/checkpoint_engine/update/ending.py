"""How a call that leads engines ends: with a report in a file, and an error unless it published."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec

from checkpoint_engine.errors import UpdateFailed, UsageError
from checkpoint_engine.update.protocol import Report, explain

__all__ = ["check_report_file", "ended"]


def check_report_file(file: str | os.PathLike[str] | None) -> None:
    """Raise UsageError if a report could not be written there in the end."""
    if file is not None and not Path(file).absolute().parent.is_dir():
        raise UsageError(f"{file}: the report's folder does not exist")


def ended(result: Report, file: str | os.PathLike[str] | None) -> Report:
    """Write a report to its file, if there is one, and return it.

    Raises:
        UpdateFailed: nothing was published, nobody lived to confirm it, or a probe said no.
    """
    if file is not None:
        Path(file).write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    published = any(replica.outcome.startswith("published") for replica in result.replicas)
    refused = result.reason is not None and result.reason.where == "probe"
    if result.outcome != "published" or not published or refused:
        raise UpdateFailed(explain(result), result)
    return result
