"""One version that every sampler has received becomes what all of them serve, or none of them.

Who decides and who is told are those of the parameter server's transaction (`update.coordinator`,
`update.relay`, `update.session`): here they speak through the keys that the stream's ranks share.
The trainer's rank 0 decides. A sampler that dies is noticed as it is in a stream; if rank 0 dies,
its keys are gone, and who has not heard that the version is to be published returns to its base.

    report = conduct(keys, version, num_bytes, look, timeout_seconds)   # rank 0
    outcome = take_part(keys, seat)                     # each sampler
    withdraw(keys, error)                               # one that cannot, so that nobody waits
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from checkpoint_engine.adapters.base import Adapter
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
    UsageError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.messages import with_sender
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.conductor import record
from checkpoint_engine.update.coordinator import Coordinator, Opening, Policy
from checkpoint_engine.update.protocol import (
    Confirmed,
    Deadlines,
    FromRank,
    FromSession,
    Hello,
    Offer,
    Report,
    Returned,
    Staged,
    Stop,
    Withdrawn,
    decode,
)
from checkpoint_engine.update.relay import Action, Relay, Tell
from checkpoint_engine.update.session import Outcome, Receive, Send, play, session

__all__ = ["conduct", "sampler_name", "take_part", "withdraw"]

POLL_SECONDS = 0.05


class _Said(msgspec.Struct, frozen=True, kw_only=True):
    """What a sampler's session says, or why there is none, or no more."""

    rank: int
    message: FromSession | None = None
    error: RemoteError | None = None


class _NoRecord:
    """Nothing is written down: who serves what is what samplers say of themselves."""

    def publish(self, update: str) -> None:
        """See `conductor.Recorder`."""

    def finish(self, update: str, outcome: str, report: bytes) -> None:
        """See `conductor.Recorder`."""


def sampler_name(rank: int) -> str:
    """What to call the sampler that is this rank of the stream, from 1 on."""
    return f"sampler {rank - 1}"


def conduct(
    keys: Rendezvous,
    version: Version,
    num_bytes: int,
    look: Callable[[bool], Sequence[int]],
    timeout_seconds: float,
) -> Report:
    """Take the version through all samplers.

    Args:
        keys: of this version.
        version: which all samplers have received.
        num_bytes: of it.
        look: called now and then, and told whether it is decided; says which ranks have died, or
            raises why to give up.
        timeout_seconds: until all are ready; a pause is shorter.
    """
    return _Conduct(keys, version, num_bytes, timeout_seconds).run(look)


class _Conduct:
    def __init__(
        self, keys: Rendezvous, version: Version, num_bytes: int, timeout_seconds: float
    ) -> None:
        deadlines = Deadlines.of(timeout_seconds, num_bytes)
        update, epoch = version.label, 1  # the stream has one trainer: there is none to fence off
        opening = Opening(update, epoch, version, num_bytes, 1, deadlines)
        offer = Offer(
            update=update, epoch=epoch, version=version, manifest=b"", parts=(), deadlines=deadlines
        )
        self._coordinator = Coordinator(opening, Policy(), time.monotonic())
        self._relay = Relay(0, offer)
        self._said = keys.log("said")
        self._told = {rank: keys.log(f"told/{rank}") for rank in range(1, keys.world_size)}
        self._names: dict[int, str] = {}
        self._returned: set[int] = set()
        self._report: Report | None = None

    def run(self, look: Callable[[bool], Sequence[int]]) -> Report:
        try:
            self._act([Staged(rank=0, num_requests=len(self._told))])
            while not self._coordinator.done:
                self._hear()
                for rank in look(self._coordinator.is_settled):
                    self._lose(rank, _died(rank))
                self._decided(self._coordinator.expire(time.monotonic()))
        except CheckpointEngineError as error:
            self._decided(self._coordinator.abandon(RemoteError.of(error, "the trainer")))
        except BaseException as error:
            if not self._coordinator.is_settled:
                with contextlib.suppress(PeerLost, DeadlineExceeded):
                    self._stop(self._told.keys(), f"the trainer failed: {error}")
            raise
        self._stop(self._told.keys() - self._names.keys(), "the sync has ended")
        assert self._report is not None, "a coordinator ends with a report"
        names = [sampler_name(rank) for rank in self._told]
        ordered = sorted(self._report.replicas, key=lambda replica: names.index(replica.name))
        return msgspec.structs.replace(self._report, replicas=tuple(ordered))

    def _stop(self, ranks: Iterable[int], reason: str) -> None:
        """Whoever greets later hears it too."""
        for rank in ranks:
            self._told[rank].append(msgspec.msgpack.encode(Stop(reason=reason)))

    def _hear(self) -> None:
        try:
            said = decode(self._said.next(POLL_SECONDS), _Said)
        except DeadlineExceeded:
            return
        if said.rank in self._returned:
            return
        if said.message is None:
            self._lose(said.rank, said.error or _died(said.rank))
            return
        if isinstance(said.message, Hello):
            if said.rank in self._names:
                raise UsageError(
                    f"two samplers are rank {said.rank}: each has one of its own, from 1 on"
                )
            self._names[said.rank], actions = self._relay.joined(said.message)
        else:
            actions = self._relay.voted(self._names[said.rank], said.message)
        self._act(actions)
        if isinstance(said.message, (Confirmed, Withdrawn)):
            self._return(said.rank, None)

    def _lose(self, rank: int, error: RemoteError) -> None:
        if rank in self._returned:
            return
        if rank in self._names:
            self._act(self._relay.left(self._names[rank], error))
        self._return(rank, None if rank in self._names else error)

    def _return(self, rank: int, error: RemoteError | None) -> None:
        self._returned.add(rank)
        self._act([Returned(rank=0, request=rank, error=error)])

    def _act(self, actions: Sequence[Action]) -> None:
        ranks = {name: rank for rank, name in self._names.items()}
        for action in actions:
            if isinstance(action, Tell):
                self._told[ranks[action.session]].append(msgspec.msgpack.encode(action.message))
            else:
                self._decided(self._coordinator.on(action, time.monotonic()))

    def _decided(self, decisions: Any) -> None:
        for decision in record(decisions, self._coordinator, _NoRecord(), "sync"):
            if decision.step == "end":
                self._report = decision.report
            elif decision.step != "enter":
                self._act(self._relay.decided(decision))


def _died(rank: int) -> RemoteError:
    said = "it died, or no link leads to its host any more"
    return RemoteError(type=PeerLost.__name__, message=said, where=sampler_name(rank))


def take_part(keys: Rendezvous, adapter: Adapter) -> Outcome:
    """Take the version that was received through an adapter, which recalls it.

    Raises:
        PeerLost, DeadlineExceeded: the trainer went away before it offered anything.
    """
    said, told = keys.log("said"), keys.log(f"told/{keys.rank}")

    def perform(step: Send | Receive) -> FromRank | None:
        with with_sender():
            if isinstance(step, Send):
                said.append(msgspec.msgpack.encode(_Said(rank=keys.rank, message=step.message)))
                return None
            heard: FromRank = decode(told.next(step.timeout_seconds), FromRank)
            return heard

    return play(session(adapter, Attachments(keep_maps=False)), perform)


def withdraw(keys: Rendezvous, error: BaseException) -> None:
    """Say why this sampler casts no vote, or none any more.

    Raises:
        PeerLost, DeadlineExceeded: nobody is left to be told.
    """
    why = RemoteError.of(error, sampler_name(keys.rank))
    keys.log("said").append(msgspec.msgpack.encode(_Said(rank=keys.rank, error=why)))
