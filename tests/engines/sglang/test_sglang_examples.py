"""An example, run as users run it, against a real server of a model with tied embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_model import make_folder
from engine_server import environment
from sglang_server import SGLangServer

from example_runs import greedy_tokens, rewards_in, rise, run_example

pytestmark = pytest.mark.timeout(600)

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained."""
    return make_folder(tmp_path_factory.mktemp("rl") / "start", seed=0)


@pytest.fixture(scope="module")
def server(python: Path, folder: Path, logs: Path) -> Iterator[SGLangServer]:
    """In float32, so that greedy tokens do not hang on rounding."""
    options = ("--sampling-defaults", "openai", "--dtype", "float32", "--context-length", "256")
    with SGLangServer(python, folder, logs / "examples", *options) as server:
        server.wait_for("/ready")
        yield server


def test_a_loop_trains_the_server_that_it_samples_from(
    server: SGLangServer, folder: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    printed = run_example(
        "rl_loop.py", "--model", str(folder), "--endpoint", server.url, "--steps", "12",
        "--learning-rate", "0.05", "--output", str(trained), environment=environment(), timeout=300,
    )  # fmt: skip
    assert rise(rewards_in(printed)) > 0.1
    assert server.label == "step-12"
    assert server.generate(16, PROMPT) == greedy_tokens(trained, PROMPT, 16)
