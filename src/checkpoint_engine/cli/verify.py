"""`ckpt-engine verify`: whether replicas serve the bytes of a checkpoint, or those of each other.

Every replica is asked for the digests of its live tensors, which it recomputes while it serves.
With a checkpoint they are compared with what an update to it would leave there, casts included;
without, with what most of the replicas serve.
"""

from __future__ import annotations

import contextlib
import secrets
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import msgspec
import typer
from rich.text import Text

from checkpoint_engine.cli.console import (
    EXIT_DISAGREE,
    new_table,
    out,
    print_json,
    printable,
    working,
)
from checkpoint_engine.cli.endpoints import checked_url, fetch_digests
from checkpoint_engine.errors import UsageError

if TYPE_CHECKING:
    from checkpoint_engine.compare import Change, TensorDigest, WeightDigests

__all__ = ["Verdict", "verify"]

EXIT_UNANSWERED = 1
NUM_SHOWN = 5

STYLES = {"equal": "green", "different": "bold red", "no answer": "red"}


class Verdict(msgspec.Struct, frozen=True, kw_only=True):
    """What was found at one endpoint.

    Attributes:
        num_tensors: tensors that were digested, tied ones once; `num_bytes` are theirs.
        different: one line for each tensor that differs.
        note: why there is no answer.
    """

    endpoint: str
    verdict: Literal["equal", "different", "no answer"]
    weight_version: str | None = None
    num_tensors: int = 0
    num_bytes: int = 0
    different: tuple[str, ...] = ()
    note: str = ""


def verify(
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", "-e", metavar="URL", help="A replica to ask; repeatable."),
    ] = None,
    checkpoint_path: Annotated[
        Path | None, typer.Option(help="Safetensors file or HF folder that all should serve.")
    ] = None,
    sample: Annotated[
        float, typer.Option(help="Share of the bytes to compare, in whole tensors.")
    ] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="Of the sample; default another one each time.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds to wait for each answer.")
    ] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare what replicas serve with a checkpoint, or with each other, while they serve.

    Exits with 5 if one serves something else, else with 1 if one does not answer.
    """
    urls = [checked_url(url) for url in endpoint or []]
    if len(urls) + (checkpoint_path is not None) < 2 or not urls:
        raise UsageError("there is nothing to compare; name two replicas, or one and a checkpoint")
    if not 0 < sample <= 1:
        raise UsageError(f"--sample is a share above 0 and up to 1, not {sample:g}")
    seed = secrets.randbelow(1 << 32) if seed is None else seed
    verdicts = _verify(urls, checkpoint_path, sample, seed, timeout)
    found = {verdict.verdict for verdict in verdicts}
    if as_json:
        equal = found == {"equal"}
        print_json({"equal": equal, "sample": sample, "seed": seed, "endpoints": verdicts})
    else:
        _show(verdicts, f"sample {sample:g}, seed {seed}" if sample < 1 else "")
    if "different" in found:
        raise typer.Exit(EXIT_DISAGREE)
    if "no answer" in found:
        raise typer.Exit(EXIT_UNANSWERED)


def _verify(
    urls: Sequence[str], path: Path | None, sample: float, seed: int, timeout: float
) -> list[Verdict]:
    from checkpoint_engine.compare import Checkpoint, WeightDigests, compare_digests
    from checkpoint_engine.sources import SafetensorsSource, safetensors_files

    with contextlib.ExitStack() as stack:
        checkpoint = None
        if path is not None:
            source = SafetensorsSource(safetensors_files(path))
            stack.callback(source.close)
            checkpoint = Checkpoint(source)
        with working("replicas digest their weights"):
            answers = fetch_digests(urls, sample=sample, seed=seed, timeout_seconds=timeout)
        replicas = [answer for answer in answers if isinstance(answer, WeightDigests)]
        usual = _usual(replicas)
        stack.enter_context(working(f"comparing with {path or 'each other'}"))
        verdicts = []
        for url, answer in zip(urls, answers, strict=True):
            if isinstance(answer, str):
                verdicts.append(Verdict(endpoint=url, verdict="no answer", note=answer))
            else:
                expected = checkpoint.as_served(answer) if checkpoint else usual
                changes = compare_digests(expected, answer.tensors)
                verdicts.append(_verdict(url, answer, changes))
        return verdicts


def _usual(replicas: Sequence[WeightDigests]) -> Sequence[TensorDigest]:
    """What most replicas serve."""
    counts = Counter(replica.digest for replica in replicas)
    return max(replicas, key=lambda replica: counts[replica.digest]).tensors if replicas else ()


def _verdict(url: str, replica: WeightDigests, changes: Sequence[Change]) -> Verdict:
    different = tuple(_told(change) for change in changes if change.kind != "equal")
    return Verdict(
        endpoint=url,
        verdict="different" if different else "equal",
        weight_version=replica.weight_version,
        num_tensors=len(replica.digested),
        num_bytes=sum(tensor.num_bytes for tensor in replica.digested),
        different=different,
    )


def _told(change: Change) -> str:
    """How a replica's tensor (B) differs from what was expected (A)."""
    told = {"only in A": "is missing", "only in B": "is not expected", "changed": "differs"}
    return f"{change.name} {told.get(change.kind, f'is {change.note}')}"


def _show(verdicts: Sequence[Verdict], sample: str) -> None:
    table = new_table("endpoint", "version", "tensors", "bytes", "verdict")
    table.columns[0].overflow = "fold"
    for row in verdicts:
        table.add_row(
            Text(row.endpoint),
            Text(printable(row.weight_version or "-")),
            str(row.num_tensors),
            f"{row.num_bytes / 1e6:.1f} MB",
            Text(row.verdict, style=STYLES[row.verdict]),
        )
    out.print(table)
    for row in verdicts:
        lines = [row.note] if row.note else list(row.different[:NUM_SHOWN])
        if len(row.different) > NUM_SHOWN:
            lines.append(f"and {len(row.different) - NUM_SHOWN} more; --json names them")
        for line in lines:
            out.print(Text(printable(f"{row.endpoint}: {line}")), soft_wrap=True)
    if sample:
        out.print(sample)
