"""TRL's GRPOTrainer against a running vLLM: it samples there, trains here, and sends the weights.

    VLLM_SERVER_DEV_MODE=1 vllm serve ./model --port 8000 --enable-scale-out \\
        --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension
    pip install ckpt-engine trl==1.16.0
    python examples/trl_grpo.py --model ./model --endpoint http://127.0.0.1:8000 --output ./trained

TRL's own way is `use_vllm=True`: vLLM in the trainer's environment, and after each step an NCCL
broadcast into a server that has no way back. Two of its public hooks replace that, and nothing of
it is patched: a callback sends the weights, `rollout_func` (which TRL calls experimental) samples.
Lost with `use_vllm` is TRL's correction for what vLLM's probabilities differ from the trainer's.
This is for one trainer process; sharded models (FSDP, DeepSpeed) have to be gathered first.

The reward is of no use: how many sampled tokens are of the first half of the vocabulary.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from checkpoint_engine import ParameterServer, engine_requests

PROMPT = "The weights"
NUM_AT_ONCE = 16


class SendWeights(TrainerCallback):
    """Has the engine serve the model as "step-0" before training, then as each step leaves it."""

    def __init__(self, endpoint: str) -> None:
        self._server = ParameterServer(rank=0, world_size=1)
        self._requests = engine_requests([endpoint], rank=0, world_size=1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send(kwargs["model"], state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._send(kwargs["model"], state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._server.close()

    def _send(self, model: Any, step: int) -> None:
        name = f"step-{step}"
        self._server.register_checkpoint(
            name, named_tensors=model.state_dict(), use_shared_memory_pool=True
        )
        self._server.gather_metas(name)
        report = self._server.update(name, self._requests)  # raises unless it is served
        print(f"{name}: {report.bytes / 1e6:.1f} MB, digest {report.digest[:12]}")


class Rollout:
    """Completions of prompts, by the server: TRL's `rollout_func`."""

    def __init__(self, endpoint: str) -> None:
        self._client = httpx.Client(base_url=endpoint, timeout=600)

    def __call__(self, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
        args = trainer.args
        sampling = {
            "temperature": args.temperature,
            "top_p": args.top_p,
            "top_k": args.top_k,
            "max_tokens": args.max_completion_length,
            "logprobs": 0,  # of the sampled token alone
        }
        prompt_ids = [trainer.processing_class.encode(prompt) for prompt in prompts]
        bodies = [{"token_ids": ids, "sampling_params": sampling} for ids in prompt_ids]
        with ThreadPoolExecutor(NUM_AT_ONCE) as pool:
            choices = list(pool.map(self._sample, bodies))

        # GRPO takes samples for those of the step's own weights. vLLM says of each token which
        # version has sampled it: another would be one that somebody else has sent meanwhile.
        sampled_by = {span["version"] for choice in choices for span in choice["weight_versions"]}
        if sampled_by != {f"step-{trainer.state.global_step}"}:
            raise RuntimeError(f"step {trainer.state.global_step} has samples of {sampled_by}")
        return {
            "prompt_ids": prompt_ids,
            "completion_ids": [choice["token_ids"] for choice in choices],
            "logprobs": [[t["logprob"] for t in c["logprobs"]["content"]] for c in choices],
        }

    def _sample(self, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._client.post("/inference/v1/generate", json=body).raise_for_status()
        choice: dict[str, Any] = answer.json()["choices"][0]
        return choice


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--model", "--endpoint", "--output"):
        parser.add_argument(name, required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args()

    half = AutoConfig.from_pretrained(options.model).vocab_size // 2

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < half for token in ids) / len(ids) for ids in completion_ids]

    trainer = GRPOTrainer(
        model=options.model,
        reward_funcs=reward,
        rollout_func=Rollout(options.endpoint),
        callbacks=[SendWeights(options.endpoint)],
        train_dataset=Dataset.from_dict({"prompt": [PROMPT] * 8}),
        args=GRPOConfig(
            output_dir=options.output,
            max_steps=options.steps,
            learning_rate=options.learning_rate,
            bf16=torch.cuda.is_available(),
            per_device_train_batch_size=32,
            num_generations=32,
            max_completion_length=8,
            logging_steps=1,
            disable_tqdm=True,  # it prints what it logs
            save_strategy="no",
            report_to="none",
        ),
    )
    trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
