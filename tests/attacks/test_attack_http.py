"""Attacks on a replica's port: it answers with a clear error, and serves what it served."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attack_tools import (
    STRANGER_UID,
    TOKEN,
    dial,
    everything_said,
    framed,
    nothing_changes,
    stranger,
)
from core_tools import Background
from e2e_server import Server

from checkpoint_engine import ParameterServer, UpdateFailed, engine_requests
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.transport import sockets

CONTROL_ROUTES = [
    "/pause",
    "/resume",
    "/update_weights_from_ipc",
    "/collective_rpc",
    "/update_weights_from_ckpt_engine",
]
WEIGHTS_ROUTES = CONTROL_ROUTES[2:]
HANDLE_ROUTES = CONTROL_ROUTES[2:4]


def credentials(text: str) -> dict[bytes, bytes]:
    return {b"Authorization": text.encode()}


def update(handle: str, route: str = "/update_weights_from_ipc") -> dict[str, Any]:
    handles = {device_uuid("cpu"): handle}
    if route == "/collective_rpc":
        return {"method": "update_weights_from_ipc", "args": [handles]}
    return {"zmq_handles": handles}


def post(server: Server, route: str, **arguments: Any) -> httpx.Response:
    return httpx.post(server.endpoint + route, timeout=30, **arguments)


# Who has no token, or a wrong one


@pytest.mark.parametrize("route", CONTROL_ROUTES)
def test_without_the_token_nothing_is_changed(guarded: Server, route: str) -> None:
    wrong = [
        {},
        credentials("Bearer"),
        credentials("Bearer secret"),
        credentials(f"Bearer {TOKEN}x"),
        credentials(f"Bearer {TOKEN[:-1]}"),
        credentials(f"Basic {TOKEN}"),
        credentials(TOKEN),
        {b"Cookie": f"token={TOKEN}".encode()},
    ]
    with nothing_changes(guarded):
        for headers in wrong:
            response = post(guarded, route, json=update("ipc:///x", route), headers=headers)
            assert response.status_code == 401, headers
            assert response.headers["www-authenticate"] == "Bearer"
            assert response.json()["message"] == "this needs Authorization: Bearer <token>"


def test_the_body_of_a_stranger_is_not_even_read(guarded: Server) -> None:
    head = b"POST /collective_rpc HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000000000\r\n\r\n"
    with nothing_changes(guarded), dial(guarded) as connection:
        connection.sendall(head)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize("route", CONTROL_ROUTES)
def test_a_web_page_cannot_use_a_browser_of_this_host(unguarded: Server, route: str) -> None:
    with nothing_changes(unguarded):
        for origin in ("http://example.com", "null", unguarded.endpoint):
            response = post(
                unguarded, route, json=update("ipc:///x", route), headers={"Origin": origin}
            )
            assert response.status_code == 403
            assert response.json()["message"] == "requests from web pages need a token"


# Bodies and heads that are too large, malformed, or ask for files

TOO_LARGE = b'{"prompt": "' + b"x" * (1 << 20) + b'"}'


@pytest.mark.parametrize("route", ["/v1/completions", *WEIGHTS_ROUTES])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_that_is_too_large(guarded: Server, route: str, chunked: bool) -> None:
    content = iter([TOO_LARGE[: 1 << 19], TOO_LARGE[1 << 19 :]]) if chunked else TOO_LARGE
    with nothing_changes(guarded):
        response = post(guarded, route, content=content, headers=credentials(f"Bearer {TOKEN}"))
        assert response.status_code == 413
        assert "the body exceeds 1048576 bytes" in response.text


@pytest.mark.parametrize("route", ["/v1/completions", *WEIGHTS_ROUTES])
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04.",
        b"[" * 500_000,
        b'{"method":"m","args":' + b"[" * 500_000 + b"]" * 500_000 + b"}",
        b'{"prompt":' + b"[" * 500_000,
        b'{"zmq_handles":{"\\ud800":"\xff"}}',
        b'{"prompt":"x","max_tokens":1e999}',
    ],
    ids=lambda content: repr(content[:24]),
)
def test_a_malformed_body(guarded: Server, route: str, content: bytes) -> None:
    with nothing_changes(guarded):
        response = post(guarded, route, content=content, headers=credentials(f"Bearer {TOKEN}"))
        assert response.status_code == 400
        assert "malformed body: " in response.text


@pytest.mark.parametrize(
    "head",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"GET /health HTTP/1.1\r\nX: " + b"x" * 100_000,
        b"POST /pause HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /pause HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: a\r\n b\x00c\r\n\r\n",
    ],
    ids=lambda head: repr(head[:50]),
)
def test_a_head_that_is_no_http(guarded: Server, head: bytes) -> None:
    with nothing_changes(guarded), dial(guarded) as connection:
        connection.sendall(head)
        assert everything_said(connection).partition(b"\r\n")[0].split()[1] in (b"400", b"501")


@pytest.mark.parametrize(
    "path",
    ["/../../etc/passwd", "/v1/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "//etc/passwd"],
)
def test_a_path_that_leads_to_a_file(guarded: Server, path: str) -> None:
    with nothing_changes(guarded), dial(guarded) as connection:
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        said = everything_said(connection)
        assert said.startswith(b"HTTP/1.1 404 ")
        assert b"root:" not in said


# Slow clients


def test_clients_that_say_nothing_or_hardly_anything_are_hung_up_on(guarded: Server) -> None:
    with nothing_changes(guarded), contextlib.ExitStack() as stack:
        slow = [stack.enter_context(dial(guarded)) for _ in range(64)]
        for connection in slow[::2]:
            connection.sendall(b"GET /health HTTP/1.1\r\nX: x")
        assert httpx.get(guarded.endpoint + "/health").status_code == 200, "others are served"
        assert [everything_said(connection) for connection in slow] == [b""] * len(slow)


def test_a_client_that_is_slow_after_its_first_request(guarded: Server) -> None:
    with dial(guarded) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /health HTTP/1.1\r\nHo")
        assert everything_said(connection).count(b"HTTP/1.1 200 ") == 1


@pytest.mark.parametrize("route", ["/v1/completions", *WEIGHTS_ROUTES])
def test_a_body_that_never_ends_is_not_waited_for(guarded: Server, route: str) -> None:
    lines = [
        f"POST {route} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {TOKEN}",
        "Content-Length: 100",
        "Connection: close",
        "",
        '{"prompt": ',
    ]
    with nothing_changes(guarded), dial(guarded) as connection:
        connection.sendall("\r\n".join(lines).encode())
        said = everything_said(connection)
        assert said.startswith(b"HTTP/1.1 408 ")
        assert b"no whole body after" in said


# Handles that lead elsewhere


@contextlib.contextmanager
def impostor(answer: bytes) -> Iterator[str]:
    """A process of this user listens, but is no rank: it says this and hangs up."""
    listener, address = sockets.listen()

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            connection.sendall(answer)

    with listener:
        serving = Background(serve)
        yield address
        serving.result()
    Path(address.removeprefix(sockets.SCHEME)).unlink()


@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("route", HANDLE_ROUTES)
@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "larger than any message"),
        (framed(b"\x80\x04."), "a malformed message"),
    ],
)
def test_a_handle_of_a_process_that_is_no_rank(
    unguarded: Server, route: str, answer: bytes, message: str
) -> None:
    with nothing_changes(unguarded), impostor(answer) as address:
        response = post(unguarded, route, json=update(address, route))
        assert response.status_code == 400
        assert message in response.json()["message"]


@pytest.mark.parametrize("route", HANDLE_ROUTES)
@pytest.mark.parametrize(
    ("handle", "message"),
    [
        ("ipc://@ckpt-engine", "is an abstract socket, whose name anyone can take"),
        ("ipc://\0ckpt-engine", "is not an address of a socket on this host"),
        ("tcp://127.0.0.1:80", "is not an address of a socket on this host"),
        ("ipc://../s", "is not an address of a socket on this host"),
        ("ipc:///etc/passwd", "cannot connect"),
        ("ipc:///" + "x" * 5000, "cannot connect"),
    ],
    ids=lambda text: repr(text[:20]),
)
def test_a_handle_that_is_none(unguarded: Server, route: str, handle: str, message: str) -> None:
    with nothing_changes(unguarded):
        response = post(unguarded, route, json=update(handle, route))
        assert response.status_code == 400
        assert message in response.json()["message"]


def test_a_handle_of_another_user(unguarded: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica's own uid cannot be changed here, so that this is refused only under root."""
    with tempfile.TemporaryDirectory() as folder, nothing_changes(unguarded):
        Path(folder).chmod(0o777)
        with stranger("listen", Path(folder) / "s") as uid:
            response = post(unguarded, "/update_weights_from_ipc", json=update(f"ipc://{folder}/s"))
            assert response.status_code == 400
            if uid == str(STRANGER_UID):
                assert f"the peer runs as uid {uid}" in response.json()["message"]


def test_an_update_that_is_replayed(unguarded: Server, server: ParameterServer) -> None:
    """The request and the handle were right once; the update that they belonged to is over."""
    (call,) = engine_requests([unguarded.endpoint], rank=0, world_size=1)
    server.update("v1", call, weight_version="once")
    assert unguarded.info()["weight_version"] == "once"
    handle = server.get_metas()[0]["address"]
    with nothing_changes(unguarded):
        for route in HANDLE_ROUTES:
            response = post(unguarded, route, json=update(handle, route))
            assert response.status_code == 400
            assert "no update is under way at this handle" in response.json()["message"]


def test_an_endpoint_that_is_no_engine_is_reported(server: ParameterServer) -> None:
    """What answers at the port that a trainer calls may be anything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(1 << 16)
                connection.sendall(b"\xff" * 1000)

        serving = Background(serve)
        port = listener.getsockname()[1]
        (call,) = engine_requests([f"http://127.0.0.1:{port}"], rank=0, world_size=1)
        with pytest.raises(UpdateFailed, match=f"127.0.0.1:{port}/v1/models"):
            server.update("v1", call)
        serving.result()
