"""Where commands write: results to stdout, progress and errors to stderr.

    with exit_on_error(show_traceback=False):
        with progress("stage", total_bytes) as advance:
            advance(num_bytes)
        print_json(result) if as_json else out.print(table)

Text from elsewhere (a peer's label, an engine's message) goes through `printable` first: a
terminal obeys the control characters in what it is shown.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    UpdateFailed,
    UpdateRefused,
    UsageError,
)

__all__ = [
    "EXIT_DISAGREE",
    "err",
    "exit_code",
    "exit_on_error",
    "exit_on_sigterm",
    "new_table",
    "out",
    "print_json",
    "printable",
    "progress",
    "working",
]

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

EXIT_DISAGREE = 5  # replicas serve different weights
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count


def exit_code(error: CheckpointEngineError) -> int:
    """What the process exits with when a command ends in `error`."""
    if isinstance(error, UsageError):
        return 2
    if isinstance(error, (UpdateRefused, UpdateFailed)):
        return 3
    if isinstance(error, DeadlineExceeded):
        return 4
    return 1


@contextmanager
def exit_on_error(*, show_traceback: bool) -> Iterator[None]:
    """Turn errors of this package into one red line and an exit code; Ctrl-C exits with 130.

    Any other exception is a bug and passes as it is.

    Args:
        show_traceback: print the traceback before the line.

    Raises:
        typer.Exit: the block raised CheckpointEngineError or was interrupted.

    """
    try:
        yield
    except CheckpointEngineError as error:
        if show_traceback:
            sys.stderr.write(traceback.format_exc())
        first_line, _, _ = str(error).partition("\n")
        line = Text(f"error: {printable(first_line)}", style="bold red")
        err.print(line, soft_wrap=True)
        raise typer.Exit(exit_code(error)) from error
    except KeyboardInterrupt as error:
        err.print("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from error


def exit_on_sigterm() -> None:
    """Have SIGTERM end this process as Ctrl-C would: what it holds, it lets go of first."""

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(128 + signum)

    signal.signal(signal.SIGTERM, stop)


def printable(text: str) -> str:
    """`text` on one line, without characters that a terminal would obey."""
    line = " ".join(text.split())
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in line)


def new_table(*columns: str) -> Table:
    """An empty table without lines, which fits 80 columns and pipes well."""
    return Table(*columns, box=None, padding=(0, 2, 0, 0))


def print_json(data: Any) -> None:
    """Print what msgspec can encode to stdout as indented JSON, uncoloured and unwrapped."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(data), indent=2).decode() + "\n")


@contextmanager
def progress(description: str, total_bytes: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the block runs, if that is a terminal.

    Yields a function to call with the bytes that have been moved since the last call.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=total_bytes)
        yield lambda num_bytes: bar.advance(task, num_bytes)


@contextmanager
def working(description: str, shown: bool = True) -> Iterator[None]:
    """Show on stderr what is going on and for how long, if that is a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    hidden = not (shown and err.is_terminal)
    with Progress(*columns, console=err, transient=True, disable=hidden) as bar:
        bar.add_task(description, total=None)
        yield
