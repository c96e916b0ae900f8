"""Whatever is posted to a replica, told to a parameter server or answered to `status`."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import torch
from fuzz_tools import altered, fuzzed, mutated
from hypothesis import strategies as st

from checkpoint_engine import ParameterServer
from checkpoint_engine.cli.status import WeightInfo, _decode
from checkpoint_engine.errors import ManifestError, UsageError
from checkpoint_engine.replica.api import (
    CollectiveRpcRequest,
    CompletionRequest,
    UpdateFromPathRequest,
    UpdateWeightsRequest,
    decode,
)
from checkpoint_engine.replica.disk import CheckpointFolders

HANDLES = {"GPU-0": "ipc:///x"}
BODIES: dict[type[Any], list[Any]] = {
    CompletionRequest: [
        {"prompt": "hello", "max_tokens": 3, "temperature": 0.5, "top_p": 0.9, "n": 2, "seed": 7},
        {"prompt": [1, 2], "stop": ["a", "b"], "stream": True, "return_token_ids": True},
        {"prompt": ["a", [1, 2]], "model": "m", "stop": "x"},
    ],
    UpdateWeightsRequest: [{"zmq_handles": HANDLES, "flush_cache": True, "weight_version": "v"}],
    UpdateFromPathRequest: [
        {"model_path": "/proc/self/task/../task/x", "weight_version": "v"},
        {"model_path": "/proc/self/task/..", "load_format": "ckpt_engine", "flush_cache": False},
    ],
    CollectiveRpcRequest: [
        {"method": "update_weights_from_ipc", "args": [HANDLES], "kwargs": {}, "timeout": 3.0}
    ],
}


def posted(valid: list[Any]) -> st.SearchStrategy[bytes]:
    encoded = [msgspec.json.encode(body) for body in valid]
    nested = st.integers(1, 100_000).map(lambda depth: b'{"args":' + b"[" * depth)
    return altered(valid).map(msgspec.json.encode) | mutated(encoded) | nested


@pytest.mark.parametrize("kind", BODIES, ids=lambda kind: kind.__name__)
@fuzzed(st.data())
def test_http_bodies(kind: type[Any], case: st.DataObject) -> None:
    data = case.draw(posted(BODIES[kind]))
    try:
        body = decode(data, kind)
        if isinstance(body, CollectiveRpcRequest):
            body = body.update()
        if isinstance(body, CompletionRequest):
            prompts = [(1,) if isinstance(prompt, str) else prompt for prompt in body.prompts()]
            requests = body.generation_requests(prompts)
            assert 1 <= len(requests) <= 128
            assert all(math.isfinite(request.temperature) for request in requests)
        elif isinstance(body, UpdateFromPathRequest):
            folder = Path("/proc/self/task")
            found = CheckpointFolders([folder]).resolve(body.model_path)
            assert found.is_relative_to(folder.resolve())
        else:
            assert all(type(text) is str for pair in body.zmq_handles.items() for text in pair)
    except UsageError as error:
        said = str(error)
    else:
        said = ""
    assert "\n" not in msgspec.json.decode(msgspec.json.encode(said)), "answered, in one line"


INFO = {
    "weight_version": "v", "digest": "d", "served_digest": None, "state": "serving",
    "reason": None, "history": [{"weight_version": "v", "digest": "d", "at": 1.0}],
}  # fmt: skip


@fuzzed(posted([INFO]) | st.binary(max_size=64))
def test_what_a_replica_answers_to_status(case: bytes) -> None:
    info = _decode(httpx.Response(200, content=case))
    assert info is None or msgspec.convert(msgspec.to_builtins(info), WeightInfo) == info


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ParameterServer, Any]]:
    """A parameter server, and what it says of itself."""
    with pytest.MonkeyPatch.context() as patch:
        folder: Path = tmp_path_factory.mktemp("s")
        folder.chmod(0o700)
        patch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder))
        server = ParameterServer(rank=0, world_size=1)
        server.register_checkpoint("v", named_tensors={"a": torch.zeros(3), "b": torch.ones(2)})
        server.gather_metas("v")
        yield server, msgspec.json.decode(msgspec.json.encode(server.get_metas()))
        server.close()


@fuzzed(st.data())
def test_metas(told: tuple[ParameterServer, Any], case: st.DataObject) -> None:
    server, honest = told
    before = server.get_metas()
    lying = case.draw(
        altered(
            [copy.deepcopy(honest)],
            st.just("\ud800") | st.text(max_size=4) | st.integers() | st.none(),
        )
    )
    try:
        server.load_metas(lying)
    except (ManifestError, UsageError):
        assert server.get_metas() == before
        assert lying != honest
    else:
        taken = server.get_metas()[0]
        assert taken["manifest"]["digest"] == before[0]["manifest"]["digest"]
        assert taken["address"] == lying["0"]["address"], "perhaps another server's"
