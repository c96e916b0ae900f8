"""What tests do with servers: bring versions, and look at what is served."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from engine_server import ROOT
from lora_tools import TARGETS
from sglang_server import SGLangServer

from checkpoint_engine.calls import EngineRequest, engine_requests
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.update.protocol import Report

LORA_OPTIONS = (
    "--enable-lora", "--lora-backend", "torch_native", "--max-lora-rank", "8",
    "--lora-target-modules", *TARGETS,
)  # fmt: skip
WITHOUT_PINNING = {
    "PYTHONPATH": os.pathsep.join(
        [str(ROOT / "src"), str(Path(__file__).parent / "without_pinning")]
    )
}


def requests_to(servers: Sequence[SGLangServer]) -> list[EngineRequest]:
    """As the command makes them: each server is asked what it is."""
    return engine_requests([server.url for server in servers], rank=0, world_size=1)


def bring(
    ps: ParameterServer,
    servers: Sequence[SGLangServer],
    name: str,
    what: Path | Mapping[str, torch.Tensor],
    **options: Any,
) -> Report:
    """One update of all of them, from files or tensors."""
    if isinstance(what, Path):
        ps.register_checkpoint(name, files=sorted(what.glob("*.safetensors")))
    else:
        ps.register_checkpoint(name, named_tensors=what)
    ps.gather_metas(name)
    return ps.update(name, requests_to(servers), **options)


def look(server: SGLangServer) -> tuple[list[int], str, str]:
    """Greedy tokens, label and checksum."""
    return server.generate(), server.label, server.checksum
