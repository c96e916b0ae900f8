"""The face that others program against: names, signatures, plain data, clear refusals."""

from __future__ import annotations

import http.server
import inspect
import json
import pickle
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from ps_tools import DEVICE, register, version

import checkpoint_engine.calls
import checkpoint_engine.ps
from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import (
    AdapterError,
    CheckpointEngineError,
    StoreError,
    UsageError,
)
from checkpoint_engine.ps import ParameterServer, request_inference_to_update

# Names and signatures

REQUIRED = inspect.Parameter.empty
ANY = object()


@pytest.mark.parametrize(
    ("method", "positional", "keyword_only"),
    [
        (
            "__init__",
            {},
            {
                "rank": None,
                "world_size": None,
                "auto_pg": True,
                "gpu_count": None,
                "mem_fraction": None,
                "master_addr": None,
                "master_port": None,
            },
        ),
        (
            "register_checkpoint",
            {"checkpoint_name": REQUIRED},
            {
                "files": None,
                "named_tensors": None,
                "use_shared_memory_pool": False,
                "use_inplace_pin_memory": False,  # MoonshotAI's removes files by default
                "mode": "auto",
            },
        ),
        ("unregister_checkpoint", {"checkpoint_name": REQUIRED, "force": False}, {}),
        ("init_process_group", {}, {"master_port": None, "timeout": ANY}),
        ("gather_metas", {"checkpoint_name": REQUIRED}, {}),
        ("get_metas", {}, {}),
        ("load_metas", {"metas": REQUIRED}, {"mode": "auto"}),
        ("store_based_barrier", {"timeout": ANY}, {}),
        (
            "update",
            {"checkpoint_name": REQUIRED, "req_func": REQUIRED},
            {
                "timeout": ANY,
                "ranks": None,
                "weight_version": None,
                "on_failure": "rollback",
                "min_replicas": 1,
                "require_rollback": False,
                "base": None,
                "lora": None,
                "probe": None,
                "report": None,
            },
        ),
    ],
)
def test_signatures_are_those_that_callers_rely_on(
    method: str, positional: dict[str, Any], keyword_only: dict[str, Any]
) -> None:
    parameters = list(inspect.signature(getattr(ParameterServer, method)).parameters.values())[1:]
    found: dict[Any, dict[str, Any]] = {}
    for parameter in parameters:
        found.setdefault(parameter.kind, {})[parameter.name] = parameter.default
    for expected, kind in (
        (positional, inspect.Parameter.POSITIONAL_OR_KEYWORD),
        (keyword_only, inspect.Parameter.KEYWORD_ONLY),
    ):
        defaults = found.pop(kind, {})
        assert defaults.keys() == expected.keys()
        for name, default in expected.items():
            if default is ANY:
                assert isinstance(defaults[name], timedelta)
            else:
                assert defaults[name] == default
    assert found == {}


def test_the_call_is_importable_from_where_it_always_was() -> None:
    assert checkpoint_engine.ps.request_inference_to_update is (
        checkpoint_engine.calls.request_inference_to_update
    )
    parameters = inspect.signature(request_inference_to_update).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "url": REQUIRED,
        "socket_paths": REQUIRED,
        "timeout": 300.0,
        "uds": None,
    }


def test_callers_may_set_the_store_of_the_p2p_mode(server: ParameterServer) -> None:
    server._p2p_store = None  # type: ignore[attr-defined]


