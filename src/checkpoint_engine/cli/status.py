"""`ckpt-engine status`: what every replica serves, and whether they agree.

Each endpoint is asked for `/health` and then `/weight_info`, all endpoints at once and each
answer within a deadline. A replica of ours answers the latter with the version that it serves;
any other server is shown as such, since it may well be healthy. Replicas agree if all that are
healthy serve the same digest.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import typer
from rich.text import Text

from checkpoint_engine.cli.console import EXIT_DISAGREE, new_table, out, print_json, printable
from checkpoint_engine.cli.endpoints import checked_url, get
from checkpoint_engine.errors import MALFORMED, UsageError

if TYPE_CHECKING:
    import httpx

__all__ = ["EndpointStatus", "WeightInfo", "status"]

EXIT_UNHEALTHY = 1

HEALTH_STYLES = {"healthy": "green", "unhealthy": "red", "unreachable": "red"}


class WeightInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica says of its weights.

    Attributes:
        weight_version: label of the version served.
        digest: the version's digest, 64 hex digits; None for weights that were never named.
        served_digest: digest of the live parameters, after casts and fusing.
        state: where the replica is in an update.
        history: the versions before, as the replica tells them.

    """

    weight_version: str | None
    digest: str | None
    state: str
    served_digest: str | None = None
    history: tuple[Any, ...] = ()


class EndpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What one endpoint answered; `note` says why something is missing."""

    endpoint: str
    health: Literal["healthy", "unhealthy", "unreachable"]
    latency_seconds: float | None = None
    weights: WeightInfo | None = None
    note: str = ""


def status(
    endpoint: Annotated[
        list[str] | None,
        typer.Option("--endpoint", "-e", metavar="URL", help="A replica to ask; repeatable."),
    ] = None,
    uds: Annotated[
        list[Path] | None,
        typer.Option("--uds", metavar="PATH", help="One behind a Unix socket; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    timeout: Annotated[
        float, typer.Option(min=0.001, help="Seconds to wait for each answer.")
    ] = 10.0,
) -> None:
    """Show what every replica serves, and whether they agree.

    Exits with 5 if healthy replicas serve different weights, else with 1 if an endpoint is not
    healthy.
    """
    targets: list[tuple[str, Path | None]] = [(checked_url(url), None) for url in endpoint or []]
    targets += [("http://localhost", path) for path in uds or []]
    if not targets:
        raise UsageError(
            "there is no replica to ask; name one, such as --endpoint http://127.0.0.1:8000"
        )
    statuses = asyncio.run(_ask_all(targets, timeout))
    healthy = [row for row in statuses if row.health == "healthy"]
    agree = len({row.weights.digest for row in healthy if row.weights is not None}) <= 1
    if as_json:
        print_json(
            {"healthy": len(healthy) == len(statuses), "agree": agree, "endpoints": statuses}
        )
    else:
        _show(statuses, agree)
    if not agree:
        raise typer.Exit(EXIT_DISAGREE)
    if len(healthy) < len(statuses):
        raise typer.Exit(EXIT_UNHEALTHY)


async def _ask_all(targets: list[tuple[str, Path | None]], timeout: float) -> list[EndpointStatus]:
    return await asyncio.gather(*(_ask(url, uds, timeout) for url, uds in targets))


async def _ask(url: str, uds: Path | None, timeout_seconds: float) -> EndpointStatus:
    import httpx

    name = url if uds is None else f"unix:{uds}"
    transport = httpx.AsyncHTTPTransport(uds=None if uds is None else str(uds))
    # Replicas are asked directly: a proxy in the environment would not reach them.
    async with httpx.AsyncClient(
        transport=transport, trust_env=False, timeout=timeout_seconds
    ) as client:
        health = await get(client, f"{url}/health", timeout_seconds)
        if isinstance(health, str):
            return EndpointStatus(endpoint=name, health="unreachable", note=health)
        info = await get(client, f"{url}/weight_info", timeout_seconds)
    notes = [] if health.is_success else [f"/health: HTTP {health.status_code}"]
    weights = None
    if isinstance(info, str):
        notes.append(f"/weight_info: {info}")
    elif (weights := _decode(info)) is None:
        notes.append(f"not a replica of ours (/weight_info: HTTP {info.status_code})")
    whole = health.is_success and not isinstance(info, str)
    return EndpointStatus(
        endpoint=name,
        health="healthy" if whole else "unhealthy",
        latency_seconds=health.elapsed.total_seconds(),
        weights=weights,
        note="; ".join(notes),
    )


def _decode(response: httpx.Response) -> WeightInfo | None:
    """The answer of a replica of ours; other engines have a /weight_info without a digest."""
    if not response.is_success:
        return None
    try:
        return msgspec.json.decode(response.content, type=WeightInfo)
    except MALFORMED:
        return None


def _show(statuses: list[EndpointStatus], agree: bool) -> None:
    table = new_table("endpoint", "health", "state", "version", "digest", "latency")
    table.columns[0].overflow = "fold"
    for row in statuses:
        weights = row.weights
        digest = weights.digest if weights else None
        latency = row.latency_seconds
        table.add_row(
            _cell(row.endpoint),
            Text(row.health, style=HEALTH_STYLES[row.health]),
            _cell(weights.state if weights else None),
            _cell(weights.weight_version if weights else None),
            _cell(digest and digest[:12], "" if agree else "red"),
            _cell(None if latency is None else f"{latency * 1e3:.1f} ms"),
        )
    out.print(table)
    for row in statuses:
        if row.note:
            out.print(Text(printable(f"{row.endpoint}: {row.note}")), soft_wrap=True)
    if not agree:
        out.print("The replicas serve different weights: see the digests.", style="bold red")


def _cell(text: str | None, style: str = "") -> Text:
    return Text("-", style="dim") if text is None else Text(printable(text), style=style)
