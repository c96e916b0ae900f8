"""One update on one rank: stage, call the engines, carry votes up and decisions down.

Every rank runs `Conductor.run`; on rank 0 a thread beside it plays the coordinator. Ranks and
coordinator speak through two logs of the rendezvous, so the coordinator's own rank is a rank like
the others. If the coordinator dies, its ranks close their sessions, which return to their base.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import msgspec

from checkpoint_engine.calls import EngineRequest
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
)
from checkpoint_engine.manifest import Version as VersionName
from checkpoint_engine.registry import Registry
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.collective import Collective
from checkpoint_engine.transport.rendezvous import Log, Rendezvous
from checkpoint_engine.update.coordinator import Coordinator, Opening, Policy
from checkpoint_engine.update.fetch import fetch
from checkpoint_engine.update.protocol import (
    Deadlines,
    Decision,
    Event,
    Offer,
    Report,
    Returned,
    Staged,
    decode,
)
from checkpoint_engine.update.sessions import Door, Sessions
from checkpoint_engine.update.staging import deliver
from checkpoint_engine.update.streaming import files_for
from checkpoint_engine.update.versions import Version, parts_on

__all__ = ["Calls", "Conductor", "Recorder", "Request", "record"]

Request = Callable[[Sequence[tuple[str, str]]], None]
"""Makes an engine take the update: called with every rank's (device uuid, handle)."""

MEET_SECONDS = 60.0
GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Calls:
    """What a rank calls its engines with.

    Attributes:
        requests: each makes an engine take the update.
        open_ended: whether one of them may reach more than one engine.
    """

    requests: tuple[Request, ...]
    open_ended: bool

    @classmethod
    def of(cls, requests: Request | Sequence[Request]) -> Calls:
        """A caller's own function may reach any number of engines; of a list, each reaches one."""
        if isinstance(requests, EngineRequest):
            return cls((requests,), open_ended=False)
        if callable(requests):
            return cls((requests,), open_ended=True)
        return cls(tuple(requests), open_ended=False)


class _Start(msgspec.Struct, frozen=True, kw_only=True):
    """What rank 0 opens an update with."""

    update: str
    epoch: int
    version: VersionName
    deadlines: Deadlines