def test_an_explicit_rank_0_is_rank_0(
    make_server: Callable[..., ParameterServer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference reads `rank or int(os.environ["RANK"])`."""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    server = make_server(rank=0, world_size=1)
    assert (server.rank, server.world_size) == (0, 1)


def test_mem_fraction_is_accepted_with_a_warning(
    make_server: Callable[..., ParameterServer],
) -> None:
    with pytest.warns(UserWarning, match="mem_fraction has no effect"):
        make_server(mem_fraction=0.9)


# Asking an engine


class Recorder:
    """An HTTP server that keeps what it is sent, and answers as told."""

    def __init__(self, status: int = 200, text: str = "{}") -> None:
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        recorder = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                recorder.requests.append((self.path, headers, json.loads(body)))
                self.send_response(status)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_: Any) -> None:
                pass

        self.handler = Handler

    @contextmanager
    def over_tcp(self) -> Iterator[str]:
        with self._serving(http.server.HTTPServer(("127.0.0.1", 0), self.handler)) as server:
            yield f"http://127.0.0.1:{server.server_address[1]}"

    @contextmanager
    def over_unix_socket(self, path: Path) -> Iterator[str]:
        with self._serving(socketserver.UnixStreamServer(str(path), self.handler)):
            yield str(path)

    @contextmanager
    def _serving(self, server: socketserver.TCPServer) -> Iterator[socketserver.TCPServer]:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
        server.server_close()


BODY = {
    "method": "update_weights_from_ipc",
    "args": [{"GPU-1": "ipc:///run/a", "GPU-2": "ipc:///run/b"}],
    "timeout": 7.5,
}


def test_an_engine_is_sent_exactly_this(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_ENGINE_TOKEN", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    recorder = Recorder()
    with recorder.over_tcp() as url:
        request_inference_to_update(f"{url}/collective_rpc", BODY["args"][0], 7.5)  # type: ignore[index]
    ((path, headers, body),) = recorder.requests
    assert (path, body) == ("/collective_rpc", BODY)
    assert headers["content-type"] == "application/json"
    assert "authorization" not in headers


def test_an_engine_is_sent_the_same_through_a_unix_socket(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_TOKEN", "secret")
    recorder = Recorder()
    with recorder.over_unix_socket(socket_folder / "engine.sock") as uds:
        request_inference_to_update(
            "http://localhost/collective_rpc",
            BODY["args"][0],
            timeout=7.5,
            uds=uds,  # type: ignore[index]
        )
    ((path, headers, body),) = recorder.requests
    assert (path, body) == ("/collective_rpc", BODY)
    assert headers["authorization"] == "Bearer secret"


def test_an_engine_that_answers_with_an_error_said_no() -> None:
    recorder = Recorder(status=500, text="CUDA out of memory")
    with recorder.over_tcp() as url, pytest.raises(AdapterError, match=r"500: CUDA out of memory"):
        request_inference_to_update(f"{url}/collective_rpc", {})


def test_an_engine_that_cannot_be_reached_is_named() -> None:
    url = "http://127.0.0.1:1/collective_rpc"
    with pytest.raises(AdapterError, match=url):
        request_inference_to_update(url, {}, timeout=5.0)


@pytest.mark.parametrize("url", ["not a url", "ftp://engine"])
def test_what_is_no_url_of_an_engine_is_named(url: str) -> None:
    with pytest.raises(UsageError, match=f"'{url}' is no URL of a server"):
        request_inference_to_update(url, {}, timeout=5.0)


# Which rank calls which engine

HANDLES = [(f"GPU-{rank}", f"ipc:///{rank}") for rank in range(6)]


def calls_of(rank: int, world_size: int, num_engines: int, parallel: int) -> list[Any]:
    """What a rank's requests post: the engine's path and its handles."""
    recorders = [Recorder() for _ in range(num_engines)]
    posted = []
    for number, recorder in enumerate(recorders):
        with recorder.over_tcp() as url:
            endpoints = ["http://127.0.0.1:1"] * num_engines
            endpoints[number] = url + "/"
            requests = engine_requests(
                endpoints,
                rank=rank,
                world_size=world_size,
                inference_parallel_size=parallel,
                timeout_seconds=5,
                engine="replica",
            )
            for request in requests:
                try:
                    request(HANDLES[:world_size])
                except AdapterError:
                    continue
            posted += [(number, path, body["args"][0]) for path, _, body in recorder.requests]
    return posted


def test_each_engine_is_called_by_its_first_rank_with_the_handles_of_its_ranks() -> None:
    calls = [calls_of(rank, world_size=6, num_engines=2, parallel=3) for rank in range(6)]
    assert calls == [
        [(0, "/collective_rpc", dict(HANDLES[:3]))],
        [],
        [],
        [(1, "/collective_rpc", dict(HANDLES[3:]))],
        [],
        [],
    ]


def test_one_rank_alone_calls_every_engine() -> None:
    assert calls_of(0, world_size=1, num_engines=3, parallel=2) == [
        (number, "/collective_rpc", dict(HANDLES[:1])) for number in range(3)
    ]


@pytest.mark.parametrize(
    ("world_size", "num_engines", "parallel"), [(3, 2, 1), (2, 2, 2), (8, 1, 4)]
)
def test_ranks_that_fit_no_engines_are_refused(
    world_size: int, num_engines: int, parallel: int
) -> None:
    with pytest.raises(UsageError, match=f"start 1 rank or {num_engines * parallel}"):
        engine_requests(
            ["http://e"] * num_engines,
            rank=0,
            world_size=world_size,
            inference_parallel_size=parallel,
        )


# Metas


def is_plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(type(key) in (str, int) and is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (str, int, float, bool)


def test_metas_are_plain_data_and_survive_every_encoding(server: ParameterServer) -> None:
    register(server, "step-1", 1)
    metas = server.get_metas()
    assert list(metas) == [0]
    assert is_plain(metas)
    with_text_keys = json.loads(json.dumps(metas))
    through_json = {int(rank): meta for rank, meta in with_text_keys.items()}
    through_pickle = pickle.loads(pickle.dumps(metas))
    for received in (metas, with_text_keys, through_json, through_pickle):
        server.load_metas(received)
        assert server.get_metas() == metas


def test_loaded_metas_can_be_updated_from(server: ParameterServer) -> None:
    server.register_checkpoint("step-1", named_tensors=version(1))
    server.gather_metas("step-1")
    metas = server.get_metas()
    register(server, "step-2", 2)
    server.load_metas(metas)
    assert server.get_metas() == metas


@pytest.mark.parametrize("ranks", [[], [1], [0, 2]])
def test_metas_without_some_ranks_are_refused(server: ParameterServer, ranks: list[int]) -> None:
    register(server, "step-1", 1)
    meta = server.get_metas()[0]
    with pytest.raises(CheckpointEngineError, match=r"some are missing|no rank registered"):
        server.load_metas({rank: {**meta, "rank": rank} for rank in ranks})


def test_metas_come_from_gathering(server: ParameterServer) -> None:
    with pytest.raises(UsageError, match="gather_metas"):
        server.get_metas()


# Using it wrongly


def test_an_update_needs_gathered_metas(server: ParameterServer) -> None:
    with pytest.raises(UsageError, match="'step-1' was not gathered"):
        server.update("step-1", lambda handles: None)
    register(server, "step-1", 1)
    with pytest.raises(UsageError, match="'step-2' was not gathered"):
        server.update("step-2", lambda handles: None)


def test_a_name_is_registered_once_and_unregistered_once(server: ParameterServer) -> None:
    server.register_checkpoint("step-1", named_tensors=version(1))
    with pytest.raises(StoreError, match="already registered"):
        server.register_checkpoint("step-1", named_tensors=version(1))
    server.unregister_checkpoint("step-1")
    with pytest.raises(StoreError, match="not registered"):
        server.unregister_checkpoint("step-1")
    server.register_checkpoint("step-1", named_tensors=version(1))


def test_what_was_unregistered_is_no_longer_gathered(server: ParameterServer) -> None:
    register(server, "step-1", 1)
    server.unregister_checkpoint("step-1")
    with pytest.raises(UsageError, match="not gathered"):
        server.update("step-1", lambda handles: None)


def test_a_checkpoint_that_nobody_registered_is_refused(server: ParameterServer) -> None:
    server.gather_metas("nothing")  # as who joins another server does first
    with pytest.raises(UsageError, match="'nothing' was not gathered: register it"):
        server.update("nothing", lambda handles: None)
    with pytest.raises(UsageError, match="register it"):
        server.get_metas()


def test_files_and_tensors_make_one_checkpoint(server: ParameterServer, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    tensors = version(1)
    weight = tensors.pop("weight")
    save_file(tensors, tmp_path / "a.safetensors")
    server.register_checkpoint(
        "both", files=[str(tmp_path / "a.safetensors")], named_tensors={"weight": weight}
    )
    server.gather_metas("both")
    both = server.get_metas()[0]["manifest"]["digest"]
    register(server, "step-1", 1)
    assert server.get_metas()[0]["manifest"]["digest"] == both


def test_the_process_group_is_for_the_caller(make_server: Callable[..., ParameterServer]) -> None:
    import torch
    import torch.distributed as dist

    server = make_server(auto_pg=False)
    try:
        server.init_process_group(timeout=timedelta(seconds=20))
        server.init_process_group(timeout=timedelta(seconds=20))
        tensor = torch.ones(1)
        dist.all_reduce(tensor)
        assert tensor.item() == 1
    finally:
        dist.destroy_process_group()


def test_req_func_is_called_once_in_a_thread_with_the_handles_of_all_ranks(
    server: ParameterServer,
) -> None:
    register(server, "step-1", 1)
    calls: list[tuple[int, Any]] = []
    with pytest.raises(CheckpointEngineError):
        server.update("step-1", lambda given: calls.append((threading.get_ident(), given)))
    ((thread, handles),) = calls
    assert thread != threading.get_ident()
    assert isinstance(handles, list)
    ((uuid, address),) = handles
    assert (uuid, address.startswith("ipc:///")) == (DEVICE, True)
