"""A real vLLM server on the CPU, and tiny checkpoints for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from children import free_port

ROOT = Path(__file__).parents[3]
EXTENSION = "checkpoint_engine.worker.VllmColocateWorkerExtension"
START_SECONDS = 240.0
ANSWER_SECONDS = 120.0
PROMPT = list(range(1, 301))  # more than a block of the prefix cache, which has 128 tokens

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}


def make_checkpoint(folder: Path, *, seed: int, experts: bool = False) -> Path:
    """A bf16 Qwen3 of a megabyte: the same configuration for every seed, other weights."""
    torch.manual_seed(seed)
    config = Qwen3MoeConfig(**SHAPE, **EXPERTS) if experts else Qwen3Config(**SHAPE)
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


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    return dict(load_file(weights_of(folder)))


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), file)
    return file


class VllmServer:
    """One server in a process group of its own. The context manager ends it, whatever happened."""

    def __init__(
        self, python: Path, folder: Path, log: Path, *options: str, **variables: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        # vLLM hangs up after an error, which must not be taken for the answer to the next request.
        one_each = httpx.Limits(max_keepalive_connections=0)
        self.client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS, limits=one_each)
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
            "--served-model-name", "m", "--host", "127.0.0.1", "--port", str(self.port),
            "--max-model-len", "1024", "--max-num-seqs", "8", "--dtype", "bfloat16",
            "--enforce-eager", *options,
        ]  # fmt: skip
        with log.open("w") as out:
            self._process = subprocess.Popen(
                command,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=environment(**variables),
                start_new_session=True,
            )

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        """Until it serves."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, f"the server ended:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"it never served:\n{self.log[-3000:]}"
            try:
                if self.client.get("/health").status_code == 200:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)

    def get(self, path: str) -> Any:
        answer = self.client.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def post(self, path: str, body: object = None) -> Any:
        answer = self.client.post(path, json=body)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def call(self, method: str, *args: object) -> list[Any]:
        """What every worker answers."""
        body = {"method": method, "args": list(args)}
        return list(self.post("/collective_rpc", body)["results"])

    def generate(self, num_tokens: int = 16, prompt: Sequence[int] = PROMPT) -> list[int]:
        """Greedy tokens after a prompt."""
        choice = self.post("/v1/completions", completion(num_tokens, prompt))["choices"][0]
        return list(choice["token_ids"])

    @contextmanager
    def generating(self, num_tokens: int, prompt: Sequence[int] = PROMPT) -> Iterator[Stream]:
        """A request whose tokens are read as they come."""
        body = {**completion(num_tokens, prompt), "stream": True}
        with self.client.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            yield Stream(answer)

    @property
    def label(self) -> str:
        return str(self.get("/weight_info")["weight_version"])

    @property
    def is_paused(self) -> bool:
        return bool(self.get("/is_paused")["is_paused"])

    def kill(self) -> None:
        """SIGKILL for the server and all its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def __enter__(self) -> VllmServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self.client.close()


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


def environment(**variables: str) -> dict[str, str]:
    """For a process that imports our package from this checkout."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))}
    return {
        **known,
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(Path(__file__).parent)]),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_NO_USAGE_STATS": "1",
        **variables,
    }
