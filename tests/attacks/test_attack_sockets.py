"""Attacks on the socket folder by another user of the host: what is not one's own is not used."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from attack_tools import (
    STRANGER_UID,
    envelope,
    everything_said,
    knock,
    not_the_strangers_uid,
    stranger,
)
from core_tools import TIMEOUT_SECONDS, num_fds

from checkpoint_engine import ParameterServer
from checkpoint_engine.errors import HandoverError
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.sockets import check_peer, listen, socket_dir
from checkpoint_engine.update.protocol import Ready

pytestmark = pytest.mark.usefixtures("no_garbage")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may use, as no folder of ours is."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


# A folder that is not one's own


def refused(message: str) -> None:
    """Neither a folder is taken nor a server started, and no descriptor is left open."""
    fds = num_fds()
    for action in (socket_dir, listen, lambda: ParameterServer(rank=0, world_size=1)):
        with pytest.raises(HandoverError, match=message):
            action()
    assert num_fds() == fds


@pytest.mark.parametrize("mode", [0o701, 0o710, 0o750, 0o777])
def test_a_folder_open_to_others_is_refused(socket_folder: Path, mode: int) -> None:
    socket_folder.mkdir()
    socket_folder.chmod(mode)
    refused(f"{socket_folder}: .* mode {mode:o}; it must be .* set CKPT_ENGINE_SOCKET_DIR")
    assert stat.S_IMODE(socket_folder.stat().st_mode) == mode, "it is left as it was"
    assert list(socket_folder.iterdir()) == []


def test_a_symlink_is_refused(socket_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir(mode=0o700)
    socket_folder.symlink_to(tmp_path / "target")
    refused("is a symlink or no folder")
    assert list((tmp_path / "target").iterdir()) == []
    socket_folder.unlink()
    socket_folder.symlink_to(tmp_path / "dangling")
    refused("is a symlink or no folder")
    assert not (tmp_path / "dangling").exists()


def test_a_file_is_refused(socket_folder: Path) -> None:
    socket_folder.touch(mode=0o600)
    refused("is a symlink or no folder")
    assert socket_folder.read_bytes() == b""


def test_another_user_squats_the_name_of_the_default_folder(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_the_strangers_uid(monkeypatch)
    monkeypatch.delenv("CKPT_ENGINE_SOCKET_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(open_folder))
    squatted = open_folder / f"ckpt-engine-{os.getuid()}"
    with stranger("squat", squatted):
        owner = squatted.stat().st_uid
        refused(f"{squatted}: belongs to uid {owner} with mode 700; it must be your own")
        assert list(squatted.iterdir()) == []


def test_a_symlink_in_the_place_of_a_socket_is_not_followed(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names cannot be guessed; even so, nothing is made where somebody made them lead."""
    monkeypatch.setattr("secrets.token_hex", lambda _: "guessed")
    listener, address = listen()
    listener.close()
    path = Path(address.removeprefix("ipc://"))
    path.unlink()
    coming = path.with_name(f".{path.name}")  # where it is bound before it is shown
    coming.symlink_to(socket_folder / "elsewhere")
    with pytest.raises(HandoverError, match=r"cannot listen: .*in use"):
        listen()
    assert coming.is_symlink()
    assert not (socket_folder / "elsewhere").exists()


def test_every_handle_has_a_name_that_cannot_be_guessed(socket_folder: Path) -> None:
    names = set()
    for _ in range(8):
        listener, address = listen()
        listener.close()
        names.add(Path(address.removeprefix("ipc://")).name)
    assert len(names) == 8
    assert {len(name) for name in names} == {16}


# Another user's process at the other end


def test_another_user_does_not_reach_a_handle(
    server: ParameterServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder keeps it out; where somebody has opened that, the kernel still says who it is."""
    before = server.get_metas()
    path = Path(before[0]["address"].removeprefix("ipc://"))
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with stranger("connect", path) as said:
        assert said == ("PermissionError" if os.getuid() == 0 else str(os.getuid()))
    path.parent.chmod(0o711)
    path.chmod(0o666)
    vote = envelope(Ready(way_back="none"))
    with monkeypatch.context() as patch:
        not_the_strangers_uid(patch)
        with stranger("greet", path, vote) as said:
            assert said == "nothing", "it is hung up on"
    with knock(before[0]["address"]) as connection:
        connection.sendall(vote)
        assert everything_said(connection) != b"", "whom it trusts is answered"
    path.parent.chmod(0o700)
    assert server.get_metas() == before


def test_another_users_process_that_connects(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    not_the_strangers_uid(monkeypatch)
    path = open_folder / "s"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        path.chmod(0o777)
        server.listen()
        server.settimeout(TIMEOUT_SECONDS)
        with stranger("connect", path) as uid, server.accept()[0] as connection:
            with pytest.raises(HandoverError, match=f"the peer runs as uid {uid}; allowed are"):
                check_peer(connection)
            monkeypatch.setenv("CKPT_ENGINE_ALLOW_UIDS", uid)
            check_peer(connection)


@pytest.mark.parametrize("through", ["path", "symlink"])
def test_another_users_process_that_listens(
    open_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, through: str
) -> None:
    not_the_strangers_uid(monkeypatch)
    path = open_folder / "s"
    with stranger("listen", path) as uid:
        if through == "symlink":
            path = tmp_path / "link"
            path.symlink_to(open_folder / "s")
        fds = num_fds()
        with pytest.raises(HandoverError, match=f"the peer runs as uid {uid}"):
            sockets.connect(f"ipc://{path}", TIMEOUT_SECONDS)
        assert num_fds() == fds
        monkeypatch.setenv("CKPT_ENGINE_ALLOW_UIDS", uid)
        sockets.connect(f"ipc://{path}", TIMEOUT_SECONDS).close()


def test_a_handle_of_before_leads_to_nobody(server: ParameterServer) -> None:
    """Whoever closes takes its name away; nobody can be found there afterwards."""
    address = server.get_metas()[0]["address"]
    knock(address).close()
    server.close()
    assert not Path(address.removeprefix("ipc://")).exists()
    with pytest.raises(HandoverError, match="is its process alive"):
        sockets.connect(address, TIMEOUT_SECONDS)


def test_a_crowd_that_says_nothing_keeps_nobody_out(server: ParameterServer) -> None:
    address = server.get_metas()[0]["address"]
    with contextlib.ExitStack() as stack:
        for _ in range(200):
            stack.enter_context(knock(address))
        with knock(address) as connection:
            connection.sendall(b"\xff" * 4)
            assert everything_said(connection) == b"", "it is served, and turned away"


def test_root_is_who_strangers_are_compared_with() -> None:
    """The stranger of these tests is a real other user wherever they run as root, as in CI."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        with stranger("listen", Path(folder) / "s") as uid:
            assert uid == str(STRANGER_UID if os.getuid() == 0 else os.getuid())
