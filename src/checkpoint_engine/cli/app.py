"""The `ckpt-engine` command: its options, its commands, and what its exit codes mean.

A command is a function with typer's annotations in a module of its own, and one line in
`COMMANDS`. Such a module imports torch, transformers and servers inside its functions only, so
that `ckpt-engine --help` answers at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from checkpoint_engine.cli import (
    bench,
    demo,
    diff,
    doctor,
    history,
    join,
    lora,
    replica,
    status,
    update,
    verify,
)
from checkpoint_engine.cli.console import exit_on_error, out

__all__ = ["app", "main"]

COMMANDS: tuple[Callable[..., None], ...] = (
    demo.demo,
    replica.replica,
    update.update,
    join.join,
    history.versions,
    history.rollback,
    status.status,
    verify.verify,
    diff.diff,
    doctor.doctor,
    bench.bench,
)

EXIT_CODES = """\
Exit codes: 0 done; 1 failed; 2 wrong usage; 3 the update was refused or did not publish; \
4 a deadline passed; 5 replicas serve different weights; 130 interrupted."""


class _Commands(TyperGroup):
    """The commands, whose errors end in a line and an exit code rather than a traceback."""

    def invoke(self, ctx: Any) -> Any:
        with exit_on_error(show_traceback=ctx.params["debug"]):
            return super().invoke(ctx)


app = typer.Typer(
    name="ckpt-engine",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line and exit."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        out.print(f"ckpt-engine {version('ckpt-engine')}")
        raise typer.Exit


@app.callback(epilog=EXIT_CODES)
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Transactional, verified weight updates for running LLM inference engines."""


for _command in COMMANDS:
    app.command()(_command)
app.add_typer(lora.lora)
