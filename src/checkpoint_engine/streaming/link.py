"""What one process of a stream holds while it takes part: the shared keys, and how bytes come.

A cycle has keys of its own. The sender counts cycles; who comes late, or comes back after it has
died, joins the one that is under way, or the next.

    link = Link(rendezvous, carrier, settings)
    cycle = link.begin()                # the sender; receivers: link.join(is_over)
    link.end(cycle)
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, UsageError
from checkpoint_engine.streaming.carriers import Carrier
from checkpoint_engine.streaming.messages import with_sender
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["Cycle", "Link", "Settings"]

POLL_SECONDS = 0.2
LEAVE_SECONDS = 1.0  # for threads to see that they are to stop


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine was made with.

    Attributes:
        engine: its kind.
        bucket_bytes: most bytes of a bucket.
        timeout_seconds: the longest wait for anything that another process does.
        compression: "none" or "zstd".
        rebuild_group: whether the way of bytes is made anew in each cycle.
    """

    engine: str
    bucket_bytes: int
    timeout_seconds: float
    compression: str
    rebuild_group: bool


class Cycle:
    """One cycle's keys, for a thread that speaks and for one that hears."""

    def __init__(self, number: int, speaking: Rendezvous, hearing: Rendezvous) -> None:
        name = f"stream {number}"
        self.number = number
        self.speaking, self.hearing = speaking.scope(name), hearing.scope(name)


class Link:
    """This process's part in a stream. Owns the rendezvous, and what is opened through it.

    Attributes:
        stopped: set when the engine is being closed, and waits are to end.
        under_way: called to end what is, with the reason.
    """

    def __init__(self, rendezvous: Rendezvous, carrier: Carrier, settings: Settings) -> None:
        self.rendezvous, self.carrier, self.settings = rendezvous, carrier, settings
        self._speaking, self._hearing = rendezvous.fork(), rendezvous.fork()
        self.stopped = threading.Event()
        self.under_way: set[Callable[[CheckpointEngineError], object]] = set()
        self._turn = threading.Lock()
        self._threads: Sequence[threading.Thread] = ()
        self._last = 0
        self._past: list[Cycle] = []
        self._sender = b""
        if rendezvous.rank == 0:
            self._speaking.put("sender", secrets.token_bytes(8))

    @property
    def rank(self) -> int:
        """This one."""
        return self.rendezvous.rank

    @property
    def number(self) -> int:
        """Of the cycle that was begun or joined last."""
        return self._past[-1].number

    def begin(self) -> Cycle:
        """The sender's next cycle, which receivers see from now on."""
        cycle = self._cycle(self._speaking.add("cycles", 1))
        cycle.speaking.put("open", b"")
        return cycle

    @contextlib.contextmanager
    def turn(self, threads: Sequence[threading.Thread]) -> Iterator[None]:
        """While a receiver joins a cycle, after what is left of its last one has ended.

        Args:
            threads: that begin within, and use the keys.

        Raises:
            DeadlineExceeded: something of it waits still.
        """
        # What is left of it has deadlines of its own, which began before.
        longest_seconds = self.settings.timeout_seconds + LEAVE_SECONDS
        deadline = time.monotonic() + longest_seconds
        if not self._turn.acquire(timeout=longest_seconds):
            raise DeadlineExceeded("the last cycle is still being left")
        try:
            for thread in _begun(self._threads):
                thread.join(max(0.0, deadline - time.monotonic()))
                if thread.is_alive():
                    raise DeadlineExceeded(f"the last cycle is still being left: {thread.name}")
            self._threads = threads
            yield
        finally:
            self._turn.release()

    def join(self, is_over: Callable[[], bool]) -> Cycle:
        """A receiver's next cycle, once the sender has begun it.

        Raises:
            DeadlineExceeded: it does not, or `is_over` meanwhile.
            PeerLost: it is gone.
        """
        deadline = time.monotonic() + self.settings.timeout_seconds
        with with_sender():
            sender = self._speaking.get("sender", self.settings.timeout_seconds)
            if sender != self._sender:  # its keys are new ones, and so is the way of bytes
                self._sender, self._last, self._past = sender, 0, []
                self.carrier.abandon()
            number = max(self._last + 1, self._speaking.add("cycles", 0))
        cycle = self._cycle(number)
        if _is_set(cycle.hearing, "over", 0.0):
            cycle = self._cycle(number + 1)
        while not _is_set(cycle.hearing, "open", POLL_SECONDS) or is_over():
            if time.monotonic() > deadline or is_over():
                raise DeadlineExceeded(
                    f"the sender sent nothing in {self.settings.timeout_seconds:.0f} s; raise "
                    "timeout= if it trains for longer"
                )
        self._last = cycle.number
        return cycle

    def end(self, cycle: Cycle) -> None:
        """The sender's: whoever comes now waits for the next."""
        cycle.speaking.put("over", b"")

    def cancel(self, error: CheckpointEngineError) -> None:
        """End the cycle that is under way, if any; the others are told why. From any thread."""
        for end in tuple(self.under_way):
            end(error)

    def close(self) -> None:
        """Leave. What was said in the last cycle stays to be heard, and goes with the sender."""
        self.stopped.set()
        self.cancel(UsageError("the engine was finalized meanwhile"))
        self.carrier.close()
        if self._turn.acquire(timeout=LEAVE_SECONDS):  # else nothing is left to be done about it
            self._turn.release()
        for thread in _begun(self._threads):
            thread.join(LEAVE_SECONDS)
        self._speaking.give_back()
        self._hearing.give_back()
        self.rendezvous.close()

    def _cycle(self, number: int) -> Cycle:
        # The last cycle's keys may still be read by a slow receiver; those before it, by nobody.
        while len(self._past) > 1:
            self._past.pop(0).speaking.clear()
        cycle = Cycle(number, self._speaking, self._hearing)
        self._past.append(cycle)
        return cycle


def _begun(threads: Sequence[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threads if thread.ident is not None]


def _is_set(keys: Rendezvous, key: str, timeout_seconds: float) -> bool:
    with with_sender():
        return keys.has(key, timeout_seconds)
