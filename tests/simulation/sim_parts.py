"""What a simulation is made of: a clock, links that fail, a replica, a registry."""

from __future__ import annotations

import heapq
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import count

import torch

from checkpoint_engine.adapters.base import Identity, Served
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.manifest import Manifest, Version
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Store
from checkpoint_engine.transport.handover import Part

READY_SECONDS, PAUSE_SECONDS, RETURN_SECONDS = 60.0, 10.0, 40.0
SLOW_SECONDS = 3 * (READY_SECONDS + PAUSE_SECONDS + RETURN_SECONDS)
LATENCY_SECONDS = 0.001


class Crash(BaseException):
    """The process dies here: no handler of the code under test may catch it."""


@dataclass(frozen=True)
class Fault:
    """What happens to an actor at its `step`th step, counted from 0.

    Processes ("coordinator", "rank 0", "replica 1"): crash, hang, slow; raise in a replica or a
    registry. Links ("events", "decisions 0", "up 1", "down 1"): lost, late, twice, swapped.
    """

    actor: str
    step: int
    kind: str


@dataclass
class Clock:
    """Simulated time, and everything that will happen."""

    faults: tuple[Fault, ...] = ()
    rng: random.Random | None = None
    now: float = 0.0
    steps: Counter[str] = field(default_factory=Counter)
    _agenda: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: count[int] = field(default_factory=count)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later; with random numbers, what is due at once comes in any order."""
        jitter = self.rng.random() * LATENCY_SECONDS if self.rng else 0.0
        heapq.heappush(self._agenda, (self.now + seconds + jitter, next(self._numbers), action))

    def step(self, actor: str) -> str | None:
        """Count a step of an actor; the fault that strikes it there, if any does."""
        number = self.steps[actor]
        self.steps[actor] += 1
        return next((f.kind for f in self.faults if (f.actor, f.step) == (actor, number)), None)

    def run(self, check: Callable[[], None]) -> None:
        """Let everything happen, checking after each step."""
        while self._agenda:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
            check()


class Link:
    """Messages one way, in order unless a fault strikes.

    `deliver` gets the number of each and the message; at the end of the stream, -1 and None.
    """

    def __init__(self, clock: Clock, name: str, deliver: Callable[[int, object], None]) -> None:
        self._clock, self._name, self._deliver = clock, name, deliver
        self._numbers = count()
        self._free_at = 0.0
        self._held: list[tuple[int, object]] = []

    def send(self, message: object) -> None:
        number = next(self._numbers)
        fault = self._clock.step(self._name)
        if fault == "lost":
            return
        if fault == "swapped":
            self._held.append((number, message))
            return
        self._free_at = max(self._free_at, self._clock.now + LATENCY_SECONDS)
        if fault == "late":
            self._free_at += SLOW_SECONDS
        following = [(number, message), *self._held, *[(number, message)] * (fault == "twice")]
        self._held = []
        for entry in following:
            self._later(*entry)

    def close(self) -> None:
        """What was sent before arrives before the end."""
        self._held = []
        self._free_at = max(self._free_at, self._clock.now + LATENCY_SECONDS)
        self._later(-1, None)

    def _later(self, number: int, message: object) -> None:
        seconds = self._free_at - self._clock.now
        self._free_at += 2 * LATENCY_SECONDS  # more than any jitter: a stream keeps its order
        self._clock.after(seconds, lambda: self._deliver(number, message))


@dataclass
class Record:
    """One update as the registry has it; survives whoever wrote it."""

    label: str
    published: bool = False
    outcome: str | None = None


class SimRegistry:
    """`registry.Registry` in memory, which fails when a fault says so."""

    def __init__(self, clock: Clock, record: Record) -> None:
        self._clock, self.record = clock, record

    def publish(self, update: str) -> None:
        if self._clock.step("registry") == "raise":
            raise OSError("the disk is full")
        self.record.published = True

    def finish(self, update: str, outcome: str, report: bytes) -> None:
        if self._clock.step("registry") == "raise":
            raise OSError("the disk is full")
        self.record.outcome = outcome
        self.record.published = outcome == "published"


class Memory:
    """Staged memory without a socket: `transport.handover.Attachments` in short."""

    def __init__(self) -> None:
        self.num_held = 0

    def attach(self, address: str, segment: str) -> Attached:
        self.num_held += 1
        return Attached(staged_version(segment)[1])

    def release(self, address: str, segment: str, attachment: Attached) -> None:
        self.num_held -= 1


@dataclass(frozen=True)
class Attached:
    memory: memoryview


@cache
def staged_version(label: str) -> tuple[Manifest, memoryview]:
    """A version of one tensor, which says its label."""
    store = Store()
    text = torch.tensor(list(label.encode().ljust(16)), dtype=torch.uint8)
    shard = store.register(label, TensorSource({"w": text}))
    manifest, memory = shard.manifest, memoryview(bytes(shard.memory))
    store.close()
    return manifest, memory


def part_of(label: str) -> Part:
    length = staged_version(label)[0].num_bytes
    return Part(address="here", segment=label, start=0, offset=0, length=length)


class SimReplica:
    """An engine of one worker with two weights, which asserts what must never happen.

    A fault strikes it at a call of its adapter: it raises, crashes half way, is slow or hangs.
    """

    def __init__(self, clock: Clock, number: int, label: str) -> None:
        self.clock = clock
        self.actor = f"replica {number}"
        self.identity = Identity(replica=self.actor, engine=self.actor)
        self.epoch = 0
        self.undecided: str | None = None
        self.weights = [label, label]
        self.label = label
        self.alive, self.paused, self.hung = True, False, False
        self.torn: str | None = None
        self.quarantined: str | None = None
        self.busy_seconds = 0.0
        self.memory = Memory()
        self.applied = {label}  # what it has told that it applied
        self._incoming: Staged | None = None
        self._version: Version | None = None
        self._before = list(self.weights)

    def assert_truthful(self) -> None:
        """While requests are answered, they are answered by the version that is named."""
        if self.alive and not self.hung and not self.paused and self.torn is None:
            assert self.weights == [self.label] * 2, f"{self.actor} serves {self.weights}"

    def base(self) -> str | None:
        return None if self.torn else staged_version(self.label)[0].digest

    def recall(self, digest: str) -> Staged | None:
        return None

    def prepare(self, staged: Staged, version: Version) -> str:
        self._incoming, self._version = staged, version
        self._strike("prepare")
        self._before = list(self.weights)
        return "snapshot"

    def abort(self) -> None:
        self._release()
        self._strike("abort")

    def pause(self, timeout_seconds: float) -> None:
        self._strike("pause")
        self.paused = True

    def apply(self) -> None:
        assert self._version is not None
        assert self.paused, "weights change while they are served"
        self.weights[0] = self._version.label
        self._strike("apply")
        self.weights[1] = self._version.label

    def check(self) -> Served:
        self._strike("check")
        return Served(digest=staged_version(self.weights[0])[0].digest, served_digest=None)

    def publish(self) -> None:
        assert self._version is not None
        assert self.paused, "the label changes while requests are answered"
        self.label, self.torn, self.quarantined = self._version.label, None, None
        self._release()
        self._strike("publish")

    def roll_back(self) -> None:
        assert self.paused, "weights change while they are served"
        self.weights[0] = self._before[0]
        self._strike("roll_back")
        self.weights = list(self._before)
        self._release()

    def resume(self) -> None:
        self._strike("resume")
        self.paused = self.torn is not None

    def quarantine(self, reason: str) -> None:
        self.quarantined = reason

    def tear(self, reason: str) -> None:
        self.torn = reason
        self._release()

    def _release(self) -> None:
        if self._incoming is not None:
            self._incoming.release()
        self._incoming = None

    def _strike(self, call: str) -> None:
        fault = self.clock.step(self.actor)
        if fault == "raise":
            raise AdapterError(f"{call} fails")
        if fault == "crash":
            raise Crash
        if fault == "slow":
            self.busy_seconds += SLOW_SECONDS
        self.hung = self.hung or fault == "hang"
