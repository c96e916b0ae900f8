"""`ckpt-engine bench`: how fast updates are on this machine, next to plain copies and files."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoint_engine.cli.console import err, exit_on_sigterm, new_table, out, print_json
from checkpoint_engine.errors import UsageError

if TYPE_CHECKING:
    from checkpoint_engine.bench.measure import Row
    from checkpoint_engine.bench.run import BenchResult

__all__ = ["bench"]

COLUMNS = ("", "ratio", "reach", "rounds", "seconds", "GB/s")
MARKS = ("<!-- bench: begin -->", "<!-- bench: end -->")


def bench(
    size: Annotated[str, typer.Option(help="full: 1.2 GB; small: 0.16 GB.")] = "full",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 15,
    only: Annotated[list[str] | None, typer.Option(help="A row; may be repeated.")] = None,
    report: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Write the tables into this file, between its marks.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure updates of Qwen3-0.6B's shapes. Needs 12 GB of memory and a quiet machine."""
    for file in (report, markdown):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist")
    page = _page(markdown) if markdown is not None else ""
    result = _run(size, rounds, only or [])
    if report is not None:
        _write_report(report, result)
    if markdown is not None:
        before, rest = page.split(MARKS[0])
        after = rest.split(MARKS[1])[1]
        markdown.write_text(f"{before}{MARKS[0]}\n\n{_markdown(result)}\n{MARKS[1]}{after}")
    if as_json:
        print_json(result)
    else:
        _show(result)


def _run(size: str, rounds: int, only: list[str]) -> BenchResult:
    try:
        import safetensors  # noqa: F401 - the extra may be missing
        import transformers  # noqa: F401
    except ImportError as error:
        raise UsageError("this needs: pip install 'ckpt-engine[transformers]'") from error
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from checkpoint_engine.bench.run import run_bench

    exit_on_sigterm()  # the replica, and files in memory, go with this process
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="ckpt-engine-bench-") as folder,
        Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar,
    ):
        os.environ["CKPT_ENGINE_STATE_DIR"] = folder  # no part of the user's history
        task = bar.add_task("")

        def tell(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        return run_bench(size=size, rounds=rounds, only=only, tell=tell)


def _show(result: BenchResult) -> None:
    table = new_table(*COLUMNS)
    for row in result.rows:
        style = "none" if row.limit is None else "green" if row.reached else "red"
        table.add_row(*_cells(row), style=style)
    out.print(table)
    for title, stages in _stages(result):
        out.print(f"\n{title}, ms: " + ", ".join(f"{n} {1000 * s:.1f}" for n, s in stages))
    out.print("\n" + _about(result), soft_wrap=True)


def _markdown(result: BenchResult) -> str:
    """The same for a page."""
    lines = [f"| {' | '.join(COLUMNS)} |", f"| --- |{' ---: |' * (len(COLUMNS) - 1)}"]
    lines += [f"| {' | '.join(_cells(row))} |" for row in result.rows]
    for title, stages in _stages(result):
        names = [name for name, _ in stages]
        times = [f"{1000 * seconds:.1f}" for _, seconds in stages]
        lines += ["", f"| {title} | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
        lines += [f"| ms | {' | '.join(times)} |"]
    return "\n".join([*lines, "", _about(result), ""])


def _cells(row: Row) -> tuple[str, ...]:
    """What `COLUMNS` are."""
    limit = "" if row.limit is None else f"{'≥' if row.at_least else '≤'} {row.limit:g}"
    timed = [seconds for seconds in (row.seconds, row.base_seconds) if seconds]
    rates = [row.num_bytes / seconds / 1e9 for seconds in timed]
    return (
        f"{row.ours} / {row.base}",
        f"{row.ratio:.2f}",
        limit,
        f"{row.lowest:.2f}-{row.highest:.2f}",
        f"{row.seconds:.3f} / {row.base_seconds:.3f}",
        " / ".join(f"{rate:.1f}" for rate in rates if rate),
    )


def _stages(result: BenchResult) -> list[tuple[str, list[tuple[str, float]]]]:
    """What was timed within something else, by that: "update/verify" is a stage of "update"."""
    groups: dict[str, list[tuple[str, float]]] = {}
    for name, seconds in result.seconds.items():
        whole, _, stage = name.partition("/")
        if stage:
            groups.setdefault(whole, []).append((stage, seconds))
    return list(groups.items())


def _about(result: BenchResult) -> str:
    measured = (
        f"Medians of {result.rounds} rounds. {result.machine}. Meanwhile others used "
        f"{100 * result.others:.0f} % of the processors."
    )
    return "\n\n".join([measured, *result.without])


def _page(file: Path) -> str:
    """The text to write tables into, checked before anything is measured for them."""
    text = file.read_text() if file.is_file() else ""
    if any(text.count(mark) != 1 for mark in MARKS) or text.index(MARKS[0]) > text.index(MARKS[1]):
        raise UsageError(f"{file}: must hold {MARKS[0]} and then {MARKS[1]}, each once")
    return text


def _write_report(file: Path, result: BenchResult) -> None:
    import msgspec

    file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
