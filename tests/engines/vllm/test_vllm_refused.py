"""A vLLM server that was not started for updates is told how it must be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_server import EXTENSION, VllmServer, weights_of
from vllm_tools import update

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other


@pytest.mark.parametrize(
    ("options", "dev_mode", "said"),
    [
        (("--worker-extension-cls", EXTENSION), "0", "start vLLM with VLLM_SERVER_DEV_MODE=1"),
        ((), "1", f"start vLLM with --worker-extension-cls {EXTENSION}"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_called(
    ps: ParameterServer,
    start: Callable[..., VllmServer],
    checkpoints: list[Path],
    options: tuple[str, ...],
    dev_mode: str,
    said: str,
) -> None:
    with start(checkpoints[0], *options, VLLM_SERVER_DEV_MODE=dev_mode) as server:
        before = server.generate()
        with pytest.raises(UpdateFailed, match=said):
            update(ps, server, weights_of(checkpoints[1]), "step-1")
        assert server.generate() == before
