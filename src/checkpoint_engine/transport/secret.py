"""The secret that the ranks of one server share, and the keys that they derive from it.

Whoever knows the secret is a rank: both CURVE key pairs, the key store's and its clients', follow
from it. Several hosts are given it in their environment. On one host rank 0 makes one up and
leaves it where only processes of the same user can read it.

    leave(secret, port)                       # rank 0, unless configured_secret() gives one
    credentials(found_secret(port))           # the other ranks
"""

from __future__ import annotations

import functools
import hashlib
import os
import secrets
from pathlib import Path
from typing import NamedTuple

import zmq
from zmq.utils import z85

from checkpoint_engine.errors import UsageError
from checkpoint_engine.transport.sockets import socket_dir

__all__ = ["Credentials", "KeyPair", "configured_secret", "credentials", "found_secret", "leave"]

LEAST_BYTES = 16
SALT = b"ckpt-engine key store 1"
COST = 1 << 14  # of each guess, for whoever recorded a handshake: 0.05 s and 16 MB


class KeyPair(NamedTuple):
    """Of CURVE, as ZeroMQ writes keys."""

    public: bytes
    private: bytes


class Credentials(NamedTuple):
    """What a key store shows its clients, and what they show it."""

    server: KeyPair
    client: KeyPair


@functools.lru_cache(maxsize=8)
def credentials(secret: bytes) -> Credentials:
    """The key pairs that follow from a secret, the same in every process."""
    derived = hashlib.scrypt(secret, salt=SALT, n=COST, r=8, p=1, dklen=64)
    return Credentials(_key_pair(derived[:32]), _key_pair(derived[32:]))


def _key_pair(private: bytes) -> KeyPair:
    encoded = z85.encode(private)
    return KeyPair(zmq.curve_public(encoded), encoded)


def configured_secret() -> bytes | None:
    """`$CKPT_ENGINE_SECRET`, else what the file `$CKPT_ENGINE_SECRET_FILE` holds, if either is set.

    Raises:
        UsageError: it is too short to be secret, or the file cannot be read.
    """
    found, name = os.environ.get("CKPT_ENGINE_SECRET", "").encode(), "CKPT_ENGINE_SECRET"
    if not found and (file := os.environ.get("CKPT_ENGINE_SECRET_FILE")):
        name = f"CKPT_ENGINE_SECRET_FILE={file!r}"
        try:
            found = Path(file).read_bytes().strip()
        except OSError as error:
            raise UsageError(f"{name}: {error.strerror}") from error
    elif not found:
        return None
    if len(found) < LEAST_BYTES:
        raise UsageError(
            f"{name}: a secret has {LEAST_BYTES} characters or more; `openssl rand -hex 32` "
            "makes a good one"
        )
    return found


def leave(secret: bytes, port: int) -> Path:
    """Put a secret where ranks of the same user and host find it; the caller unlinks it."""
    path = _path(port)
    coming = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    descriptor = os.open(coming, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(secret)
    return coming.rename(path)


def found_secret(port: int) -> bytes | None:
    """What rank 0 has left on this host for this port, if anything."""
    try:
        return _path(port).read_bytes()
    except FileNotFoundError:
        return None


def _path(port: int) -> Path:
    return socket_dir() / f"secret-{port}"
