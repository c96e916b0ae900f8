"""How the ranks of one parameter server find and tell each other things.

Everything is bytes under keys: in memory for one rank, for several kept by rank 0
(`transport.keystore`). Nothing here is a process group, so it goes on working while a broken group
is rebuilt.

    rendezvous = Rendezvous.of_environment(rank=None, world_size=None)
    everyone = rendezvous.gather("metas", b"...", timeout_seconds=60)
    rendezvous.log("decisions").append(b"...")
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence

from checkpoint_engine.errors import DeadlineExceeded, PeerLost, UsageError
from checkpoint_engine.transport.address import LOOPBACK
from checkpoint_engine.transport.group_store import GroupStore
from checkpoint_engine.transport.keystore import KeyStore, LocalKeyStore
from checkpoint_engine.transport.meeting import Keeper, Meeting, number_of

__all__ = ["Log", "Rendezvous"]

LEAVE_SECONDS = 5.0


class Rendezvous:
    """The shared keys of `world_size` ranks.

    One thread uses it at a time, since a wait blocks the connection; `fork` gives another its own.

    Args:
        store: the keys.
        rank: this one.
        world_size: how many there are.
        address: of this host, for what the ranks open between them.
        prefix: of every key.
        keys: names of the keys that were set, to be cleared.
    """

    def __init__(
        self,
        store: KeyStore,
        rank: int,
        world_size: int,
        *,
        address: str = LOOPBACK,
        prefix: str = "",
        keys: set[str] | None = None,
    ) -> None:
        self.rank, self.world_size, self.address = rank, world_size, address
        self.store = store
        self._prefix = prefix
        self._rounds: dict[str, int] = {}
        self._keys: set[str] = set() if keys is None else keys
        self._keeper: Keeper | None = None

    @classmethod
    def of_environment(
        cls,
        rank: int | None = None,
        world_size: int | None = None,
        master_addr: str | None = None,
        master_port: int | None = None,
    ) -> Rendezvous:
        """Meet the other ranks: arguments first, then torchrun's variables, else a single rank.

        The caller closes what it gets.

        Raises:
            UsageError: rank and world size contradict, nothing says where rank 0 is, or this rank
                does not know the secret.
            DeadlineExceeded: rank 0 cannot be reached.
        """
        rank = number_of("RANK", 0) if rank is None else rank
        world_size = number_of("WORLD_SIZE", 1) if world_size is None else world_size
        if not 0 <= rank < world_size:
            raise UsageError(f"rank {rank} is not one of world size {world_size}")
        if world_size == 1:
            return cls(LocalKeyStore(), 0, 1)
        meeting = Meeting.of_environment(master_addr, master_port)
        keeper = meeting.keep() if rank == 0 else None
        return cls.at(meeting, rank, world_size, keeper)

    @classmethod
    def at(
        cls,
        meeting: Meeting,
        rank: int,
        world_size: int,
        keeper: Keeper | None = None,
        *,
        timeout_seconds: float | None = None,
    ) -> Rendezvous:
        """Meet the other ranks there; rank 0 gives its `keeper`, which is taken over.

        Raises:
            UsageError: this rank does not know the secret.
            DeadlineExceeded: rank 0 cannot be reached.
        """
        store = meeting.reach(timeout_seconds)
        rendezvous = cls(store, rank, world_size, address=meeting.address)
        rendezvous._keeper = keeper
        return rendezvous

    def close(self) -> None:
        """Leave. Rank 0 keeps the keys until the others have left too, or for a while."""
        with contextlib.suppress(PeerLost, DeadlineExceeded):  # nobody is left to be waited for
            if self._keeper is None:
                self.put(f"left/{self.rank}", b"")
            else:
                deadline = time.monotonic() + LEAVE_SECONDS
                for rank in range(1, self.world_size):
                    self.get(f"left/{rank}", deadline - time.monotonic())
        self.store.close()
        if self._keeper is not None:
            self._keeper.close()

    def fork(self) -> Rendezvous:
        """The same keys over a connection of its own, for another thread, which gives it back."""
        return self._child(self.store.fork(), self._prefix, self._keys)

    def give_back(self) -> None:
        """End this fork."""
        self.store.close()

    def scope(self, name: str) -> Rendezvous:
        """Keys of their own under `name`, over the same connection."""
        return self._child(self.store, f"{self._prefix}{name}/", set())

    def subset(self, ranks: Sequence[int]) -> Rendezvous:
        """The keys that these ranks alone share; they are numbered anew, in this order."""
        prefix = f"{self._prefix}ranks {','.join(map(str, ranks))}/"
        return Rendezvous(
            self.store.fork(),
            ranks.index(self.rank),
            len(ranks),
            address=self.address,
            prefix=prefix,
        )

    def group_store(self, name: str) -> GroupStore:
        """A torch store under `name`, over a connection of its own, which the caller closes.

        Its keys are deleted by `clear`, as others are.
        """
        return GroupStore(
            self.store.fork(),
            f"{self._prefix}{name}/",
            lambda key: self._keys.add(f"{name}/{key}"),
        )

    def put(self, key: str, value: bytes) -> None:
        """Set a key."""
        self._keys.add(key)
        self.store.set(self._prefix + key, value)

    def has(self, key: str, timeout_seconds: float = 0.0) -> bool:
        """Whether a value was put, or is in time; raises as `get` else."""
        try:
            self.get(key, timeout_seconds)
        except DeadlineExceeded:
            return False
        return True

    def get(self, key: str, timeout_seconds: float) -> bytes:
        """Wait for a key.

        Raises:
            DeadlineExceeded: nobody set it in time.
            PeerLost: the rank that keeps the keys is gone.
        """
        return self.store.get(self._prefix + key, timeout_seconds)

    def gather(self, key: str, value: bytes, timeout_seconds: float) -> list[bytes]:
        """Every rank's value, in the order of ranks; all ranks call it equally often."""
        deadline = time.monotonic() + timeout_seconds
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
        self._keys.add(key)
        return self.store.add(self._prefix + key, amount)

    def append(self, key: str, value: bytes) -> None:
        """Add to a list of entries, in one step: nobody sees a number without its entry."""
        number = self.store.append(self._prefix + key, value)
        self._keys.update((f"{key}/length", f"{key}/{number}"))

    def clear(self) -> None:
        """Delete every key that this object and its forks set. Nobody may need them any more."""
        keys = [self._prefix + self._keys.pop() for _ in range(len(self._keys))]
        if keys:
            self.store.delete(*keys)

    def _child(self, store: KeyStore, prefix: str, keys: set[str]) -> Rendezvous:
        return Rendezvous(
            store, self.rank, self.world_size, address=self.address, prefix=prefix, keys=keys
        )

    def _delete(self, key: str) -> None:
        self.store.delete(self._prefix + key)
        self._keys.discard(key)


class Log:
    """Appended to by any rank, read by any rank in one order. One reader or writer a thread."""

    def __init__(self, rendezvous: Rendezvous, name: str) -> None:
        self._rendezvous, self._name = rendezvous, name
        self._num_read = 0

    def append(self, entry: bytes) -> None:
        """Add an entry at the end."""
        self._rendezvous.append(self._name, entry)

    def next(self, timeout_seconds: float) -> bytes:
        """Wait for the next entry that this reader has not seen.

        Raises:
            DeadlineExceeded: none came in time.
        """
        entry = self._rendezvous.get(f"{self._name}/{self._num_read + 1}", timeout_seconds)
        self._num_read += 1
        return entry
