"""The examples, run as users run them, against one real server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_server import environment, python_of
from transformers import AutoTokenizer
from vllm_server import EXTENSION, VllmServer, make_checkpoint, weights_of
from vllm_tools import update

from checkpoint_engine.ps import ParameterServer
from example_runs import greedy_tokens, rewards_in, rise, run_example

pytestmark = pytest.mark.timeout(600)  # servers start one after the other

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
OPTIONS = ("--steps", "12", "--learning-rate", "0.01")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is trained: with a token to pad with, as TRL needs."""
    folder = make_checkpoint(tmp_path_factory.mktemp("rl") / "start", seed=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shared(start: Callable[..., VllmServer], folder: Path) -> Iterator[VllmServer]:
    """In float32, so that greedy tokens do not hang on rounding."""
    extended = ("--worker-extension-cls", EXTENSION, "--enable-scale-out")
    sampling = ("--generation-config", "vllm")
    with start(folder, *extended, *sampling, "--dtype", "float32") as server:
        yield server


@pytest.fixture
def server(ps: ParameterServer, shared: VllmServer, folder: Path) -> VllmServer:
    """It serves what is trained."""
    update(ps, shared, weights_of(folder), "start")
    return shared


def test_a_loop_trains_the_server_that_it_samples_from(
    server: VllmServer, folder: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    printed = run_example(
        "rl_loop.py", "--model", str(folder), "--endpoint", server.url, *OPTIONS,
        "--output", str(trained), environment=environment(), timeout=300,
    )  # fmt: skip
    assert rise(rewards_in(printed)) > 0.1
    assert server.label == "step-12"
    assert server.generate(16, PROMPT) == greedy_tokens(trained, PROMPT, 16)


def test_trl_trains_the_server_that_it_samples_from(
    server: VllmServer, folder: Path, tmp_path: Path
) -> None:
    trained = tmp_path / "trained"
    printed = run_example(
        "trl_grpo.py", "--model", str(folder), "--endpoint", server.url, *OPTIONS,
        "--output", str(trained), environment=environment(), python=python_of("trl"), timeout=300,
    )  # fmt: skip
    assert rise(rewards_in(printed)) > 0.1
    assert server.label == "step-12"
    assert server.generate(16, PROMPT) == greedy_tokens(trained, PROMPT, 16)
