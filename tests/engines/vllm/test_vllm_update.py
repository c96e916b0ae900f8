"""A vLLM server of one worker takes our updates: what it answers is that of a fresh start."""

from __future__ import annotations

import operator
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
import torch
from engine_server import damage, environment, save_tensors, tensors_of
from lora_tools import bring_lora, make_lora
from vllm_server import PROMPT, VllmServer, weights_of
from vllm_tools import Fresh, lacking, update

from checkpoint_engine.calls import engine_requests, request_inference_to_update
from checkpoint_engine.errors import AdapterError, UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other

NUM_LONG = 3000  # tokens, which take several times as long as an update


@pytest.fixture
def at_start(ps: ParameterServer, server: VllmServer, checkpoints: list[Path]) -> str:
    """The server serves the first checkpoint, which is called "start"."""
    update(ps, server, weights_of(checkpoints[0]), "start")
    return "start"


def test_after_an_update_it_answers_as_one_started_on_the_new_checkpoint(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path]
) -> None:
    server.generate()  # the prompt is in the prefix cache
    report = update(ps, server, weights_of(checkpoints[1]), "step-1")
    assert server.generate() == fresh(checkpoints[1])
    assert server.label == "step-1"
    assert not server.is_paused
    assert [replica.outcome for replica in report.replicas] == ["published"]
    update(ps, server, weights_of(checkpoints[0]), "step-2")
    assert server.generate() == fresh(checkpoints[0])
    assert server.label == "step-2"


def test_the_command_line_finds_out_what_it_is(
    server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    def run(*arguments: str) -> None:
        command = [sys.executable, "-m", "checkpoint_engine", *arguments, "--endpoint", server.url]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=environment(), check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr

    for number in (1, 0):
        label = f"step-{number}"
        run("update", "--checkpoint-path", str(checkpoints[number]), "--weight-version", label)
        assert (server.generate(), server.label) == (fresh(checkpoints[number]), label)
    run("rollback")
    assert (server.generate(), server.label) == (fresh(checkpoints[1]), "step-1")


def test_a_request_in_flight_goes_on_under_the_new_weights(
    ps: ParameterServer, server: VllmServer, checkpoints: list[Path], at_start: str
) -> None:
    """What it had cached is computed again: its last tokens are those of requests of their own.

    But for a few, since a token alone and one among others are not rounded alike.
    """
    with server.generating(NUM_LONG) as stream:
        tokens = [token for _ in range(3) for token in stream.next() or []]
        update(ps, server, weights_of(checkpoints[1]), "step-1")
        rest = stream.rest()
    assert len(rest) > 100, "it was in flight"
    tokens += rest
    assert len(tokens) == NUM_LONG
    assert server.label == "step-1"
    server.post("/reset_prefix_cache")
    alone = [
        server.generate(1, [*PROMPT, *tokens[:end]])[0] for end in range(NUM_LONG - 16, NUM_LONG)
    ]
    assert sum(map(operator.eq, alone, tokens[-16:])) >= 12, (alone, tokens[-16:])


def reshaped(folder: Path) -> dict[str, torch.Tensor]:
    name = "model.layers.0.mlp.down_proj.weight"
    return {**tensors_of(folder), name: tensors_of(folder)[name].T.contiguous()}


def renamed(folder: Path) -> dict[str, torch.Tensor]:
    return {**tensors_of(folder), "model.layers.9.mlp.down_proj.weight": torch.zeros(128, 256)}


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lacking, "lacks 'model.layers.1.self_attn.v_proj.weight'"),
        (reshaped, "down_proj.weight' has shape"),
        (renamed, "does not know, 'model.layers.9.mlp.down_proj.weight'"),
    ],
)
def test_a_version_that_does_not_fit_changes_nothing(
    ps: ParameterServer,
    server: VllmServer,
    fresh: Fresh,
    checkpoints: list[Path],
    tmp_path: Path,
    at_start: str,
    spoil: object,
    said: str,
) -> None:
    assert callable(spoil)
    file = save_tensors(tmp_path / "bad.safetensors", spoil(checkpoints[1]))
    with pytest.raises(UpdateFailed, match=said):
        update(ps, server, file, "bad")
    assert server.generate() == fresh(checkpoints[0])
    assert server.label == at_start
    assert not server.is_paused


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "k_norm"])
def test_a_failure_half_way_ends_on_the_version_before(
    ps: ParameterServer,
    server: VllmServer,
    fresh: Fresh,
    checkpoints: list[Path],
    tmp_path: Path,
    at_start: str,
    name: str,
) -> None:
    """Layers before are new by then, and this one has some of its tensors."""
    file = save_tensors(tmp_path / "new.safetensors", tensors_of(checkpoints[1]))
    ps.register_checkpoint("damaged", files=[file], mode="streamed")
    ps.gather_metas("damaged")
    damage(file, f"model.layers.1.self_attn.{name}.weight")
    with pytest.raises(UpdateFailed, match="no longer holds the bytes") as failed:
        ps.update("damaged", engine_requests([server.url], rank=0, world_size=1))
    assert failed.value.report.replicas[0].outcome == "kept"
    assert server.generate() == fresh(checkpoints[0])
    assert server.label == at_start
    assert not server.is_paused


