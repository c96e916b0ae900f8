"""`ckpt-engine versions` and `ckpt-engine rollback`: what was published, and back to it."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Annotated

import typer

from checkpoint_engine.cli.console import new_table, out, print_json, printable, working
from checkpoint_engine.cli.fleet import (
    AsJson,
    EngineKind,
    ReportFile,
    UnixSocket,
    leading,
    requests_of,
    show_report,
)

__all__ = ["rollback", "versions"]


def versions(
    as_json: Annotated[bool, typer.Option("--json", help="Print them as JSON.")] = False,
) -> None:
    """List the versions that were published from this host, newest first."""
    from checkpoint_engine.registry import Registry, state_dir

    registry = Registry(state_dir() / "registry.sqlite")
    try:
        registry.settle()
        found = registry.versions()
    finally:
        registry.close()
    if as_json:
        print_json(found)
        return
    table = new_table("", "version", "adapter", "digest", "published", "size")
    served: set[str | None] = set()
    for one in found:
        table.add_row(
            "" if one.lora in served else "→",
            printable(one.version),
            printable(one.lora or "-"),
            one.digest[:16] or "-",
            datetime.fromtimestamp(one.published_at).strftime("%Y-%m-%d %H:%M:%S"),
            "-" if one.num_bytes is None else f"{one.num_bytes / 1e6:.1f} MB",
        )
        served.add(one.lora)
    out.print(table)


def rollback(
    endpoint: Annotated[list[str], typer.Option(help="URL of an engine; repeat for several.")],
    to: Annotated[
        str | None, typer.Option(help="A published version; default the one before the last.")
    ] = None,
    engine: EngineKind = "auto",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until all are ready.")] = 60.0,
    uds: UnixSocket = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Return running engines to a version that they still keep, all of them or none.

    Nothing is read or sent, and no server of then needs to live.
    """
    from checkpoint_engine.ps import ParameterServer

    server = ParameterServer(rank=0, world_size=1)
    with leading(server, as_json=as_json):
        requests = requests_of(server, endpoint, engine, 1, timeout, uds)
        with working("rolling back", True):
            result = server.rollback(
                requests, to=to, timeout=timedelta(seconds=timeout), report=report
            )
        show_report(result, as_json=as_json)
