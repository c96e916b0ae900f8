"""Whatever happens in whatever order, nobody is told to publish what others rolled back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from coordinator_play import PAUSE_SECONDS, READY_SECONDS, Play, no
from hypothesis import Phase, event, given, settings
from hypothesis import strategies as st

from checkpoint_engine.update.protocol import Decision

MUCH_LATER = 1000.0


@dataclass
class Worker:
    """One worker of an engine, which does what it was told, or fails."""

    name: str
    engine: str
    rank: int
    world_size: int
    state: str = "new"

    def go_on(self, play: Play) -> None:
        """What a session does next, once it has been told to."""
        if self.state == "new":
            self.state = "joined"
            play.join(self.name, engine=self.engine, worker=self.rank, world_size=self.world_size)
        elif self.state == "joined":
            self.state = "ready"
            play.ready(self.name)
        elif self.state == "told apply":
            self.state = "applied"
            play.applied(self.name)
        elif self.state == "told publish":
            self.state = "published"
            play.confirmed(self.name)
        elif self.state == "told stop":
            self.state = "gone"
            play.withdrawn(self.name)

    def refuse(self, play: Play) -> None:
        self._leave(lambda: play.withdrawn(self.name))

    def tear(self, play: Play) -> None:
        self._leave(lambda: play.withdrawn(self.name, torn=True))

    def die(self, play: Play) -> None:
        self._leave(lambda: play.left(self.name))

    def _leave(self, say: Callable[[], object]) -> None:
        if self.state not in ("new", "gone", "published", "told publish"):
            self.state = "gone"
            say()


@dataclass
class Fleet:
    """The workers of some engines, the coordinator, and what has been said by whom."""

    play: Play
    workers: list[Worker]
    world_size: int
    min_replicas: int
    returned: set[str] = field(default_factory=set)
    num_heard: int = 0
    publishing: Decision | None = None
    stopped: bool = False

    def act(self, number: int, action: str, seconds: float = 0.0) -> None:
        worker = self.workers[number % len(self.workers)]
        if action == "wait":
            self.play.wait(seconds)
        elif action == "return_request":
            self.return_request(worker.engine)
        else:
            getattr(worker, action)(self.play)
        self.hear()

    def return_request(self, engine: str) -> None:
        """An engine's call ends, with an error unless it was published."""
        if engine in self.returned:
            return
        self.returned.add(engine)
        states = {worker.state for worker in self.workers if worker.engine == engine}
        error = None if states == {"published"} else no("the call failed", engine)
        self.play.returned(request=int(engine), error=error)

    def hear(self) -> None:
        """Tell the workers what has been decided since, and check that it may be."""
        while self.num_heard < len(self.play.decisions):
            decision = self.play.decisions[self.num_heard]
            self.check(decision, [d.step for d in self.play.decisions[: self.num_heard]])
            self.num_heard += 1
            for worker in self.workers:
                if worker.state in ("new", "gone") or decision.step in ("enter", "end"):
                    continue
                goes_on = worker.name in decision.proceed
                worker.state = f"told {decision.step if goes_on else 'stop'}"

    def check(self, decision: Decision, before: list[str]) -> None:
        assert decision.step not in before
        assert "end" not in before
        proceeding = [worker for worker in self.workers if worker.name in decision.proceed]
        if decision.step in ("apply", "publish"):
            num_engines = len({worker.engine for worker in proceeding})
            assert num_engines >= self.min_replicas
            assert len(proceeding) == num_engines * self.world_size, "half an engine"
            assert not set(decision.proceed) & set(decision.quarantine)
        if decision.step == "apply":
            assert before == ["enter"]
            assert {worker.state for worker in proceeding} == {"ready"}
        elif decision.step == "publish":
            assert before == ["enter", "apply"]
            assert {worker.state for worker in proceeding} == {"applied"}
            self.publishing = decision
        elif decision.step == "stop":
            assert "publish" not in before
            self.stopped = True

    def finish(self) -> None:
        """Nobody says another word: every deadline passes."""
        for _ in range(5):
            if self.play.coordinator.done:
                break
            self.play.wait(MUCH_LATER)
            self.hear()
        assert self.play.coordinator.done, "a wait without an end"
        self.check_report()

    def check_report(self) -> None:
        report = self.play.report
        assert (report.outcome == "published") == (self.publishing is not None)
        assert self.stopped == (self.publishing is None)
        proceeded = set(self.publishing.proceed) if self.publishing else set()
        for replica in report.replicas:
            if replica.outcome.startswith("published"):
                assert replica.name in proceeded
            if replica.outcome == "quarantined":
                assert replica.name not in proceeded
                assert any(replica.name in d.quarantine for d in self.play.decisions)
        if report.outcome != "published":
            assert report.reason is not None


