"""What attackers have: another user's process, raw bytes, and a look at what they have changed."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
from core_tools import TIMEOUT_SECONDS
from e2e_server import Server

from checkpoint_engine.transport import sockets

TOKEN = "sécret"
STRANGER_UID = 65534

STRANGER = """
import os, socket, sys
role, path, uid = sys.argv[1], sys.argv[2], int(sys.argv[3])
if os.getuid() == 0:
    os.setgid(uid)
    os.setuid(uid)
end = socket.socket(socket.AF_UNIX)
try:
    if role == "listen":
        end.bind(path)
        end.listen()
        os.chmod(path, 0o777)
    elif role == "squat":
        os.mkdir(path, 0o700)
    else:
        end.connect(path)
    if role == "greet":
        try:
            end.sendall(bytes.fromhex(sys.argv[4]))
            print(end.recv(100) or "nothing", flush=True)
        except ConnectionError:
            print("nothing", flush=True)
    else:
        print(os.getuid(), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def stranger(role: str, path: Path, greeting: bytes = b"") -> Iterator[str]:
    """Another user's process: it will "listen" at a path, "connect", "greet", or "squat" the name.

    Gives its uid (of "greet", what it was answered), or the name of the error that it met. Only
    root can start another user's process; elsewhere it is this user's, and tests make this
    process say that it is another's.
    """
    with subprocess.Popen(
        [sys.executable, "-c", STRANGER, role, str(path), str(STRANGER_UID), greeting.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.stdin.close()
        assert process.wait(TIMEOUT_SECONDS) == 0


def framed(content: bytes) -> bytes:
    """As it goes through a Unix socket: four bytes of length before it."""
    return struct.pack("<I", len(content)) + content


def envelope(
    body: Any, *, update: Any = "", epoch: Any = 0, sequence: Any = 0, raw: bytes | None = None
) -> bytes:
    """A frame as a channel sends it, or as it should not."""
    encoded = raw if raw is not None else msgspec.msgpack.encode(body)
    return framed(msgspec.msgpack.encode((update, epoch, sequence, msgspec.Raw(encoded))))


def knock(address: str) -> socket.socket:
    """A bare connection to a handle."""
    connection = sockets.connect(address, TIMEOUT_SECONDS)
    connection.settimeout(TIMEOUT_SECONDS)
    return connection


def everything_said(connection: socket.socket) -> bytes:
    """What the other side says until it hangs up, however it does that."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while data := connection.recv(1 << 16):
            said += data
    return said


def dial(server: Server) -> socket.socket:
    """A bare connection to a replica."""
    url = httpx.URL(server.endpoint)
    return socket.create_connection((url.host, url.port), TIMEOUT_SECONDS)


@contextlib.contextmanager
def nothing_changes(server: Server) -> Iterator[None]:
    """Label, digests, history, state and what a replica says are as before."""
    before = server.info(), says(server)
    assert before[0]["state"] == "serving"
    yield
    assert (server.info(), says(server)) == before


def says(server: Server) -> Any:
    (choice,) = server.complete(prompt="hello", max_tokens=4, temperature=0).json()["choices"]
    return choice


def not_the_strangers_uid(patch: Any) -> None:
    """Where this process is not root, the stranger is its own user: say that it is another."""
    if os.getuid() != 0:
        patch.setattr(os, "getuid", lambda: STRANGER_UID + 1)
