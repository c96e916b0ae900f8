"""A checkpoint that drafts for itself: its draft model changes with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_server import save_tensors
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig
from vllm_server import EXTENSION, SHAPE, VllmServer, save_tokenizer, weights_of
from vllm_tools import update

from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other

HIDDEN = SHAPE["hidden_size"]
NUM_TOKENS = 64
SPECULATIVE = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')


def make_checkpoint(folder: Path, *, drafts_well: bool) -> Path:
    """An ERNIE whose next token depends on the last alone, so that it can be drafted exactly.

    One layer has experts. The draft's projection either passes the last token on, or garbles it.
    """
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(
        **SHAPE,
        moe_num_experts=4,
        moe_k=2,
        moe_intermediate_size=64,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
        moe_layer_end_index=1,
        moe_layer_interval=1,
        num_nextn_predict_layers=1,
        use_bias=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    save_tokenizer(folder)
    tensors = dict(load_file(weights_of(folder)))
    layer = {name: t for name, t in tensors.items() if name.startswith("model.layers.0.")}
    for name, tensor in layer.items():
        tensors[name.replace("layers.0.", "mtp_block.0.")] = tensor.clone()
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    projection = torch.randn(HIDDEN, 2 * HIDDEN)
    if drafts_well:
        projection = torch.cat([torch.eye(HIDDEN), torch.zeros(HIDDEN, HIDDEN)], dim=1)
    tensors["model.mtp_linear_proj.0.weight"] = projection.to(torch.bfloat16)
    for name in ("mtp_emb_norm", "mtp_hidden_norm"):
        tensors[f"model.{name}.0.weight"] = torch.ones(HIDDEN, dtype=torch.bfloat16)
    save_tensors(weights_of(folder), tensors)
    return folder


def num_accepted(server: VllmServer) -> float:
    """How many drafted tokens were right while so many were generated."""
    before = accepted(server)
    server.generate(NUM_TOKENS)
    return accepted(server) - before


def accepted(server: VllmServer) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    name = "vllm:spec_decode_num_accepted_tokens_total"
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_the_draft_model_is_that_of_the_new_version(
    ps: ParameterServer, start: Callable[..., VllmServer], tmp_path: Path
) -> None:
    badly = make_checkpoint(tmp_path / "badly", drafts_well=False)
    well = make_checkpoint(tmp_path / "well", drafts_well=True)
    with start(badly, *SPECULATIVE, "--worker-extension-cls", EXTENSION) as server:
        tokens = server.generate(NUM_TOKENS)
        assert num_accepted(server) < NUM_TOKENS / 8
        update(ps, server, weights_of(well), "well")
        assert num_accepted(server) > NUM_TOKENS / 3
        update(ps, server, weights_of(badly), "badly")
        assert num_accepted(server) < NUM_TOKENS / 8
        assert server.generate(NUM_TOKENS) == tokens
