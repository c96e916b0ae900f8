"""The examples as they are started, without the engines that tests/engines has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from e2e_server import Server

from example_runs import greedy_tokens, rewards_in, rise, run_example


def test_a_server_is_trained_by_what_it_says(
    start: Callable[..., Server],
    folders: tuple[Path, Path],
    environment: dict[str, str],
    tmp_path: Path,
) -> None:
    server = start(folders[0])
    printed = run_example(
        "rl_loop.py", "--model", str(folders[0]), "--endpoint", server.endpoint, "--steps", "12",
        "--learning-rate", "0.05", "--output", str(tmp_path / "trained"), environment=environment,
    )  # fmt: skip
    rewards = rewards_in(printed)
    assert len(rewards) == 12
    assert rise(rewards) > 0.1
    info = server.info()
    assert info["weight_version"] == "step-12"
    assert f"digest {info['digest'][:12]}" in printed.splitlines()[-1]
    prompt = [3, 1, 4, 1, 5]
    body = {"prompt": prompt, "max_tokens": 16, "temperature": 0.0, "return_token_ids": True}
    served = server.complete(**body).json()["choices"][0]["token_ids"]
    assert served == greedy_tokens(tmp_path / "trained", prompt, len(served))


def test_samplers_sample_what_the_trainer_has_learnt(environment: dict[str, str]) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"]
    printed = run_example("sync_samplers.py", launcher=launcher, environment=environment)
    rewards = rewards_in(printed)
    assert len(rewards) == 20
    assert rise(rewards) > 0.4
    digests = re.findall(r"digest (\w+) on 2 samplers", printed)
    assert len(set(digests)) == 20
