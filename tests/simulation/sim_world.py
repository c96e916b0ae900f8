"""One update of a whole fleet on simulated time: the real coordinator, relays and sessions.

What is simulated is what lies between them: the clock, sockets, logs, engines and the registry.
Every process can crash, hang or be slow, and every link can lose, delay, double and swap messages,
at each of its steps. After each step the fleet is checked; at the end, that nobody waits any more.

    world = World(Shape(num_replicas=2), faults=(Fault("replica 0", 2, "crash"),))
    world.run()
    world.recover()
"""

from __future__ import annotations

import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from sim_parts import (
    PAUSE_SECONDS,
    READY_SECONDS,
    RETURN_SECONDS,
    SLOW_SECONDS,
    Clock,
    Crash,
    Fault,
    Link,
    Record,
    SimRegistry,
    SimReplica,
    part_of,
    staged_version,
)

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    RemoteError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.update.conductor import record
from checkpoint_engine.update.coordinator import Coordinator, Opening, Policy
from checkpoint_engine.update.protocol import (
    Applied,
    Deadlines,
    Decision,
    Event,
    Hello,
    Offer,
    Report,
    Returned,
    Staged,
)
from checkpoint_engine.update.relay import Action, Relay, Tell
from checkpoint_engine.update.session import Outcome, Receive, Send, session

LOG_SECONDS = 2 * READY_SECONDS + 60.0  # how long a rank waits for a coordinator that says nothing
DEADLINES = Deadlines(
    ready_seconds=READY_SECONDS, pause_seconds=PAUSE_SECONDS, return_seconds=RETURN_SECONDS
)
DEAF = ("down", "up", "rank", "decisions", "coordinator")  # faults by which a verdict is lost
OLD = "v0"
GONE = RemoteError(type="PeerLost", message="the engine's process died")


@dataclass(frozen=True)
class Shape:
    """Replicas of one worker each; one rank calls all of them, or each has its own."""

    num_replicas: int = 2
    ranks_of_their_own: bool = False
    on_failure: str = "rollback"

    @property
    def num_ranks(self) -> int:
        return self.num_replicas if self.ranks_of_their_own else 1

    def rank_of(self, replica: int) -> int:
        return replica if self.ranks_of_their_own else 0