def test_a_streamed_version_is_served_as_a_staged_one(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    report = update(ps, server, weights_of(checkpoints[1]), "step-1", mode="streamed")
    assert report.mode == "streamed"
    assert server.generate() == fresh(checkpoints[1])


def test_rollback_returns_to_the_version_before_and_forth(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    update(ps, server, weights_of(checkpoints[1]), "step-1")
    requests = engine_requests([server.url], rank=0, world_size=1)
    ps.rollback(requests)
    assert (server.generate(), server.label) == (fresh(checkpoints[0]), at_start)
    ps.rollback(requests)
    assert (server.generate(), server.label) == (fresh(checkpoints[1]), "step-1")


def test_an_engine_that_was_paused_stays_paused(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    server.post("/pause?mode=keep")
    update(ps, server, weights_of(checkpoints[1]), "step-1")
    assert server.is_paused
    server.post("/resume")
    assert server.generate() == fresh(checkpoints[1])


class OneCall:
    """A caller that knows of one call alone, as those of MoonshotAI's do."""

    def __init__(self, server: VllmServer) -> None:
        self._server = server
        self.results: list[dict[str, object]] = []

    def __call__(self, handles: Sequence[tuple[str, str]]) -> None:
        self.results = self._server.call("update_weights_from_ipc", dict(handles))


def test_one_call_does_it_all_but_for_caches_and_label(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    """Which are the caller's: without `/reset_prefix_cache` the prompt is answered from both."""
    server.generate()
    ps.register_checkpoint("step-1", files=[weights_of(checkpoints[1])])
    ps.gather_metas("step-1")
    call = OneCall(server)
    ps.update("step-1", call)
    assert call.results == [{"rank": 0, "state": "published", "label": "step-1", "error": None}]
    assert server.generate() != fresh(checkpoints[1])
    server.post("/reset_prefix_cache")
    assert server.generate() == fresh(checkpoints[1])
    assert server.label == at_start


def test_its_answer_has_the_error_that_http_does_not(
    ps: ParameterServer, server: VllmServer, checkpoints: list[Path], tmp_path: Path, at_start: str
) -> None:
    file = save_tensors(tmp_path / "bad.safetensors", lacking(checkpoints[1]))
    ps.register_checkpoint("bad", files=[file])
    ps.gather_metas("bad")
    call = OneCall(server)
    with pytest.raises(UpdateFailed, match="lacks"):
        ps.update("bad", call)
    assert call.results[0]["state"] == "kept"
    assert "lacks 'model.layers.1" in str(call.results[0]["error"])


def test_what_was_begun_and_never_finished_changes_nothing(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    """Whoever called has died, say; vLLM goes on."""
    ps.register_checkpoint("step-1", files=[weights_of(checkpoints[1])])
    ps.gather_metas("step-1")

    def begin(handles: Sequence[tuple[str, str]]) -> None:
        server.call("ckpt_begin_update", dict(handles))
        while server.call("ckpt_update_state")[0]["state"] == "preparing":
            time.sleep(0.01)
        raise RuntimeError("the caller has died")

    with pytest.raises(UpdateFailed):
        ps.update("step-1", begin)
    assert server.generate() == fresh(checkpoints[0])
    assert server.call("ckpt_finish_update")[0]["state"] == "kept"
    assert server.generate() == fresh(checkpoints[0])
    update(ps, server, weights_of(checkpoints[1]), "step-2")
    assert server.generate() == fresh(checkpoints[1])


def test_an_update_beside_another_is_refused_and_leaves_that_alone(
    ps: ParameterServer, server: VllmServer, fresh: Fresh, checkpoints: list[Path], at_start: str
) -> None:
    with closing(ParameterServer()) as other:
        for server_, label, number in ((ps, "step-1", 1), (other, "step-2", 2)):
            server_.register_checkpoint(label, files=[weights_of(checkpoints[number])])
            server_.gather_metas(label)
        refused: list[str] = []

        def call(handles: Sequence[tuple[str, str]]) -> None:
            server.call("ckpt_begin_update", dict(handles))
            with pytest.raises(UpdateFailed, match="another update of this worker is under way"):
                other.update("step-2", engine_requests([server.url], rank=0, world_size=1))
            refused.append("step-2")
            while server.call("ckpt_update_state")[0]["state"] == "preparing":
                time.sleep(0.01)
            server.call("ckpt_finish_update")
            server.post("/reset_prefix_cache")

        ps.update("step-1", call)
    assert refused == ["step-2"]
    assert server.generate() == fresh(checkpoints[1])


def test_misuse_is_answered_with_data(server: VllmServer) -> None:
    (answer,) = server.call("ckpt_begin_update", {})
    assert answer["state"] == "kept"
    assert "no handle for device" in answer["error"]
    (answer,) = server.call("update_weights_from_ipc", "nonsense")
    assert answer["error"]
    with pytest.raises(AdapterError, match="no handle for device"):
        request_inference_to_update(f"{server.url}/collective_rpc", {})


def test_started_without_adapters_it_takes_none_and_says_what_it_lacks(
    ps: ParameterServer, server: VllmServer, checkpoints: list[Path], tmp_path: Path
) -> None:
    folder = make_lora(tmp_path / "lora", checkpoints[0], seed=0)
    with pytest.raises(UpdateFailed, match="start vLLM with --enable-lora"):
        bring_lora(ps, [server], "lora", folder, "helper")
