"""A vLLM server without a way back, whose first update fails half-way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from engine_server import save_tensors
from vllm_server import EXTENSION, VllmServer, weights_of
from vllm_tools import Fresh, lacking, update

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other


def test_it_stays_paused_and_alive_until_an_update_mends_it(
    ps: ParameterServer,
    start: Callable[..., VllmServer],
    fresh: Fresh,
    checkpoints: list[Path],
    tmp_path: Path,
) -> None:
    """With random weights there is nothing to compare names with: what lacks shows afterwards."""
    fresh(checkpoints[1])
    options = ("--load-format", "dummy", "--worker-extension-cls", EXTENSION)
    with start(checkpoints[0], *options) as server:
        label = server.label
        file = save_tensors(tmp_path / "bad.safetensors", lacking(checkpoints[1]))
        with pytest.raises(UpdateFailed, match="qkv_proj' was given") as failed:
            update(ps, server, file, "bad")
        report = failed.value.report
        assert report is not None
        assert [(r.outcome, r.way_back) for r in report.replicas] == [("torn", "none")]
        assert server.is_paused
        assert server.label == label
        update(ps, server, weights_of(checkpoints[1]), "step-1")
        assert (server.generate(), server.label) == (fresh(checkpoints[1]), "step-1")