class World:
    """An update of replicas that serve "v0" to "v1", and what becomes of it."""

    def __init__(
        self,
        shape: Shape,
        faults: tuple[Fault, ...] = (),
        seed: int | None = None,
        *,
        replicas: list[SimReplica] | None = None,
        number: int = 1,
    ) -> None:
        self.shape, self.number = shape, number
        self.clock = Clock(faults, None if seed is None else random.Random(seed))
        self.record = Record(label=f"v{number}")
        self.replicas = replicas or [
            SimReplica(self.clock, index, OLD) for index in range(shape.num_replicas)
        ]
        self.ranks = [Rank(self, index) for index in range(shape.num_ranks)]
        self.leader = Leader(self)
        self.workers = [Worker(self, index) for index in range(shape.num_replicas)]

    @property
    def report(self) -> Report | None:
        return self.leader.report

    def run(self) -> None:
        """Run the update to its end, and check how it ended."""
        for rank in self.ranks:
            self.clock.after(0.0, rank.stage)
        self.clock.after(READY_SECONDS, self.leader.wake)
        self.clock.run(self._check)
        self._check_end()

    def recover(self) -> None:
        """Whoever is dead or hangs is started anew; the next update brings everyone forward."""
        clock = Clock()
        for index, replica in enumerate(self.replicas):
            if not replica.alive or replica.hung:
                self.replicas[index] = SimReplica(clock, index, OLD)
            self.replicas[index].clock = clock
            self.replicas[index].busy_seconds = 0.0
        after = World(self.shape, replicas=self.replicas, number=self.number + 1)
        after.clock = clock
        for part in (*after.ranks, *after.workers, after.leader):
            part.connect(clock)
        after.run()
        assert after.report is not None
        assert after.report.outcome == "published", after.report.reason
        labels = {replica.label for replica in self.replicas}
        assert labels == {f"v{after.number}"}, f"after recovery there is still {labels}"
        for replica in self.replicas:
            state = (replica.torn, replica.quarantined, replica.paused)
            assert state == (None, None, False), f"after recovery it is {state}"

    def check_publish(self) -> None:
        """Before it is recorded: everyone who is not left out has told that it has applied."""
        for replica in self.replicas:
            if replica.alive and not replica.hung and self.shape.on_failure == "rollback":
                assert self.record.label in replica.applied, "published before all have applied"

    def _check(self) -> None:
        for replica in self.replicas:
            replica.assert_truthful()
            if replica.label == self.record.label and replica.alive:
                assert self.record.published, "published before it was recorded"

    def _check_end(self) -> None:
        """Nothing waits beyond its deadline, nothing is held in vain, and the report is true."""
        longest = READY_SECONDS + PAUSE_SECONDS + RETURN_SECONDS + LOG_SECONDS
        assert self.clock.now < 2 * longest + 8 * SLOW_SECONDS, "somebody waited too long"
        for worker, replica in zip(self.workers, self.replicas, strict=True):
            if replica.alive and not replica.hung:
                assert worker.ended, f"{replica.actor} waits for ever"
                said_so = replica.torn is not None or replica.quarantined is not None
                assert not replica.paused or said_so, "requests wait for ever"
                assert replica.memory.num_held == 0, "staged memory is leased for ever"
        stuck = self.leader.alive and not self.leader.hung and not self.leader.done
        assert not stuck, "the coordinator waits for ever"
        if self.report is not None:
            self._check_report(self.report)

    def _check_report(self, report: Report) -> None:
        if self.record.outcome is not None:  # else the end could not be recorded
            assert (report.outcome == "published") == self.record.published
        by_name = {replica.actor: replica for replica in self.replicas}
        for told in report.replicas:
            replica = by_name[told.name]
            if told.outcome.startswith("published"):
                assert replica.label == self.record.label
            elif told.outcome in ("kept", "quarantined") and replica.alive:
                assert replica.label != self.record.label
            heard = not any(f.actor.startswith(DEAF) for f in self.clock.faults)
            if told.outcome == "quarantined" and replica.alive and not replica.hung and heard:
                assert replica.quarantined is not None, "it is said to be out of service"
        if report.outcome != "published":
            assert report.reason is not None, "a failure without a cause"
            assert all(r.label != self.record.label for r in self.replicas if r.alive)


class Process:
    """Something that takes steps, and may crash, hang or be slow at any of them."""

    def __init__(self, world: World, actor: str) -> None:
        self.world, self.actor = world, actor
        self.alive, self.hung = True, False
        self._busy_until = 0.0
        self.connect(world.clock)

    def connect(self, clock: Clock) -> None:
        self.clock = clock

    def ready(self, again: Any) -> bool:
        """Whether it takes this step now: not if it crashes, hangs, or is busy until later."""
        if not self.alive or self.hung:
            return False
        if self.clock.now < self._busy_until:
            self.clock.after(self._busy_until - self.clock.now, again)
            return False
        fault = self.clock.step(self.actor)
        self.hung = fault == "hang"
        if fault == "crash":
            self.crash()
        if fault == "slow":
            self._busy_until = self.clock.now + SLOW_SECONDS
            self.clock.after(SLOW_SECONDS, again)
        return fault is None

    def crash(self) -> None:
        self.alive = False


class Leader(Process):
    """The coordinator, in the process of rank 0: they die together."""

    def __init__(self, world: World) -> None:
        self.done, self.ended_at = False, 0.0
        self.report: Report | None = None
        super().__init__(world, "coordinator")
        version = Version(
            label=f"v{world.number}", digest=staged_version(world.record.label)[0].digest
        )
        opening = Opening(
            update=f"update {world.number}",
            epoch=world.number,
            version=version,
            num_bytes=256,
            world_size=world.shape.num_ranks,
            deadlines=DEADLINES,
        )
        self._coordinator = Coordinator(opening, Policy(world.shape.on_failure), 0.0)

    def connect(self, clock: Clock) -> None:
        super().connect(clock)
        self._registry = SimRegistry(clock, self.world.record)
        self.events = Link(clock, "events", lambda _, event: self.hear(event))

    def hear(self, event: Any) -> None:
        if self.ready(lambda: self.hear(event)) and not self.done:
            self._decide(self._coordinator.on(event, self.clock.now))

    def wake(self) -> None:
        """Its deadline may have passed."""
        if self.ready(self.wake) and not self.done:
            if self.clock.now >= self._coordinator.next_deadline:
                self._decide(self._coordinator.expire(self.clock.now))
            else:
                self._sleep()

    def _decide(self, decided: list[Decision]) -> None:
        update = f"update {self.world.number}"
        if any(decision.step == "publish" for decision in decided):
            self.world.check_publish()
        told = record(decided, self._coordinator, self._registry, update, lambda: self.clock.now)
        for decision in told:
            for rank in self.world.ranks:
                rank.decisions.send(decision)
            if decision.step == "end":
                self.done, self.report, self.ended_at = True, decision.report, self.clock.now
        if decided and not self.done:
            self._sleep()

    def _sleep(self) -> None:
        seconds = self._coordinator.next_deadline - self.clock.now
        self.clock.after(max(0.0, seconds), self.wake)

    def crash(self) -> None:
        super().crash()
        self.world.ranks[0].crash()


