"""A coordinator with a clock that stands still until it is told to go on."""

from __future__ import annotations

from typing import Any

from checkpoint_engine.errors import RemoteError
from checkpoint_engine.manifest import Version
from checkpoint_engine.timeline import Span
from checkpoint_engine.update.coordinator import Coordinator, Opening, Policy
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
    Report,
    Returned,
    Staged,
    Voted,
    Withdrawn,
)

OLD, NEW = "0" * 64, "1" * 64
EPOCH = 1000
READY_SECONDS, PAUSE_SECONDS = 60.0, 10.0
SETTLED_SECONDS = 1.0
STOPPED_SECONDS = 100.0


def no(message: str, where: str = "") -> RemoteError:
    return RemoteError(type="AdapterError", message=message, where=where)


class Play:
    """Tells a coordinator events in few words; every verb returns what it decides."""

    def __init__(self, *, num_ranks: int = 1, on_failure: str = "rollback", **policy: Any) -> None:
        self.now = 0.0
        self.decisions: list[Decision] = []
        opening = Opening(
            update=f"{EPOCH}-1",
            epoch=EPOCH,
            version=Version(label="step-1", digest=NEW, parent=OLD),
            num_bytes=4096,
            world_size=num_ranks,
            deadlines=Deadlines(
                ready_seconds=READY_SECONDS,
                pause_seconds=PAUSE_SECONDS,
                return_seconds=PAUSE_SECONDS + 30.0,
            ),
        )
        self.coordinator = Coordinator(opening, Policy(on_failure, **policy), self.now)

    @property
    def report(self) -> Report:
        """What the update ended with."""
        last = self.decisions[-1]
        assert last.step == "end"
        assert last.report is not None
        return last.report

    @property
    def outcomes(self) -> dict[str, str]:
        return {replica.name: replica.outcome for replica in self.report.replicas}

    def staged(
        self,
        rank: int = 0,
        *,
        num_requests: int = 1,
        open_ended: bool = True,
        error: RemoteError | None = None,
    ) -> list[Decision]:
        span = Span("stage", f"rank {rank}", start=1.0 + rank, seconds=2.0)
        return self.on(
            Staged(
                rank=rank,
                num_requests=num_requests,
                open_ended=open_ended,
                bytes_sent=100,
                error=error,
                spans=(span,),
            )
        )

    def join(
        self,
        name: str,
        *,
        rank: int = 0,
        engine: str | None = None,
        worker: int = 0,
        world_size: int = 1,
        follower: bool = False,
        protocol: int = PROTOCOL,
        epoch: int = 0,
    ) -> list[Decision]:
        hello = Hello(
            protocol=protocol,
            replica=name,
            engine=engine or name,
            rank=worker,
            world_size=world_size,
            base=OLD,
            epoch=epoch,
        )
        return self.on(Joined(session=name, rank=rank, hello=hello, follower=follower))

    def ready(self, name: str, way_back: str = "staged") -> list[Decision]:
        return self.on(Voted(session=name, vote=Ready(way_back=way_back)))

    def applied(self, name: str, digest: str | None = NEW) -> list[Decision]:
        return self.on(Voted(session=name, vote=Applied(digest=digest, served_digest=digest)))

    def confirmed(
        self, name: str, *, pause_seconds: float = 0.5, error: RemoteError | None = None
    ) -> list[Decision]:
        vote = Confirmed(pause_seconds=pause_seconds, error=error)
        return self.on(Voted(session=name, vote=vote))

    def withdrawn(
        self, name: str, message: str = "refused", *, torn: bool = False, pause_seconds: float = 0.0
    ) -> list[Decision]:
        vote = Withdrawn(error=no(message, name), torn=torn, pause_seconds=pause_seconds)
        return self.on(Voted(session=name, vote=vote))

    def left(self, name: str, message: str = "the peer died") -> list[Decision]:
        return self.on(Left(session=name, error=no(message, name)))

    def returned(
        self, rank: int = 0, *, request: int = 0, error: RemoteError | None = None
    ) -> list[Decision]:
        return self.on(Returned(rank=rank, request=request, error=error))

    def wait(self, seconds: float) -> list[Decision]:
        """Let time pass, and wake the coordinator if it asked to be woken by then."""
        self.now += seconds
        if self.now < self.coordinator.next_deadline:
            return []
        return self._keep(self.coordinator.expire(self.now))

    def on(self, event: Event) -> list[Decision]:
        return self._keep(self.coordinator.on(event, self.now))

    # ── as far as a phase, with one engine for each name and one request for each engine ────

    def entering(self, *names: str) -> Play:
        """All have said hello."""
        self.staged(num_requests=len(names))
        for name in names:
            self.join(name)
        return self

    def applying(self, *names: str) -> Play:
        """All have been told to apply."""
        self.entering(*names)
        for name in names:
            self.ready(name)
        if len(names) == 1:
            self.wait(SETTLED_SECONDS)
        assert steps(self.decisions[-1:]) == ["apply"]
        return self

    def publishing(self, *names: str) -> Play:
        """All have been told to publish."""
        self.applying(*names)
        for name in names:
            self.applied(name)
        assert steps(self.decisions[-1:]) == ["publish"]
        return self

    def return_all(self, number: int) -> list[Decision]:
        """Every request of rank 0 comes back; what the last one leads to."""
        decided: list[Decision] = []
        for request in range(number):
            decided = self.returned(request=request)
        return decided

    def _keep(self, decided: list[Decision]) -> list[Decision]:
        self.decisions += decided
        return decided


def steps(decisions: list[Decision]) -> list[str]:
    return [decision.step for decision in decisions]
