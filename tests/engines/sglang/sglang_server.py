"""A real SGLang server on the CPU, and tiny checkpoints for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from children import free_port

ROOT = Path(__file__).parents[3]
START_SECONDS = 240.0
ANSWER_SECONDS = 120.0
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


def make_checkpoint(folder: Path, *, seed: int, sharded: bool = False) -> Path:
    """A bf16 Qwen2 of some hundred kilobytes: one configuration, other weights for other seeds.

    `sharded` gives it the index that large checkpoints have.
    """
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=255,
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.to(torch.bfloat16).save_pretrained(folder, max_shard_size="200KB" if sharded else "5GB")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    from safetensors import safe_open

    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    return tensors


def save_tensors(file: Path, tensors: Mapping[str, torch.Tensor]) -> Path:
    save_file(dict(tensors), file)
    return file


class SGLangServer:
    """One server in a process group of its own. The context manager ends it, whatever happened."""

    def __init__(
        self, python: Path, folder: Path, log: Path, *options: str, **variables: str
    ) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = log
        self._client = httpx.Client(base_url=self.url, timeout=ANSWER_SECONDS)
        command = [
            str(python), "-m", "sglang.launch_server", "--model-path", str(folder),
            "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "bfloat16",
            "--host", "127.0.0.1", "--port", str(self.port), "--skip-tokenizer-init",
            "--max-total-tokens", "4096", "--max-running-requests", "8", "--context-length", "512",
            *options,
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
    def pid(self) -> int:
        return self._process.pid

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_for(self, path: str, status: int) -> None:
        """Until GET `path` answers with this status."""
        deadline = time.monotonic() + START_SECONDS
        while True:
            assert self._process.poll() is None, f"the server ended:\n{self.log[-3000:]}"
            assert time.monotonic() < deadline, f"{path} never said {status}:\n{self.log[-3000:]}"
            try:
                if self._client.get(path).status_code == status:
                    return
            except httpx.TransportError:
                pass  # it does not listen yet
            time.sleep(0.2)

    def get(self, path: str) -> Any:
        answer = self._client.get(path)
        assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text}"
        return answer.json()

    def status(self, path: str) -> int:
        return self._client.get(path).status_code

    def generate(self, num_tokens: int = 16, prompt: Sequence[int] = PROMPT) -> list[int]:
        """Greedy tokens after a prompt."""
        sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        answer = self._client.post(
            "/generate", json={"input_ids": list(prompt), "sampling_params": sampling}
        )
        assert answer.status_code == 200, answer.text
        return list(answer.json()["output_ids"])

    @property
    def label(self) -> str:
        return str(self.get("/model_info")["weight_version"])

    @property
    def checksum(self) -> str:
        """Of every parameter and buffer."""
        answer = self._client.post("/weights_checker", json={"action": "checksum"})
        assert answer.status_code == 200, answer.text
        return json.dumps(answer.json()["ranks"], sort_keys=True)

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return int(self.get("/v1/loads?include=core")["loads"][0]["num_running_reqs"])

    def kill(self) -> None:
        """SIGKILL for the server and all its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(30)

    def __enter__(self) -> SGLangServer:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self.kill()
        self._client.close()


def environment(**variables: str) -> dict[str, str]:
    """For a process that imports our package from this checkout."""
    known = {k: v for k, v in os.environ.items() if not k.startswith(("RANK", "WORLD_SIZE"))}
    return {
        **known,
        "PYTHONPATH": str(ROOT / "src"),
        "HF_HUB_OFFLINE": "1",
        "SGLANG_USE_CPU_ENGINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        **variables,
    }
