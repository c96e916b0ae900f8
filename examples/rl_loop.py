"""Reinforcement learning against a running server: sample there, train here, send the weights.

    ckpt-engine replica --model ./model --port 8000   # or vLLM, or SGLang: docs/examples.md
    python examples/rl_loop.py --model ./model --endpoint http://127.0.0.1:8000

The server and this process begin with the same folder. The reward is how many of the tokens that
were sampled are among the first half of the vocabulary: of no use, but it rises within a few steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import httpx
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from checkpoint_engine import ParameterServer, engine_requests

PROMPT = "The weights"
NUM_SAMPLES, NUM_TOKENS = 32, 8


def sample(endpoint: str, model_name: str, prompt_ids: list[int]) -> list[list[int]]:
    """Token ids of completions, as the server samples them with the weights that it has."""
    body = {
        "model": model_name,
        "prompt": prompt_ids,
        "n": NUM_SAMPLES,
        "max_tokens": NUM_TOKENS,
        "temperature": 1.0,
        "return_token_ids": True,
    }
    answer = httpx.post(f"{endpoint}/v1/completions", json=body, timeout=60).raise_for_status()
    return [choice["token_ids"] for choice in answer.json()["choices"]]


def weight_version(endpoint: str) -> str:
    """Label of the weights that the server has; SGLang shows it elsewhere than the others."""
    answer = httpx.get(f"{endpoint}/weight_info", timeout=60)
    if answer.status_code == httpx.codes.NOT_FOUND:
        answer = httpx.get(f"{endpoint}/model_info", timeout=60)
    label: str = answer.raise_for_status().json()["weight_version"]
    return label


def policy_loss(
    model: PreTrainedModel, prompt_ids: list[int], samples: list[list[int]], rewards: torch.Tensor
) -> torch.Tensor:
    """REINFORCE (Williams 1992) with the mean reward as the baseline."""
    rows = pad_sequence([torch.tensor(prompt_ids + ids) for ids in samples], batch_first=True)
    is_sampled = pad_sequence(
        [torch.tensor([0.0] * len(prompt_ids) + [1.0] * len(ids)) for ids in samples],
        batch_first=True,
    )
    logprobs = model(rows).logits[:, :-1].log_softmax(-1)
    taken = logprobs.gather(-1, rows[:, 1:, None]).squeeze(-1) * is_sampled[:, 1:]
    return -((rewards - rewards.mean())[:, None] * taken).sum() / is_sampled.sum()


def main() -> None:
    """Sample, learn, send."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--learning-rate", type=float, default=1e-2)
    parser.add_argument("--output", type=Path, help="folder for the trained model")
    options = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(options.model).float()  # for Adam's small steps
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    prompt_ids = tokenizer.encode(PROMPT)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
    models = httpx.get(f"{options.endpoint}/v1/models", timeout=60).json()["data"]
    half = model.config.vocab_size // 2

    server = ParameterServer(rank=0, world_size=1)
    requests = engine_requests([options.endpoint], rank=0, world_size=1)
    version = weight_version(options.endpoint)
    for step in range(1, options.steps + 1):
        samples = sample(options.endpoint, models[0]["id"], prompt_ids)
        # REINFORCE holds only for samples of the model's own weights. The label says whose they
        # are: a loop that samples while it trains would weigh or drop those of older versions.
        if (sampled_by := weight_version(options.endpoint)) != version:
            raise SystemExit(f"{sampled_by!r} has sampled, not {version!r}: who else updates it?")
        rewards = torch.tensor([sum(token < half for token in ids) / len(ids) for ids in samples])
        optimizer.zero_grad()
        policy_loss(model, prompt_ids, samples, rewards).backward()
        optimizer.step()

        name = f"step-{step}"
        server.register_checkpoint(
            name, named_tensors=model.state_dict(), use_shared_memory_pool=True
        )
        server.gather_metas(name)
        report = server.update(name, requests)  # returns once it is served, and raises if not
        version = name
        pause = max(replica.pause_seconds for replica in report.replicas)
        print(
            f"{name}: reward {rewards.mean():.2f}, {report.bytes / 1e6:.1f} MB, digest "
            f"{report.digest[:12]}, requests waited {1000 * pause:.0f} ms"
        )
    server.close()
    if options.output:
        model.save_pretrained(options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
