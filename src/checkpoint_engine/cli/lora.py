"""`ckpt-engine lora`: load, replace, unload and list the LoRA adapters of running engines."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from checkpoint_engine.cli.console import new_table, out, print_json, printable, working
from checkpoint_engine.cli.endpoints import checked_url
from checkpoint_engine.cli.fleet import (
    AsJson,
    EngineKind,
    ReportFile,
    UnixSocket,
    leading,
    reach,
    requests_of,
    show_report,
)

if TYPE_CHECKING:
    from checkpoint_engine.calls import EngineRequest
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.update.protocol import Report

__all__ = ["lora"]

Name = Annotated[str, typer.Argument(help="What requests call the adapter by.")]
EngineUrls = Annotated[list[str], typer.Option(help="URL of an engine; repeat for several.")]
Timeout = Annotated[
    float, typer.Option(min=1, help="Seconds until all are ready, and for requests that use it.")
]

lora = typer.Typer(name="lora", help="LoRA adapters of running engines.", no_args_is_help=True)


class _Listed(msgspec.Struct, frozen=True, kw_only=True):
    """What one engine shows: the path of each adapter, and the digest of those of ours."""

    endpoint: str
    loras: dict[str, str]
    digests: dict[str, str | None]


@lora.command()
def load(
    name: Name,
    folder: Annotated[Path, typer.Argument(help="As PEFT's save_pretrained has written it.")],
    endpoint: EngineUrls,
    engine: EngineKind = "auto",
    weight_version: Annotated[
        str | None, typer.Option(help="Label of this version; default the folder's name.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Digest that every engine must serve as NAME; else refuse.")
    ] = None,
    timeout: Timeout = 120.0,
    uds: UnixSocket = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Load an adapter, or replace the one of that name: on all engines or on none."""
    from checkpoint_engine.sources import LoraSource

    label = weight_version or folder.absolute().name

    def bring(server: ParameterServer, requests: list[EngineRequest]) -> Report:
        server.register_source(label, LoraSource.of_folder(folder), mode="staged")
        server.gather_metas(label)
        return server.update(
            label,
            requests,
            timeout=timedelta(seconds=timeout),
            base=base,
            lora=name,
            report=report,
        )

    _lead(bring, endpoint, engine, timeout, uds, as_json=as_json)


@lora.command()
def unload(
    name: Name,
    endpoint: EngineUrls,
    engine: EngineKind = "auto",
    timeout: Timeout = 120.0,
    uds: UnixSocket = None,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Have all engines let go of an adapter, or none."""

    def unloaded(server: ParameterServer, requests: list[EngineRequest]) -> Report:
        seconds = timedelta(seconds=timeout)
        return server.unload_lora(name, requests, timeout=seconds, report=report)

    _lead(unloaded, endpoint, engine, timeout, uds, as_json=as_json)


@lora.command("list")
def show(
    endpoint: EngineUrls,
    uds: UnixSocket = None,
    as_json: AsJson = False,
) -> None:
    """List the adapters that engines serve, and which version of each."""
    from checkpoint_engine.adapters.lora_folders import LoraFolders
    from checkpoint_engine.engines.endpoint import Endpoint

    listed = []
    for url in map(checked_url, endpoint):
        loras, folders = Endpoint(url, uds=uds).loras(), LoraFolders.of_engine(url)
        digests = {name: folders.digest_of(path) for name, path in loras.items()}
        listed.append(_Listed(endpoint=url, loras=loras, digests=digests))
    if as_json:
        print_json(listed)
        return
    table = new_table("engine", "adapter", "digest", "path")
    for one in listed:
        for name, path in sorted(one.loras.items()):
            digest = (one.digests[name] or "not loaded by us")[:16]
            table.add_row(printable(one.endpoint), printable(name), digest, printable(path))
    out.print(table)


def _lead(
    act: Callable[[ParameterServer, list[EngineRequest]], Report],
    endpoints: list[str],
    engine: str,
    timeout_seconds: float,
    uds: str | None,
    *,
    as_json: bool,
) -> None:
    """Let a server of one rank do it, and print how it ended."""
    from checkpoint_engine.ps import ParameterServer

    urls = [checked_url(url) for url in endpoints]
    server = ParameterServer(rank=0, world_size=1)
    with leading(server, as_json=as_json):
        requests = requests_of(server, urls, engine, 1, timeout_seconds, uds)
        with working("waiting for engines", True):
            reach(urls, uds)
        with working("updating", True):
            result = act(server, requests)
        show_report(result, as_json=as_json)
