"""What a real SGLang does not do at will: fail halfway, or say what is not so. Over real HTTP."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.engines.sglang import SGLang
from checkpoint_engine.errors import AdapterError

UPDATE = "/update_weights_from_ipc"


@dataclass
class Stand:
    """A stand-in for SGLang, and what an update makes of its label, its weights and its answer."""

    status: int
    label: str
    weights: str
    shown: tuple[str, str] = ("old", "old weights")
    asked: list[str] = field(default_factory=list)

    def answer(self, path: str) -> tuple[int, object]:
        self.asked.append(path)
        if path == UPDATE:
            self.shown = self.label, self.weights
            return self.status, {"success": self.status == 200, "message": "it says why"}
        return 200, {
            "loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}],
            "weight_version": self.shown[0],
            "per_engine_checksum": self.shown[1],
        }

    @property
    def goes_on(self) -> bool:
        return self.asked[-1] == "/continue_generation"


@pytest.fixture
def stand() -> Stand:
    return Stand(200, "new", "new weights")


@pytest.fixture
def endpoint(stand: Stand) -> Iterator[Endpoint]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("content-length", 0)))
            status, body = stand.answer(self.path)
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield Endpoint(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()
        thread.join()


def update(endpoint: Endpoint) -> None:
    SGLang().update(endpoint, {"GPU-x": "ipc:///x"}, "new", 5)


def test_it_is_paused_before_and_goes_on_after(stand: Stand, endpoint: Endpoint) -> None:
    update(endpoint)
    assert [path for path in stand.asked if "generation" in path or path == UPDATE] == [
        "/pause_generation",
        UPDATE,
        "/continue_generation",
    ]


def test_who_refuses_goes_on_as_before(stand: Stand, endpoint: Endpoint) -> None:
    stand.status, stand.label, stand.weights = 400, *stand.shown
    with pytest.raises(AdapterError, match="it says why"):
        update(endpoint)
    assert stand.goes_on


def test_new_weights_under_the_old_label_are_not_served(stand: Stand, endpoint: Endpoint) -> None:
    stand.status, stand.label = 400, "old"
    with pytest.raises(AdapterError, match=r"it says why.*not those of 'old'.*it stays paused"):
        update(endpoint)
    assert not stand.goes_on


def test_a_success_that_shows_another_label_is_none(stand: Stand, endpoint: Endpoint) -> None:
    stand.label = "old"
    with pytest.raises(AdapterError, match="shows 'old' after an update to 'new'"):
        update(endpoint)
    assert not stand.goes_on


def test_who_took_it_and_failed_to_say_so_goes_on(stand: Stand, endpoint: Endpoint) -> None:
    stand.status = 500
    with pytest.raises(AdapterError, match="answered 500"):
        update(endpoint)
    assert stand.goes_on


def test_a_deadline_that_is_no_number(
    stand: Stand, endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_DRAIN_SECONDS", "soon")
    with pytest.raises(AdapterError, match="'soon' is no number"):
        update(endpoint)
    assert UPDATE not in stand.asked
