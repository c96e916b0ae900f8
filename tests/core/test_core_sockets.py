"""Sockets that no other user of the host can take over."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from core_tools import TIMEOUT_SECONDS, Background, num_fds

from checkpoint_engine.errors import HandoverError
from checkpoint_engine.transport.sockets import check_peer, connect, listen, socket_dir

pytestmark = pytest.mark.usefixtures("no_garbage")

STRANGER_UID = 65534


# The folder


def test_the_folder_is_made_for_this_user_alone(socket_folder: Path) -> None:
    before = os.umask(0)
    try:
        assert socket_dir() == socket_folder
    finally:
        os.umask(before)
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    assert socket_dir() == socket_folder, "again"


def test_its_usual_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_ENGINE_SOCKET_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "none"))
    assert socket_dir() == tmp_path / f"ckpt-engine-{os.getuid()}"
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert socket_dir() == tmp_path / "ckpt-engine"


@pytest.mark.parametrize("name", ["file/folder", "/proc/none/folder"])
def test_a_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(tmp_path / name))
    with pytest.raises(HandoverError, match="set CKPT_ENGINE_SOCKET_DIR"):
        socket_dir()


def test_a_path_that_no_address_holds_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 bytes for the folder, a slash, and 16 characters; ä has two bytes."""
    room = 100 - 17 - len(os.fsencode(tmp_path)) - 1
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(tmp_path / ("s" * room)))
    listener, address = listen()
    listener.close()
    assert len(os.fsencode(address.removeprefix("ipc://"))) == 100
    for name in ("s" * (room + 1), "ä" * (room // 2 + 1)):
        monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(tmp_path / name))
        with pytest.raises(HandoverError, match="the path is too long"):
            listen()


def test_a_relative_folder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The address is used by processes that were started elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", "sockets")
    with contextlib.closing(listen()[0]) as listener:
        assert listener.getsockname() == str(socket_dir() / Path(listener.getsockname()).name)
        assert Path(listener.getsockname()).is_absolute()


# Connections


@pytest.fixture
def listener(socket_folder: Path) -> Iterator[tuple[socket.socket, str]]:
    listener, address = listen()
    listener.settimeout(TIMEOUT_SECONDS)
    yield listener, address
    listener.close()


def test_what_is_said_at_one_end_is_heard_at_the_other(
    listener: tuple[socket.socket, str], socket_folder: Path
) -> None:
    server, address = listener
    path = Path(address.removeprefix("ipc://"))
    assert path.parent == socket_folder
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with connect(address, 5) as one, server.accept()[0] as other:
        check_peer(other)
        one.sendall(b"hello")
        assert other.recv(10) == b"hello"


def test_every_listener_has_a_path_of_its_own(listener: tuple[socket.socket, str]) -> None:
    other, address = listen()
    other.close()
    assert address != listener[1]


@pytest.mark.parametrize(
    "address",
    ["", "ipc://", "ipc://relative", "tcp://127.0.0.1:80", "ipc://\0abstract"],
)
def test_what_is_no_address_of_this_host(address: str) -> None:
    with pytest.raises(HandoverError, match="is not an address of a socket on this host"):
        connect(address, 1)


def test_an_address_of_another_package_is_named() -> None:
    with pytest.raises(HandoverError, match="MoonshotAI"):
        connect("ipc://@checkpoint-engine-0.sock", 1)


@pytest.mark.parametrize("name", ["nobody", "a\0b", "\ud800", "n" * 200])
def test_nobody_listens(socket_folder: Path, name: str) -> None:
    fds = num_fds()
    with pytest.raises(HandoverError, match="cannot connect"):
        connect(f"ipc://{socket_folder}/{name}", 1)
    assert num_fds() == fds


def test_a_listener_that_is_gone(listener: tuple[socket.socket, str]) -> None:
    server, address = listener
    server.close()
    fds = num_fds()
    with pytest.raises(HandoverError, match=r"cannot connect: .*refused; is its process alive"):
        connect(address, 1)
    assert num_fds() == fds


@contextlib.contextmanager
def crowd(server: socket.socket, address: str) -> Iterator[None]:
    """So many connect that the listener's queue is full."""
    server.listen(0)
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            one = stack.enter_context(socket.socket(socket.AF_UNIX))
            one.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                one.connect(address.removeprefix("ipc://"))
        yield


def test_a_crowd_waits_for_its_turn(listener: tuple[socket.socket, str]) -> None:
    """A listener that is busy is not dead."""
    server, address = listener
    with crowd(server, address):
        last = Background(lambda: connect(address, TIMEOUT_SECONDS))
        assert not last.is_done(within_seconds=0.1)
        while not last.is_done(within_seconds=0.01):
            server.accept()[0].close()
        connection = last.result()
        assert isinstance(connection, socket.socket)
        connection.close()


def test_a_queue_that_stays_full_ends_with_the_deadline(
    listener: tuple[socket.socket, str],
) -> None:
    server, address = listener
    with crowd(server, address):
        fds = num_fds()
        with pytest.raises(HandoverError, match="cannot connect"):
            connect(address, 0.1)
        assert num_fds() == fds


def test_the_socket_of_a_process_that_was_killed_goes_and_that_of_a_busy_one_stays(
    listener: tuple[socket.socket, str], socket_folder: Path
) -> None:
    server, address = listener
    dead, dead_address = listen()
    dead.close()
    with crowd(server, address):
        other, other_address = listen()
        other.close()
    names = {name.removeprefix(f"ipc://{socket_folder}/") for name in (address, other_address)}
    assert set(os.listdir(socket_folder)) == names, dead_address


# Who is there


class Peer:
    """A connection whose other end the kernel reports as this user's."""

    def __init__(self, uid: int) -> None:
        self._uid = uid

    def getsockopt(self, level: int, option: int, size: int) -> bytes:
        assert (level, option, size) == (socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return struct.pack("3i", 0, self._uid, 0)  # a pid of another namespace is 0


def is_allowed(uid: int) -> bool:
    try:
        check_peer(Peer(uid))  # type: ignore[arg-type]
    except HandoverError:
        return False
    return True


def test_oneself_and_root_are_allowed_and_whoever_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("CKPT_ENGINE_ALLOW_UIDS", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 1000)
    allowed = [is_allowed(uid) for uid in (0, 1000, 1001, 1002, -1)]
    assert allowed == [True, True, False, False, False]
    monkeypatch.setenv("CKPT_ENGINE_ALLOW_UIDS", "1001, 1003,")
    allowed = [is_allowed(uid) for uid in (0, 1000, 1001, 1002, 1003)]
    assert allowed == [True, True, True, False, True]


def test_a_list_of_uids_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CKPT_ENGINE_ALLOW_UIDS", "1001,alice")
    with pytest.raises(HandoverError, match="'1001,alice' is not a list of numbers"):
        check_peer(Peer(1001))  # type: ignore[arg-type]