class Rank(Process):
    """A rank: it stages, makes the calls, and passes on what its relay says."""

    def __init__(self, world: World, number: int) -> None:
        self.number, self.ended, self._called = number, False, False
        self._num_heard = 0
        label = world.record.label
        manifest = staged_version(label)[0]
        offer = Offer(
            update=f"update {world.number}",
            epoch=world.number,
            version=Version(label=label, digest=manifest.digest),
            manifest=manifest.to_msgpack(),
            parts=(part_of(label),),
            deadlines=DEADLINES,
        )
        self.relay = Relay(number, offer)
        self.sessions: dict[str, Worker] = {}
        super().__init__(world, f"rank {number}")

    def connect(self, clock: Clock) -> None:
        super().connect(clock)
        self.decisions = Link(clock, f"decisions {self.number}", self.hear)
        clock.after(LOG_SECONDS, self.give_up)

    @property
    def calls(self) -> list[int]:
        shape = self.world.shape
        return [i for i in range(shape.num_replicas) if shape.rank_of(i) == self.number]

    def stage(self) -> None:
        if self.ready(self.stage):
            self.post(Staged(rank=self.number, num_requests=len(self.calls)))

    def hear(self, number: int, decision: Any) -> None:
        """A decision; a log gives each entry once and in order, or nothing more."""
        if self.ended or not self.ready(lambda: self.hear(number, decision)):
            return
        if number != self._num_heard:
            return
        self._num_heard += 1
        if decision.step == "end":
            self.close()
        elif decision.step == "enter":
            self._called = True
            for index in self.calls:
                self.clock.after(0.0, self.world.workers[index].start)
        else:
            self.perform(self.relay.decided(decision))
            if decision.step == "stop" and not self._called:
                for request, _ in enumerate(self.calls):
                    self.post(Returned(rank=self.number, request=request))

    def give_up(self) -> None:
        """The coordinator has said nothing for as long as it may."""
        if self.alive and not self.ended:
            self.close()

    def close(self) -> None:
        self.ended = True
        for worker in self.sessions.values():
            worker.hang_up()

    def crash(self) -> None:
        super().crash()
        self.close()
        if self.number == 0:
            self.world.leader.alive = False
            for rank in self.world.ranks[1:]:  # they learn it when they next use the store
                self.clock.after(1.0, rank.give_up)

    def post(self, event: Event) -> None:
        if self.alive and not self.ended:
            self.world.leader.events.send(event)

    def perform(self, actions: list[Action]) -> None:
        for action in actions:
            if isinstance(action, Tell):
                self.sessions[action.session].down.send(action.message)
            else:
                self.post(action)


