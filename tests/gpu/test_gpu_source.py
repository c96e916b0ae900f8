"""Tensors on a GPU as a parameter server registers them; skipped where there is none."""

from __future__ import annotations

import pytest
import torch

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import GatheredSource, weights_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

NUM = 32 << 20


def test_a_trainers_tensors_come_down_to_pinned_memory(lone_server: ParameterServer) -> None:
    on_gpu = {
        "large": torch.arange(NUM, device="cuda"),
        "across": torch.arange(NUM, device="cuda").view(1024, -1).t(),
        "part": torch.arange(200, device="cuda", dtype=torch.uint8)[3:78],
        "small": torch.ones((), device="cuda"),
        "empty": torch.empty(0, 3, device="cuda"),
        "beside": torch.ones(77),
    }
    on_host = {name: tensor.cpu() for name, tensor in on_gpu.items()}
    lone_server.register_checkpoint("gpu", named_tensors=on_gpu, use_shared_memory_pool=True)
    lone_server.register_checkpoint("host", named_tensors=on_host)
    versions, segment = lone_server._store, lone_server._store["gpu"].segment
    assert versions["gpu"].manifest.digest == versions["host"].manifest.digest
    assert segment.is_pinned
    assert not versions["host"].segment.is_pinned
    del versions
    lone_server.unregister_checkpoint("gpu", force=True)
    assert not segment.is_pinned


def test_what_a_trainer_still_computes_is_waited_for(lone_server: ParameterServer) -> None:
    weight = torch.zeros(NUM, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)  # cycles, a tenth of a second
        weight += 1
        lone_server.register_checkpoint("v1", named_tensors={"weight": weight})
    lone_server.register_checkpoint("v2", named_tensors={"weight": torch.ones(NUM)})
    versions = lone_server._store
    assert versions["v1"].manifest.digest == versions["v2"].manifest.digest


def test_what_a_model_in_training_still_computes_is_waited_for(
    lone_server: ParameterServer,
) -> None:
    """Its weights are made on one thread, and read on others."""
    model = torch.nn.Linear(NUM // 1024, 1024, bias=False, device="cuda")
    model.requires_grad_(False).weight.zero_()
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(200_000_000)
        model.weight += 1
        lone_server.register_source("v1", GatheredSource(weights_of(model)))
    ones = {"weight": torch.ones(1024, NUM // 1024)}
    lone_server.register_checkpoint("v2", named_tensors=ones)
    versions = lone_server._store
    assert versions["v1"].manifest.digest == versions["v2"].manifest.digest
