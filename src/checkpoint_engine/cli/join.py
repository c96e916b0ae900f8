"""`ckpt-engine join`: bring new or quarantined engines to what a running server has published."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from checkpoint_engine.cli.console import working
from checkpoint_engine.cli.fleet import (
    AsJson,
    Endpoints,
    EngineKind,
    ParallelSize,
    ReportFile,
    UnixSocket,
    leading,
    reach,
    requests_of,
    show_report,
)

__all__ = ["join"]


def join(
    load_metas_file: Annotated[
        Path, typer.Option(help="What `update --save-metas-file` wrote; keep it secret.")
    ],
    endpoint: Endpoints = None,
    engine: EngineKind = "auto",
    inference_parallel_size: ParallelSize = 1,
    mode: Annotated[
        str,
        typer.Option(help="staged, streamed (engines read while requests wait), or auto."),
    ] = "auto",
    uds: UnixSocket = None,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for all of it.")] = 600.0,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Bring engines to what another server has published, reading it from its ranks."""
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.update.metas import load_metas_file as load

    endpoints = endpoint or ["http://localhost:19730"]
    metas = load(load_metas_file)
    server = ParameterServer()
    with leading(server, as_json=as_json):
        requests = requests_of(server, endpoints, engine, inference_parallel_size, timeout, uds)
        with working("waiting for engines and reading from peers", server.rank == 0):
            if requests:
                reach(endpoints, uds)
            limit = timedelta(seconds=timeout)
            result = server.join(metas, requests, mode=mode, timeout=limit, report=report)
        if server.rank == 0:
            show_report(result, as_json=as_json)
