"""`ckpt-engine status` against real HTTP servers on loopback and on a Unix socket."""

from __future__ import annotations

import json
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from checkpoint_engine.cli.app import app

# An event in place of an answer holds the request until it is set.
Answers = dict[str, tuple[int, bytes] | threading.Event]
Serve = Callable[[Answers], str]


def replica(
    digest: str, *, label: str = "step-7", health: int = 200, state: str = "serving"
) -> Answers:
    info = {
        "weight_version": label,
        "digest": digest,
        "served_digest": "ab" * 32,
        "state": state,
        "history": ["step-6"],
    }
    return {"/health": (health, b""), "/weight_info": (200, json.dumps(info).encode())}


def handler(answers: Answers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer = answers.get(self.path, (404, b"not found"))
            if isinstance(answer, threading.Event):
                answer.wait(60)
                return
            code, body = answer
            self.send_response(code)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    return Handler


@contextmanager
def running(server: socketserver.BaseServer) -> Iterator[None]:
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    with ExitStack() as stack:

        def start(answers: Answers) -> str:
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler(answers))
            stack.enter_context(running(server))
            return f"http://127.0.0.1:{server.server_port}"

        yield start


def run(*arguments: str) -> tuple[int, Any]:
    result = CliRunner().invoke(app, ["status", "--json", *arguments])
    return result.exit_code, json.loads(result.stdout)


def test_replicas_that_agree(serve: Serve) -> None:
    urls = [serve(replica("12" * 32)) for _ in range(3)]
    code, answer = run(*(f"--endpoint={url}/" for url in urls))
    assert code == 0
    assert answer["healthy"]
    assert answer["agree"]
    assert [entry["endpoint"] for entry in answer["endpoints"]] == urls
    for entry in answer["endpoints"]:
        assert entry["health"] == "healthy"
        assert entry["latency_seconds"] > 0
        assert entry["weights"]["weight_version"] == "step-7"
        assert entry["weights"]["digest"] == "12" * 32
        assert entry["weights"]["history"] == ["step-6"]


def test_replicas_that_disagree_outweigh_one_that_is_down(serve: Serve) -> None:
    first, second = serve(replica("12" * 32)), serve(replica("34" * 32))
    code, answer = run("-e", first, "-e", second, "-e", unused_url())
    assert code == 5
    assert not answer["agree"]
    assert not answer["healthy"]


def test_an_unreachable_endpoint_says_why(serve: Serve) -> None:
    code, answer = run("-e", serve(replica("12" * 32)), "-e", unused_url())
    assert code == 1
    assert answer["agree"]
    assert [e["health"] for e in answer["endpoints"]] == ["healthy", "unreachable"]
    assert answer["endpoints"][1]["note"] == "Connection refused"


def test_a_replica_that_is_not_healthy_still_tells_its_state(serve: Serve) -> None:
    code, answer = run("-e", serve(replica("12" * 32, health=503, state="torn")))
    assert code == 1
    (entry,) = answer["endpoints"]
    assert entry["health"] == "unhealthy"
    assert entry["weights"]["state"] == "torn"
    assert "503" in entry["note"]


@pytest.mark.parametrize("body", [None, b"<html>", b'{"weight_version": "default"}', b"[]"])
def test_an_engine_that_is_not_ours_may_be_healthy(serve: Serve, body: bytes | None) -> None:
    answers: Answers = {"/health": (200, b"")}
    if body is not None:
        answers["/weight_info"] = (200, body)
    code, answer = run("-e", serve(answers), "-e", serve(replica("12" * 32)))
    assert code == 0
    assert answer["endpoints"][0]["weights"] is None
    assert "not a replica of ours" in answer["endpoints"][0]["note"]


def test_an_endpoint_that_never_answers_is_given_up(serve: Serve) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        code, answer = run("-e", url, "-e", serve(replica("12" * 32)), "--timeout", "0.5")
    assert code == 1
    assert [e["health"] for e in answer["endpoints"]] == ["unreachable", "healthy"]
    assert answer["endpoints"][0]["note"] == "no answer within 0.5 s"


def test_a_replica_that_does_not_tell_its_weights_is_not_healthy(serve: Serve) -> None:
    told = threading.Event()
    code, answer = run("-e", serve({"/health": (200, b""), "/weight_info": told}), "--timeout=0.5")
    told.set()
    assert code == 1
    (entry,) = answer["endpoints"]
    assert entry["health"] == "unhealthy"
    assert entry["note"] == "/weight_info: no answer within 0.5 s"


def test_replicas_that_are_not_healthy_have_no_say_in_agreement(serve: Serve) -> None:
    quarantined = replica("34" * 32, health=503, state="quarantined")
    code, answer = run("-e", serve(replica("12" * 32)), "-e", serve(quarantined))
    assert code == 1
    assert answer["agree"]


def test_a_replica_behind_a_unix_socket(tmp_path: Path) -> None:
    class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        def get_request(self) -> tuple[socket.socket, Any]:
            connection, _ = super().get_request()
            return connection, ("unix", 0)

    path = tmp_path / "replica.sock"
    with running(Server(str(path), handler(replica("12" * 32)))):
        code, answer = run("--uds", str(path))
    assert code == 0
    assert answer["endpoints"][0]["endpoint"] == f"unix:{path}"
    assert answer["endpoints"][0]["weights"]["digest"] == "12" * 32


def test_the_table_shows_versions_and_disarms_their_labels(serve: Serve) -> None:
    url = serve(replica("12" * 32, label="\x1b[2J"))
    other = serve(replica("34" * 32))
    arguments = ["status", "-e", url, "-e", other, "-e", unused_url()]
    result = CliRunner(env={"COLUMNS": "120"}).invoke(app, arguments)
    assert result.exit_code == 5
    for text in (url, "serving", "12" * 6, "34" * 6, "Connection refused", "different weights"):
        assert text in result.stdout
    assert "12" * 7 not in result.stdout
    assert "\x1b" not in result.stdout


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://host:99999"])
def test_what_is_no_url(url: str) -> None:
    result = CliRunner().invoke(app, ["status", "--endpoint", url])
    assert result.exit_code == 2
    assert url in result.stderr


def test_nothing_to_ask() -> None:
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 2
    assert "--endpoint" in result.stderr


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"http://127.0.0.1:{listener.getsockname()[1]}"
