"""A receiver's side of one cycle: find memory ∥ move ∥ check ∥ use.

One thread hears what the sender says, finds memory for each bucket that it announces, and so gives
it credit; one begins to take the bytes; one checks them once they have landed, while the next come,
for which the sender would else wait; the consumer uses them where they lie, and gives the memory
back when it asks for more. So a consumer that is slow stops the sender, and a sender that dies or
gives up is noticed whatever the consumer does.

The cycle ends when the sender says that every receiver has taken all.

    receiving = Receiving(link, presence, places)
    await in_thread(receiving.join)
    while isinstance(arrived := await in_thread(receiving.next), Arrived):
        ...
        arrived.release()
    await in_thread(receiving.finish)
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import msgspec
import torch

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    RemoteError,
    TransferError,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.carriers import Landed
from checkpoint_engine.streaming.compression import unpack
from checkpoint_engine.streaming.link import Link
from checkpoint_engine.streaming.messages import (
    FROM_SENDER,
    Bucket,
    Done,
    Ear,
    End,
    Failed,
    FromSender,
    Hello,
    Over,
    Plan,
    Ready,
    Voice,
    raised,
    with_sender,
)
from checkpoint_engine.streaming.packing import Ledger, check_arrived, view, whole_tensors
from checkpoint_engine.streaming.places import Place, Places
from checkpoint_engine.streaming.threads import ended_by
from checkpoint_engine.streaming.watch import Presence
from checkpoint_engine.transport.sockets import own_host

__all__ = ["Arrived", "Receiving"]

Item = TypeVar("Item")

POLL_SECONDS = 0.05
CAUSE_SECONDS = 3.0  # for the sender to say why the way broke


class Arrived(NamedTuple):
    """Tensors that are here and checked; their memory is theirs until it is released."""

    tensors: list[tuple[str, torch.Tensor]]
    release: Callable[[], None]


class _Placed(NamedTuple):
    """A bucket, the memory that was found for it, and what waits until its bytes are there."""

    bucket: Bucket
    place: Place
    landed: Landed


class Receiving:
    """One version on its way here."""

    def __init__(self, link: Link, presence: Presence, places: Places) -> None:
        self._link, self._presence, self._places = link, presence, places
        self._timeout_seconds = link.settings.timeout_seconds
        self._ledger = Ledger()
        self._checked_at = 0.0
        self._stopped = threading.Event()
        self._ear: Ear[FromSender]
        self._voice: Voice | None = None
        self._listener = threading.Thread(target=self._listen, name="ckpt-credit", daemon=True)
        self._failing = threading.Lock()
        self._given_up: BaseException | None = None
        self._coming: queue.SimpleQueue[tuple[Bucket, Place] | End] = queue.SimpleQueue()
        self._landed: queue.SimpleQueue[_Placed | End] = queue.SimpleQueue()
        self._taker = self._worker("ckpt-arrive", self._coming, self._take)
        self._checker = self._worker("ckpt-check", self._landed, self._check)
        self._arrived: queue.SimpleQueue[Arrived | Version | Over | BaseException]
        self._arrived = queue.SimpleQueue()

    def join(self) -> None:
        """Take part in the sender's next cycle.

        Raises:
            DeadlineExceeded: it begins none.
            PeerLost: it is gone.
            CheckpointEngineError: it gave up.
        """
        with self._link.turn((self._listener, self._taker, self._checker)):
            cycle = self._link.join(self._is_over)
            self._ear = Ear(cycle.hearing.log("sent"), FROM_SENDER)
            with with_sender():
                hello = msgspec.msgpack.encode(self._hello())
                cycle.speaking.put(f"hello/{self._link.rank}", hello)
            self._voice = Voice(cycle.speaking.log("heard"))  # others may speak from here on
            plan = self._hear()
            if plan is None:  # the consumer was cancelled before there was a voice to say so
                self._say_failed(error := UsageError("its consumer left before the first tensor"))
                raise error
            if not isinstance(plan, Plan):
                raise ProtocolError(f"a cycle begins with a plan, not {plan!r:.80}")
            if plan.world_size != (own := self._link.rendezvous.world_size):
                odd = UsageError(f"world_size is {plan.world_size} at rank 0, and {own} here")
                self._say_failed(odd)
                raise odd
            self._places.begin(plan.bucket_bytes)
            self._listener.start()
            try:
                with ended_by(self._link.carrier.abandon, when=self._is_over):
                    self._link.carrier.join(plan.way, self._timeout_seconds)
            except TransferError as error:
                if not self._is_over():
                    self._say_failed(error)
                self._stopped.set()
                self._listener.join(CAUSE_SECONDS)
                raise self._heard() or self._cause(error) from error
            self._taker.start()
            self._checker.start()

    def next(self) -> Arrived | Version:
        """What arrives next; in the end, what all of it was.

        Raises:
            CheckpointEngineError: as the sender says, or as found here.
        """
        arrived = self._next()
        assert not isinstance(arrived, Over), "the sender waits for all to be done"
        return arrived

    def finish(self, version: Version) -> None:
        """Tell the sender that all of it was taken, and wait until everybody has.

        Raises:
            CheckpointEngineError: another receiver failed.
        """
        assert self._voice is not None, "a cycle begins with joining it"
        self._voice.say(Done(rank=self._link.rank, digest=version.digest))
        self._next()
        self._stopped.set()

    def give_up(self, error: BaseException) -> BaseException:
        """End it here, and tell the sender why, which may know already; returns the first reason.

        From any thread.
        """
        with self._failing:
            if self._given_up is None:
                self._given_up = error
                self._stopped.set()
                self._say_failed(error)
        self._link.carrier.abandon()
        self._arrived.put(error)  # for a thread that waits on behalf of a task that was cancelled
        return self._given_up

    def _next(self) -> Arrived | Version | Over:
        asked_at = time.monotonic()
        while True:
            with contextlib.suppress(queue.Empty):
                arrived = self._arrived.get(timeout=POLL_SECONDS)
                break
            # Of a large tensor, buckets arrive long before it is whole.
            idle_seconds = time.monotonic() - max(asked_at, self._checked_at)
            is_late = idle_seconds > self._timeout_seconds + 2 * CAUSE_SECONDS
            if self._link.stopped.is_set() or is_late:
                raise DeadlineExceeded(f"nothing arrived in {self._timeout_seconds:.0f} s")
        if isinstance(arrived, BaseException):
            raise arrived
        return arrived

    def _heard(self) -> BaseException | None:
        """Why the sender has given up, if the listener has heard that."""
        with contextlib.suppress(queue.Empty):
            arrived = self._arrived.get_nowait()
            return arrived if isinstance(arrived, BaseException) else None
        return None

    def _is_over(self) -> bool:
        return self._stopped.is_set() or self._link.stopped.is_set()

    # ── the thread that hears the sender ────────────────────────────────────────────────────

    def _listen(self) -> None:
        expected = 0
        try:
            while (heard := self._hear()) is not None:
                if isinstance(heard, Bucket) and heard.index == expected:
                    expected += 1
                    self._give_credit(heard)
                elif isinstance(heard, End):
                    self._coming.put(heard)
                elif isinstance(heard, Over):
                    self._arrived.put(heard)
                    return
                else:
                    raise ProtocolError(f"bucket {expected} comes next, not {heard!r:.80}")
        except BaseException as error:
            self._stopped.set()
            self._arrived.put(error)

    def _hear(self) -> Plan | Bucket | End | Over | None:
        """What the sender says next; None if it no longer matters."""
        deadline = time.monotonic() + self._timeout_seconds + CAUSE_SECONDS
        while not self._is_over():
            heard = self._ear.next(POLL_SECONDS)
            if isinstance(heard, Failed):
                raise raised(heard)
            if heard is not None:
                return heard
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the sender said nothing for {self._timeout_seconds:.0f} s: it hangs, or "
                    "waits for another receiver or for its own tensors; raise timeout= if it may"
                )
        return None

    def _give_credit(self, bucket: Bucket) -> None:
        place = self._places.find(bucket, self._is_over)
        if place is None:
            return
        if self._link.carrier.early:
            self._say_ready(bucket)
        self._coming.put((bucket, place))

    # ── the threads that take bytes and check them ──────────────────────────────────────────

    def _worker(
        self, name: str, source: queue.SimpleQueue[Item | End], work: Callable[[Item | End], None]
    ) -> threading.Thread:
        """Does something with each bucket, and with the end, after which it ends."""

        def run() -> None:
            try:
                item = self._awaited(source)
                while item is not None:
                    work(item)
                    item = None if isinstance(item, End) else self._awaited(source)
            except BaseException as error:
                self._fail(error)

        return threading.Thread(target=run, name=name, daemon=True)

    def _awaited(self, source: queue.SimpleQueue[Item | End]) -> Item | End | None:
        """What comes next; None if it no longer matters."""
        while not self._is_over():
            with contextlib.suppress(queue.Empty):
                return source.get(timeout=POLL_SECONDS)
        return None

    def _take(self, item: tuple[Bucket, Place] | End) -> None:
        if isinstance(item, End):
            self._landed.put(item)
            return
        bucket, place = item
        self._landed.put(_Placed(bucket, place, self._begin(bucket, place.data)))
        if not self._link.carrier.early:
            self._say_ready(bucket)

    def _begin(self, bucket: Bucket, data: torch.Tensor) -> Landed:
        receive = self._link.carrier.receive
        if not bucket.packed:
            return receive(bucket.index, data, self._timeout_seconds)
        packed = data.new_empty(bucket.packed)
        landed = receive(bucket.index, packed, self._timeout_seconds)

        def unpacked() -> None:
            landed()
            unpack(packed, into=data)

        return unpacked

    def _check(self, item: _Placed | End) -> None:
        if isinstance(item, End):
            self._arrived.put(self._checked(item))
            return
        bucket, place, landed = item
        landed()
        check_arrived(bucket, place.data)
        self._checked_at = time.monotonic()
        for part in bucket.parts:
            self._ledger.add(part)
        if place.whole is not None:
            (part,) = bucket.parts
            self._arrived.put(Arrived([(part.name, view(part, place.whole))], place.release))
        elif not self._ledger.is_within:
            tensors = list(whole_tensors(bucket, place.data))
            self._arrived.put(Arrived(tensors, place.release))

    def _fail(self, error: BaseException) -> None:
        with self._failing:  # of two threads that fail at once, one says it
            if self._is_over():
                return
            self._say_failed(error)
            self._stopped.set()
        self._listener.join(CAUSE_SECONDS)
        self._arrived.put(self._cause(error) if isinstance(error, TransferError) else error)

    def _checked(self, end: End) -> Version:
        digest = self._ledger.digest()
        if (digest, self._ledger.num_tensors) != (end.digest, end.num_tensors):
            raise VerificationError(
                f"{end.label!r}: what arrived is not, tensor for tensor, what was sent"
            )
        return Version(label=end.label, digest=digest)

    # ── what this receiver says ─────────────────────────────────────────────────────────────

    def _hello(self) -> Hello:
        settings = self._link.settings
        return Hello(
            bucket_bytes=settings.bucket_bytes,
            engine=settings.engine,
            host=own_host(),
            kept=self._link.carrier.kept,
            address=self._presence.address,
            key=self._presence.key,
        )

    def _say_ready(self, bucket: Bucket) -> None:
        assert self._voice is not None, "a cycle begins with joining it"
        self._voice.say(Ready(rank=self._link.rank, bucket=bucket.index))

    def _say_failed(self, error: BaseException) -> None:
        if self._voice is not None and not self._link.stopped.is_set():
            with contextlib.suppress(PeerLost, DeadlineExceeded):  # it may be the sender that died
                self._voice.say(Failed(rank=self._link.rank, error=RemoteError.of(error)))

    def _cause(self, error: TransferError) -> CheckpointEngineError:
        """Why the way broke, as the sender knows it; it hears of every receiver."""
        deadline = time.monotonic() + CAUSE_SECONDS
        while time.monotonic() < deadline:
            try:
                heard = self._ear.next(POLL_SECONDS)
            except PeerLost as lost:
                return lost
            if isinstance(heard, Failed):
                return raised(heard)
        return error
