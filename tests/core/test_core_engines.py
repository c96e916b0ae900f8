"""Engines of third parties, and what is none: over real HTTP, with the code of docs/adapters.md."""

from __future__ import annotations

import http.server
import json
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import AdapterError, UpdateFailed, UsageError
from checkpoint_engine.ps import ParameterServer

PAGE = Path(__file__).parents[2] / "docs/adapters.md"


class Model:
    """Weights and a loader."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.refuses = False

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        if self.refuses:
            self.refuses = False
            raise RuntimeError("load_weights refused")
        self.weights = {name: tensor.clone() for name, tensor in named}


class CopperServer:
    """An engine that is nobody's but these tests'; its worker runs the page's first block."""

    def __init__(self, owner: str, take_update: Callable[..., None]) -> None:
        self.model, self.label = Model(), ""
        self.calls: list[str] = []
        copper = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.answer(200, {"data": [{"id": "m", "owned_by": owner}]})

            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers.get("content-length", 0)))
                body = json.loads(data) if data else {}
                copper.calls.append(self.path)
                try:
                    if self.path == "/take_update":
                        take_update(copper.model, body["handles"], device_uuid())
                    copper.label = (body or {}).get("label", copper.label)
                except AdapterError as error:
                    self.answer(500, str(error))
                else:
                    self.answer(200, {})

            def answer(self, status: int, body: object) -> None:
                data = json.dumps(body).encode()
                self.send_response(status)
                self.send_header("content-length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self.handler = Handler


@contextmanager
def serving(server: CopperServer) -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), server.handler) as listener:
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listener.server_address[1]}"
        listener.shutdown()
        thread.join()


@pytest.fixture
def take_update() -> Callable[..., None]:
    worker_side: dict[str, Any] = {}
    exec(blocks("python")[0], worker_side)
    take_update: Callable[..., None] = worker_side["take_update"]
    return take_update


@pytest.fixture
def copper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The distribution that the page describes, installed."""
    (tmp_path / "copper.py").write_text(blocks("python")[1])
    info = tmp_path / "copper-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: copper\nVersion: 1.0\n")
    section = blocks("toml")[0].replace("project.entry-points.", "").replace('"', "")
    (info / "entry_points.txt").write_text(section)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("copper", None)


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def register(server: ParameterServer, value: float) -> str:
    name = f"step-{value:g}"
    server.register_checkpoint(name, named_tensors={"w": torch.full((3,), value)})
    server.gather_metas(name)
    return name


def test_a_third_partys_engine_is_found_by_asking_and_taken_along(
    lone_server: ParameterServer, copper: None, take_update: Callable[..., None]
) -> None:
    engine = CopperServer("copper", take_update)
    with serving(engine) as url:
        requests = engine_requests([url], rank=0, world_size=1)
        lone_server.update(register(lone_server, 1), requests)
        assert (engine.label, engine.model.weights["w"].tolist()) == ("step-1", [1.0] * 3)
        assert engine.calls == ["/stop_requests", "/take_update", "/label", "/go_on"]
        engine.calls.clear()
        engine.model.refuses = True
        with pytest.raises(UpdateFailed, match="load_weights refused"):
            lone_server.update(register(lone_server, 2), requests)
        assert (engine.label, engine.model.weights["w"].tolist()) == ("step-1", [1.0] * 3)
        assert engine.calls == ["/stop_requests", "/take_update", "/go_on"]


def test_what_is_no_engine_that_is_known_is_named(
    lone_server: ParameterServer, copper: None, take_update: Callable[..., None]
) -> None:
    engine = CopperServer("tin", take_update)
    with serving(engine) as url:
        requests = engine_requests([url], rank=0, world_size=1)
        with pytest.raises(
            UpdateFailed, match=r"is no engine that is known here \(copper, replica"
        ):
            lone_server.update(register(lone_server, 1), requests)
    assert engine.calls == []


def test_an_engine_that_there_is_not_is_refused_at_once() -> None:
    with pytest.raises(UsageError, match=r"'127\.0\.0\.1:9' is no URL of a server, as http://"):
        engine_requests(["127.0.0.1:9"], rank=0, world_size=1)
    with pytest.raises(UsageError, match="--engine tin: there are auto, replica"):
        engine_requests(["http://127.0.0.1:1"], rank=0, world_size=1, engine="tin")
