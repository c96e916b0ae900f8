"""An engine whose weights are bytes, staged memory without a socket, and a session by hand."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoint_engine.adapters.base import Identity, Served
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.errors import AdapterError, PeerLost
from checkpoint_engine.manifest import Manifest, Version
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Shard, Store
from checkpoint_engine.transport.handover import Part
from checkpoint_engine.update.protocol import Deadlines, FromRank, FromSession, Offer, Stop
from checkpoint_engine.update.session import Outcome, Receive, Send, session

EPOCH = 500
DEADLINES = Deadlines(ready_seconds=120.0, pause_seconds=20.0, return_seconds=50.0)


class Memory:
    """Store memory of this very process, and who holds it: `transport.handover` in short."""

    def __init__(self) -> None:
        self.store = Store()
        self.held: list[str] = []

    def register(self, label: str, tensors: dict[str, torch.Tensor]) -> Shard:
        return self.store.register(label, TensorSource(tensors))

    def parts(self, shard: Shard) -> tuple[Part, ...]:
        return (
            Part(
                address="here",
                segment=shard.segment.name,
                start=0,
                offset=0,
                length=shard.manifest.num_bytes,
            ),
        )

    def staged(self, label: str, tensors: dict[str, torch.Tensor]) -> Staged:
        shard = self.register(label, tensors)
        return Staged.attach(shard.manifest, self.parts(shard), self)  # type: ignore[arg-type]

    def attach(self, address: str, segment: str) -> _Attachment:
        found = self.store.segment(segment)
        assert found is not None
        self.held.append(segment)
        return _Attachment(found.memory)

    def release(self, address: str, segment: str, attachment: _Attachment) -> None:
        self.held.remove(segment)


@dataclass(frozen=True)
class _Attachment:
    memory: memoryview


def content_of(shard: Shard) -> Staged:
    """The bytes of a shard, as `LiveModel.bind` takes them."""
    staged = Staged(shard.manifest, [], None)  # type: ignore[arg-type]
    staged.memory = lambda start, end: shard.memory[start:end]  # type: ignore[method-assign]
    return staged


@dataclass
class ToyAdapter:
    """Serves some bytes under a label; fails in the methods named in `failing`.

    It is as strict as an engine: requests go on only if they were held, and whatever fails, fails
    half-way.
    """

    weights: bytes
    label: str
    failing: set[str] = field(default_factory=set)
    failure: type[Exception] = AdapterError
    identity: Identity = field(default_factory=lambda: Identity(replica="toy", engine="toy engine"))
    epoch: int = 0
    undecided: str | None = None
    paused: bool = False
    paused_for: float | None = None
    torn: str | None = None
    quarantined: str | None = None
    calls: list[str] = field(default_factory=list)
    staged: Staged | None = None
    _version: Version | None = None
    _before: bytes = b""

    def base(self) -> str | None:
        return self.label

    def recall(self, digest: str) -> Staged | None:
        return None

    def prepare(self, staged: Staged, version: Version) -> str:
        self.staged, self._version = staged, version
        self._call("prepare")
        self._before = self.weights
        return "snapshot"

    def abort(self) -> None:
        self._call("abort")
        self._release()

    def pause(self, timeout_seconds: float) -> None:
        self.paused_for = timeout_seconds
        self._call("pause")
        self.paused = True

    def apply(self) -> None:
        assert self.paused, "weights changed while they were served"
        new = self._new()
        self.weights = new[: len(new) // 2] + self.weights[len(new) // 2 :]
        self._call("apply")
        self.weights = new

    def check(self) -> Served:
        self._call("check")
        return Served(digest=self._manifest().digest, served_digest="served")

    def publish(self) -> None:
        assert self.paused, "the label changed while requests were served"
        assert self._version is not None
        self.label = self._version.label
        self._release()
        self._call("publish")

    def roll_back(self) -> None:
        assert self.paused, "weights changed while they were served"
        self._call("roll_back")
        self.weights = self._before
        self._release()

    def resume(self) -> None:
        assert self.paused, "nobody held the requests"
        self._call("resume")
        self.paused = False

    def quarantine(self, reason: str) -> None:
        self.quarantined = reason

    def tear(self, reason: str) -> None:
        self.torn = reason
        self._release()

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise self.failure(f"{name} failed")

    def _manifest(self) -> Manifest:
        assert self.staged is not None
        return self.staged.manifest

    def _new(self) -> bytes:
        assert self.staged is not None
        return b"".join(bytes(tensor.numpy()) for _, tensor in self.staged.tensors())

    def _release(self) -> None:
        if self.staged is not None:
            self.staged.release()
        self.staged = None


@dataclass
class Scene:
    """A toy engine that serves "old", and the offer of "new"."""

    memory: Memory
    adapter: ToyAdapter
    offer: Offer
    old: bytes
    new: bytes
    sent: list[FromSession] = field(default_factory=list)
    waited: list[float] = field(default_factory=list)
    unheard: list[FromRank | Exception] = field(default_factory=list)

    @classmethod
    def make(cls, failing: Sequence[str] = (), **fields: Any) -> Scene:
        memory = Memory()
        old, new = torch.arange(64, dtype=torch.uint8), torch.arange(64, 128, dtype=torch.uint8)
        shard = memory.register("new", {"w": new})
        offer = Offer(
            update=f"{EPOCH}-1",
            epoch=EPOCH,
            version=Version(label="new", digest=shard.manifest.digest),
            manifest=shard.manifest.to_msgpack(),
            parts=memory.parts(shard),
            deadlines=DEADLINES,
        )
        weights = bytes(old.numpy())
        adapter = ToyAdapter(weights=weights, label="old", failing=set(failing), **fields)
        return cls(memory, adapter, offer, weights, bytes(new.numpy()))

    def play(self, *replies: FromRank | Exception, lost_at: str | None = None) -> Outcome:
        """Play the session: each wait takes the next reply, and a missing one is a lost peer.

        `lost_at` names the message whose sending finds the peer gone; no reply comes after that.
        """
        remaining = list(replies)
        steps = session(self.adapter, self.memory)  # type: ignore[arg-type]
        try:
            step = next(steps)
            while True:
                if isinstance(step, Receive):
                    self.waited.append(step.timeout_seconds)
                    reply = remaining.pop(0) if remaining else PeerLost("the rank is gone")
                    step = _resume(steps, reply)
                else:
                    if type(step.message).__name__ == lost_at:
                        remaining.clear()
                        step = steps.throw(PeerLost("the rank is gone"))
                        continue
                    self.sent.append(step.message)
                    step = steps.send(None)
        except StopIteration as end:
            self.unheard = remaining
            return end.value

    def check(self, outcome: Outcome) -> None:
        """Whatever happened: one true version under its own label, and nothing held in vain."""
        adapter = self.adapter
        if outcome.state == "torn":
            assert adapter.torn is not None
            assert outcome.error is not None
        else:
            assert adapter.torn is None
            assert not adapter.paused, "requests wait for ever"
            expected = {"published": (self.new, "new"), "kept": (self.old, "old")}[outcome.state]
            assert (adapter.weights, adapter.label) == expected
        assert (outcome.label == "new") == (outcome.state == "published")
        assert self.memory.held == [], "staged memory is leased for ever"
        assert adapter.epoch == EPOCH

    @property
    def said(self) -> list[str]:
        return [type(message).__name__ for message in self.sent]


Steps = Generator[Send | Receive, Any, Outcome]


def _resume(steps: Steps, reply: FromRank | Exception) -> Send | Receive:
    return steps.throw(reply) if isinstance(reply, Exception) else steps.send(reply)


def stop(reason: str = "another replica said no", *, quarantine: bool = False) -> Stop:
    return Stop(reason=reason, quarantine=quarantine)
