"""Real adapters, made by peft for the engines' tiny models, and what brings them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from engine_server import EngineServer
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import LoraSource
from checkpoint_engine.update.protocol import Report

TARGETS = ("q_proj", "v_proj", "down_proj")


def make_lora(
    folder: Path,
    checkpoint: Path,
    *,
    seed: int,
    rank: int = 8,
    scale: float = 0.3,
    targets: Sequence[str] = TARGETS,
) -> Path:
    """An adapter for a checkpoint as peft saves it, strong enough to change every answer."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, about transformers' own names
        model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets))
        adapted = get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=scale)
        adapted.save_pretrained(folder)
    return folder


def bring_lora(
    ps: ParameterServer, servers: Sequence[EngineServer], label: str, folder: Path, lora: str
) -> Report:
    """One adapter to all of them, as the command does it."""
    ps.register_source(label, LoraSource.of_folder(folder))
    ps.gather_metas(label)
    requests = engine_requests([server.url for server in servers], rank=0, world_size=1)
    try:
        return ps.update(label, requests, lora=lora)
    finally:
        ps.unregister_checkpoint(label)


def unload_lora(ps: ParameterServer, servers: Sequence[EngineServer], lora: str) -> Report:
    requests = engine_requests([server.url for server in servers], rank=0, world_size=1)
    return ps.unload_lora(lora, requests)
