"""A vLLM server that dies in the middle of an update: the others serve one version."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from engine_server import tensors_of
from vllm_server import EXTENSION, VllmServer, weights_of

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import Child

pytestmark = pytest.mark.timeout(600)  # servers start one after the other


def digests(folder: Path) -> dict[str, str]:
    """As the toy engine has them of what it serves."""
    return {
        name: hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, tensor in tensors_of(folder).items()
    }


def test_the_others_return_to_the_version_before(
    ps: ParameterServer, start: Callable[..., VllmServer], checkpoints: list[Path]
) -> None:
    old, new = checkpoints[:2]
    with (
        Child("ps/ps_engine.py") as toy,
        start(old, "--worker-extension-cls", EXTENSION) as server,
        ThreadPoolExecutor(1) as pool,
    ):

        def loading(behaviour: str) -> Callable[[Sequence[tuple[str, str]]], None]:
            return lambda handles: toy.call("update", handle=handles[0][1], behaviour=behaviour)

        calls = engine_requests([server.url], rank=0, world_size=1)
        for name, folder in (("old", old), ("new", new)):
            ps.register_checkpoint(name, files=[weights_of(folder)])
        ps.gather_metas("old")
        report = ps.update("old", [*calls, loading("load")])
        assert [replica.outcome for replica in report.replicas] == ["published"] * 2

        toy.forget()
        ps.gather_metas("new")
        update = pool.submit(ps.update, "new", [*calls, loading("block")])
        toy.wait_for("loading")  # vLLM has been told to change its weights, too
        server.kill()
        toy.send("go")
        with pytest.raises(UpdateFailed):
            update.result(60)
        assert toy.call("weights") == digests(old)
