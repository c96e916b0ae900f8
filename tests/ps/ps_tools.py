"""Versions of a small model, and the process of an engine."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.ps import ParameterServer
from children import Child, call_all, free_port

HERE = Path(__file__).parent
DEVICE = f"GPU-{platform.machine()}"

Handles = Sequence[tuple[str, str]]


def version(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of three dtypes, one of them larger than a page."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "bias": torch.randn(10, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(seed),
        "weight": torch.randn(64, 33, generator=generator),
    }


def large_version(seed: int, num_tensors: int) -> dict[str, torch.Tensor]:
    """Tensors of 4 MB, so that a version has a bucket for about each eight."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layers.{number}": torch.randint(0, 256, (4_000_001,), generator=generator).to(torch.uint8)
        for number in range(num_tensors)
    }


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What is equal for equal bytes."""
    return {
        name: hashlib.sha256(
            bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def register(server: ParameterServer, name: str, seed: int, **options: Any) -> None:
    server.register_checkpoint(name, named_tensors=version(seed), **options)
    server.gather_metas(name)


class EngineProcess(Child):
    """An engine that is known by its loader alone: see `ps_engine.py`."""

    def __init__(self) -> None:
        super().__init__("ps/ps_engine.py")

    def request(self, **behaviour: Any) -> Callable[[Handles], None]:
        """A `req_func` that makes this engine take the update in some way."""

        def request(handles: Handles) -> None:
            self.call("update", handle=dict(handles)[DEVICE], **behaviour)

        return request

    @property
    def weights(self) -> dict[str, str]:
        """Digests of what it serves."""
        return self.call("weights")


def rank_processes(stack: ExitStack, hosts: Sequence[str]) -> list[Child]:
    """The ranks of one server, each on the host that is named for it; they have met."""
    port = free_port()
    ranks = [
        stack.enter_context(
            Child(
                "ps/ps_rank.py",
                RANK=str(rank),
                WORLD_SIZE=str(len(hosts)),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port - 1),
                CKPT_ENGINE_HOST=host,
            )
        )
        for rank, host in enumerate(hosts)
    ]
    assert call_all(ranks, "meet") == [[rank, len(hosts)] for rank in range(len(hosts))]
    return ranks
