"""How the ranks of one server find the keys that rank 0 keeps.

Rank 0 listens at one address of its host: at a given port or, under torchrun, at any, and tells
where through the launcher's store. That store is not trusted: whoever answers must know the ranks'
secret.

    meeting = Meeting.of_environment(master_addr=None, master_port=None)
    keeper = meeting.keep()         # rank 0
    store = meeting.reach()         # every rank
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, PeerLost, UsageError
from checkpoint_engine.transport.address import (
    LOOPBACK,
    address_towards,
    is_loopback,
    is_of_this_host,
    own_address,
)
from checkpoint_engine.transport.keystore import KeyClient, KeyServer
from checkpoint_engine.transport.secret import configured_secret, credentials, found_secret, leave
from checkpoint_engine.transport.sockets import socket_dir

__all__ = ["Keeper", "Meeting", "number_of"]

CONNECT_SECONDS = 300.0
HANG_UP_SECONDS = 5.0  # of a rank 0 that starts, or of one before it that has left its traces
ATTEMPT_SECONDS = 5.0
RETRY_SECONDS = 0.05


class Keeper:
    """Rank 0's: the key store, and the secret that ranks of this host find.

    Args:
        address: of this host, where it listens.
        port: there; 0 for any.
        secret: of the ranks; default the configured one, else one that is made up.

    Raises:
        UsageError: it cannot listen there.
    """

    def __init__(self, address: str, port: int, secret: bytes | None = None) -> None:
        configured = secret or configured_secret()
        secret = configured or secrets.token_hex(32).encode()
        self._server = KeyServer(address, port, credentials(secret))
        self.address = self._server.address
        self._left: Path | None = None
        if configured is None:
            try:
                self._left = leave(secret, self._server.port)
            except BaseException:
                self._server.close()
                raise

    def close(self) -> None:
        """End it, and forget the secret."""
        self._server.close()
        if self._left is not None:
            self._left.unlink(missing_ok=True)


class Meeting:
    """Where the ranks meet.

    Args:
        host: where rank 0 is.
        port: of the key store there; with `by_launcher`, of the launcher's store.
        by_launcher: rank 0 tells where it listens through the launcher's store.
        secret: of the ranks, where they were told it; default what is configured, or found.
    """

    def __init__(
        self, host: str, port: int, *, by_launcher: bool, secret: bytes | None = None
    ) -> None:
        self._host, self._port, self._secret = host, port, secret
        self._is_one_host = is_loopback(address_towards(host))
        self.address = LOOPBACK if self._is_one_host else own_address(host)
        self._launcher = _Launcher(host, port) if by_launcher else None

    @classmethod
    def of_environment(cls, master_addr: str | None, master_port: int | None) -> Meeting:
        """Arguments first, then the launcher's variables.

        Raises:
            UsageError: nothing says where rank 0 is, or nothing leads there.
        """
        host = master_addr or os.environ.get("MASTER_ADDR")
        if host is None or (master_port is None and "MASTER_PORT" not in os.environ):
            raise UsageError(
                "several ranks need MASTER_ADDR and MASTER_PORT: start them with torchrun, "
                "or pass master_addr and master_port"
            )
        by_launcher = (
            os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and master_port is None
        )
        # Beside torchrun the port after MASTER_PORT is free: MASTER_PORT itself is for the
        # trainer's own process group.
        port = master_port or number_of("MASTER_PORT", 0) + (0 if by_launcher else 1)
        return cls(host, port, by_launcher=by_launcher)

    def keep(self) -> Keeper:
        """Listen, and tell the others where; for rank 0, which closes what it gets."""
        if self._launcher is None:
            return Keeper(self.address, self._port, self._secret)
        keeper = Keeper(self.address, 0, self._secret)
        try:
            self._launcher.tell(keeper.address)
        except BaseException:
            keeper.close()
            raise
        return keeper

    def reach(self, timeout_seconds: float | None = None) -> KeyClient:
        """A connection to the keys, once rank 0 keeps them.

        Args:
            timeout_seconds: to wait for that; default five minutes.

        Raises:
            UsageError: this host was not given the secret, or was given another than rank 0.
            DeadlineExceeded: rank 0 cannot be reached.
        """
        patience = CONNECT_SECONDS if timeout_seconds is None else timeout_seconds
        deadline = time.monotonic() + patience
        silent_at = time.monotonic()  # the last time that nobody was there to hang up
        while True:
            try:
                return self._try_to_reach()
            except (_NotYetError, DeadlineExceeded) as error:
                failure: Exception = error
                silent_at = time.monotonic()
            except PeerLost as error:
                failure = error
                if time.monotonic() > silent_at + HANG_UP_SECONDS:
                    raise UsageError(
                        f"{error}: every rank needs the same CKPT_ENGINE_SECRET"
                    ) from error
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"cannot reach rank 0 at {self._host}:{self._port}: {failure}; check "
                    "MASTER_ADDR, MASTER_PORT and that rank 0 is up"
                ) from failure
            time.sleep(RETRY_SECONDS)

    def _try_to_reach(self) -> KeyClient:
        """Look for everything anew: what is there may be of a rank 0 that has died."""
        address = self._address_of_keeper()
        host, _, port = address.rpartition(":")
        secret = self._secret or configured_secret() or found_secret(int(port))
        if secret is None and not is_of_this_host(host):
            raise UsageError(
                f"rank 0 is on another host, {host}: several hosts need CKPT_ENGINE_SECRET, the "
                "same on each"
            )
        if secret is None:
            raise _NotYetError(
                f"there is no secret for port {port} in {socket_dir()}, and CKPT_ENGINE_SECRET is "
                "not set"
            )
        _check_that_somebody_listens(host, int(port))
        store = KeyClient(address, credentials(secret))
        try:
            store.add("met", 1)
        except CheckpointEngineError:
            store.close()
            raise
        return store

    def _address_of_keeper(self) -> str:
        if self._launcher is not None:
            return self._launcher.told()
        return f"{LOOPBACK if self._is_one_host else self._host}:{self._port}"


class _NotYetError(Exception):
    """Rank 0 may still be starting."""


def _check_that_somebody_listens(host: str, port: int) -> None:
    try:
        socket.create_connection((host, port), ATTEMPT_SECONDS).close()
    except OSError as error:
        raise _NotYetError(error.strerror or str(error)) from error


class _Launcher:
    """The store of torchrun's agent, in which rank 0 leaves its address."""

    def __init__(self, host: str, port: int) -> None:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._key = f"ckpt-engine/{restart}/address"
        timeout = timedelta(seconds=CONNECT_SECONDS)
        try:
            self._store = TCPStore(
                host, port, is_master=False, timeout=timeout, wait_for_workers=False
            )
        except RuntimeError as error:
            raise _launcher_lost(error) from error

    def tell(self, address: str) -> None:
        try:
            self._store.set(self._key, address)
        except RuntimeError as error:
            raise _launcher_lost(error) from error

    def told(self) -> str:
        try:
            if not self._store.check([self._key]):
                raise _NotYetError("rank 0 has not told the launcher where it listens")
            return str(self._store.get(self._key).decode())
        except RuntimeError as error:
            raise _launcher_lost(error) from error


def _launcher_lost(error: RuntimeError) -> DeadlineExceeded:
    return DeadlineExceeded(
        f"cannot reach the launcher's store: {str(error).splitlines()[0]}; check MASTER_ADDR, "
        "MASTER_PORT and that torchrun is up"
    )


def number_of(variable: str, default: int) -> int:
    """A number in the environment.

    Raises:
        UsageError: it is none.
    """
    value = os.environ.get(variable, str(default))
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"{variable}={value!r} is not a number")
    return int(value)
