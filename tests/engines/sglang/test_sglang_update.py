"""Updates of one real server by our own call."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_server import environment, tensors_of
from lora_tools import bring_lora, make_lora
from sglang_server import SGLangServer
from sglang_tools import bring, look, requests_to

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import wait_until

pytestmark = pytest.mark.timeout(600)

LAST = "model.layers.1.mlp.down_proj.weight"
Fresh = Callable[[int], list[int]]
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def at_one(
    ps: ParameterServer, shared_server: SGLangServer, checkpoints: list[Path]
) -> SGLangServer:
    """The server, serving version 1 as "step-1"."""
    bring(ps, [shared_server], "step-1", checkpoints[1])
    return shared_server


def test_it_is_recognised_by_what_it_says(shared_server: SGLangServer) -> None:
    assert SGLang().recognises(Endpoint(shared_server.url))


def test_an_update_serves_what_a_fresh_start_would(
    ps: ParameterServer, shared_server: SGLangServer, checkpoints: list[Path], fresh: Fresh
) -> None:
    for number in (1, 2):
        report = bring(ps, [shared_server], f"step-{number}", checkpoints[number])
        assert [replica.outcome for replica in report.replicas] == ["published"]
        assert shared_server.generate() == fresh(number)
        assert shared_server.label == f"step-{number}"


def test_the_command_updates_it(
    at_one: SGLangServer, checkpoints: list[Path], fresh: Fresh
) -> None:
    command = [
        sys.executable, "-m", "checkpoint_engine", "update", "--engine", "sglang",
        "--endpoint", at_one.url, "--checkpoint-path", str(checkpoints[2]),
        "--weight-version", "rl-7",
    ]  # fmt: skip
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert (at_one.generate(), at_one.label) == (fresh(2), "rl-7")


def test_a_rollback_brings_tokens_label_and_checksum_back(
    ps: ParameterServer, at_one: SGLangServer, checkpoints: list[Path]
) -> None:
    before = look(at_one)
    bring(ps, [at_one], "step-2", checkpoints[2])
    assert look(at_one)[1] == "step-2"
    ps.rollback(requests_to([at_one]))
    assert look(at_one) == before


def without_one(tensors: Tensors) -> Tensors:
    del tensors[LAST]
    return tensors


def renamed(tensors: Tensors) -> Tensors:
    tensors["model.layers.1.mlp.dwon_proj.weight"] = tensors.pop(LAST)
    return tensors


def of_another_shape(tensors: Tensors) -> Tensors:
    tensors[LAST] = tensors[LAST][:-1].clone()
    return tensors


@pytest.mark.parametrize("spoil", [without_one, renamed, of_another_shape])
def test_what_does_not_fit_the_model_changes_nothing(
    spoil: Callable[[Tensors], Tensors],
    ps: ParameterServer,
    at_one: SGLangServer,
    checkpoints: list[Path],
) -> None:
    before = look(at_one)
    with pytest.raises(UpdateFailed) as failure:
        bring(ps, [at_one], "bad", spoil(tensors_of(checkpoints[2])))
    assert [replica.outcome for replica in failure.value.report.replicas] == ["kept"]
    assert look(at_one) == before
    assert at_one.status("/ready") == 200, "it goes on"


# Requests in flight


def generate_beside(server: SGLangServer) -> tuple[threading.Thread, list[int]]:
    """A long generation, which is under way."""
    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.extend(server.generate(480)))
    thread.start()
    wait_until(lambda: server.num_running > 0, "a running request")
    return thread, tokens


def test_a_request_in_flight_is_drained(
    ps: ParameterServer,
    at_one: SGLangServer,
    checkpoints: list[Path],
    fresh: Fresh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_DRAIN_SECONDS", "60")
    under_old = at_one.generate(480)
    thread, tokens = generate_beside(at_one)
    bring(ps, [at_one], "step-2", checkpoints[2])
    thread.join()
    assert tokens == under_old
    assert at_one.generate() == fresh(2)


def test_a_request_past_the_deadline_goes_on_under_the_new_weights(
    ps: ParameterServer,
    at_one: SGLangServer,
    checkpoints: list[Path],
    fresh: Fresh,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_DRAIN_SECONDS", "0")
    thread, tokens = generate_beside(at_one)
    bring(ps, [at_one], "step-2", checkpoints[2])
    thread.join()
    assert len(tokens) == 480, "nobody's request was lost"
    assert at_one.generate() == fresh(2), "nothing of the old cache was left"


def test_started_without_adapters_it_takes_none_and_says_what_it_lacks(
    ps: ParameterServer, at_one: SGLangServer, checkpoints: list[Path], tmp_path: Path
) -> None:
    folder = make_lora(tmp_path / "lora", checkpoints[1], seed=0)
    with pytest.raises(UpdateFailed, match="start SGLang with --enable-lora"):
        bring_lora(ps, [at_one], "lora", folder, "helper")