class Worker:
    """A replica's session and its connection, both ends of it."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.ended = True  # until it is called
        self._name = ""  # by which the rank knows the session
        self._open_here = self._open_there = False
        self._num_up = self._num_down = 0
        self._inbox: list[Any] = []
        self._steps: Generator[Send | Receive, Any, Outcome] | None = None
        self._waiting = 0  # which of its waits this is, 0 while it does not wait
        self._num_waits = 0
        self.connect(world.clock)

    def connect(self, clock: Clock) -> None:
        self.clock = clock
        self.up = Link(clock, f"up {self.number}", self._arrive_up)
        self.down = Link(clock, f"down {self.number}", self._arrive_down)

    @property
    def replica(self) -> SimReplica:
        return self.world.replicas[self.number]

    @property
    def rank(self) -> Rank:
        return self.world.ranks[self.world.shape.rank_of(self.number)]

    @property
    def _runs(self) -> bool:
        return self.replica.alive and not self.replica.hung

    # ── the replica's end ───────────────────────────────────────────────────────────────────

    def start(self) -> None:
        """The engine was called: it connects to the handle."""
        if not self._runs:
            return
        if not self.rank.alive:
            self._return(GONE)
            return
        self.ended, self._open_here, self._open_there = False, True, True
        self._steps = session(self.replica, self.replica.memory)  # type: ignore[arg-type]
        self._advance(None)

    def _advance(self, reply: Any) -> None:
        """Run the session to its next wait."""
        assert self._steps is not None
        self._waiting = 0
        try:
            while True:
                if isinstance(reply, Exception):
                    step = self._steps.throw(reply)
                else:
                    step = self._steps.send(reply)
                if self.replica.hung:
                    return
                if isinstance(step, Receive):
                    self._wait(step.timeout_seconds)
                    return
                reply = self._send(step.message)
        except StopIteration as end:
            self._finish(end.value.error)
        except Crash:
            self.replica.alive = False
            self._finish(GONE)
        except CheckpointEngineError as error:  # nothing was offered
            self._finish(RemoteError.of(error))

    def _send(self, message: Any) -> PeerLost | None:
        if not self._open_there:
            return PeerLost("the rank is gone")
        busy, self.replica.busy_seconds = self.replica.busy_seconds, 0.0
        self.clock.after(busy, lambda: self._send_now(message))
        return None

    def _send_now(self, message: Any) -> None:
        if isinstance(message, Applied):
            self.replica.applied.add(self.world.record.label)
        self.up.send(message)

    def _wait(self, timeout_seconds: float) -> None:
        self._num_waits += 1
        self._waiting = wait = self._num_waits
        if self._inbox:
            self._advance(self._inbox.pop(0))
        else:
            self.clock.after(timeout_seconds, lambda: self._expire(wait))

    def _expire(self, wait: int) -> None:
        if self._waiting == wait and self._runs:
            self._advance(DeadlineExceeded("nothing came in time"))

    def _arrive_down(self, number: int, message: object) -> None:
        if not self._open_here or not self._runs:
            return
        if message is None:
            message = PeerLost("the rank has hung up")
        elif number != self._num_down:  # as `transport.channel` does
            message = ProtocolError(f"message {number} arrived where {self._num_down} was due")
        self._num_down += 1
        if self._waiting:
            self._advance(message)
        else:
            self._inbox.append(message)

    def _finish(self, error: RemoteError | None) -> None:
        self.ended, self._open_here = True, False
        self.clock.after(self.replica.busy_seconds, self.up.close)
        self._return(error)

    def _return(self, error: RemoteError | None) -> None:
        """The engine's call returns."""
        index = self.rank.calls.index(self.number)
        event = Returned(rank=self.rank.number, request=index, error=error)
        self.clock.after(0.001, lambda: self.rank.post(event))

    # ── the rank's end ──────────────────────────────────────────────────────────────────────

    def hang_up(self) -> None:
        if self._open_there:
            self._open_there = False
            self.down.close()

    def _arrive_up(self, number: int, message: object) -> None:
        rank = self.rank
        if not self._open_there or not rank.ready(lambda: self._arrive_up(number, message)):
            return
        if message is None:
            rank.perform(self._left(GONE))
        elif number != self._num_up:
            rank.perform(self._left(RemoteError(type="ProtocolError", message="out of sequence")))
        elif isinstance(message, Hello):
            self._name, actions = rank.relay.joined(message)
            rank.sessions[self._name] = self
            rank.perform(actions)
        else:
            rank.perform(rank.relay.voted(self._name, message))  # type: ignore[arg-type]
        self._num_up += 1
        if not self._name or not rank.relay.is_open(self._name):
            self.hang_up()

    def _left(self, error: RemoteError) -> list[Action]:
        """Before its hello, nobody knew that it was there."""
        return self.rank.relay.left(self._name, error) if self._name else []
