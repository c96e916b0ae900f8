"""Ranks that conduct updates together: all of a server, or those that read from the others.

A group counts its updates, each of which has keys of its own in the rendezvous, and keeps what
outlives an update: the collective of its hosts.

    group = Group(rendezvous, store, door, shelf, registry)
    report = group.conduct(version, "step-120", Calls.of(req_func), timeout_seconds=600)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import msgspec

from checkpoint_engine.errors import UsageError
from checkpoint_engine.registry import Registry
from checkpoint_engine.store import Store
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.conductor import Calls, Conductor
from checkpoint_engine.update.coordinator import Policy
from checkpoint_engine.update.protocol import Report, decode
from checkpoint_engine.update.sessions import Door
from checkpoint_engine.update.shelf import Description, Shelf, Survey, ask, survey
from checkpoint_engine.update.streaming import why_streamed
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["Group", "chosen_of"]

SURVEY_SECONDS = 120.0


class Group:
    """One rank's part in its group.

    Args:
        rendezvous: of the group's ranks; its rank 0 coordinates.
        store: this rank's.
        door: where its engines say hello.
        shelf: what its peers may read.
        registry: opens the coordinator's record.
    """

    def __init__(
        self,
        rendezvous: Rendezvous,
        store: Store,
        door: Door,
        shelf: Shelf,
        registry: Callable[[], Registry],
    ) -> None:
        self.rendezvous = rendezvous
        self.registry = registry
        self._store, self._door, self._shelf = store, door, shelf
        self._collective: Collective | None = None
        self._published: str | None = None
        self._num_updates = 0
        self._scopes: list[Rendezvous] = []

    def conduct(
        self,
        version: Version,
        label: str,
        calls: Calls,
        *,
        timeout_seconds: float,
        policy: Policy | None = None,
        base: str | None = None,
        lora: str | None = None,
    ) -> Report:
        """Take part in one update; every rank of the group calls it, and gets the same report."""
        # The last update's keys may still be read by a slow rank; those before it, by nobody.
        while len(self._scopes) > 1:
            self._scopes.pop(0).clear()
        self._num_updates += 1
        conductor = Conductor(
            label=label,
            version=version,
            rendezvous=self.rendezvous,
            store=self._store,
            door=self._door,
            collective=self._collective_of(version),
            policy=policy or Policy(),
            timeout_seconds=timeout_seconds,
            registry=self.registry,
            parent=None if lora else self._published,
            base=base,
            lora=lora,
        )
        try:
            with self._shelf.updating():
                result = conductor.run(self._num_updates, calls)
                if result.outcome == "published" and lora is None:
                    self._published = result.digest
                    self._shelf.keep(label, version, self.rendezvous.rank, conductor.received)
        finally:
            conductor.close()
            self._scopes.append(conductor.scope)
        return result

    def ask(self, metas: Sequence[RankMeta]) -> Description:
        """What the server of these metas has published; this group's first rank asks it."""
        found = msgspec.msgpack.encode(ask(metas)) if self.rendezvous.rank == 0 else b""
        described: Description = decode(self._from_first("ask", found), Description)
        return described

    def read_from_peers(
        self, version: Version, metas: Sequence[RankMeta], mode: str = "auto"
    ) -> Version:
        """The version as this group reads it; its first rank finds out who is there to be read.

        If one rank's host lacks memory to stage it, or if `mode` says so, none stages it.
        """
        rank = self.rendezvous.rank
        found = msgspec.msgpack.encode(survey(version)) if rank == 0 else b""
        surveyed: Survey = decode(self._from_first("survey", found), Survey)
        read = version.read_by(metas, surveyed.copies, frozenset(surveyed.lost))
        why = why_streamed(read, rank, self._store, mode)
        reasons = self.rendezvous.gather("streamed", why.encode(), SURVEY_SECONDS)
        return replace(read, streamed=next((one.decode() for one in reasons if one), ""))

    def close(self) -> None:
        """Leave the collective, if there is one."""
        if self._collective is not None:
            self._collective.abandon()

    def _from_first(self, key: str, value: bytes) -> bytes:
        return self.rendezvous.gather(key, value, SURVEY_SECONDS)[0]

    def _collective_of(self, version: Version) -> Collective | None:
        """That of the hosts' leads, if they broadcast to each other and this rank leads."""
        hosts, rank = version.hosts, self.rendezvous.rank
        host = hosts.of_rank[rank]
        if version.by_peers or version.mode == "streamed":
            return None
        if len(hosts.names) == 1 or hosts.lead(host) != rank:
            return None
        if self._collective is None or self._collective.size != len(hosts.names):
            self._collective = Collective(self.rendezvous, index=host, size=len(hosts.names))
        return self._collective


def chosen_of(ranks: Sequence[int] | None, world_size: int) -> tuple[int, ...]:
    """The ranks of a group, in order; all if none are named. Raises UsageError if one is none."""
    chosen = tuple(sorted(set(range(world_size) if ranks is None else ranks)))
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < world_size:
        raise UsageError(f"ranks {list(chosen)} are not of world size {world_size}")
    return chosen
