r"""TRL's GRPOTrainer against a running vLLM: it samples there, trains here, and sends the weights.

    VLLM_SERVER_DEV_MODE=1 vllm serve ./model --port 8000 --enable-scale-out \
        --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension
    pip install ckpt-engine trl==1.16.0
    python examples/trl_grpo.py --model ./model --endpoint http://127.0.0.1:8000 --output ./trained

TRL's own way is `use_vllm=True`: vLLM in the trainer's environment, too, and an NCCL broadcast into
a server that has no way back. Two hooks of TRL replace that, and nothing of it is patched: a
callback sends the weights, `rollout_func` (which TRL calls experimental) samples. What is lost is
TRL's correction for probabilities that differ between vLLM and the trainer. All this is for one
trainer process; a model that is sharded must be gathered first: docs/training.md. The reward, how
many sampled tokens are of the vocabulary's first half, is of no use, but rises in a few steps.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from typing import Any

import httpx
import torch
from datasets import Dataset
from transformers import AutoConfig, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from checkpoint_engine import ParameterServer, engine_requests

PROMPT = "The weights"
NUM_SAMPLES, NUM_TOKENS = 32, 8


class SendWeights(TrainerCallback):
    """Sends the model to the engine: before training as "step-0", then as each step leaves it."""

    def __init__(self, server: ParameterServer, endpoint: str) -> None:
        self._server = server
        self._requests = engine_requests([endpoint], rank=0, world_size=1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Returns once the engine serves these weights, and raises if it does not."""
        name = f"step-{state.global_step}"
        self._server.register_checkpoint(
            name, named_tensors=kwargs["model"].state_dict(), use_shared_memory_pool=True
        )
        self._server.gather_metas(name)
        report = self._server.update(name, self._requests)
        print(f"{name}: {report.bytes / 1e6:.1f} MB, digest {report.digest[:12]}")

    on_train_begin = on_step_end


def rollout(client: httpx.Client, prompts: list[str], trainer: GRPOTrainer) -> dict[str, list[Any]]:
    """One completion of each prompt; TRL has repeated each as often as it needs completions."""
    step, args = trainer.state.global_step, trainer.args
    sampling = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "max_tokens": args.max_completion_length,
        "logprobs": 0,  # only of what is sampled
    }

    def complete(token_ids: list[int]) -> Any:
        body = {"token_ids": token_ids, "sampling_params": sampling}
        answer = client.post("/inference/v1/generate", json=body)
        return answer.raise_for_status().json()["choices"][0]

    prompt_ids = [trainer.processing_class.encode(prompt) for prompt in prompts]
    with ThreadPoolExecutor(NUM_SAMPLES) as pool:
        choices = list(pool.map(complete, prompt_ids))
    # To GRPO all samples are of this step's weights. vLLM says of each token which version has
    # sampled it: with an old one among them, the step would learn from what it has not said.
    sampled_by = {span["version"] for choice in choices for span in choice["weight_versions"]}
    if sampled_by != {f"step-{step}"}:
        raise RuntimeError(f"step {step} was sampled by {sampled_by}: who else updates the server?")
    return {
        "prompt_ids": prompt_ids,
        "completion_ids": [choice["token_ids"] for choice in choices],
        "logprobs": [[token["logprob"] for token in c["logprobs"]["content"]] for c in choices],
    }


def main() -> None:
    """Train, and save what is served in the end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--output", required=True, help="folder for the trained model")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    options = parser.parse_args()
    half = AutoConfig.from_pretrained(options.model).vocab_size // 2

    def reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [sum(token < half for token in ids) / len(ids) for ids in completion_ids]

    arguments = GRPOConfig(
        output_dir=options.output, max_steps=options.steps, learning_rate=options.learning_rate,
        per_device_train_batch_size=NUM_SAMPLES, num_generations=NUM_SAMPLES,
        max_completion_length=NUM_TOKENS, bf16=torch.cuda.is_available(),
        logging_steps=1, disable_tqdm=True, save_strategy="no", report_to="none",
    )  # fmt: skip
    client = httpx.Client(base_url=options.endpoint, timeout=600)
    with client, closing(ParameterServer(rank=0, world_size=1)) as server:
        trainer = GRPOTrainer(
            options.model, reward, arguments, Dataset.from_dict({"prompt": [PROMPT] * 8}),
            callbacks=[SendWeights(server, options.endpoint)],
            rollout_func=partial(rollout, client),
        )  # fmt: skip
        trainer.train()
    trainer.save_model(options.output)


if __name__ == "__main__":
    main()
