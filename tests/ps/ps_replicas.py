"""Real replicas, `python -m checkpoint_engine replica`, and the tiny models that they serve."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from children import TIMEOUT_SECONDS
from nursery import fork_command

START_SECONDS = 120.0
PROMPT = [3, 1, 4, 1, 5]
NUM_TOKENS = 12


def make_model(seed: int, vocab_size: int = 64) -> Qwen3ForCausalLM:
    """Weights large enough for greedy text that differs from seed to seed."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        initializer_range=0.5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def weights(seed: int) -> dict[str, torch.Tensor]:
    return dict(make_model(seed).state_dict())


def greedy(seed: int) -> list[int]:
    """What the model with these weights says."""
    inputs = torch.tensor([PROMPT])
    output = make_model(seed).generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(PROMPT) :].tolist()


def save_model(folder: Path, seed: int, vocab_size: int = 64) -> None:
    make_model(seed, vocab_size).save_pretrained(folder)
    vocabulary = {f"t{number}": number for number in range(64)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


class ReplicaProcess:
    """A replica of the model in `folder`."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name = name
        self._url = ""
        arguments = ["replica", "--model", str(folder), "--port", "0", "--name", name]
        self._process = fork_command(arguments, os.environ)

    @property
    def url(self) -> str:
        """Waits for it to serve, the first time."""
        if not self._url:
            with selectors.DefaultSelector() as selector:
                selector.register(self._process.stdout, selectors.EVENT_READ)
                assert selector.select(START_SECONDS), "the replica says nothing"
            line = self._process.stdout.readline()
            assert line, "the replica died"
            self._url = line.split()[-1]
        return self._url

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def get(self, path: str, timeout: float = TIMEOUT_SECONDS) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=timeout)

    def post(self, path: str, body: Mapping[str, Any]) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", json=body, timeout=TIMEOUT_SECONDS)

    @property
    def health(self) -> tuple[int, str]:
        response = self.get("/health")
        return response.status_code, response.json()["status"]

    @property
    def info(self) -> dict[str, Any]:
        return self.get("/weight_info").json()

    def generate(self) -> dict[str, Any]:
        """The one choice of a greedy completion."""
        body = {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
        response = self.post("/v1/completions", {**body, "return_token_ids": True})
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def kill(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(TIMEOUT_SECONDS)

    def close(self) -> None:
        if self.alive:
            self._process.terminate()
        try:
            self._process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._process.stdout.close()