@dataclass
class Conductor:
    """One rank's part in one update. Make one for each update, and `run` it once."""

    label: str
    version: Version
    rendezvous: Rendezvous
    store: Store
    door: Door
    collective: Collective | None
    policy: Policy
    timeout_seconds: float
    registry: Callable[[], Registry]
    parent: str | None = None
    base: str | None = None
    lora: str | None = None
    scope: Rendezvous = field(init=False)
    received: Segment | None = field(init=False, default=None)
    _events: _Outbox = field(init=False)
    _timeline: Timeline = field(init=False)
    _calls: list[threading.Thread] = field(init=False, default_factory=list)

    def run(self, number: int, calls: Calls) -> Report:
        """Take part in the `number`th update of these ranks; returns its report.

        Args:
            number: counts the updates of these ranks.
            calls: of this rank's engines.

        Raises:
            PeerLost, DeadlineExceeded: the coordinator is gone. What it decided, its registry
                knows; the sessions of this rank have returned to their base.
        """
        rank = self.rendezvous.rank
        scope = self.scope = self.rendezvous.scope(f"update/{number}")
        self._timeline = Timeline(f"rank {rank}")
        self._events = _Outbox(scope.fork())
        if rank == 0:
            self._open(scope, number)
        try:
            return self._take_part(scope, calls)
        except BaseException:
            self._await_calls()
            raise

    def close(self) -> None:
        """Let go of what this rank received, which engines and peers may have leased by now."""
        if self.received is not None:
            self.received.release()

    # ── rank 0 ──────────────────────────────────────────────────────────────────────────────

    def _open(self, scope: Rendezvous, number: int) -> None:
        registry = self.registry()
        registry.settle()
        epoch = registry.next_epoch()
        digest, num_bytes = self.version.digest, self.version.num_bytes
        start = _Start(
            update=f"{epoch}-{number}",
            epoch=epoch,
            version=VersionName(label=self.label, digest=digest, parent=self.parent),
            deadlines=Deadlines.of(
                self.timeout_seconds, num_bytes, mode=self.version.mode, is_lora=bool(self.lora)
            ),
        )
        registry.start(start.update, epoch, self.label, digest, lora=self.lora)
        opening = Opening(
            update=start.update,
            epoch=epoch,
            version=start.version,
            num_bytes=num_bytes,
            world_size=scope.world_size,
            deadlines=start.deadlines,
            base=self.base,
            mode=self.version.mode,
            why=self.version.why,
            lora=self.lora,
        )
        thread = threading.Thread(
            target=_coordinate,
            args=(opening, self.policy, registry, scope.fork()),
            name="ckpt-coordinator",
            daemon=True,
        )
        thread.start()
        scope.put("start", msgspec.msgpack.encode(start))

    # ── every rank ──────────────────────────────────────────────────────────────────────────

    def _take_part(self, scope: Rendezvous, calls: Calls) -> Report:
        start = decode(scope.get("start", MEET_SECONDS), _Start)
        sessions: Sessions | None = None
        try:
            sessions = self._stage(scope, start, calls)
            return self._follow(scope, sessions, calls.requests)
        finally:
            self.door.attend(None)
            if sessions is not None:
                sessions.close()
            self._events.close()

    def _stage(self, scope: Rendezvous, start: _Start, calls: Calls) -> Sessions | None:
        """Get the bytes to this host and open the door; a failure is this rank's "no"."""
        rank, version = scope.rank, self.version
        sessions: Sessions | None = None
        error: RemoteError | None = None
        num_moved = 0
        try:
            with self._timeline.span("stage"):
                num_moved = self._receive(start)
                name = self.received.name if self.received else ""
                names = scope.gather("received", name.encode(), start.deadlines.ready_seconds)
        except Exception as failure:
            error = RemoteError.of(failure, f"rank {rank}")
            scope.offer("received", b"")  # nobody needs to wait for this rank
        else:
            host = version.hosts.of_rank[rank]
            received = [name.decode() for name in names]
            offer = Offer(
                update=start.update,
                epoch=start.epoch,
                version=start.version,
                manifest=version.manifest.to_msgpack() if version.manifest else b"",
                parts=parts_on(version, host, received),
                files=files_for(rank, version.metas),
                remote=version.remote,
                deadlines=start.deadlines,
                require_rollback=self.policy.require_rollback,
            )
            sessions = Sessions(rank, offer, self._events.post)
            self.door.attend(sessions)
        self._events.post(
            Staged(
                rank=rank,
                num_requests=len(calls.requests),
                open_ended=calls.open_ended,
                bytes_sent=num_moved,
                error=error,
                spans=tuple(self._timeline.spans),
            )
        )
        return sessions

    def _receive(self, start: _Start) -> int:
        """What this host lacks, by broadcast or from peers; returns the bytes that this moved."""
        if self.version.mode == "streamed":
            return 0
        seconds = start.deadlines.ready_seconds
        if self.version.by_peers:
            self.received, num_moved = fetch(
                self.version,
                self.rendezvous.rank,
                self.store,
                self._timeline,
                timeout_seconds=seconds,
            )
            return num_moved
        if self.collective is not None:
            self.collective.connect(start.update, seconds)
        self.received, num_moved = deliver(
            self.version,
            self.rendezvous.rank,
            self.store,
            self.collective,
            self._timeline,
            timeout_seconds=seconds,
        )
        return num_moved

    def _follow(
        self, scope: Rendezvous, sessions: Sessions | None, requests: Sequence[Request]
    ) -> Report:
        """Do as decided until the end."""
        decisions = scope.log("decisions")
        longest = 2 * self.timeout_seconds + GRACE_SECONDS
        called = False
        while True:
            decision: Decision = decode(decisions.next(longest), Decision)
            if decision.step == "end":
                assert decision.report is not None, "the end comes with a report"
                return decision.report
            if decision.step == "enter":
                called = True
                self._call(requests)
            elif sessions is not None:
                sessions.decide(decision)
            if decision.step == "stop" and not called:
                self._skip(requests)
                if self.collective is not None:
                    self.collective.abandon()

    def _call(self, requests: Sequence[Request]) -> None:
        """Make the engines' calls, each on a thread: an engine answers when it is done."""
        handles = [(meta.device_uuid, meta.address) for meta in self.version.metas]

        def call(number: int, request: Request) -> None:
            error: RemoteError | None = None
            try:
                if isinstance(request, EngineRequest):
                    request(handles, self.label)
                else:
                    request(handles)
            except BaseException as failure:  # an exit from this thread would be seen by nobody
                error = RemoteError.of(failure, f"rank {self.rendezvous.rank}, request {number}")
            with contextlib.suppress(CheckpointEngineError):  # nobody is left to be told
                self._events.post(Returned(rank=self.rendezvous.rank, request=number, error=error))

        for number, request in enumerate(requests):
            thread = threading.Thread(
                target=call, args=(number, request), name="ckpt-request", daemon=True
            )
            self._calls.append(thread)
            thread.start()

    def _await_calls(self) -> None:
        """This process may be about to end; what a call has paused, it lets go of at its end."""
        deadline = time.monotonic() + self.timeout_seconds + GRACE_SECONDS
        for thread in self._calls:
            thread.join(max(0.0, deadline - time.monotonic()))

    def _skip(self, requests: Sequence[Request]) -> None:
        for number, _ in enumerate(requests):
            self._events.post(Returned(rank=self.rendezvous.rank, request=number))


