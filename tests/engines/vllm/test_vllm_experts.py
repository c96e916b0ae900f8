"""Models with experts, whose kernel on a CPU holds weights of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_server import EXTENSION, VllmServer, weights_of
from vllm_tools import Fresh, update

from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other


def test_experts_are_those_of_the_new_version(
    ps: ParameterServer,
    start: Callable[..., VllmServer],
    fresh: Fresh,
    expert_checkpoints: list[Path],
) -> None:
    old, new = expert_checkpoints
    fresh(new)
    with start(old, "--worker-extension-cls", EXTENSION) as server:
        fresh.remember(old, server)
        update(ps, server, weights_of(new), "step-1")
        assert server.generate() == fresh(new)
        update(ps, server, weights_of(old), "step-2")
        assert server.generate() == fresh(old)
