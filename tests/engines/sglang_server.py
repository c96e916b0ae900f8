"""A real SGLang server on the CPU, and tiny checkpoints for it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from engine_server import EngineServer
from transformers import Qwen2Config, Qwen2ForCausalLM

SERVER_VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"}
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


class SGLangServer(EngineServer):
    """See `EngineServer`."""

    def __init__(
        self, python: Path, folder: Path, log: Path, *options: str, **variables: str
    ) -> None:
        command = [
            str(python), "-m", "sglang.launch_server", "--model-path", str(folder),
            "--device", "cpu", "--attention-backend", "torch_native", "--dtype", "bfloat16",
            "--max-total-tokens", "4096", "--max-running-requests", "8",
            "--context-length", "512", *options,
        ]  # fmt: skip
        if not (folder / "tokenizer.json").exists():
            command.append("--skip-tokenizer-init")
        super().__init__(command, log, {**SERVER_VARIABLES, **variables})

    def generate(
        self, num_tokens: int = 16, prompt: Sequence[int] = PROMPT, lora: str | None = None
    ) -> list[int]:
        """Greedy tokens after a prompt, by a LoRA adapter if one is named."""
        sampling = {"temperature": 0.0, "max_new_tokens": num_tokens, "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling, "lora_path": lora}
        return list(self.post("/generate", body)["output_ids"])

    @property
    def label(self) -> str:
        return str(self.get("/model_info")["weight_version"])

    @property
    def checksum(self) -> str:
        """Of every parameter and buffer."""
        answer = self.post("/weights_checker", {"action": "checksum"})
        return json.dumps(answer["ranks"], sort_keys=True)

    @property
    def num_running(self) -> int:
        """Requests in flight."""
        return int(self.get("/v1/loads?include=core")["loads"][0]["num_running_reqs"])
