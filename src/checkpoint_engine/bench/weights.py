"""Models with the shapes of Qwen3-0.6B, bf16, filled with noise: nothing is downloaded.

What is measured depends on the shapes alone, tied embeddings included, never on the values.

    save_folder(SIZES["full"], folder)               # what a replica loads
    model = make_model(SIZES["full"], seed=0)        # every page of it touched
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config

__all__ = ["SIZES", "Size", "make_model", "parameters", "save_checkpoint", "save_folder"]


@dataclass(frozen=True)
class Size:
    """How much is measured.

    Attributes:
        num_layers, vocab_size: of the model; everything else is Qwen3-0.6B's.
        file_bytes: at least the size of its file.
        broadcast_bytes: what is broadcast and streamed, of no model.
        peer_bytes: what is read from peers, of which each source has all.
    """

    num_layers: int
    vocab_size: int
    file_bytes: int
    broadcast_bytes: int
    peer_bytes: int


SIZES = {
    "full": Size(
        28, 151936, file_bytes=1_200_000_000, broadcast_bytes=1 << 30, peer_bytes=256 << 20
    ),
    "small": Size(4, 16384, file_bytes=170_000_000, broadcast_bytes=64 << 20, peer_bytes=64 << 20),
}


def _config(size: Size) -> Qwen3Config:
    return Qwen3Config(
        num_hidden_layers=size.num_layers,
        vocab_size=size.vocab_size,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        dtype=torch.bfloat16,
    )


def make_model(size: Size, seed: int) -> PreTrainedModel:
    """A model of random parameters; it is moved, never run."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(_config(size))  # type: ignore[no-untyped-call]
    model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1.0, 1.0, generator=generator)
    assert isinstance(model, PreTrainedModel)
    return model


def parameters(model: torch.nn.Module) -> list[torch.Tensor]:
    """Every parameter once, tied ones too, detached: writing into them changes the model."""
    return [parameter.detach() for parameter in model.parameters()]


def save_checkpoint(size: Size, file: Path) -> int:
    """Write a model's parameters as a safetensors file, tied ones once; returns their bytes."""
    tensors = {name: one.detach() for name, one in make_model(size, seed=0).named_parameters()}
    save_file(tensors, file)
    return sum(tensor.nbytes for tensor in tensors.values())


def save_folder(size: Size, folder: Path) -> None:
    """Write a configuration and a tokenizer of one word, which `ckpt-engine replica` loads."""
    config = _config(size)
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))  # noqa: S106
    fast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        unk_token="<unk>",  # noqa: S106
    )
    fast.save_pretrained(folder)
