"""`ckpt-engine diff`: what changed, tensor by tensor, between checkpoints or running replicas.

Two checkpoints are compared element by element. Of a replica only digests are known, so there a
tensor is equal or changed; a checkpoint beside it is compared as an update would leave it there.
"""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from checkpoint_engine.cli.console import new_table, out, print_json, printable, progress, working
from checkpoint_engine.cli.endpoints import checked_url, fetch_digests
from checkpoint_engine.errors import AdapterError

if TYPE_CHECKING:
    from checkpoint_engine.compare import Change, WeightDigests
    from checkpoint_engine.sources import SafetensorsSource

__all__ = ["diff"]

NUM_SHOWN = 20


def diff(
    a: Annotated[str, typer.Argument(help="Safetensors file, HF folder, or URL of a replica.")],
    b: Annotated[str, typer.Argument(help="The same.")],
    all_tensors: Annotated[
        bool, typer.Option("--all", help="Show every tensor, equal ones too.")
    ] = False,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds to wait for a replica's answer.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report per tensor what changed from A to B, the most changed first.

    It is a report: it exits with 0 whether or not something changed.
    """
    changes = sorted(_changes(a, b, timeout), key=_order)
    counts = Counter(change.kind for change in changes)
    if as_json:
        print_json({"a": a, "b": b, "counts": counts, "tensors": changes})
    else:
        shown = changes if all_tensors else [c for c in changes if c.kind != "equal"][:NUM_SHOWN]
        _show(shown)
        hidden = len(changes) - counts["equal"] - len(shown)
        if hidden > 0:
            out.print(f"and {hidden} more; --all shows them")
        told = ", ".join(f"{number} {kind}" for kind, number in counts.most_common())
        out.print(f"{len(changes)} tensors: {told}")


def _changes(a: str, b: str, timeout_seconds: float) -> list[Change]:
    from checkpoint_engine.compare import Checkpoint, compare_digests
    from checkpoint_engine.sources import SafetensorsSource, safetensors_files

    urls = [checked_url(side) for side in (a, b) if _is_url(side)]
    with contextlib.ExitStack() as stack:
        sources = []
        for side in (a, b):
            if not _is_url(side):
                sources.append(SafetensorsSource(safetensors_files(side)))
                stack.callback(sources[-1].close)
        if not urls:
            return _elements(*sources)
        with working("comparing digests"):
            replicas = _ask(urls, timeout_seconds)
            if not sources:
                return compare_digests(*(replica.tensors for replica in replicas))
            expected, (replica,) = Checkpoint(sources[0]).as_served(replicas[0]), replicas
            sides = (replica.tensors, expected) if _is_url(a) else (expected, replica.tensors)
            return compare_digests(*sides)


def _elements(a: SafetensorsSource, b: SafetensorsSource) -> list[Change]:
    from checkpoint_engine.compare import compare_elements
    from checkpoint_engine.dtypes import num_bytes

    total_bytes = sum(num_bytes(spec.dtype, spec.shape) for spec in a.specs())
    changes = []
    with progress("comparing", total_bytes) as advance:
        for change in compare_elements(a, b):
            advance(change.num_bytes)
            changes.append(change)
    return changes


def _ask(urls: Sequence[str], timeout_seconds: float) -> list[WeightDigests]:
    replicas = []
    answers = fetch_digests(urls, sample=1.0, seed=0, timeout_seconds=timeout_seconds)
    for url, answer in zip(urls, answers, strict=True):
        if isinstance(answer, str):
            raise AdapterError(f"{url}: {answer}")
        replicas.append(answer)
    return replicas


def _is_url(side: str) -> bool:
    return side.startswith(("http://", "https://"))


def _order(change: Change) -> tuple[bool, float, str]:
    """Equal ones last; first what has no measure, then by how much it changed."""
    amount = change.relative_l2
    if amount is None or math.isnan(amount):
        amount = math.inf
    return change.kind == "equal", -amount, change.name


def _show(changes: Sequence[Change]) -> None:
    if not changes:
        return
    table = new_table("tensor", "", "elements", "max |Δ|", "rel. L2")
    table.columns[0].overflow = "fold"
    for change in changes:
        share = change.changed_share
        table.add_row(
            Text(printable(change.name)),
            Text(printable(f"{change.kind} {change.note}")),
            "" if share is None else f"{100 * share:.3g} %",
            _number(change.max_difference),
            _number(change.relative_l2),
        )
    out.print(table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
