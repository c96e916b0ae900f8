"""Servers that have never had an update: one that waits for its weights, and two at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from engine_server import tensors_of
from sglang_server import SGLangServer
from sglang_tools import bring, look, requests_to

from checkpoint_engine.calls import EngineRequest
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import wait_until

pytestmark = pytest.mark.timeout(900)

WAIT = "--checkpoint-engine-wait-weights-before-ready"
LAST = "model.layers.1.mlp.down_proj.weight"
Fresh = Callable[[int], list[int]]


@pytest.fixture
def other_server(python: Path, checkpoints: list[Path], logs: Path) -> Iterator[SGLangServer]:
    """A server on version 0 that has never had an update."""
    with SGLangServer(python, checkpoints[0], logs / "other") as server:
        server.wait_for("/ready", 200)
        yield server


def test_a_server_that_waits_for_its_weights_is_ready_once_it_has_them(
    python: Path, ps: ParameterServer, checkpoints: list[Path], logs: Path, fresh: Fresh
) -> None:
    """A whole version: what lacks in a layer shows by its like in the other."""
    expected = fresh(1)
    options = ("--load-format", "dummy", WAIT)
    part = tensors_of(checkpoints[1])
    del part["model.layers.1.self_attn.v_proj.weight"]
    with SGLangServer(python, checkpoints[0], logs / "waiting", *options) as server:
        server.wait_for("/ready", 503)
        with pytest.raises(UpdateFailed, match=r"elements of the model's '.*layers\.1.*qkv_proj"):
            bring(ps, [server], "part", part)
        assert server.status("/ready") == 503
        bring(ps, [server], "step-1", checkpoints[1])
        server.wait_for("/ready", 200)
        assert (server.generate(), server.label) == (expected, "step-1")


def renamed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """SGLang's loader skips what it does not know, and says nothing."""
    tensors["model.layers.1.mlp.dwon_proj.weight"] = tensors.pop(LAST)
    return tensors


def of_another_shape(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors[LAST] = tensors[LAST][:-1].clone()
    return tensors


def test_two_servers_are_updated_as_one_and_neither_if_one_dies(
    ps: ParameterServer,
    shared_server: SGLangServer,
    other_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Fresh,
) -> None:
    both = [shared_server, other_server]

    # The first update of a server has a way back, too.
    before = look(other_server)
    for name, spoil in (("renamed", renamed), ("of another shape", of_another_shape)):
        with pytest.raises(UpdateFailed) as failure:
            bring(ps, [other_server], name, spoil(tensors_of(checkpoints[1])))
        (replica,) = failure.value.report.replicas
        assert (replica.outcome, replica.way_back) == ("kept", "snapshot")
        assert LAST in str(failure.value) or "torch.Size" in str(failure.value)
        assert look(other_server) == before

    report = bring(ps, both, "step-1", checkpoints[1])
    assert [replica.outcome for replica in report.replicas] == ["published"] * 2
    seen = look(shared_server)
    assert seen[:2] == (fresh(1), "step-1")
    assert look(other_server) == seen, "equal servers have equal checksums"

    # One dies while the other is ready, paused, and waits for its vote.
    live, dying = requests_to(both)
    dies = threading.Thread(target=_kill_when_waited_for, args=(shared_server, other_server))
    ps.register_checkpoint("step-2", files=sorted(checkpoints[2].glob("*.safetensors")))
    ps.gather_metas("step-2")
    dies.start()
    with pytest.raises(UpdateFailed) as failure:
        ps.update("step-2", [live, _once_dead(dying, dies)])
    dies.join()
    assert failure.value.report.outcome == "aborted"
    assert look(shared_server) == seen
    assert shared_server.status("/ready") == 200, "it goes on"


def _kill_when_waited_for(live: SGLangServer, dying: SGLangServer) -> None:
    wait_until(lambda: live.status("/ready") == 503, "the pause")
    dying.kill()


def _once_dead(request: EngineRequest, dies: threading.Thread) -> EngineRequest:
    """The call of a server that dies before it has answered."""

    def call(handles: object, label: str = "") -> None:
        dies.join()
        request(handles, label)  # type: ignore[arg-type]

    return call  # type: ignore[return-value]
