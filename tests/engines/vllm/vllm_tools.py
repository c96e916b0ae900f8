"""What the tests of vLLM compare with, send, and spoil."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from engine_server import tensors_of
from vllm_server import VllmServer

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.update.protocol import Report


class Fresh:
    """The greedy tokens of servers freshly started on a checkpoint, without anything of ours."""

    def __init__(self, start: Callable[..., VllmServer]) -> None:
        self._start = start
        self._known: dict[tuple[Path, tuple[str, ...]], list[int]] = {}

    def __call__(self, folder: Path, *options: str, **variables: str) -> list[int]:
        if (folder, options) not in self._known:
            with self._start(folder, *options, **variables) as server:
                self.remember(folder, server, *options)
        return self._known[folder, options]

    def remember(self, folder: Path, server: VllmServer, *options: str) -> None:
        """This server has just been started on that checkpoint."""
        self._known[folder, options] = server.generate()


def update(
    ps: ParameterServer, server: VllmServer, file: Path, label: str, mode: str = "staged"
) -> Report:
    """As `ckpt-engine update` does it."""
    ps.register_checkpoint(label, files=[file], mode=mode)
    ps.gather_metas(label)
    return ps.update(label, engine_requests([server.url], rank=0, world_size=1))


def lacking(folder: Path) -> dict[str, torch.Tensor]:
    tensors = tensors_of(folder)
    del tensors["model.layers.1.self_attn.v_proj.weight"]
    return tensors
