"""What the commands that lead engines share: their options, calls and reports."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoint_engine.cli.console import (
    exit_on_sigterm,
    new_table,
    out,
    print_json,
    printable,
)
from checkpoint_engine.errors import DeadlineExceeded, UpdateFailed, UsageError

if TYPE_CHECKING:
    from checkpoint_engine.calls import EngineRequest
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.update.protocol import Report

__all__ = [
    "AsJson",
    "Endpoints",
    "EngineKind",
    "ParallelSize",
    "ReportFile",
    "UnixSocket",
    "leading",
    "reach",
    "requests_of",
    "show_report",
]

REACH_SECONDS = 60.0
RETRY_SECONDS = 1.0

Endpoints = Annotated[list[str] | None, typer.Option(help="URL of an engine; repeat for several.")]
EngineKind = Annotated[
    str, typer.Option(help="vllm, sglang, replica, or auto: each is asked what it is.")
]
ParallelSize = Annotated[
    int, typer.Option(min=1, help="Workers of each engine (tensor parallel size).")
]
UnixSocket = Annotated[str | None, typer.Option(help="Unix socket to send requests through.")]
ReportFile = Annotated[Path | None, typer.Option(help="Write the report as JSON.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


def requests_of(
    server: ParameterServer,
    endpoints: Sequence[str],
    engine: str,
    inference_parallel_size: int,
    timeout_seconds: float,
    uds: str | None,
) -> list[EngineRequest]:
    """The calls of the engines that this rank leads."""
    from checkpoint_engine.calls import engine_requests

    return engine_requests(
        endpoints,
        rank=server.rank,
        world_size=server.world_size,
        inference_parallel_size=inference_parallel_size,
        timeout_seconds=timeout_seconds,
        uds=uds,
        engine=engine,
    )


def reach(endpoints: Sequence[str], uds: str | None) -> None:
    """Wait until every engine answers; one that waits for its first weights may be unhealthy.

    Raises:
        DeadlineExceeded: one does not answer; says which, and why.
    """
    import httpx

    deadline = time.monotonic() + REACH_SECONDS
    for endpoint in endpoints:
        while True:
            transport = httpx.HTTPTransport(uds=uds, verify=endpoint.startswith("https:"))
            try:
                with httpx.Client(transport=transport, timeout=10.0) as client:
                    client.get(f"{endpoint.rstrip('/')}/health")
                break
            except httpx.UnsupportedProtocol as error:
                raise UsageError(f"--endpoint {endpoint}: {error}") from error
            except httpx.HTTPError as error:
                if time.monotonic() > deadline:
                    raise DeadlineExceeded(
                        f"{endpoint} does not answer after {REACH_SECONDS:.0f} s: {error}; is the "
                        "engine up, and the address right?"
                    ) from error
            time.sleep(RETRY_SECONDS)


@contextmanager
def leading(server: ParameterServer, *, as_json: bool) -> Iterator[None]:
    """Close the server at the end; if an update fails, print its report where JSON is wanted.

    SIGTERM ends it as Ctrl-C does: engines return to what they served, and go on.
    """
    exit_on_sigterm()
    try:
        yield
    except UpdateFailed as failure:
        if as_json and failure.report is not None and server.rank == 0:
            show_report(failure.report, as_json=True)
        raise
    finally:
        server.close()


def show_report(result: Report, *, as_json: bool) -> None:
    """Print how an update ended."""
    if as_json:
        print_json(result)
        return
    table = new_table("replica", "outcome", "digest", "way back", "pause")
    for replica in result.replicas:
        pause = f"{1000 * replica.pause_seconds:.1f} ms" if replica.pause_seconds else "-"
        table.add_row(
            printable(replica.name),
            replica.outcome,
            (replica.digest or "not shown")[:16],
            replica.way_back or "-",
            pause,
        )
    out.print(table)
    stages = ", ".join(f"{name} {1000 * s:.1f}" for name, s in result.seconds.items())
    adapter = f"adapter {printable(result.lora)}: " if result.lora else ""
    out.print(
        f"{adapter}{printable(result.version)} {result.outcome}: {result.bytes / 1e6:.1f} MB "
        f"{result.mode}{f' ({result.why})' if result.why else ''}, digest "
        f"{result.digest[:16]}, {'verified' if result.verified else 'verified where staged'}; "
        f"ms: {stages}",
        soft_wrap=True,
    )
