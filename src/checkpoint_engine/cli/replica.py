"""`ckpt-engine replica`: an inference server whose weights can be replaced while it serves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from checkpoint_engine.cli.console import exit_on_sigterm, out
from checkpoint_engine.errors import UsageError

__all__ = ["replica"]

STOP_SECONDS = 30.0


def replica(
    model: Annotated[Path, typer.Option(help="Hugging Face folder of the model.")],
    host: Annotated[str, typer.Option(help="Beyond loopback a token is compulsory.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
    load_format: Annotated[
        str, typer.Option(help="auto; dummy: random weights; ckpt_engine: see the next option.")
    ] = "auto",
    ckpt_engine_url: Annotated[
        str, typer.Option(help="ckptengine:///metas.json joins its server; empty: wait.")
    ] = "ckptengine://",
    wait_for_initial_weights: Annotated[
        bool, typer.Option("--wait-for-initial-weights", help="Serve nothing before an update.")
    ] = False,
    allow_path: Annotated[
        list[Path] | None, typer.Option(help="Folder whose checkpoints clients may name; repeat.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="What reports call it.")] = None,
    scrub_seconds: Annotated[
        float, typer.Option(min=0, help="Check live weights once in this time; 0: never.")
    ] = 600.0,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the bearer token; else $CKPT_ENGINE_TOKEN.")
    ] = None,
) -> None:
    """Serve a model with an OpenAI-compatible API, and take weight updates while serving."""
    from transformers.utils import logging as transformers_logging

    from checkpoint_engine.device_utils import device_uuid
    from checkpoint_engine.replica.disk import CheckpointFolders
    from checkpoint_engine.replica.replica import load_replica
    from checkpoint_engine.replica.scrub import scrubbing
    from checkpoint_engine.replica.server import check_binding, create_app, serve

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    token = _token(token_file)
    check_binding(host, token)
    folders = CheckpointFolders(allow_path or ())
    called = name or f"replica {os.getpid()}"
    served = load_replica(
        model,
        name=called,
        load_format=load_format,
        wait_for_initial_weights=wait_for_initial_weights,
        url=ckpt_engine_url,
    )
    application = create_app(
        served,
        token=token,
        model_name=str(model),
        device_uuid=device_uuid("cpu"),
        folders=folders,
    )

    def announce(bound_port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        out.print(f"{called} serves {model} on http://{shown}:{bound_port}", soft_wrap=True)

    exit_on_sigterm()
    served.engine.start()
    try:
        with scrubbing(served, scrub_seconds):
            serve(application, host, port, ready=announce)
    finally:
        served.engine.stop(STOP_SECONDS)


def _token(token_file: Path | None) -> str | None:
    """The token, without the newline that a file ends in."""
    if token_file is None:
        return os.environ.get("CKPT_ENGINE_TOKEN") or None
    try:
        token = token_file.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{token_file}: the token cannot be read: {error}") from error
    if not token:
        raise UsageError(f"{token_file}: holds no token")
    return token
