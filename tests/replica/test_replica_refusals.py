from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from replica_client import UPDATE, body, complete, in_background
from tiny_replica import TIMEOUT_SECONDS, Gate, StandInReplica, wait_until
from transformers import PreTrainedModel

from checkpoint_engine.errors import UsageError
from checkpoint_engine.replica.engine import Engine
from checkpoint_engine.replica.server import check_binding, create_app

TOKEN = "sécret"
FROM_PATH = "/update_weights_from_ckpt_engine"
CONTROL_ROUTES = ["/pause", "/resume", "/update_weights_from_ipc", FROM_PATH, "/collective_rpc"]


# What cannot be done


@pytest.mark.parametrize("stream", [False, True])
def test_a_replica_that_serves_nothing_answers_503(
    http: httpx.Client, engine: Engine, stream: bool
) -> None:
    engine.set_accepting("waiting for the first weights")
    response = http.post("/v1/completions", json=body(stream=stream))
    assert response.status_code == 503
    assert response.json() == {
        "error": {"message": "waiting for the first weights", "type": "server_error"}
    }


def test_a_full_queue_answers_429_and_keeps_nothing(http: httpx.Client, engine: Engine) -> None:
    engine.pause(TIMEOUT_SECONDS)
    response = http.post("/v1/completions", json=body(n=33))
    assert response.status_code == 429
    assert response.json()["error"]["type"] == "rate_limit_error"
    assert engine.num_waiting == 0


def test_requests_in_flight_hear_that_the_replica_is_torn(
    http: httpx.Client, engine: Engine, gate: Gate
) -> None:
    gate.close(num_permits=3)
    request = body(max_tokens=900)
    with (
        http.stream("POST", "/v1/completions", json={**request, "stream": True}) as stream,
        in_background(lambda: http.post("/v1/completions", json=request)) as responses,
    ):
        lines = stream.iter_lines()
        next(lines)
        wait_until(lambda: engine.num_running + engine.num_waiting == 2)
        engine.fail_all("torn: restart this replica")
        events = [line for line in lines if line]
    error = '{"error":{"message":"torn: restart this replica","type":"server_error"}}'
    assert events[-1] == f"data: {error}"
    assert responses[0].status_code == 503
    assert responses[0].text == error


def test_a_failing_model_answers_500(http: httpx.Client, model: PreTrainedModel) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    handle = model.register_forward_pre_hook(fail)
    response = http.post("/v1/completions", json=body())
    assert response.status_code == 500
    assert "no memory" in response.json()["error"]["message"]
    handle.remove()
    complete(http)


MALFORMED_REQUESTS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": []}, "prompt is a text"),
    ({"prompt": ""}, "no tokens"),
    ({"prompt": [1, "a"]}, "prompt is a text"),
    ({"prompt": [[]]}, "no tokens"),
    ({"prompt": [1.5]}, "$.prompt"),
    ({"prompt": [999]}, "token id 999"),
    ({"max_tokens": "many"}, "$.max_tokens"),
    ({"max_tokens": 2000}, "1024 positions"),
    ({"temperature": -1}, "temperature"),
    ({"n": 0}, "choices"),
    ({"n": 129}, "choices"),
    ({"prompt": ["a"] * 65, "n": 2}, "choices"),
    ({"logprobs": 3}, "logprobs"),
]


def test_a_malformed_request_is_refused_in_one_line(http: httpx.Client) -> None:
    for fields, message in MALFORMED_REQUESTS:
        response = http.post("/v1/completions", json=body(**fields))
        assert response.status_code == 400, fields
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert message in error["message"]
        assert "\n" not in error["message"]


def test_a_body_that_is_no_request_is_refused(http: httpx.Client) -> None:
    for route in ("/v1/completions", "/update_weights_from_ipc", FROM_PATH, "/collective_rpc"):
        for content in (b"", b"{", b"[]", b'{"max_tokens": 3}', b'"\xff"'):
            response = http.post(route, content=content)
            assert response.status_code == 400, (route, content)
            assert "malformed body" in response.text


