"""Two tensor parallel workers of one vLLM server: they change together, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from engine_server import damage, save_tensors, tensors_of
from vllm_server import EXTENSION, VllmServer, weights_of
from vllm_tools import Fresh, lacking, update

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other

OPTIONS = ("--tensor-parallel-size", "2")
BACKEND = ("--weight-transfer-config", '{"backend": "checkpoint_engine"}')
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def server(
    start: Callable[..., VllmServer], fresh: Fresh, checkpoints: list[Path]
) -> Iterator[VllmServer]:
    """Started on the first checkpoint."""
    fresh(checkpoints[1], *OPTIONS, **CORES)
    extension = ("--worker-extension-cls", EXTENSION)
    with start(checkpoints[0], *OPTIONS, *BACKEND, *extension, **CORES) as server:
        fresh.remember(checkpoints[0], server, *OPTIONS)
        yield server


@pytest.fixture
def tokens(fresh: Fresh, checkpoints: list[Path]) -> list[list[int]]:
    """Of the first two checkpoints; how a sum is split changes its last bits."""
    return [fresh(folder, *OPTIONS) for folder in checkpoints[:2]]


def test_both_workers_serve_the_new_version(
    ps: ParameterServer, server: VllmServer, tokens: list[list[int]], checkpoints: list[Path]
) -> None:
    for number in (1, 0):
        report = update(ps, server, weights_of(checkpoints[number]), f"step-{number}")
        assert [replica.outcome for replica in report.replicas] == ["published"] * 2
        assert (server.generate(), server.label) == (tokens[number], f"step-{number}")


def test_errors_are_data_and_the_next_answers_are_those_of_the_next_calls(
    ps: ParameterServer,
    server: VllmServer,
    tokens: list[list[int]],
    checkpoints: list[Path],
    tmp_path: Path,
) -> None:
    """An exception in a worker would shift the answers of the other by one call."""
    update(ps, server, weights_of(checkpoints[0]), "start")
    for method in ("ckpt_begin_update", "update_weights_from_ipc"):
        answers = server.call(method, {})
        assert [answer["rank"] for answer in answers] == [0, 1]
        assert all("no handle" in answer["error"] for answer in answers)
    file = save_tensors(tmp_path / "bad.safetensors", lacking(checkpoints[1]))
    with pytest.raises(UpdateFailed, match="lacks"):
        update(ps, server, file, "bad")
    assert [answer["rank"] for answer in server.call("ckpt_update_state")] == [0, 1]
    assert (server.generate(), server.label) == (tokens[0], "start")


def test_both_go_back_when_loading_fails_half_way(
    ps: ParameterServer,
    server: VllmServer,
    tokens: list[list[int]],
    checkpoints: list[Path],
    tmp_path: Path,
) -> None:
    update(ps, server, weights_of(checkpoints[0]), "start")
    file = save_tensors(tmp_path / "new.safetensors", tensors_of(checkpoints[1]))
    ps.register_checkpoint("damaged", files=[file], mode="streamed")
    ps.gather_metas("damaged")
    damage(file, "model.layers.1.self_attn.q_proj.weight")
    with pytest.raises(UpdateFailed, match="no longer holds the bytes"):
        ps.update("damaged", engine_requests([server.url], rank=0, world_size=1))
    assert (server.generate(), server.label) == (tokens[0], "start")
    assert not server.is_paused


class OwnEndpoints:
    """vLLM's own endpoints for weight transfer, as a trainer calls them."""

    def __init__(self, server: VllmServer, label: str) -> None:
        self._server, self._label = server, label
        self.status = 0

    def __call__(self, handles: list[tuple[str, str]]) -> None:
        server = self._server
        server.post("/pause?mode=keep")
        server.post("/start_weight_update")
        body = {"update_info": {"zmq_handles": dict(handles)}}
        self.status = server.client.post("/update_weights", json=body).status_code
        finish = {"weight_version": self._label} if self.status == 200 else None
        server.client.post("/finish_weight_update", json=finish)
        server.post("/reset_prefix_cache?reset_running_requests=true")
        server.post("/resume")


def test_vllms_own_endpoints_do_the_same(
    ps: ParameterServer,
    server: VllmServer,
    tokens: list[list[int]],
    checkpoints: list[Path],
    tmp_path: Path,
) -> None:
    def take(file: Path, label: str) -> int:
        call = OwnEndpoints(server, label)
        ps.register_checkpoint(label, files=[file])
        ps.gather_metas(label)
        fails = pytest.raises(UpdateFailed, match="lacks") if label == "bad" else nullcontext()
        with fails:
            ps.update(label, [call])
        return call.status

    server.post("/init_weight_transfer_engine", {"init_info": {}})
    update(ps, server, weights_of(checkpoints[0]), "start")
    assert take(weights_of(checkpoints[1]), "own-1") == 200
    assert (server.generate(), server.label) == (tokens[1], "own-1")
    assert take(save_tensors(tmp_path / "bad.safetensors", lacking(checkpoints[0])), "bad") == 500
    assert (server.generate(), server.label) == (tokens[1], "own-1")
    assert [answer["rank"] for answer in server.call("ckpt_update_state")] == [0, 1]
    assert take(weights_of(checkpoints[0]), "own-2") == 200
    assert (server.generate(), server.label) == (tokens[0], "own-2")
