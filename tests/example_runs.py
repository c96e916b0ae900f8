"""Examples run as users run them, and what they should have come to."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GenerationConfig

EXAMPLES = Path(__file__).parents[1] / "examples"


def run_example(
    name: str,
    *options: str,
    environment: Mapping[str, str],
    python: Path | str = sys.executable,
    launcher: Sequence[str] = (),
    timeout: float = 110,
) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run(
        [str(python), *launcher, str(EXAMPLES / name), *options],
        env=dict(environment),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def rewards_in(printed: str) -> list[float]:
    """The mean reward of every step, as our loop and TRL print it."""
    return [float(found) for found in re.findall(r"\breward'?:? '?([\d.]+)", printed)]


def rise(rewards: list[float]) -> float:
    """From the first three steps to the last three."""
    return (sum(rewards[-3:]) - sum(rewards[:3])) / 3


def greedy_tokens(folder: Path, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers generates with a saved model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    how = GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False)
    ids = torch.tensor([prompt])
    done = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=how)
    return list(done[0, len(prompt) :].tolist())