def new_fleet(
    num_engines: int, world_size: int = 1, on_failure: str = "rollback", min_replicas: int = 1
) -> Fleet:
    play = Play(on_failure=on_failure, min_replicas=min_replicas)
    play.staged(num_requests=num_engines)
    workers = [
        Worker(f"{engine}.{rank}", f"{engine}", rank, world_size)
        for engine in range(num_engines)
        for rank in range(world_size)
    ]
    fleet = Fleet(play, workers, world_size, min_replicas)
    fleet.hear()
    return fleet


fleets = st.tuples(
    st.integers(2, 3),
    st.integers(1, 2),
    st.sampled_from(["rollback", "quarantine", "quarantine"]),
    st.integers(1, 2),
)
actions = ["go_on"] * 20 + ["refuse", "tear", "die", "return_request", "wait"]
waits = st.sampled_from([0.1, 6.0, PAUSE_SECONDS, READY_SECONDS])
schedules = st.lists(
    st.tuples(st.integers(0, 5), st.sampled_from(actions), waits), min_size=20, max_size=50
)


@settings(max_examples=400, deadline=None, phases=set(Phase) - {Phase.explain})
@given(fleets, schedules)
def test_every_schedule_ends_and_publishes_only_what_was_applied(
    shape: tuple[int, int, str, int], schedule: list[tuple[int, str, float]]
) -> None:
    fleet = new_fleet(*shape)
    for number, action, seconds in schedule:
        fleet.act(number, action, seconds)
    fleet.finish()
    event(fleet.play.report.outcome)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 3), st.integers(1, 2), st.permutations(list(range(6)) * 4))
def test_without_failures_every_order_of_votes_publishes_to_all(
    num_engines: int, world_size: int, order: list[int]
) -> None:
    fleet = new_fleet(num_engines, world_size)
    for number in [*order, *range(6), *range(6), *range(6), *range(6)]:
        fleet.act(number, "go_on")
    for worker in fleet.workers:
        fleet.return_request(worker.engine)
    assert fleet.play.report.outcome == "published"
    assert set(fleet.play.outcomes.values()) == {"published"}


verbs = ["ready", "applied", "confirmed"] * 5 + ["withdrawn", "left"]
disorder = st.lists(
    st.tuples(st.sampled_from(["a", "b"]), st.sampled_from(verbs)), min_size=3, max_size=20
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(["rollback", "quarantine"]), disorder)
def test_votes_repeated_and_out_of_turn_publish_nothing_that_was_not_applied(
    on_failure: str, votes: list[tuple[str, str]]
) -> None:
    play = Play(on_failure=on_failure).entering("a", "b")
    told: set[str] = set()
    applied: set[str] = set()
    for name, verb in votes:
        if verb == "applied" and name in told:
            applied.add(name)
        for decision in getattr(play, verb)(name):
            if decision.step == "apply":
                told |= set(decision.proceed)
            if decision.step == "publish":
                assert set(decision.proceed) <= applied
    for _ in range(5):
        play.wait(MUCH_LATER)
    assert play.coordinator.done
