"""How a sender hears its receivers: what they say, and that they are gone.

A receiver that dies says nothing, and its connection to the shared keys does not tell who it was.
So each receiver listens at a port of its own, where nothing is ever said: the kernel breaks that
connection when the process ends, or its host is gone.

    watch = Watch(ear, lines, ranks={1, 2}, on_failure=carrier.abandon)
    watch.wait_ready(7, timeout_seconds=60)         # raises PeerLost if rank 2 dies meanwhile
    watch.close()
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable

import zmq

from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    TransferError,
    VerificationError,
)
from checkpoint_engine.streaming.messages import (
    Done,
    Ear,
    Failed,
    FromReceiver,
    Hello,
    Ready,
    raised,
)
from checkpoint_engine.transport.line import Context, Line
from checkpoint_engine.transport.responder import Responder

__all__ = ["Lines", "Presence", "Watch", "died", "named_ranks"]

POLL_SECONDS = 0.05
STOP_SECONDS = 10.0
ECHO_SECONDS = 1.0  # who dies makes others fail, and these may be heard first
MAX_MESSAGE_BYTES = 4096  # a CURVE handshake; nothing is said after it


class Presence:
    """A receiver's: an encrypted port that is open as long as the process lives.

    Attributes:
        address: where.
        key: the CURVE key without which nobody gets in.
    """

    def __init__(self, host: str) -> None:
        self.key, private = zmq.curve_keypair()
        self._responder = Responder(
            name="ckpt-presence", max_request_bytes=MAX_MESSAGE_BYTES, private_key=private
        )
        self._responder.start(host, lambda peer, frames: None)
        self.address = self._responder.address

    def close(self) -> None:
        """End it."""
        self._responder.close()


class Lines:
    """The sender's connections to its receivers' ports, kept from cycle to cycle."""

    def __init__(self) -> None:
        self._context = Context()
        self._lines: dict[int, tuple[tuple[str, bytes], Line]] = {}

    def hold(self, rank: int, hello: Hello) -> None:
        """Be connected to this receiver, anew if the link broke between two cycles."""
        place = hello.address, hello.key
        held = self._lines.get(rank)
        if held is not None and held[0] == place and not held[1].is_broken():
            return
        self.drop(rank)
        line = Line(
            self._context,
            hello.address,
            max_message_bytes=MAX_MESSAGE_BYTES,
            server_key=hello.key,
            peer=f"rank {rank}",
        )
        self._lines[rank] = place, line

    def broken(self) -> list[int]:
        """Which receivers are gone."""
        return [rank for rank, (_, line) in self._lines.items() if line.is_broken()]

    def drop(self, rank: int) -> None:
        """Forget the connection to this one."""
        if rank in self._lines:
            self._lines.pop(rank)[1].close()

    def close(self) -> None:
        """Disconnect."""
        for rank in tuple(self._lines):
            self.drop(rank)
        self._context.destroy(linger=0)


class Watch:
    """Hears the receivers of one cycle, on a thread of its own, until closed.

    Args:
        ear: what they say.
        lines: held to each of them.
        ranks: theirs.
        on_failure: called when one gave up, or is gone.
    """

    def __init__(
        self,
        ear: Ear[FromReceiver],
        lines: Lines,
        ranks: Iterable[int],
        on_failure: Callable[[], None],
    ) -> None:
        self._ear, self._lines, self._on_failure = ear, lines, on_failure
        self._ready = dict.fromkeys(ranks, -1)
        self._done: dict[int, str] = {}
        self._failure: CheckpointEngineError | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._listen, name="ckpt-watch", daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        """Whether a receiver gave up, or is gone."""
        return self._failure is not None

    def wait_ready(self, bucket: int, timeout_seconds: float) -> None:
        """Wait until every receiver is ready for this bucket.

        Raises:
            DeadlineExceeded: one is not in time; says which.
            PeerLost: one is gone.
            CheckpointEngineError: one gave up.
        """
        self._wait(
            lambda: [rank for rank, ready in self._ready.items() if ready < bucket],
            timeout_seconds,
            f"had no room for bucket {bucket}",
        )

    def wait_done(self, digest: str, timeout_seconds: float) -> None:
        """Wait until every receiver has taken all; as `wait_ready`.

        Raises:
            VerificationError: what one has taken is not what was sent.
        """
        self._wait(
            lambda: [rank for rank in self._ready if rank not in self._done],
            timeout_seconds,
            "did not take the last tensors",
        )
        wrong = [rank for rank, taken in self._done.items() if taken != digest]
        if wrong:
            raise VerificationError(f"{named_ranks(wrong)} took another version than was sent")

    def cause(self, error: CheckpointEngineError) -> CheckpointEngineError:
        """What is behind a way that broke: a receiver that failed, or else one that hangs."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, ECHO_SECONDS)
            if self._failure is not None:
                return self._failure
            last = min(self._ready.values(), default=-1)
            silent = [rank for rank, ready in self._ready.items() if ready == last]
        return DeadlineExceeded(f"{named_ranks(silent)} hangs, as it seems: {error}")

    def close(self) -> None:
        """Stop listening."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(STOP_SECONDS)

    def _wait(self, missing: Callable[[], list[int]], timeout_seconds: float, what: str) -> None:
        with self._changed:
            self._changed.wait_for(
                lambda: self._closed or self._failure or not missing(), timeout_seconds
            )
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise TransferError("the cycle was given up")
            if late := missing():
                raise DeadlineExceeded(
                    f"{named_ranks(late)} {what} in {timeout_seconds:.0f} s: a receiver hangs, or "
                    "reads slowly; raise timeout= if it may"
                )

    def _listen(self) -> None:
        while not (self._closed or self._failure or len(self._done) == len(self._ready)):
            try:
                heard = self._ear.next(POLL_SECONDS)
                failure = self._lost() or self._note(heard)
            except CheckpointEngineError as error:
                failure = error
            if failure is not None:
                with self._changed:
                    self._failure = failure
                    self._changed.notify_all()
                self._on_failure()

    def _note(self, heard: FromReceiver | None) -> CheckpointEngineError | None:
        if isinstance(heard, Failed):
            deadline = time.monotonic() + ECHO_SECONDS / 2
            while time.monotonic() < deadline:
                if (lost := self._lost()) is not None:
                    return lost
                time.sleep(POLL_SECONDS)
            return raised(heard)
        with self._changed:
            if isinstance(heard, Ready) and heard.rank in self._ready:
                self._ready[heard.rank] = max(heard.bucket, self._ready[heard.rank])
            elif isinstance(heard, Done) and heard.rank in self._ready:
                self._done[heard.rank] = heard.digest
            self._changed.notify_all()
        return None

    def _lost(self) -> PeerLost | None:
        gone = [rank for rank in self._lines.broken() if rank not in self._done]
        if not gone:
            return None
        for rank in gone:
            self._lines.drop(rank)
        return died(gone)


def died(ranks: Iterable[int]) -> PeerLost:
    """What is raised because of it."""
    return PeerLost(f"{named_ranks(ranks)} died, or no link leads to its host any more")


def named_ranks(ranks: Iterable[int]) -> str:
    """What to call them."""
    names = [str(rank) for rank in sorted(ranks)]
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names)}"
