"""How a session on a thread of its own borrows the engine's thread.

What touches a model must run where the engine runs it, between two steps; attaching and verifying
need not, and may take long. So a session runs beside the engine and waits here until the engine's
own thread is lent to it, which then runs what the session asks for until the session has ended.

    turn.take(timeout_seconds)      # the session: wait for the engine's thread
    turn.do(load)                   # the session: run there, and wait for the result
    turn.end()                      # the session: has ended, however

    turn.lend()                     # the engine's thread: returns when the session has ended
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from checkpoint_engine.errors import DeadlineExceeded

__all__ = ["Turn"]

T = TypeVar("T")


class Turn:
    """Of one session."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._work = queue.SimpleQueue()
        self._wanted, self._lent = threading.Event(), threading.Event()

    @property
    def is_wanted(self) -> bool:
        """Whether the session has come to where it needs the engine's thread."""
        return self._wanted.is_set()

    def take(self, timeout_seconds: float) -> None:
        """Wait until the engine's thread is lent.

        Raises:
            DeadlineExceeded: it was not.
        """
        self._wanted.set()
        if not self._lent.wait(timeout_seconds):
            raise DeadlineExceeded(
                f"the engine was not told within {timeout_seconds:g} s to let its weights be "
                "changed: whoever begins an update must finish it"
            )

    def do(self, work: Callable[[], T]) -> T:
        """Run this on the engine's thread, which was taken; raises what it raises."""
        future: Future[T] = Future()
        self._work.put((future, work))
        return future.result()

    def end(self) -> None:
        """Give the engine's thread back, for good."""
        self._work.put(None)

    def lend(self) -> None:
        """Run here what the session asks for, until it ends: each of its waits has a deadline."""
        self._lent.set()
        while (item := self._work.get()) is not None:
            future, work = item
            try:
                future.set_result(work())
            except Exception as error:
                future.set_exception(error)
            except BaseException as error:  # the process is to end
                future.set_exception(error)
                raise
        self.end()  # it stays so, however often the thread is lent
