"""The examples, against a replica of ours; tests/engines runs them against other engines."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from e2e_server import Server

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_a_server_is_trained_by_what_it_says(
    start: Callable[..., Server], folders: tuple[Path, Path], environment: dict[str, str]
) -> None:
    server = start(folders[0])
    done = subprocess.run(
        [
            sys.executable, EXAMPLES / "rl_loop.py", "--model", folders[0],
            "--endpoint", server.endpoint, "--steps", "12", "--learning-rate", "0.05",
        ],
        env=environment, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rewards = [float(found) for found in re.findall(r"reward ([\d.]+)", done.stdout)]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1
    info = server.info()
    assert info["weight_version"] == "step-12"
    assert f"digest {info['digest'][:12]}" in done.stdout.splitlines()[-1]
