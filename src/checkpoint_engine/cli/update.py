"""`ckpt-engine update`: bring running engines to a checkpoint, from a shell.

Alone it serves every engine from one process. Under torchrun each rank reads its share of the
checkpoint and leads the engine at its place.
"""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from checkpoint_engine.cli.join import join
from checkpoint_engine.errors import UsageError

if TYPE_CHECKING:
    from checkpoint_engine.update.probe import Probe

__all__ = ["update"]

# Whether each of a method's updates is read from peers.
METHODS = {"broadcast": (False,), "p2p": (True,), "all": (False, True)}


def update(
    checkpoint_path: Annotated[
        Path | None, typer.Option(help="Safetensors file, or HF folder.")
    ] = None,
    endpoint: Endpoints = None,
    engine: EngineKind = "auto",
    inference_parallel_size: ParallelSize = 1,
    checkpoint_name: Annotated[
        str, typer.Option(help="What to register it as.")
    ] = "my-checkpoint-iter-0",
    weight_version: Annotated[
        str | None, typer.Option(help="Label that engines show; default the checkpoint's name.")
    ] = None,
    uds: UnixSocket = None,
    update_method: Annotated[
        str, typer.Option(help="broadcast; p2p: read from each other; all: one, then the other.")
    ] = "broadcast",
    save_metas_file: Annotated[
        Path | None, typer.Option(help="Write how new engines join; keep it secret.")
    ] = None,
    load_metas_file: Annotated[
        Path | None, typer.Option(help="Join what another server published: see `join`.")
    ] = None,
    mode: Annotated[
        str, typer.Option(help="staged, streamed, or auto: streamed if memory is short.")
    ] = "auto",
    timeout: Annotated[float, typer.Option(min=1, help="Seconds until all are ready.")] = 600.0,
    on_failure: Annotated[str, typer.Option(help="rollback or quarantine.")] = "rollback",
    min_replicas: Annotated[
        int, typer.Option(min=1, help="With quarantine: engines that must be left.")
    ] = 1,
    require_rollback: Annotated[
        bool, typer.Option("--require-rollback", help="Refuse engines without a way back.")
    ] = False,
    base: Annotated[
        str | None, typer.Option(help="Digest that every engine must serve; else refuse.")
    ] = None,
    probe_url: Annotated[
        str | None, typer.Option(help="Asked after publish; if it fails, go back.")
    ] = None,
    probe_seconds: Annotated[float, typer.Option(min=0, help="How long it is asked.")] = 10.0,
    probe_threshold: Annotated[
        int, typer.Option(min=0, help="Answers of 400 and above that are still well.")
    ] = 0,
    sleep_time: Annotated[float, typer.Option(min=0, help="Seconds to stay afterwards.")] = 0.0,
    report: ReportFile = None,
    as_json: AsJson = False,
) -> None:
    """Update running engines to a checkpoint, all of them or none."""
    if load_metas_file is not None:
        join(
            load_metas_file,
            endpoint,
            engine,
            inference_parallel_size,
            mode,
            uds,
            timeout,
            report,
            as_json,
        )
        return
    if checkpoint_path is None:
        raise UsageError("--checkpoint-path is missing: a safetensors file, or a folder")
    if update_method not in METHODS:
        raise UsageError(f"--update-method {update_method}: it is one of {', '.join(METHODS)}")
    if report is not None and not report.absolute().parent.is_dir():
        raise UsageError(f"{report}: its folder does not exist")
    endpoints = endpoint or ["http://localhost:19730"]

    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.sources import SafetensorsSource, Share, safetensors_files
    from checkpoint_engine.update.metas import save_metas_file as save

    server = ParameterServer()
    with leading(server, as_json=as_json):
        requests = requests_of(server, endpoints, engine, inference_parallel_size, timeout, uds)
        with working(f"reading {checkpoint_path}", server.rank == 0):
            source = SafetensorsSource(safetensors_files(checkpoint_path))
            part = Share(source, server.rank, server.world_size)
            server.register_source(checkpoint_name, part, mode=mode)
        with working("waiting for engines and ranks", server.rank == 0):
            if requests:
                reach(endpoints, uds)
            server.gather_metas(checkpoint_name)
            if save_metas_file is not None and server.rank == 0:
                save(save_metas_file, server.get_metas())
        for by_peers in METHODS[update_method]:
            with working("updating", server.rank == 0):
                result = server.update(
                    checkpoint_name,
                    requests,
                    timeout=timedelta(seconds=timeout),
                    ranks=range(server.world_size) if by_peers else None,
                    weight_version=weight_version,
                    on_failure=on_failure,
                    min_replicas=min_replicas,
                    require_rollback=require_rollback,
                    base=base,
                    probe=_probe(probe_url, probe_seconds, probe_threshold),
                    report=report,
                )
            if server.rank == 0:
                show_report(result, as_json=as_json)
        time.sleep(sleep_time)


def _probe(url: str | None, seconds: float, threshold: int) -> Probe | None:
    if url is None:
        return None
    from checkpoint_engine.update.probe import Probe, http_check

    return Probe(http_check(url), window_seconds=seconds, max_failures=threshold)
