"""Unix sockets that no other user of the host can take over.

They live in one folder that is this user's own (0700, owner and symlinks checked), under a short
path, since a socket's address holds 107 bytes. Both ends check the peer's uid as the kernel
reports it; never its pid, which is 0 across namespaces. Never an abstract socket: anyone can
bind its name.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import socket
import stat
import struct
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

from checkpoint_engine.errors import HandoverError

__all__ = [
    "SCHEME",
    "check_peer",
    "connect",
    "listen",
    "own_host",
    "peer_name",
    "private_folder",
    "socket_dir",
]

SCHEME = "ipc://"
MAX_PATH_BYTES = 100
BACKLOG = 64
RETRY_SECONDS = 0.01


def socket_dir() -> Path:
    """The folder of this user's sockets, made on first use.

    `$CKPT_ENGINE_SOCKET_DIR`, else `$XDG_RUNTIME_DIR/ckpt-engine`, else `ckpt-engine-<uid>` in
    the system's temporary folder.

    Raises:
        HandoverError: it is a symlink, another user's, open to others, or its path is too long.
    """
    if configured := os.environ.get("CKPT_ENGINE_SOCKET_DIR"):
        folder = Path(configured).absolute()
    elif (runtime := os.environ.get("XDG_RUNTIME_DIR")) and Path(runtime).is_dir():
        folder = Path(runtime) / "ckpt-engine"
    else:
        folder = Path(tempfile.gettempdir()) / f"ckpt-engine-{os.getuid()}"
    private_folder(folder, "CKPT_ENGINE_SOCKET_DIR")
    if len(os.fsencode(folder)) + len("/0123456789abcdef") > MAX_PATH_BYTES:
        raise HandoverError(f"{folder}: the path is too long; set CKPT_ENGINE_SOCKET_DIR")
    return folder


def private_folder(folder: Path, variable: str) -> None:
    """Make a folder that is this user's alone, unless it is there.

    Args:
        folder: its path.
        variable: of the environment, where users choose another.

    Raises:
        HandoverError: it is a symlink, another user's, or open to others.
    """
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700, parents=True)
        status = folder.lstat()
    except OSError as error:
        raise HandoverError(
            f"{folder}: cannot be made: {error.strerror}; set {variable}"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise HandoverError(f"{folder}: is a symlink or no folder; set {variable}")
    if status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise HandoverError(
            f"{folder}: belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}; "
            f"it must be your own with mode 700, or set {variable}"
        )


def own_host() -> str:
    """Equal for processes that can reach each other's sockets, and so hand over descriptors.

    `$CKPT_ENGINE_HOST`, else of this boot of the kernel and of the folder of sockets.
    """
    if configured := os.environ.get("CKPT_ENGINE_HOST"):
        return configured
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    folder = socket_dir().stat()
    return f"{boot}-{folder.st_dev}-{folder.st_ino}"


def listen() -> tuple[socket.socket, str]:
    """A listening socket under a fresh name, and its address (`ipc://...`).

    The caller owns the socket and unlinks the path when done. What processes that were killed have
    left in the folder goes.
    """
    folder = socket_dir()
    # Other hosts may share the folder, and only this one can tell which of its sockets are dead.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text()[:6]
    _sweep(folder.glob(f"{boot}*"))
    path = folder / f"{boot}{secrets.token_hex(5)}"
    coming = path.with_name(f".{path.name}")  # until it listens it looks dead
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        listener.bind(str(coming))
        coming.chmod(0o600)
        listener.listen(BACKLOG)
        coming.rename(path)
    except OSError as error:
        listener.close()
        raise HandoverError(f"{path}: cannot listen: {error}") from error
    return listener, f"{SCHEME}{path}"


def connect(address: str, timeout_seconds: float) -> socket.socket:
    """Connect to an address that `listen` gave, in a process of a user that is allowed.

    Raises:
        HandoverError: nobody listens there, or somebody else's process does.
    """
    if address.startswith(f"{SCHEME}@"):
        raise HandoverError(
            f"{address!r} is an abstract socket, whose name anyone can take; MoonshotAI's "
            "checkpoint-engine gives such: use this package on both sides"
        )
    if not address.startswith(f"{SCHEME}/"):
        raise HandoverError(f"{address!r} is not an address of a socket on this host")
    path = address.removeprefix(SCHEME)
    deadline = time.monotonic() + timeout_seconds
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.setblocking(False)
    try:
        while True:
            try:
                connection.connect(path)
                break
            except BlockingIOError:  # its queue is full: a busy listener is not dead
                if time.monotonic() > deadline:
                    raise
            time.sleep(RETRY_SECONDS)
        check_peer(connection)
    except HandoverError:
        connection.close()
        raise
    except (OSError, ValueError) as error:
        connection.close()
        raise HandoverError(f"{path!r}: cannot connect: {error}; is its process alive?") from error
    return connection


def check_peer(connection: socket.socket) -> None:
    """Refuse a peer that runs as another user than this one, root, or an allowed one.

    Raises:
        HandoverError: its uid is not among those.
    """
    _, uid = _credentials(connection)
    if uid not in {os.getuid(), 0, *_allowed_uids()}:
        raise HandoverError(
            f"the peer runs as uid {uid}; allowed are {os.getuid()}, 0 and CKPT_ENGINE_ALLOW_UIDS"
        )


def peer_name(connection: socket.socket) -> str:
    """What to call the process at the other end, for messages only."""
    pid, _ = _credentials(connection)
    return f"process {pid}" if pid else "a process of another pid namespace"


def _credentials(connection: socket.socket) -> tuple[int, int]:
    """The peer's pid and uid."""
    credentials = connection.getsockopt(
        socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")
    )
    pid, uid, _ = struct.unpack("3i", credentials)
    return pid, uid


def _sweep(paths: Iterable[Path]) -> None:
    """Unlink the sockets that nobody listens at any more: a process that is killed leaves its."""
    for path in paths:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a busy listener is not dead
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                continue


def _allowed_uids() -> set[int]:
    configured = os.environ.get("CKPT_ENGINE_ALLOW_UIDS", "")
    try:
        return {int(uid) for uid in configured.split(",") if uid.strip()}
    except ValueError:
        raise HandoverError(
            f"CKPT_ENGINE_ALLOW_UIDS={configured!r} is not a list of numbers such as 1000,1001"
        ) from None
