"""What the tests of vLLM compare with, send, and spoil."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from engine_server import tensors_of
from safetensors.torch import load_file
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


def damage(file: Path, name: str) -> None:
    """Change a tensor's bytes so that size and time of the file stay: only reading it tells."""
    found = os.stat(file)
    bits = load_file(file)[name].contiguous().view(torch.uint8).numpy().tobytes()
    data = file.read_bytes()
    place = data.index(bits)
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(bytes(len(bits)))
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))