def test_another_models_name_is_not_found(http: httpx.Client) -> None:
    response = http.post("/v1/completions", json=body(model="gpt-9"))
    assert response.status_code == 404
    assert "gpt-9" in response.json()["error"]["message"]
    assert http.get("/v1/nothing").json()["error"]["type"] == "invalid_request_error"


MALFORMED_UPDATES: list[tuple[str, dict[str, Any], str]] = [
    ("/update_weights_from_ipc", {"zmq_handles": {"GPU-0": "ipc:///x"}}, "GPU-test"),
    ("/update_weights_from_ipc", {"zmq_handles": {"GPU-test": 1}}, "zmq_handles"),
    ("/update_weights_from_ipc", {**UPDATE, "force": True}, "force"),
    (FROM_PATH, {"model_path": ""}, "model_path"),
    (FROM_PATH, {"model_path": "/m", "load_format": "pt"}, "'pt'"),
    (FROM_PATH, {"model_path": "/m", "abort_all_requests": True}, "abort_all_requests"),
    ("/collective_rpc", {"method": "exec", "args": []}, "'exec'"),
    ("/collective_rpc", {"method": "update_weights_from_ipc"}, "args"),
    ("/collective_rpc", {"method": "update_weights_from_ipc", "args": ["x"]}, "args"),
    (
        "/collective_rpc",
        {
            "method": "update_weights_from_ipc",
            "args": [UPDATE["zmq_handles"]],
            "kwargs": {"a": 1},
        },
        "kwargs",
    ),
]


def test_a_malformed_update_is_refused_in_one_line(http: httpx.Client) -> None:
    for route, update, message in MALFORMED_UPDATES:
        response = http.post(route, json=update)
        assert response.status_code == 400, (route, update)
        failure = response.json()
        assert failure["success"] is False
        assert message in failure["message"]
        assert "\n" not in failure["message"]


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large_is_refused(http: httpx.Client, chunked: bool) -> None:
    data = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'
    content = iter([data[: 1 << 19], data[1 << 19 :]]) if chunked else data
    response = http.post("/v1/completions", content=content)
    assert response.status_code == 413
    assert "1048576 bytes" in response.json()["error"]["message"]


# Who may do what


@pytest.fixture
def guarded(
    start_server: Callable[[FastAPI], str], replica: StandInReplica
) -> Iterator[httpx.Client]:
    """A client, without credentials, of a replica that requires a token."""
    app = create_app(replica, token=TOKEN, model_name="tiny", device_uuid="GPU-test")
    with httpx.Client(base_url=start_server(app), timeout=TIMEOUT_SECONDS) as client:
        yield client


def bearer(token: str, scheme: str = "Bearer") -> dict[bytes, bytes]:
    return {b"Authorization": f"{scheme} {token}".encode()}


def test_the_token_opens_them_and_the_rest_is_open(guarded: httpx.Client) -> None:
    rpc = {"method": "update_weights_from_ipc", "args": [UPDATE["zmq_handles"]]}
    bodies = {"/update_weights_from_ipc": UPDATE, "/collective_rpc": rpc}
    for route in ("/pause", "/resume", *bodies):  # in this order: it completes at the end
        response = guarded.post(route, json=bodies.get(route), headers=bearer(TOKEN))
        assert response.status_code == 200, response.text
    response = guarded.post(FROM_PATH, json={"model_path": "/"}, headers=bearer(TOKEN))
    assert response.status_code == 403, "not for want of a token, but of a folder"
    assert "this replica loads from no folder; start it with --allow-path" in response.text
    for route in ("/health", "/weight_info", "/v1/models"):
        assert guarded.get(route).status_code == 200
    complete(guarded)


def test_an_empty_token_is_refused(replica: StandInReplica) -> None:
    with pytest.raises(UsageError, match="empty token"):
        create_app(replica, token="", model_name="tiny", device_uuid="GPU-test")


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST"])
def test_loopback_needs_no_token(host: str) -> None:
    check_binding(host, None)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "::", "", "10.0.0.1", "192.168.1.1", "fe80::1", "example.com", "localhost.evil"],
)
def test_beyond_loopback_a_token_is_needed(host: str) -> None:
    for missing in (None, ""):
        with pytest.raises(UsageError, match="without a token"):
            check_binding(host, missing)
    check_binding(host, "token")
