"""Models, trainers and samplers of syncs: the same seed gives the same weights in every process."""

from __future__ import annotations

import copy
import hashlib
import threading
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from checkpoint_engine import CheckpointEngineMixin
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.update.protocol import Report

SETTINGS: dict[str, Any] = {"bucket_size": 4 << 20, "timeout": 20}
TOKENS = torch.tensor([[1, 5, 2, 9, 30]])


def llama(
    seed: int, *, tied: bool = False, dtype: torch.dtype = torch.bfloat16, vocab_size: int = 33
) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
        eos_token_id=None,
        bos_token_id=1,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def with_adapter(base: torch.nn.Module, name: str = "default", **options: Any) -> Any:
    """An adapter that is no longer as it begins, which is to change nothing."""
    return get_peft_model(base, lora(**options), name).eval()


def lora(**options: Any) -> LoraConfig:
    chosen = {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**{"init_lora_weights": False, **chosen, **options})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(TOKENS).logits
    return found


@torch.no_grad()
def greedy(model: Any) -> list[int]:
    """What it samples; with greedy search its output is one thing only."""
    made = model.generate(input_ids=TOKENS, max_new_tokens=12, do_sample=False)
    return [int(token) for token in made[0]]


def merged_by_hand(model: Any) -> Any:
    return copy.deepcopy(model).merge_and_unload()


def as_text(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Bytes, dtypes and shapes, short."""
    return {name: _hash(tensor) for name, tensor in tensors.items()}


def _hash(tensor: torch.Tensor) -> str:
    whole = tensor.detach()
    whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
    data = whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(data).hexdigest()[:16]}"


class Trainer(CheckpointEngineMixin):
    checkpoint_engine_settings = SETTINGS

    def __init__(self, model: Any) -> None:
        self.model = model
        trained = [one for one in model.parameters() if one.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.01)

    def step(self) -> None:
        self.model(TOKENS).logits.float().square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, str]:
        """Of the model and of the optimizer, every bit of it."""
        optimizer = {
            f"{number} {key}": value
            for number, state in self.optimizer.state_dict()["state"].items()
            for key, value in state.items()
        }
        return as_text({**self.model.state_dict(), **optimizer})


class Sampler(CheckpointEngineMixin):
    checkpoint_engine_settings = SETTINGS

    def __init__(self, model: Any) -> None:
        self.model = model
        self.held = threading.Lock()
        self.num_holds = 0
        self.failure: UpdateFailed | None = None

    def receive_weights(self) -> Report:
        self.failure = None
        try:
            return super().receive_weights()
        except UpdateFailed as error:
            self.failure = error
            raise

    def hold_requests(self, timeout_seconds: float) -> None:
        assert self.held.acquire(timeout=timeout_seconds)
        self.num_holds += 1

    def release_requests(self) -> None:
        self.held.release()
