"""The defects of the reference implementation: each would be caught here."""

from __future__ import annotations

import json
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import msgspec
import pytest
from ps_tools import HERE, EngineProcess, Handles, digests, register, version

from checkpoint_engine import errors
from checkpoint_engine.errors import CheckpointEngineError, UpdateFailed
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transport import sockets
from checkpoint_engine.worker import update_weights_from_ipc
from children import python_path

Engines = tuple[EngineProcess, EngineProcess]


# "The reply to the last bucket is received and dropped, so a failed load of it is success."


def test_a_load_that_fails_at_its_very_end_is_an_error(
    server: ParameterServer, engines: Engines
) -> None:
    engine = engines[0]
    register(server, "step-1", 1)
    server.update("step-1", engine.request())
    register(server, "step-2", 2)
    with pytest.raises(UpdateFailed, match="refused after the last tensor"):
        server.update("step-2", engine.request(behaviour="raise at the end"))
    assert engine.weights == digests(version(1))


# "The thread that calls the engine dies unseen: every rank blocks for ever."


@pytest.mark.parametrize("death", [RuntimeError, SystemExit, KeyboardInterrupt])
def test_the_death_of_a_request_is_reported(
    death: type[BaseException], server: ParameterServer
) -> None:
    register(server, "step-1", 1)

    def die(handles: Handles) -> None:
        raise death("the caller is gone")

    with pytest.raises(UpdateFailed) as failure:
        server.update("step-1", die, timeout=timedelta(seconds=2))
    assert failure.value.report.reason.type == death.__name__
    assert "the caller is gone" in str(failure.value)


# "A failing post-hook sends no reply: hang."


def test_a_post_hook_that_fails_is_reported_with_its_traceback(
    server: ParameterServer, engines: Engines
) -> None:
    engine = engines[0]
    register(server, "step-1", 1)
    server.update("step-1", engine.request(hook="post_hook"))
    register(server, "step-2", 2)
    with pytest.raises(UpdateFailed, match="process_weights_after_loading failed") as failure:
        server.update("step-2", engine.request(hook="failing_post_hook"))
    assert "in failing_post_hook" in failure.value.report.reason.traceback
    assert engine.weights == digests(version(1))
    assert engine.call("num_hooks") == 2, "the way back is post-processed too"


# "Nothing rolls back or marks an engine with half of the new weights."


def test_an_engine_with_half_of_the_new_weights_is_brought_back(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    server.update("step-1", [engine.request() for engine in engines])
    register(server, "step-2", 2)
    with pytest.raises(UpdateFailed):
        server.update("step-2", [engine.request(behaviour="raise") for engine in engines])
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_an_engine_that_cannot_be_brought_back_is_marked(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UpdateFailed, match="torn") as failure:
        server.update("step-1", engines[0].request(behaviour="raise"))
    (replica,) = failure.value.report.replicas
    assert (replica.outcome, replica.way_back) == ("torn", "none")


# "Repeated updates reuse a stale barrier key."


def test_updates_and_barriers_can_be_repeated(server: ParameterServer, engines: Engines) -> None:
    register(server, "step-1", 1)
    updates = set()
    for _ in range(10):
        server.store_based_barrier()
        updates.add(server.update("step-1", engines[0].request()).update)
        server.store_based_barrier(timedelta(seconds=5))
    assert len(updates) == 10


# "The worker unpickles from an abstract socket with a predictable name."


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def disguises(pickled: bytes) -> list[bytes]:
    """Pickled bytes alone, as a frame, and as the body of an envelope."""
    envelope = msgspec.msgpack.encode(("", 0, 0, pickled))
    return [pickled, *(struct.pack("<I", len(frame)) + frame for frame in (pickled, envelope))]


def test_pickled_bytes_sent_to_a_handle_are_refused(
    server: ParameterServer, engines: Engines, tmp_path: Path
) -> None:
    register(server, "step-1", 1)
    bomb = pickle.dumps(Bomb(tmp_path / "unpickled"))

    def attack(handles: Handles) -> None:
        for data in disguises(bomb):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attacker:
                attacker.settimeout(30)
                attacker.connect(handles[0][1].removeprefix("ipc://"))
                with suppress(ConnectionError):  # closed with some of it unread
                    attacker.sendall(data)
                    attacker.shutdown(socket.SHUT_WR)
                    assert attacker.recv(100) == b"", "the rank answered"

    attack([("", server.get_metas()[0]["address"])])
    report = server.update("step-1", [engines[0].request(), attack])
    assert report.outcome == "published"
    assert len(report.replicas) == 1
    assert not (tmp_path / "unpickled").exists()
    pickle.loads(bomb)
    assert (tmp_path / "unpickled").exists(), "the bomb was a dud"


@contextmanager
def impostor(data: bytes) -> Iterator[str]:
    """A rank that answers whatever it hears with the same bytes."""
    listener, address = sockets.listen()

    def answer() -> None:
        with suppress(OSError), listener.accept()[0] as connection:
            connection.recv(1000)
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)

    thread = threading.Thread(target=answer)
    thread.start()
    yield address
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(30)
    os.unlink(address.removeprefix("ipc://"))


@pytest.mark.parametrize("number", range(3))
def test_pickled_bytes_sent_to_a_worker_are_refused(
    number: int, socket_folder: Path, tmp_path: Path
) -> None:
    data = disguises(pickle.dumps(Bomb(tmp_path / "unpickled")))[number]
    loaded: list[object] = []
    with impostor(data) as address, pytest.raises(CheckpointEngineError):
        update_weights_from_ipc(None, address, "cpu", run=lambda named: loaded.append(named))
    assert loaded == []
    assert not (tmp_path / "unpickled").exists()


@pytest.mark.parametrize(
    "handle", ["ipc://@checkpoint-engine-0.sock", "ipc://\0abstract", "tcp://h:1"]
)
def test_a_handle_is_a_file_that_nobody_else_can_take(handle: str, server: ParameterServer) -> None:
    with pytest.raises(errors.HandoverError):
        update_weights_from_ipc(None, handle, "cpu", run=print)
    register(server, "step-1", 1)
    path = Path(server.get_metas()[0]["address"].removeprefix("ipc://"))
    assert path.is_socket()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)


# "75 `assert` lines guard run-time conditions."


def test_bad_input_is_refused_alike_without_asserts(own_records: Path) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, *options, str(HERE / "ps_bad_inputs.py")],
            env={**os.environ, **python_path()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for options in ([], ["-O"])
    ]
    with_asserts, without = [json.loads(one.communicate(timeout=60)[0]) for one in processes]
    assert (with_asserts.pop("asserts"), without.pop("asserts")) == ("on", "off")
    assert with_asserts == without
    own = {name for name in errors.__all__ if name != "CheckpointEngineError"}
    for case, message in without.items():
        kind, _, text = message.partition(": ")
        assert kind in own | {"Stop"}, f"{case}: {message}"
        assert len(text) > 10, f"{case}: {message}"
