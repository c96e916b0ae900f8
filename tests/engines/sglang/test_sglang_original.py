"""SGLang's own update.py, unmodified, with our package in place of MoonshotAI's."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from sglang_server import SGLangServer, environment

pytestmark = pytest.mark.timeout(600)


def run_update(python: Path, server: SGLangServer, folder: Path, *options: str) -> str:
    """SGLang's three-command way: its script starts torchrun by itself."""
    done = subprocess.run(
        [
            str(python), "-m", "sglang.srt.checkpoint_engine.update", "--checkpoint-path",
            str(folder), "--inference-parallel-size", "1", "--endpoint", server.url, *options,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(PATH=f"{python.parent}:/usr/bin:/bin"),
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stderr


def test_sglangs_own_script_brings_the_new_weights(
    python: Path,
    shared_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Callable[[int], list[int]],
) -> None:
    run_update(python, shared_server, checkpoints[1], "--weight-version", "step-1")
    assert shared_server.generate() == fresh(1)
    assert shared_server.label == "step-1"