class _Outbox:
    """Posts events to the coordinator's log, from many threads."""

    def __init__(self, rendezvous: Rendezvous) -> None:
        self._rendezvous = rendezvous
        self._log = rendezvous.log("events")
        self._lock = threading.Lock()
        self._closed = False

    def post(self, event: Event) -> None:
        with self._lock:
            if not self._closed:
                self._log.append(msgspec.msgpack.encode(event))

    def close(self) -> None:
        """The update is over: what comes late would be read by nobody, and stay for ever."""
        with self._lock:
            self._closed = True
            self._rendezvous.give_back()


def _coordinate(
    opening: Opening, policy: Policy, registry: Registry, rendezvous: Rendezvous
) -> None:
    """Drive the coordinator until it is done. Whatever fails in it, the ranks are told."""
    coordinator = Coordinator(opening, policy, time.monotonic())
    decisions = rendezvous.log("decisions")
    try:
        for decision in _decide(coordinator, registry, rendezvous.log("events"), opening):
            decisions.append(msgspec.msgpack.encode(decision))
    except PeerLost:
        pass  # with the rendezvous gone, nobody can be told
    except Exception as error:
        with contextlib.suppress(CheckpointEngineError):
            for decision in coordinator.abandon(RemoteError.of(error, "coordinator")):
                decisions.append(msgspec.msgpack.encode(decision))
    finally:
        rendezvous.give_back()


def _decide(
    coordinator: Coordinator, registry: Registry, events: Log, opening: Opening
) -> Iterator[Decision]:
    """Events in, decisions out, each recorded before it is given."""
    while not coordinator.done:
        wait_seconds = coordinator.next_deadline - time.monotonic()
        try:
            entry = events.next(max(0.0, wait_seconds))
        except DeadlineExceeded:
            decided = coordinator.expire(time.monotonic())
        else:
            decided = coordinator.on(decode(entry, Event), time.monotonic())
        yield from record(decided, coordinator, registry, opening.update)


class Recorder(Protocol):
    """The part of the registry in which decisions are written."""

    def publish(self, update: str) -> None:
        """Record the decision to publish."""

    def finish(self, update: str, outcome: str, report: bytes) -> None:
        """Record how it ended."""


def record(
    decided: list[Decision],
    coordinator: Coordinator,
    registry: Recorder,
    update: str,
    clock: Callable[[], float] = time.monotonic,
) -> list[Decision]:
    """Write down what was decided; returns what may now be told.

    The record comes before the message, since its absence means abort: a decision to publish that
    cannot be recorded is vetoed.
    """
    recorded: list[Decision] = []
    for decision in decided:
        try:
            if decision.step == "publish":
                registry.publish(update)
                if clock() > coordinator.decision_deadline:
                    raise DeadlineExceeded(
                        "it was recorded too late: who has applied no longer waits"
                    )
            elif decision.report is not None:
                report = msgspec.json.encode(decision.report)
                registry.finish(update, decision.report.outcome, report)
        except Exception as error:
            failure = RemoteError.of(error, "registry")
            if decision.step == "publish":
                vetoed = coordinator.veto(failure, clock())
                return [*recorded, *record(vetoed, coordinator, registry, update, clock)]
            assert decision.report is not None, "only a publish and the end are recorded"
            degraded = (*decision.report.degraded, str(failure))
            ending = msgspec.structs.replace(decision.report, degraded=degraded)
            recorded.append(msgspec.structs.replace(decision, report=ending))
        else:
            recorded.append(decision)
    return recorded
