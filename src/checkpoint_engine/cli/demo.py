"""`ckpt-engine demo`: the main job, live."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoint_engine.cli.console import err, new_table, out, print_json, printable
from checkpoint_engine.errors import UpdateFailed, UsageError

if TYPE_CHECKING:
    from checkpoint_engine.demo.run import DemoResult, Event, StepDone

__all__ = ["demo"]

STAGES = ("attach", "verify", "apply", "check", "publish")


def demo(
    steps: Annotated[int, typer.Option(min=1, help="Policy-gradient steps.")] = 10,
    replicas: Annotated[int, typer.Option(min=1, max=16, help="Replica processes.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the model, the text and the rollouts.")] = 0,
    chaos: Annotated[
        bool, typer.Option("--chaos", help="A replica refuses an update, another dies in one.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Write the result as JSON.")] = None,
    trace: Annotated[Path | None, typer.Option(help="Write a timeline for Perfetto.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Train a small model and keep running replicas on its newest weights."""
    for file in (report, trace):
        if file is not None and not file.absolute().parent.is_dir():
            raise UsageError(f"{file}: its folder does not exist")
    try:
        import transformers  # noqa: F401 - the extra may be missing
    except ImportError as error:
        raise UsageError("the demo needs: pip install 'ckpt-engine[transformers]'") from error
    from transformers.utils import logging as transformers_logging

    from checkpoint_engine.demo.run import run_demo
    from checkpoint_engine.timeline import to_perfetto

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="ckpt-engine-demo-") as folder:
        os.environ["CKPT_ENGINE_STATE_DIR"] = folder  # a demo is no part of the user's history
        view = _View(steps, quiet=as_json)
        with view:
            result = run_demo(
                steps=steps, num_replicas=replicas, seed=seed, tell=view.show, chaos=chaos
            )
    if report is not None:
        _write_report(report, result)
    if trace is not None:
        trace.write_bytes(to_perfetto(result.spans))
    if as_json:
        print_json(_reported(result))
    else:
        _conclude(result)
    _insist(result)


class _View:
    """A bar while something takes long, and a line for each step."""

    def __init__(self, steps: int, *, quiet: bool) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self._steps, self._quiet = steps, quiet
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=err, transient=True, disable=quiet)
        self._task = self._progress.add_task("training on text", total=1.0)

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, event: Event) -> None:
        from checkpoint_engine.demo.run import Pretraining, Serving

        if self._quiet:
            return
        if isinstance(event, Pretraining):
            done = min(1.0, event.seconds / event.total_seconds)
            text = f"training on text, loss {event.loss:.2f}"
            self._progress.update(self._task, description=text, completed=done)
            if done >= 1.0:
                self._progress.update(self._task, description="starting replicas", total=None)
        elif isinstance(event, Serving):
            where = ", ".join(event.endpoints)
            out.print(f"{event.num_parameters:,} parameters served at {where}", soft_wrap=True)
            self._progress.update(
                self._task, description="policy gradient", completed=0, total=self._steps
            )
        else:
            out.print(_line(event), soft_wrap=True)
            self._progress.update(self._task, completed=event.step)


def _line(event: StepDone) -> str:
    report = event.report
    stages = " ".join(f"{stage} {1000 * report.seconds.get(stage, 0.0):.1f}" for stage in STAGES)
    digests = " ".join(
        f"{name.removeprefix('replica-')}:{digest[:8]}" for name, digest in event.digests.items()
    )
    rate = report.bytes * len(report.replicas) / event.update_seconds / 1e9
    return (
        f"step {event.step:>2}  reward {event.reward:.2f} {'█' * round(20 * event.reward):<20}  "
        f"{report.version} {report.outcome}  {report.bytes / 1e6:.1f} MB  {rate:.2f} GB/s  "
        f"pause {1000 * (report.pause_seconds or 0.0):.1f} ms  [dim]{stages} ms[/dim]  {digests}"
        f"  [bold yellow]{event.trouble}[/bold yellow]"
    )


def _conclude(result: DemoResult) -> None:
    table = new_table("replica", "version", "digest", "greedy tokens")
    for replica in result.replicas:
        verdict = "equal the trainer's" if replica.outputs_match else "[red]DIFFER[/red]"
        table.add_row(replica.name, replica.version, replica.digest[:16], verdict)
    out.print(table)
    out.print(
        f"reward {result.rewards[0]:.2f} → {result.rewards[-1]:.2f}; {result.num_requests} "
        f"requests answered meanwhile, {result.num_requests_failed} failed, "
        f"{result.num_requests_cut_off} cut off by a death, "
        f"{result.num_requests_across_versions} went on across an update",
        soft_wrap=True,
    )


def _insist(result: DemoResult) -> None:
    """A demo that did not show what it is for has failed."""
    wrong = [replica.name for replica in result.replicas if not replica.outputs_match]
    if wrong:
        raise UpdateFailed(f"{', '.join(wrong)}: greedy tokens differ from the trainer's")
    if result.num_requests_failed:
        raise UpdateFailed(f"requests failed during updates: {printable(result.failures[0])}")


def _reported(result: DemoResult) -> dict[str, object]:
    import msgspec

    fields: dict[str, object] = msgspec.to_builtins(result)
    del fields["spans"]
    return fields


def _write_report(file: Path, result: DemoResult) -> None:
    import msgspec

    file.write_bytes(msgspec.json.format(msgspec.json.encode(_reported(result))))
