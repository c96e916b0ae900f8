"""A server whose update fails half-way, and whose way back is gone: it serves nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from engine_server import damage, save_tensors, tensors_of
from sglang_server import SGLangServer
from sglang_tools import bring, requests_to

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)

LAST = "model.layers.1.mlp.down_proj.weight"


def test_it_stays_paused_until_an_update_mends_it(
    ps: ParameterServer,
    shared_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    """The loader fails on the last tensor, and somebody has written into the file before."""
    expected = fresh(1)
    file = save_tensors(tmp_path / "0.safetensors", tensors_of(checkpoints[0]))
    ps.register_checkpoint("step-0", files=[file], mode="streamed")
    ps.gather_metas("step-0")
    ps.update("step-0", requests_to([shared_server]))
    damage(file, LAST)
    tensors = tensors_of(checkpoints[1])
    with pytest.raises(UpdateFailed) as failure:
        bring(ps, [shared_server], "step-1", {**tensors, LAST: tensors[LAST][:-1].clone()})
    assert [replica.outcome for replica in failure.value.report.replicas] == ["torn"]
    assert shared_server.label == "step-0"
    assert shared_server.status("/ready") == 503, "it is paused"

    # A request is answered under the version that ends this.
    answers: list[list[int]] = []
    asking = threading.Thread(target=lambda: answers.append(shared_server.generate()))
    asking.start()
    bring(ps, [shared_server], "step-2", checkpoints[1])
    asking.join()
    assert answers == [expected]
    assert (shared_server.generate(), shared_server.label) == (expected, "step-2")
    assert shared_server.status("/ready") == 200
