"""The receiving side of an update, inside an engine's worker.

`session` is the protocol as a generator: it yields what to send or wait for, and is sent what
arrives. It owns no socket and no clock, so that tests can play every schedule against it; `run`
plays it against a real channel.

A session never waits for ever. In doubt, past a deadline or when its rank is gone, it returns to
its base and serves that truthfully.

    outcome = run(address, adapter, attachments)
    if outcome.error: ...                                   # the engine call must fail
"""

from __future__ import annotations

import contextlib
import time
import traceback
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from checkpoint_engine.adapters.base import Adapter, Content
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    RemoteError,
    UpdateRefused,
)
from checkpoint_engine.manifest import decode_manifest
from checkpoint_engine.timeline import Span, Timeline
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.files import fetch_files
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.transport.remote import RemoteTensors
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    FromRank,
    FromSession,
    Hello,
    Offer,
    Proceed,
    Ready,
    Stop,
    Withdrawn,
)

__all__ = ["Outcome", "Receive", "Send", "run", "session"]

GREETING_SECONDS = 60.0


@dataclass(frozen=True)
class Send:
    """Send this to the rank."""

    message: FromSession


@dataclass(frozen=True)
class Receive:
    """Wait this long for the rank's next message."""

    timeout_seconds: float


@dataclass(frozen=True)
class Outcome:
    """How a session ended: "published", "kept" (the base, as before) or "torn"."""

    state: str
    label: str | None = None
    error: RemoteError | None = None


Result = TypeVar("Result")
Steps = Generator[Send | Receive, Any, Result]


class _Halt(CheckpointEngineError):
    """The rank said stop, or nothing: return to the base."""

    def __init__(self, reason: str, *, quarantine: bool = False) -> None:
        super().__init__(reason)
        self.quarantine = quarantine


@dataclass
class _Progress:
    """How far this session has come, which says what has to be undone."""

    timeline: Timeline
    stage: str = "entering"  # entering, changed, applied
    paused_at: float | None = None
    pause_seconds: float = 0.0

    def resume(self, adapter: Adapter) -> None:
        """Let requests go on, and stop the clock that counts how long they waited."""
        if self.paused_at is not None:
            with self.timeline.span("resume"):
                adapter.resume()
            self.pause_seconds = time.monotonic() - self.paused_at
            self.paused_at = None

    @property
    def spans(self) -> tuple[Span, ...]:
        """What was recorded since this was last asked."""
        spans, self.timeline.spans = self.timeline.spans, []
        return tuple(spans)


def session(adapter: Adapter, attachments: Attachments) -> Steps[Outcome]:
    """Take one update through an adapter; see the module's text."""
    who = adapter.identity
    hello = Hello(
        protocol=PROTOCOL,
        replica=who.replica,
        engine=who.engine,
        rank=who.rank,
        world_size=who.world_size,
        base=adapter.base(),
        epoch=adapter.epoch,
        undecided=adapter.undecided,
    )
    yield Send(hello)
    offer = yield Receive(GREETING_SECONDS)
    if isinstance(offer, Stop):
        raise UpdateRefused(offer.reason)
    if not isinstance(offer, Offer):
        raise ProtocolError(f"an offer was due, not {type(offer).__name__}")
    progress = _Progress(Timeline(who.replica))
    adapter.epoch = max(adapter.epoch, offer.epoch)
    try:
        yield from _enter(adapter, attachments, offer, progress)
        yield from _await("apply", offer.deadlines.ready_seconds)
        yield from _apply(adapter, offer, progress)
        yield from _await("publish", offer.deadlines.decision_seconds)
    except Exception as error:
        return (yield from _withdraw(adapter, offer, progress, error))
    return (yield from _publish(adapter, offer, progress))


def run(address: str, adapter: Adapter, attachments: Attachments) -> Outcome:
    """Play a session against the rank that listens at `address`.

    Raises:
        HandoverError: nobody that is trusted listens there.
        PeerLost, DeadlineExceeded: the rank went away before it offered anything.
    """
    channel: Channel[FromRank] = Channel(sockets.connect(address, GREETING_SECONDS), FromRank)

    def perform(step: Send | Receive) -> FromRank | None:
        if isinstance(step, Send):
            channel.send(step.message)
            return None
        return channel.receive(step.timeout_seconds)

    try:
        return play(session(adapter, attachments), perform)
    finally:
        channel.close()


def play(steps: Steps[Outcome], perform: Callable[[Send | Receive], FromRank | None]) -> Outcome:
    """Do what a session asks for, one step after the other, however its rank is reached.

    Args:
        steps: of `session`.
        perform: does one of them; the session hears what it raises.
    """
    try:
        step = next(steps)
        while True:
            try:
                reply = perform(step)
            except CheckpointEngineError as error:
                step = steps.throw(error)
            else:
                step = steps.send(reply)
    except StopIteration as end:
        outcome: Outcome = end.value
        return outcome


