"""A trainer's side of a sync: what is sent, in which order, and who decides.

All processes of a trainer make the weights together, as far as the model is sharded over them; the
first sends them and conducts the transaction. The others read from its keys what to make, since
that depends on what samplers serve: an adapter's base is sent before it to those who lack it.

    side = TrainerSide(engine)
    report = side.sync(model, Wanted(False, "default", label="step-120", number=1))
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import msgspec
import torch

from checkpoint_engine.adapters.attached import LacksBase
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
    UpdateFailed,
    UsageError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources.lora import BaseSeen
from checkpoint_engine.sources.training import own_rank
from checkpoint_engine.streaming.base import StreamReport
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.streaming.orders import PATIENCE, Ending, Order, raise_failed
from checkpoint_engine.streaming.steps import (
    Step,
    Steps,
    Wanted,
    Weights,
    beside,
    made,
    what_to_send,
)
from checkpoint_engine.streaming.threads import UnderWay, alone, blocking
from checkpoint_engine.streaming.transaction import conduct
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import Report

__all__ = ["FollowingSide", "TrainerSide"]

POLL_SECONDS = 0.2


class _Base(NamedTuple):
    """The base that every sampler serves, and the trainer's as it was when it was sent."""

    digest: str
    seen: BaseSeen


class TrainerSide:
    """The first process of a trainer. Borrows the engine, which has met the samplers."""

    def __init__(self, engine: StreamingEngine) -> None:
        self._engine = engine
        self._keys = engine.link.rendezvous.fork()
        self._timeout_seconds = engine.link.settings.timeout_seconds
        self._past: list[Rendezvous] = []
        self._base: _Base | None = None
        self._cancelled: CheckpointEngineError | None = None
        self._turn = threading.Lock()

    def sync(self, model: torch.nn.Module, wanted: Wanted) -> Report:
        """Send what there is to be sent; returns when all samplers serve it.

        Raises:
            UsageError: the model has no such adapter.
            UpdateFailed: no sampler serves it; says which one could not, and why.
        """
        try:
            with alone(self._turn):
                return self._sync(model, wanted)
        except UnderWay as error:
            with beside(self._keys, wanted.number) as steps:
                steps.fail(error)
            raise

    def _sync(self, model: torch.nn.Module, wanted: Wanted) -> Report:
        self._cancelled = None
        steps = Steps(self._keys, wanted.number)
        self._remember(steps.keys)
        try:
            kind, adapter = self._what_to_send(model, wanted)
            ending = self._send(model, kind, adapter, wanted.label, steps)
        except BaseException as error:  # the others must not wait, whatever it is
            steps.fail(error)
            raise
        steps.tell(Step(ending=ending))
        return raise_failed(ending)

    def cancel(self, error: CheckpointEngineError) -> None:
        """End a sync that another thread is in, if any, for this reason, unless it is decided."""
        self._cancelled = error
        self._engine.cancel(error)

    def close(self) -> None:
        """Leave."""
        self._keys.give_back()

    def _what_to_send(self, model: torch.nn.Module, wanted: Wanted) -> tuple[str, str]:
        try:
            return what_to_send(model, wanted)
        except UsageError as error:
            with contextlib.suppress(UpdateFailed):  # tells the samplers, which wait for tensors
                self._stream(_Weights(_failing(error)), "")
            raise

    def _send(
        self, model: torch.nn.Module, kind: str, adapter: str, label: str, steps: Steps
    ) -> Ending:
        step = Step(kind=kind, adapter=adapter, to=own_rank())
        if kind != "adapter":
            return self._one(model, step, label, steps)
        if self._has_base_of(model):
            ending = self._one(model, step, label, steps, more=_lacks_base)
            if not ending.more:
                return ending
        of_base = f"{label}-base" if label else ""
        of_it = msgspec.structs.replace(step, kind="base")
        ending = self._one(model, of_it, of_base, steps, more=_is_published)
        if not ending.more:
            return ending
        try:
            return self._one(model, step, label, steps)
        except UpdateFailed as error:
            raise UpdateFailed(f"the base is served, its adapter is not: {error}") from error

    def _one(
        self,
        model: torch.nn.Module,
        step: Step,
        label: str,
        steps: Steps,
        *,
        more: Callable[[Report], bool] = lambda report: False,
    ) -> Ending:
        """Send one version. `more`: whether another follows, which the samplers are told."""
        weights = self._announced(model, step, steps)
        sent = self._stream(weights, label)
        parent = self._base.digest if step.kind == "adapter" and self._base else None
        version = Version(label=sent.label, digest=sent.digest, parent=parent)
        order = Order(kind=step.kind, version=version, adapter=step.adapter)
        keys = self._keys.scope(f"sync {self._engine.link.number}")
        self._remember(keys)
        keys.put("order", msgspec.msgpack.encode(order))
        try:
            report = conduct(keys, version, sent.num_bytes, self._look, self._timeout_seconds)
        except BaseException as error:  # the samplers must not wait, whatever it is
            ending = Ending(error=RemoteError.of(error))
            with contextlib.suppress(PeerLost, DeadlineExceeded):
                keys.put("end", msgspec.msgpack.encode(ending))
            raise
        if step.kind != "adapter" and _is_published(report):
            # To what was merged, an adapter would be applied twice.
            self._base = _Base(version.digest, weights.base) if weights.base else None
        ending = Ending(report=report, more=more(report))
        keys.put("end", msgspec.msgpack.encode(ending))
        return ending

    def _look(self, is_decided: bool) -> list[int]:
        """Which samplers have died; raises why to give up."""
        if self._cancelled is not None and not is_decided:
            raise self._cancelled
        return self._engine.lost()

    def _has_base_of(self, model: torch.nn.Module) -> bool:
        """Whether the samplers were sent this model's base, as it is."""
        try:
            return self._base is not None and self._base.seen.is_of(model)
        except CheckpointEngineError:
            return False  # all are told why when it is sent

    def _announced(self, model: torch.nn.Module, step: Step, steps: Steps) -> _Weights:
        """What fails in it, the samplers hear."""

        def tensors() -> Weights:
            self._look(is_decided=False)
            if step.kind == "base":
                weights.base = BaseSeen(model)
            if not steps.claim():
                raise UpdateFailed("another of the trainer's processes has given up its call")
            steps.tell(step)
            yield from made(model, step, self._timeout_seconds)

        weights = _Weights(tensors())
        return weights

    def _stream(self, weights: _Weights, label: str) -> StreamReport:
        async def send() -> StreamReport | None:
            return await self._engine.send_weights(weights, label=label)

        try:
            sent = blocking(send())
        except Exception as error:
            if weights.has_begun:  # the trainer's other processes go on making them
                with contextlib.suppress(Exception):  # of which this one is the first
                    deque(weights, maxlen=0)
            if not isinstance(error, CheckpointEngineError):
                raise
            raise UpdateFailed(f"nothing was changed: {error}") from error
        assert sent is not None, "rank 0 sends"
        return sent

    def _remember(self, keys: Rendezvous) -> None:
        """To delete them once nobody reads them, who is at younger ones by then."""
        while len(self._past) > 4:
            self._past.pop(0).clear()
        self._past.append(keys)


