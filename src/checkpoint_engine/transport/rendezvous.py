"""How the ranks of one parameter server find and tell each other things.

Everything is bytes under keys of a torch Store: in memory for one rank, over TCP for several.
Nothing here is a process group, so it goes on working while a broken group is rebuilt. Under
torchrun the launcher's own store is used and no port is opened at all.

    rendezvous = Rendezvous.of_environment(rank=None, world_size=None)
    everyone = rendezvous.gather("metas", b"...", timeout_seconds=60)
    rendezvous.log("decisions").append(b"...")
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TypeVar

from torch.distributed import HashStore, PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from checkpoint_engine.errors import DeadlineExceeded, PeerLost, UsageError

__all__ = ["Log", "Rendezvous"]

PIECE_BYTES = 4 << 20  # torch's TCP store refuses values over 8 MiB
CONNECT_SECONDS = 300.0

Result = TypeVar("Result")


class Rendezvous:
    """The shared keys of `world_size` ranks.

    One thread uses it at a time, since a wait blocks the connection; `fork` gives another its own.
    Connections that are given back are used again: torch's store may take seconds to accept one.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        world_size: int,
        *,
        prefix: str = "",
        keys: list[str] | None = None,
        idle: list[Store] | None = None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.store = store
        self._prefix = prefix
        self._rounds: dict[str, int] = {}
        self._keys: list[str] = [] if keys is None else keys
        self._idle: list[Store] = [] if idle is None else idle
        self._broken = False

    @classmethod
    def of_environment(
        cls,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> Rendezvous:
        """Meet the other ranks: arguments first, then torchrun's variables, else a single rank.

        Raises:
            UsageError: rank and world size contradict, or nothing says where rank 0 is.
            DeadlineExceeded: rank 0 cannot be reached.
        """
        rank = _number("RANK", 0) if rank is None else rank
        world_size = _number("WORLD_SIZE", 1) if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of world size {world_size}")
        if world_size == 1:
            return cls(HashStore(), 0, 1)
        host = master_addr or os.environ.get("MASTER_ADDR")
        base_port = os.environ.get("MASTER_PORT")
        if host is None or (master_port is None and base_port is None):
            raise UsageError(
                f"{world_size} ranks need MASTER_ADDR and MASTER_PORT: start them with torchrun, "
                "or pass master_addr and master_port"
            )
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and master_port is None
        # Beside torchrun the port after MASTER_PORT is free: MASTER_PORT itself is for the
        # trainer's own process group.
        port = master_port or _number("MASTER_PORT", 0) + (0 if agent else 1)
        store = _connect(host, port, is_master=rank == 0 and not agent)
        return cls(PrefixStore("ckpt-engine", store), rank, world_size)

    def fork(self) -> Rendezvous:
        """The same keys over a connection of its own, for another thread."""
        return self._child(self._connection(), self._prefix, self._keys)

    def give_back(self) -> None:
        """End this fork; the next one uses its connection, unless that has failed."""
        if not self._broken:
            self._idle.append(self.store)

    def scope(self, name: str) -> Rendezvous:
        """Keys of their own under `name`, over the same connection."""
        self._refresh()
        return self._child(self.store, f"{self._prefix}{name}/", [])

    def subset(self, ranks: Sequence[int]) -> Rendezvous:
        """The keys that these ranks alone share; they are numbered anew, in this order."""
        prefix = f"{self._prefix}ranks {','.join(map(str, ranks))}/"
        return Rendezvous(
            self._connection(), ranks.index(self.rank), len(ranks), prefix=prefix, idle=self._idle
        )

    def group_store(self, name: str) -> Store:
        """A torch store under `name` for a process group, which keeps its connection."""
        return PrefixStore(f"{self._prefix}{name}", self._connection())

    def put(self, key: str, value: bytes) -> None:
        """Set a key of any size, once."""
        pieces = [value[i : i + PIECE_BYTES] for i in range(0, len(value), PIECE_BYTES)] or [b""]
        for number, piece in enumerate(pieces):
            self._set(f"{key}/{number}", piece)
        self._set(key, str(len(pieces)).encode())

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """Wait for a key.

        Raises:
            DeadlineExceeded: nobody set it in time.
            PeerLost: the rank that keeps the keys is gone.
        """
        self._wait(key, timeout_seconds)
        num_pieces = int(self._call(key, self.store.get))
        return b"".join(self._call(f"{key}/{n}", self.store.get) for n in range(num_pieces))

    def gather(self, key: str, value: bytes, timeout_seconds: float) -> list[bytes]:
        """Every rank's value, in the order of ranks; all ranks call it equally often."""
        deadline = time.monotonic() + timeout_seconds
        self._refresh()
        number = self.offer(key, value)
        return [
            self.get(f"{key}/{number}/{rank}", deadline - time.monotonic())
            for rank in range(self.world_size)
        ]

    def offer(self, key: str, value: bytes) -> int:
        """This rank's part of a `gather` without waiting for the others; returns its round.

        Whoever begins a round has ended the one before, and with it everybody the one before
        that, so that one's value is deleted.
        """
        number = self._rounds[key] = self._rounds.get(key, 0) + 1
        self.put(f"{key}/{number}/{self.rank}", value)
        if number > 2:
            self._delete(f"{key}/{number - 2}/{self.rank}")
        return number

    def barrier(self, key: str, timeout_seconds: float) -> None:
        """Wait until every rank is here; fresh keys each time, so that it can be repeated."""
        self.gather(f"barrier/{key}", b"", timeout_seconds)

    def log(self, name: str) -> Log:
        """A log that every rank may append to and read from its beginning."""
        return Log(self, name)

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value."""
        self._keys.append(key)
        return int(self._call(key, lambda key: self.store.add(key, amount)))

    def clear(self) -> None:
        """Delete every key that this object and its forks set. Nobody may need them any more."""
        self._refresh()
        while self._keys:
            self._call(self._keys.pop(), self.store.delete_key)

    def _child(self, store: Store, prefix: str, keys: list[str]) -> Rendezvous:
        return Rendezvous(
            store, self.rank, self.world_size, prefix=prefix, keys=keys, idle=self._idle
        )

    def _refresh(self) -> None:
        """Connect again if the connection broke, as it does when the link was down for long."""
        if not _works(self.store):
            self.store = self._connection()

    def _connection(self) -> Store:
        while self._idle:
            store = self._idle.pop()
            if _works(store):
                return store
        try:
            clone: Store = self.store.clone()  # type: ignore[attr-defined]
        except RuntimeError as error:
            raise PeerLost(f"the rank that keeps the shared keys is gone: {error}") from error
        return clone

    def _delete(self, key: str) -> None:
        for number in range(int(self._call(key, self.store.get))):
            self._call(f"{key}/{number}", self.store.delete_key)
        self._call(key, self.store.delete_key)
        self._keys[:] = [kept for kept in self._keys if not kept.startswith(key)]

    def _wait(self, key: str, timeout_seconds: float) -> None:
        timeout = timedelta(seconds=max(0.001, timeout_seconds))
        try:
            self.store.wait([self._prefix + key], timeout)
        except RuntimeError as error:  # DistStoreError is one, in every torch version
            if "timeout" in str(error).lower() or "timed out" in str(error).lower():
                raise DeadlineExceeded(f"no rank set {key!r} in {timeout_seconds:.1f} s") from error
            self._broken = True
            raise PeerLost(f"the rank that keeps the shared keys is gone: {error}") from error

    def _set(self, key: str, value: bytes) -> None:
        self._keys.append(key)
        self._call(key, lambda key: self.store.set(key, value))  # type: ignore[arg-type]

    def _call(self, key: str, operation: Callable[[str], Result]) -> Result:
        try:
            return operation(self._prefix + key)
        except RuntimeError as error:
            self._broken = True
            raise PeerLost(f"the rank that keeps the shared keys is gone: {error}") from error


class Log:
    """Appended to by any rank, read by any rank in one order. One reader or writer a thread."""

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self._rendezvous, self._name = rendezvous, name
        self._num_read = 0

    def append(self, entry: bytes) -> None:
        """Add an entry at the end."""
        number = self._rendezvous.add(f"{self._name}/length", 1)
        self._rendezvous.put(f"{self._name}/{number}", entry)

    def next(self, timeout_seconds: float) -> bytes:
        """Wait for the next entry that this reader has not seen.

        Raises:
            DeadlineExceeded: none came in time.
        """
        entry = self._rendezvous.get(f"{self._name}/{self._num_read + 1}", timeout_seconds)
        self._num_read += 1
        return entry


def _works(store: Store) -> bool:
    try:
        store.check(["any"])
    except RuntimeError:
        return False
    return True


def _connect(host: str, port: int, *, is_master: bool) -> Store:
    try:
        return TCPStore(
            host, port, is_master=is_master, timeout=timedelta(seconds=CONNECT_SECONDS),
            wait_for_workers=False,
        )  # fmt: skip
    except RuntimeError as error:
        action = "cannot listen on" if is_master else "cannot reach rank 0 at"
        raise DeadlineExceeded(
            f"{action} {host}:{port}: {str(error).splitlines()[0]}; check MASTER_ADDR, "
            "MASTER_PORT and that rank 0 is up"
        ) from error


def _number(variable: str, default: int) -> int:
    value = os.environ.get(variable, str(default))
    if not (value.isascii() and value.isdigit()):
        raise UsageError(f"{variable}={value!r} is not a number")
    return int(value)
