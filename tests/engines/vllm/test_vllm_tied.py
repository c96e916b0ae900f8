"""A model whose head is tied to its embeddings, as small ones are: the head is new, too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from vllm_server import EXTENSION, VllmServer, make_checkpoint, weights_of
from vllm_tools import Fresh, update

from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other


def test_the_head_is_that_of_the_new_version(
    ps: ParameterServer, start: Callable[..., VllmServer], fresh: Fresh, tmp_path: Path
) -> None:
    old, new = (make_checkpoint(tmp_path / f"{n}", seed=n, tied=True) for n in range(2))
    fresh(new)
    with start(old, "--worker-extension-cls", EXTENSION) as server:
        fresh.remember(old, server)
        update(ps, server, weights_of(new), "step-1")
        assert server.generate() == fresh(new)
        update(ps, server, weights_of(old), "step-2")
        assert server.generate() == fresh(old)