def _is_published(report: Report) -> bool:
    return report.outcome == "published"


def _lacks_base(report: Report) -> bool:
    """A sampler was started anew, or has served something else since."""
    return report.reason is not None and report.reason.type == LacksBase.__name__


class _Weights:
    """Tensors that are made when they are asked for, which is when all samplers are here.

    To begin before would have the trainer's other processes wait in the middle of a collective, and
    break the group with which they train if a sampler does not come.

    Attributes:
        has_begun: whether one was asked for.
        base: as it was then, if it is one.
    """

    def __init__(self, tensors: Weights) -> None:
        self._tensors = tensors
        self.has_begun = False
        self.base: BaseSeen | None = None

    def __iter__(self) -> Weights:
        return self

    def __next__(self) -> tuple[str, torch.Tensor]:
        self.has_begun = True
        return next(self._tensors)


class FollowingSide:
    """Another process of a trainer: it makes weights, and hears how it ended.

    Args:
        keys: that the first one keeps; taken over.
        timeout_seconds: the longest wait for it to go on.
    """

    def __init__(self, keys: Rendezvous, timeout_seconds: float) -> None:
        self._keys = keys
        self._timeout_seconds = timeout_seconds
        self._cancelled: CheckpointEngineError | None = None
        self._turn = threading.Lock()

    def sync(self, model: torch.nn.Module, wanted: Wanted) -> Report:
        """As `TrainerSide.sync`, in step with it."""
        try:
            with alone(self._turn):
                self._cancelled = None
                what_to_send(model, wanted)
                steps = Steps(self._keys, wanted.number)
                while (ending := (step := self._next(steps)).ending) is None:
                    for _ in made(model, step, self._timeout_seconds):
                        pass
        except UnderWay:
            with beside(self._keys, wanted.number) as steps:
                steps.leave()  # nobody is to gather with this process, which does not
            raise
        return raise_failed(ending)

    def cancel(self, error: CheckpointEngineError) -> None:
        """Leave a sync that another thread is in, if any, as soon as nobody waits for weights."""
        self._cancelled = error

    def close(self) -> None:
        """Leave."""
        self._keys.give_back()

    def _next(self, steps: Steps) -> Step:
        """What the first process says; once that has claimed a step, nobody leaves before it."""
        last = time.monotonic() + PATIENCE * self._timeout_seconds
        late: CheckpointEngineError = DeadlineExceeded(
            "the trainer's first process does not say what to send: all of its processes call "
            "sync_weights() alike"
        )
        while True:
            with contextlib.suppress(DeadlineExceeded):
                return steps.next(POLL_SECONDS)
            now, why = time.monotonic(), self._cancelled
            if (now > last or why is not None) and steps.leave():
                raise why or late
            if now > last + self._timeout_seconds:
                raise late


def _failing(error: UsageError) -> Weights:
    raise error
    yield  # makes it a generator
