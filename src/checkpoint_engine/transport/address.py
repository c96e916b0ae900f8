"""At which address of this host the other hosts of a server reach it.

server.bind(f"tcp://{own_address()}:4711")
"""

from __future__ import annotations

import os
import socket

from checkpoint_engine.errors import UsageError

__all__ = ["LOOPBACK", "address_towards", "is_loopback", "is_of_this_host", "own_address"]

LOOPBACK = "127.0.0.1"
ANY_PORT = 9  # nothing is sent there


def own_address(master: str | None = None) -> str:
    """An IPv4 address: `$CKPT_ENGINE_ADDRESS`, else the one from which `master` is reached.

    Args:
        master: where rank 0 is; default `$MASTER_ADDR`, else loopback.

    Raises:
        UsageError: nothing leads to `master`.
    """
    if configured := os.environ.get("CKPT_ENGINE_ADDRESS"):
        return configured
    return address_towards(master or os.environ.get("MASTER_ADDR") or LOOPBACK)


def address_towards(host: str) -> str:
    """The address of this host from which another is reached; loopback from loopback.

    Raises:
        UsageError: nothing leads there.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, ANY_PORT))
        except OSError as error:
            raise UsageError(
                f"no address of this host leads to MASTER_ADDR={host!r}: {error.strerror}; check "
                "it, or set CKPT_ENGINE_ADDRESS"
            ) from error
        return str(probe.getsockname()[0])


def is_loopback(address: str) -> bool:
    """Whether only this host reaches it."""
    return address.startswith("127.")


def is_of_this_host(host: str) -> bool:
    """Whether a name or address is one of this host's own."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError:
            return False
    return True
