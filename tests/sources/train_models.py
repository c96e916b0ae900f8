"""Models as trainers have them, whole on every rank: the same seed gives the same weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


class Block(nn.Module):
    """Two layers that tensor parallelism cuts differently, and what it leaves alone."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width, dtype=torch.float32)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Odd(nn.Module):
    """Sizes that no number of ranks divides, dtypes, tied weights, buffers of both kinds."""

    def __init__(self, width: int = 12, hidden: int = 20) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, width)
        self.blocks = nn.ModuleList(Block(width, hidden) for _ in range(2))
        self.low = nn.Linear(width, 3, bias=False, dtype=torch.bfloat16)
        self.one = nn.Linear(width, 1)
        self.head = nn.Linear(width, 3, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("cache", torch.zeros(4), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.one(x) + self.low(x.bfloat16()).sum()


class Wide(nn.Module):
    """Many layers of one size, to see how much memory is used."""

    def __init__(self, num_layers: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(num_layers))


def llama(*, tied: bool, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=33,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).to(dtype)


def experts() -> Qwen3MoeForCausalLM:
    """Saved as one tensor for each expert, kept as one for all."""
    config = Qwen3MoeConfig(
        vocab_size=33,
        hidden_size=16,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        num_experts=4,
        num_experts_per_tok=2,
    )
    return Qwen3MoeForCausalLM(config)


def with_adapters(base: nn.Module, **options: Any) -> PeftModel:
    """Adapters that are no longer as they begin, which is to change nothing."""
    chosen = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], **options}
    return get_peft_model(base, LoraConfig(init_lora_weights=False, **chosen))


def make(kind: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "lora":
        return with_adapters(llama(tied=True))
    if kind == "dora":
        return with_adapters(llama(tied=False), use_dora=True, modules_to_save=["lm_head"])
    if kind == "odd":
        return Odd()
    if kind == "experts":
        return experts()
    if kind == "wide":
        return Wide(num_layers=16, width=1024)
    return llama(tied=kind == "tied llama")


def as_text(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What is equal for equal names, dtypes, shapes and bytes, and for nothing else."""
    return {
        name: f"{tensor.dtype} {list(tensor.shape)} {_hash(tensor)}"
        for name, tensor in tensors.items()
    }


def _hash(tensor: torch.Tensor) -> str:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(bytes(flat.numpy())).hexdigest()
