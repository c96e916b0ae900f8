"""Engines whose parameters are on a GPU, in a process of their own; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import Child

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

NUM_BYTES = 256 << 20
SLACK_BYTES = 64 << 20


@pytest.fixture
def engine(socket_folder: Path) -> Iterator[Child]:
    with Child("gpu/gpu_engine.py") as child:
        yield child


def weights(seed: int) -> dict[str, torch.Tensor]:
    """Where a trainer has them."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return {
        "large": torch.randn(NUM_BYTES // 2, generator=generator, device="cuda").bfloat16(),
        "small": torch.tensor([float(seed)], device="cuda"),
    }


def bring(server: ParameterServer, engine: Child, seed: int, **behaviour: Any) -> None:
    def request(handles: Any) -> None:
        engine.call("update", handle=dict(handles)[device_uuid()], **behaviour)

    name = f"step-{seed}"
    server.register_checkpoint(name, named_tensors=weights(seed), use_shared_memory_pool=True)
    server.gather_metas(name)
    server.update(name, request)


def sums(seed: int) -> dict[str, float]:
    return {name: float(tensor.double().sum()) for name, tensor in weights(seed).items()}


def test_a_loader_on_the_gpu_is_brought_forward_and_back(
    lone_server: ParameterServer, engine: Child
) -> None:
    bring(lone_server, engine, 1)
    assert engine.call("sums") == sums(1)
    with pytest.raises(UpdateFailed, match="refused") as failure:
        bring(lone_server, engine, 2, failing=True)
    assert failure.value.report.outcome == "rolled_back"
    assert engine.call("sums") == sums(1)
    bring(lone_server, engine, 3)
    assert engine.call("sums") == sums(3)


def test_memory_of_the_gpu_is_given_back(lone_server: ParameterServer, engine: Child) -> None:
    bring(lone_server, engine, 1)
    before = engine.call("used_bytes")
    for seed in range(2, 6):
        bring(lone_server, engine, seed)
    assert engine.call("used_bytes") - before < SLACK_BYTES
