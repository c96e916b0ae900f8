"""What one process of a stream holds while it takes part: the shared keys, and how bytes come.

A cycle has keys of its own. The sender counts cycles; who comes late, or comes back after it has
died, joins the one that is under way, or the next.

    link = Link(rendezvous, carrier, settings)
    number = link.begin()               # the sender; link.next_cycle() of receivers
    scope = link.scope(number)
"""

from __future__ import annotations

import contextlib
import threading
import time

import msgspec

from checkpoint_engine.errors import DeadlineExceeded, PeerLost
from checkpoint_engine.streaming.carriers import Carrier
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["Cycle", "Link", "Settings"]

POLL_SECONDS = 0.2


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
    """

    def __init__(self, rendezvous: Rendezvous, carrier: Carrier, settings: Settings) -> None:
        self.rendezvous, self.carrier, self.settings = rendezvous, carrier, settings
        self._speaking, self._hearing = rendezvous.fork(), rendezvous.fork()
        self.stopped = threading.Event()
        self._last = 0
        self._past: list[Cycle] = []

    @property
    def rank(self) -> int:
        """This one."""
        return self.rendezvous.rank

    def begin(self) -> Cycle:
        """The sender's next cycle, which receivers see from now on."""
        cycle = self._cycle(self._speaking.add("cycles", 1))
        cycle.speaking.put("open", b"")
        return cycle

    def join(self) -> Cycle:
        """A receiver's next cycle, once the sender has begun it.

        Raises:
            DeadlineExceeded: it does not.
            PeerLost: it is gone.
        """
        deadline = time.monotonic() + self.settings.timeout_seconds
        number = max(self._last + 1, self._speaking.add("cycles", 0))
        cycle = self._cycle(number)
        if _is_set(cycle.hearing, "over", 0.0):
            cycle = self._cycle(number + 1)
        while not _is_set(cycle.hearing, "open", POLL_SECONDS):
            if time.monotonic() > deadline or self.stopped.is_set():
                raise DeadlineExceeded(
                    f"the sender sent nothing in {self.settings.timeout_seconds:.0f} s; raise "
                    "timeout= if it trains for longer"
                )
        self._last = cycle.number
        return cycle

    def end(self, cycle: Cycle) -> None:
        """The sender's: whoever comes now waits for the next."""
        cycle.speaking.put("over", b"")

    def close(self) -> None:
        """Leave."""
        self.stopped.set()
        self.carrier.close()
        with contextlib.suppress(PeerLost, DeadlineExceeded):
            while self._past:
                self._past.pop(0).speaking.clear()
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


def _is_set(keys: Rendezvous, key: str, timeout_seconds: float) -> bool:
    try:
        keys.get(key, timeout_seconds)
    except DeadlineExceeded:
        return False
    except PeerLost as error:
        raise PeerLost(f"the sender is gone: {error}") from error
    return True