def _enter(
    adapter: Adapter, attachments: Attachments, offer: Offer, progress: _Progress
) -> Steps[None]:
    with progress.timeline.span("attach"):
        content = _attach(adapter, attachments, offer)
    with progress.timeline.span("verify"):
        way_back = adapter.prepare(content, offer.version)
    yield Send(Ready(way_back=way_back, spans=progress.spans))


def _attach(adapter: Adapter, attachments: Attachments, offer: Offer) -> Content:
    if not offer.manifest:
        recalled = adapter.recall(offer.version.digest)
        if recalled is None:
            raise UpdateRefused(
                f"this replica keeps no version {offer.version.label!r} to return to; update it "
                "from a checkpoint instead"
            )
        return recalled
    manifest = decode_manifest(offer.manifest, msgpack=True)
    if manifest.digest != offer.version.digest:
        raise ProtocolError("the manifest offered is not that of the version offered")
    if offer.files:
        names = [meta.name for meta in manifest.tensors if meta.length]
        return Streamed(manifest, fetch_files(offer.files, names))
    if offer.remote is not None:
        return Streamed(manifest, RemoteTensors(manifest, offer.remote))
    return Staged.attach(manifest, offer.parts, attachments)


def _await(step: str, timeout_seconds: float) -> Steps[None]:
    decision = yield Receive(timeout_seconds)
    if isinstance(decision, Stop):
        raise _Halt(decision.reason, quarantine=decision.quarantine)
    if decision != Proceed(step=step):
        raise ProtocolError(f"the decision on {step!r} was due, not {decision}")


def _apply(adapter: Adapter, offer: Offer, progress: _Progress) -> Steps[None]:
    started = time.monotonic()
    with progress.timeline.span("enter"):
        adapter.pause(offer.deadlines.pause_seconds)
    progress.stage, progress.paused_at = "changed", started
    with progress.timeline.span("apply"):
        adapter.apply()
    with progress.timeline.span("check"):
        served = adapter.check()
    progress.stage = "applied"
    yield Send(
        Applied(digest=served.digest, served_digest=served.served_digest, spans=progress.spans)
    )


def _publish(adapter: Adapter, offer: Offer, progress: _Progress) -> Steps[Outcome]:
    """The version is decided. What fails from here on is reported, and never undone."""
    failure: RemoteError | None = None
    adapter.undecided = None
    for step in (adapter.publish, lambda: progress.resume(adapter)):
        try:
            with progress.timeline.span("publish"):
                step()
        except Exception as error:
            failure = failure or RemoteError.of(error, adapter.identity.replica)
    if progress.paused_at is not None:
        adapter.quarantine(f"the new version was published, but requests still wait: {failure}")
    confirmed = Confirmed(pause_seconds=progress.pause_seconds, error=failure, spans=progress.spans)
    with contextlib.suppress(PeerLost, DeadlineExceeded):
        yield Send(confirmed)
    return Outcome("published", offer.version.label, failure)


def _withdraw(
    adapter: Adapter, offer: Offer, progress: _Progress, error: Exception
) -> Steps[Outcome]:
    """Return to the base and say so; whoever said no first learns whether it is quarantined."""
    told = isinstance(error, _Halt)
    in_doubt = progress.stage == "applied" and isinstance(error, (PeerLost, DeadlineExceeded))
    adapter.undecided = offer.update if in_doubt else None
    cause: Exception = UpdateRefused(str(error)) if told else error
    failure = _return_to_base(adapter, progress)
    described = RemoteError.of(failure or cause, adapter.identity.replica)
    if failure is not None:
        why = f"{described.message}; it was to go back after {type(cause).__name__}: {cause}"
        described = msgspec.structs.replace(described, message=why)
    for known in (error, failure):
        if known is not None:  # views in its frames would hold the memory until a collection
            traceback.clear_frames(known.__traceback__)
    withdrawn = Withdrawn(
        error=described,
        torn=failure is not None,
        pause_seconds=progress.pause_seconds,
        spans=progress.spans,
    )
    quarantine = error.quarantine if isinstance(error, _Halt) else False
    with contextlib.suppress(CheckpointEngineError):
        yield Send(withdrawn)
        if not told:
            longest = offer.deadlines.ready_seconds + offer.deadlines.pause_seconds
            verdict = yield Receive(longest)
            quarantine = isinstance(verdict, Stop) and verdict.quarantine
    if failure is not None:
        return Outcome("torn", error=described)
    if quarantine:
        adapter.quarantine(str(cause))
    return Outcome("kept", error=described)


def _return_to_base(adapter: Adapter, progress: _Progress) -> Exception | None:
    """Undo what was done. Returns why that failed, if it did: the replica is torn then."""
    try:
        if progress.stage != "entering":
            with progress.timeline.span("roll_back"):
                adapter.roll_back()
        else:
            adapter.abort()
        progress.resume(adapter)
    except Exception as failure:
        adapter.tear(f"{type(failure).__name__}: {failure}")
        return failure
    return None
