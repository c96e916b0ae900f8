"""Who decides: the state machine that turns votes into decisions.

Pure: events and the time go in, decisions come out. No sockets, no threads, no clock of its own, so
that every schedule of faults can be replayed in a test. Rank 0 drives it (`update.conductor`).

    staging ─► entering ─► applying ─► publishing ─► done
        └─────────┴───────────┴─► stopping ───────────┘

Absence of a decision means abort: a session that hears nothing returns to its base. Everything
before `apply` is free to abort; after `publish` nothing is rolled back any more, only reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from checkpoint_engine.errors import RemoteError, UsageError
from checkpoint_engine.manifest import Version
from checkpoint_engine.timeline import Span, stage_seconds
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    Deadlines,
    Decision,
    Event,
    Hello,
    Joined,
    Left,
    Ready,
    ReplicaReport,
    Report,
    Returned,
    Staged,
    Vote,
    Voted,
    Withdrawn,
)

__all__ = ["Coordinator", "Opening", "Policy"]

SETTLE_SECONDS = 0.2
VOTES_DUE = {
    Ready: ("joined", ("staging", "entering")),
    Applied: ("ready", ("applying", "stopping")),
    Confirmed: ("applied", ("publishing",)),
}


@dataclass(frozen=True)
class Opening:
    """What an update sets out to do.

    `base`: digest of the version that every replica must serve; None if any will do. `mode`,
    `why` and `lora` are for the report.
    """

    update: str
    epoch: int
    version: Version
    num_bytes: int
    world_size: int
    deadlines: Deadlines
    base: str | None = None
    mode: str = "staged"
    why: str = ""
    lora: str | None = None


@dataclass(frozen=True)
class Policy:
    """What to do about a replica that says no.

    `on_failure`: "rollback" returns everyone to the old version; "quarantine" publishes to the
    others while at least `min_replicas` engines are left.
    """

    on_failure: str = "rollback"
    min_replicas: int = 1
    require_rollback: bool = False

    def __post_init__(self) -> None:
        if self.on_failure not in ("rollback", "quarantine"):
            raise UsageError(f"on_failure is 'rollback' or 'quarantine', not {self.on_failure!r}")
        if self.min_replicas < 1:
            raise UsageError(f"min_replicas is at least 1, not {self.min_replicas}")


@dataclass
class _Worker:
    """One session as the coordinator sees it."""

    session: str
    rank: int
    hello: Hello
    follower: bool
    state: str = "joined"  # joined, ready, applied, published, unconfirmed, kept, torn, lost
    quarantined: bool = False
    way_back: str | None = None
    applied: Applied | None = None
    applied_at: float = math.inf
    pause_seconds: float | None = None
    error: RemoteError | None = None
    spans: list[Span] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        return self.state in ("kept", "torn", "lost")

    def report(self, request_error: RemoteError | None) -> ReplicaReport:
        """How it ended; a request that failed after all means that the engine did not confirm.

        Whoever is still under way is told to stop, or hung up on: it keeps its base.
        """
        outcome = "kept" if self.state in ("joined", "ready", "applied") else self.state
        if outcome == "unconfirmed" or (outcome == "published" and request_error):
            outcome = "published_unconfirmed"
        return ReplicaReport(
            name=self.hello.replica,
            rank=self.rank,
            outcome="quarantined" if self.quarantined and outcome == "kept" else outcome,
            digest=self.applied.digest if self.applied and not self.gone else self.hello.base,
            served_digest=self.applied.served_digest if self.applied and not self.gone else None,
            way_back=self.way_back,
            pause_seconds=self.pause_seconds,
            follower=self.follower,
            undecided=self.hello.undecided,
            error=self.error or request_error,
        )


class Coordinator:
    """One update. Feed it events with `on`, and the time with `expire`, until `done`."""

    def __init__(self, opening: Opening, policy: Policy, now: float) -> None:
        self._opening, self._policy = opening, policy
        self._phase = "staging"
        self._deadline = now + opening.deadlines.ready_seconds
        self._staged: set[int] = set()
        self._num_requests: dict[int, int] = {}
        self._open_ended = False
        self._returned: dict[tuple[int, int], RemoteError | None] = {}
        self._workers: dict[str, _Worker] = {}
        self._now = self._settled_at = now
        self._reason: RemoteError | None = None
        self._bytes_sent = 0
        self._spans: list[Span] = []
        self._outcome = "aborted"
        self._just_quarantined: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        """Whether the last decision, "end", has been made."""
        return self._phase == "done"

    @property
    def is_settled(self) -> bool:
        """Whether the version is decided, one way or the other."""
        return self._phase in ("publishing", "stopping", "done")

    @property
    def next_deadline(self) -> float:
        """When `expire` should be called if nothing happens before."""
        if self._phase == "entering" and self._must_settle() and self._now < self._settled_at:
            return min(self._deadline, self._settled_at)
        return self._deadline

    @property
    def decision_deadline(self) -> float:
        """Until when everyone that is to publish still waits to hear so."""
        first = min((worker.applied_at for worker in self._active()), default=math.inf)
        return first + self._opening.deadlines.decision_seconds

    def on(self, event: Event, now: float) -> list[Decision]:
        """Take one event in; returns the decisions that follow, in order."""
        handlers: dict[type[Event], Callable[..., None]] = {
            Staged: self._on_staged,
            Joined: self._on_joined,
            Voted: self._on_voted,
            Left: self._on_left,
            Returned: self._on_returned,
        }
        self._now = now
        handlers[type(event)](event, now)
        return self._advance(now)

    def expire(self, now: float) -> list[Decision]:
        """Take in that time has passed."""
        self._now = now
        if now < self._deadline or self.done:
            return self._advance(now)
        missing = self._missing_workers()
        if self._phase == "entering":
            missing += self._without_siblings()
        names = self._missing_ranks() + [worker.hello.replica for worker in missing]
        unheard = "an engine that was called to say hello"
        answers = "the requests to the engines to return"
        waited_for = ", ".join(names) or (unheard if self._phase == "entering" else answers)
        error = RemoteError(
            type="DeadlineExceeded",
            message=f"{self._phase}: the deadline passed while waiting for {waited_for}",
        )
        for worker in missing:
            self._lose(worker, error)
        if self._phase in ("staging", "entering"):
            self._reason = self._reason or error
        if self._phase == "staging":
            return self._stop(now)
        if self._phase == "entering":
            return self._vote(now, "apply", "applying", self._opening.deadlines.pause_seconds)
        if self._phase == "applying":
            return self._advance(now)
        return self._end()

    def veto(self, error: RemoteError, now: float) -> list[Decision]:
        """The decision to publish could not be recorded, so it was not made."""
        assert self._phase == "publishing", "only a publish decision is recorded"
        self._phase, self._reason = "applying", error
        for session in self._just_quarantined:
            self._workers[session].quarantined = False
        return self._stop(now)

    def abandon(self, error: RemoteError) -> list[Decision]:
        """The coordinator itself has failed: end now, without a wait for anybody's answer."""
        self._reason = self._reason or error
        if self._phase in ("publishing", "done"):
            return self._end()
        self._outcome = "rolled_back" if self._phase == "applying" else "aborted"
        return [Decision(step="stop", reason=str(error)), *self._end()]

    # ── events ──────────────────────────────────────────────────────────────────────────────

    def _on_staged(self, event: Staged, now: float) -> None:
        if event.rank in self._staged:
            return  # sent twice
        self._staged.add(event.rank)
        self._num_requests[event.rank] = event.num_requests
        self._open_ended = self._open_ended or event.open_ended
        self._bytes_sent += event.bytes_sent
        self._spans.extend(event.spans)
        if event.error is not None:
            self._reason = self._reason or event.error

    def _on_joined(self, event: Joined, now: float) -> None:
        if event.session in self._workers:
            return  # sent twice
        late = self._phase not in ("staging", "entering")
        worker = _Worker(event.session, event.rank, event.hello, event.follower or late)
        self._workers[event.session] = worker
        self._settled_at = now + SETTLE_SECONDS
        if event.hello.protocol != PROTOCOL:
            message = f"the replica speaks protocol {event.hello.protocol}, this is {PROTOCOL}"
            self._refuse(worker, "ProtocolError", message)
        elif event.hello.epoch >= self._opening.epoch:
            message = f"the replica has seen epoch {event.hello.epoch}, a newer coordinator's"
            self._refuse(worker, "UpdateRefused", message)
        elif self._opening.base not in (None, event.hello.base):
            serves = event.hello.base or "no version that it knows"
            message = (
                f"the update is made for base {self._opening.base}, the replica serves {serves}"
            )
            self._refuse(worker, "UpdateRefused", message)

    def _on_voted(self, event: Voted, now: float) -> None:
        worker, vote = self._workers.get(event.session), event.vote
        if worker is None or worker.gone or not self._is_due(worker, vote):
            return  # late, early, or sent twice
        worker.spans.extend(vote.spans)
        if isinstance(vote, Ready):
            worker.state, worker.way_back = "ready", vote.way_back
            if self._policy.require_rollback and vote.way_back == "none":
                message = "the replica has no way back, and --require-rollback was given"
                self._refuse(worker, "UpdateRefused", message)
        elif isinstance(vote, Applied):
            worker.state, worker.applied, worker.applied_at = "applied", vote, now
        elif isinstance(vote, Confirmed):
            worker.state = "unconfirmed" if vote.error else "published"
            worker.error, worker.pause_seconds = vote.error, vote.pause_seconds
        else:
            worker.state = "torn" if vote.torn else "kept"
            worker.error, worker.pause_seconds = vote.error, vote.pause_seconds or None
            self._blame(worker)

    def _is_due(self, worker: _Worker, vote: Vote) -> bool:
        """A vote counts from the state before it, and a voter's only once it was asked for."""
        if isinstance(vote, Withdrawn):
            return True
        state, phases = VOTES_DUE[type(vote)]
        return worker.state == state and (worker.follower or self._phase in phases)

    def _on_left(self, event: Left, now: float) -> None:
        worker = self._workers.get(event.session)
        if worker is not None and not worker.gone and worker.state != "published":
            self._lose(worker, event.error)

    def _on_returned(self, event: Returned, now: float) -> None:
        self._returned[event.rank, event.request] = event.error
        if event.error is None or self._phase not in ("staging", "entering", "applying"):
            return
        self._reason = self._reason or event.error
        for worker in self._active():
            if self._request_error(worker) is not None:
                self._lose(worker, event.error)

    # ── phases ──────────────────────────────────────────────────────────────────────────────

    def _advance(self, now: float) -> list[Decision]:
        if self._phase == "staging" and len(self._staged) == self._opening.world_size:
            if self._reason:
                return self._stop(now)
            self._phase, self._settled_at = "entering", now + SETTLE_SECONDS
            return [Decision(step="enter"), *self._advance_entering(now)]
        if self._phase == "entering":
            return self._advance_entering(now)
        if self._phase == "applying":
            return self._advance_applying(now)
        ending = self._phase in ("publishing", "stopping")
        if ending and not self._missing_workers() and self._all_returned():
            return self._end()
        return []

    def _advance_entering(self, now: float) -> list[Decision]:
        if self._failed() and self._policy.on_failure == "rollback":
            return self._stop(now)
        if self._missing_workers() or not self._all_engines_here(now):
            return []
        if not self._active():
            message = (
                "no engine said hello: the request must make the engine call "
                "update_weights_from_ipc with the handle that it was given"
            )
            self._reason = self._reason or RemoteError(type="UpdateRefused", message=message)
            return self._stop(now)
        return self._vote(now, "apply", "applying", self._opening.deadlines.pause_seconds)

    def _advance_applying(self, now: float) -> list[Decision]:
        if self._failed() and self._policy.on_failure == "rollback":
            return self._stop(now)
        if self._missing_workers():
            return []
        return self._vote(now, "publish", "publishing", self._opening.deadlines.pause_seconds)

    def _vote(self, now: float, step: str, phase: str, seconds: float) -> list[Decision]:
        """Everyone has voted on `step`: go on with those that said yes, if they are enough."""
        num_engines = len({worker.hello.engine for worker in self._active()})
        if self._failed():
            if self._policy.on_failure == "rollback" or num_engines < self._policy.min_replicas:
                return self._stop(now)
        elif num_engines < self._policy.min_replicas:
            message = f"{num_engines} replicas are ready, fewer than --min-replicas"
            self._reason = RemoteError(type="UpdateRefused", message=message)
            return self._stop(now)
        quarantine = self._quarantine()
        self._phase, self._deadline = phase, now + seconds
        if step == "publish":
            self._outcome = "published"
        proceed = tuple(worker.session for worker in self._active())
        return [Decision(step=step, proceed=proceed, quarantine=quarantine)]

    def _quarantine(self) -> tuple[str, ...]:
        """An engine is out as soon as one of its workers is: the rest of it must stop too."""
        broken = self._broken_engines()
        out = [w for w in self._voters() if w.hello.engine in broken and not w.quarantined]
        for worker in out:
            worker.quarantined = True
        self._just_quarantined = tuple(worker.session for worker in out)
        return self._just_quarantined

    def _stop(self, now: float) -> list[Decision]:
        self._outcome = "rolled_back" if self._phase == "applying" else "aborted"
        self._phase = "stopping"
        self._deadline = now + self._opening.deadlines.return_seconds
        decision = Decision(step="stop", reason=str(self._reason or "a replica said no"))
        return [decision, *self._advance(now)]

    def _end(self) -> list[Decision]:
        self._phase = "done"
        return [Decision(step="end", report=self._report())]

    # ── who is here, who is missing ─────────────────────────────────────────────────────────

    def _voters(self) -> Iterable[_Worker]:
        return (worker for worker in self._workers.values() if not worker.follower)

    def _active(self) -> list[_Worker]:
        broken = self._broken_engines()
        return [w for w in self._voters() if not w.quarantined and w.hello.engine not in broken]

    def _broken_engines(self) -> set[str]:
        """Engines that have lost a worker, or of which one said no."""
        return {worker.hello.engine for worker in self._voters() if worker.gone}

    def _failed(self) -> bool:
        return self._reason is not None

    def _missing_ranks(self) -> list[str]:
        return [f"rank {r}" for r in range(self._opening.world_size) if r not in self._staged]

    def _missing_workers(self) -> list[_Worker]:
        """Whoever has not voted yet on what this phase waits for."""
        if self._phase == "staging":
            return []
        if self._phase == "entering":
            return [worker for worker in self._active() if worker.state == "joined"]
        if self._phase == "applying":
            return [worker for worker in self._active() if worker.state == "ready"]
        voted = ("published", "unconfirmed", "kept", "torn", "lost")
        return [worker for worker in self._voters() if worker.state not in voted]

    def _leader(self, worker: _Worker) -> int:
        """Engine i is called by the first of its ranks; one rank alone calls every engine."""
        if self._opening.world_size == 1:
            return 0
        return worker.rank // worker.hello.world_size * worker.hello.world_size

    def _all_engines_here(self, now: float) -> bool:
        """Every request still running has a complete engine; none is expected of the others."""
        if self._must_settle() and now < self._settled_at:
            return False
        num_missing = self._num_missing()
        # An engine that said no holds its request until it hears the verdict; a lost one does not.
        lost = {worker.hello.engine for worker in self._voters() if worker.state == "lost"}
        num_here = len(num_missing) + len(self._broken_engines() - lost)
        num_running = sum(self._num_requests.values()) - len(self._returned)
        return all(missing <= 0 for missing in num_missing.values()) and num_here >= num_running

    def _num_missing(self) -> dict[str, int]:
        """For each engine that is whole so far, how many of its workers have not said hello."""
        num_missing: dict[str, int] = {}
        for worker in self._active():
            engine, world_size = worker.hello.engine, worker.hello.world_size
            num_missing[engine] = num_missing.get(engine, world_size) - 1
        return num_missing

    def _without_siblings(self) -> list[_Worker]:
        """Workers that are ready, of engines whose other workers did not come."""
        num_missing = self._num_missing()
        waiting = [worker for worker in self._active() if worker.state != "joined"]
        return [worker for worker in waiting if num_missing[worker.hello.engine] > 0]

    def _must_settle(self) -> bool:
        """A function of one rank may call any number of engines: give the others a moment."""
        return self._open_ended and self._num_requests == {0: 1} and (0, 0) not in self._returned

    def _all_returned(self) -> bool:
        return len(self._returned) >= sum(self._num_requests.values())

    def _request_error(self, worker: _Worker) -> RemoteError | None:
        """What its engine's request raised, where it is known which request was its own."""
        leader = self._leader(worker)
        return self._returned.get((leader, 0)) if self._num_requests.get(leader) == 1 else None

    # ── failures ────────────────────────────────────────────────────────────────────────────

    def _refuse(self, worker: _Worker, kind: str, message: str) -> None:
        worker.state = "kept"
        worker.error = RemoteError(type=kind, message=message, where=worker.hello.replica)
        self._blame(worker)

    def _lose(self, worker: _Worker, error: RemoteError) -> None:
        worker.state, worker.error = "lost", error
        self._blame(worker)

    def _blame(self, worker: _Worker) -> None:
        """Remember the first cause, which is what the user needs to see."""
        if not worker.follower and self._phase in ("staging", "entering", "applying"):
            self._reason = self._reason or worker.error

    def _report(self) -> Report:
        opening, workers = self._opening, list(self._workers.values())
        spans = [*self._spans, *(span for worker in workers for span in worker.spans)]
        pauses = [worker.pause_seconds for worker in workers if worker.pause_seconds is not None]
        published = [w for w in workers if w.state in ("published", "unconfirmed")]
        return Report(
            update=opening.update,
            epoch=opening.epoch,
            version=opening.version.label,
            digest=opening.version.digest,
            base=opening.version.parent,
            mode=opening.mode,
            why=opening.why,
            lora=opening.lora,
            outcome=self._outcome,
            bytes=opening.num_bytes,
            bytes_sent=self._bytes_sent,
            seconds=stage_seconds(spans),
            pause_seconds=max(pauses, default=None),
            verified=bool(published)
            and all(w.applied and w.applied.digest == opening.version.digest for w in published),
            replicas=tuple(worker.report(self._request_error(worker)) for worker in workers),
            degraded=tuple(w.hello.replica for w in workers if w.follower and w not in published),
            reason=self._reason if self._outcome != "published" or self._failed() else None,
            spans=tuple(sorted(spans, key=lambda span: span.start)),
        )
