"""Buckets broadcast from one host to all others through a process group.

The group is our own, beside any that the trainer has, and is made of one rank per host. Bytes are
sent from, and received into, the memory where they lie. After any error a gloo group is dead, and
half of its ranks do not know it yet: `abandon` closes it, which wakes the others at once, and the
next broadcast meets under a new name. It listens at this host's one address.

    collective = Collective(rendezvous, index=0, size=2)
    collective.connect("update-17", timeout_seconds=60)
    collective.broadcast(memory[a:b], root=0)
"""

from __future__ import annotations

from datetime import timedelta

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo

from checkpoint_engine.errors import CheckpointEngineError, TransferError
from checkpoint_engine.transport.group_store import GroupStore
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["Collective"]


class Collective:
    """A gloo group of `size` members, of which this one is `index`."""

    def __init__(self, rendezvous: Rendezvous, *, index: int, size: int) -> None:
        self._rendezvous, self.index, self.size = rendezvous, index, size
        self._group: ProcessGroupGloo | None = None
        self._store: GroupStore | None = None

    def connect(self, name: str, timeout_seconds: float) -> None:
        """Meet the other members under `name`, unless the group of before still works.

        All members must call it, and abandon it, for the same updates.

        Raises:
            TransferError: a member did not come in time.
        """
        if self._group is not None:
            return
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timedelta(seconds=timeout_seconds)
        self._store = self._rendezvous.group_store(f"gloo/{name}")
        self._store.set_timeout(options._timeout)
        try:
            options._devices = [ProcessGroupGloo.create_device(hostname=self._rendezvous.address)]
            self._group = ProcessGroupGloo(self._store, self.index, self.size, options)
        except (RuntimeError, CheckpointEngineError) as error:
            self.abandon()
            raise TransferError(
                f"host {self.index} of {self.size} could not join the group: {_first_line(error)}"
            ) from error

    def broadcast(self, memory: memoryview, root: int, timeout_seconds: float) -> None:
        """Send `memory` from member `root` to all others, whose `memory` it fills.

        Raises:
            TransferError: a member died, or the deadline passed; the group must be abandoned.
        """
        assert self._group is not None, "connect comes before broadcast"
        options = BroadcastOptions()
        options.rootRank = root
        options.timeout = timedelta(seconds=timeout_seconds)
        tensor = torch.frombuffer(memory, dtype=torch.uint8)
        try:
            work = self._group.broadcast([tensor], options)  # type: ignore[attr-defined]
            work.wait(options.timeout)
        except RuntimeError as error:
            raise TransferError(f"broadcast from host {root}: {_first_line(error)}") from error

    def abandon(self) -> None:
        """Close the group; members that wait in it fail at once."""
        self._group = None
        if self._store is not None:
            self._store.close()
            self._store = None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
