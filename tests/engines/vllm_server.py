"""A real vLLM server on the CPU, and tiny checkpoints for it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from engine_server import ROOT, EngineServer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

EXTENSION = "checkpoint_engine.worker.VllmColocateWorkerExtension"
SERVER_VARIABLES = {
    "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent)]),
    "VLLM_SERVER_DEV_MODE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_NO_USAGE_STATS": "1",
}
PROMPT = list(range(1, 301))  # more than a block of the prefix cache, which has 128 tokens

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def make_checkpoint(
    folder: Path,
    *,
    seed: int,
    experts: bool = False,
    tied: bool = False,
    vocab_size: int = 512,
) -> Path:
    """A bf16 Qwen3 of a megabyte: the same configuration for every seed, other weights.

    `tied` makes its head that of its embeddings. vLLM pads a vocabulary to a multiple of 64.
    """
    torch.manual_seed(seed)
    shape = {**SHAPE, "tie_word_embeddings": tied, "vocab_size": vocab_size}
    config = Qwen3MoeConfig(**shape, **EXPERTS) if experts else Qwen3Config(**shape)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_tokenizer(folder: Path) -> None:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def weights_of(folder: Path) -> Path:
    return folder / "model.safetensors"


class VllmServer(EngineServer):
    """See `EngineServer`."""

    def __init__(
        self, python: Path, folder: Path, log: Path, *options: str, **variables: str
    ) -> None:
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "m", "--max-model-len", "4096", "--max-num-seqs", "8",
            "--dtype", "bfloat16", "--enforce-eager", *options,
        ]  # fmt: skip
        super().__init__(command, log, {**SERVER_VARIABLES, **variables})

    def call(self, method: str, *args: object) -> list[Any]:
        """What every worker answers."""
        body = {"method": method, "args": list(args)}
        return list(self.post("/collective_rpc", body)["results"])

    def generate(
        self, num_tokens: int = 16, prompt: Sequence[int] = PROMPT, model: str = "m"
    ) -> list[int]:
        """Greedy tokens after a prompt; a LoRA adapter is asked for as a model."""
        body = completion(num_tokens, prompt) | {"model": model}
        return list(self.post("/v1/completions", body)["choices"][0]["token_ids"])

    @contextmanager
    def generating(
        self, num_tokens: int, prompt: Sequence[int] = PROMPT, model: str = "m"
    ) -> Iterator[Stream]:
        """A request whose tokens are read as they come."""
        body = {**completion(num_tokens, prompt), "stream": True, "model": model}
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            yield Stream(answer)

    @property
    def label(self) -> str:
        return str(self.get("/weight_info")["weight_version"])

    @property
    def is_paused(self) -> bool:
        return bool(self.get("/is_paused")["is_paused"])


class Stream:
    """The tokens of one request."""

    def __init__(self, answer: httpx.Response) -> None:
        self._lines = answer.iter_lines()

    def next(self) -> list[int] | None:
        """The tokens that come next; None at the end."""
        for line in self._lines:
            if line == "data: [DONE]":
                return None
            if line.startswith("data: "):
                return list(json.loads(line[6:])["choices"][0]["token_ids"])
        return None

    def rest(self) -> list[int]:
        tokens: list[int] = []
        while (some := self.next()) is not None:
            tokens += some
        return tokens


def completion(num_tokens: int, prompt: Sequence[int]) -> dict[str, Any]:
    return {
        "model": "m",
        "prompt": list(prompt),
        "max_tokens": num_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
