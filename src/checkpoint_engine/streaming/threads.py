"""Calls that wait, kept off the event loop.

The threads are daemons: a process that is told to end does not wait for what waits for a peer.

    value = await in_thread(wait_for_everyone)
    worker = Worker("ckpt-move")
    future = worker.submit(lambda: move(bucket))        # one after the other, in this order
    with ended_by(group.close, when=lambda: somebody_died):
        group.form()                                    # would wait for them until its deadline
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any, TypeVar

from checkpoint_engine.device_utils import same_stream
from checkpoint_engine.errors import UsageError

__all__ = ["UnderWay", "Worker", "alone", "blocking", "ended_by", "in_thread"]

STOP_SECONDS = 30.0
POLL_SECONDS = 0.05

Result = TypeVar("Result")


async def in_thread(call: Callable[[], Result]) -> Result:
    """What a call gives that waits; it has deadlines of its own."""
    future: Future[Result] = Future()
    threading.Thread(target=_run, args=(future, call), name="ckpt-wait", daemon=True).start()
    return await asyncio.wrap_future(future)


def blocking(work: Coroutine[Any, Any, Result]) -> Result:
    """Run a coroutine to its end, in a loop of its own; this thread's may be running."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    enter_stream = same_stream()

    def run() -> Result:
        enter_stream()
        return asyncio.run(work)

    future: Future[Result] = Future()
    threading.Thread(target=_run, args=(future, run), name="ckpt-loop", daemon=True).start()
    return future.result()


@contextmanager
def ended_by(end: Callable[[], None], *, when: Callable[[], bool]) -> Iterator[None]:
    """Call `end` once it is time, from a thread beside this one, which waits for something.

    It is called again until the wait is over, which may not have begun when it was called first.
    """
    over = threading.Event()

    def look() -> None:
        while not over.wait(POLL_SECONDS):
            if when():
                end()

    thread = threading.Thread(target=look, name="ckpt-look", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(STOP_SECONDS)


class UnderWay(UsageError):
    """A call came while another one was made."""


@contextmanager
def alone(turn: threading.Lock) -> Iterator[None]:
    """Nobody else is within; raises UnderWay if somebody is."""
    if not turn.acquire(blocking=False):
        raise UnderWay("a sync is under way in this process already, perhaps one that was given up")
    try:
        yield
    finally:
        turn.release()


class Worker:
    """A thread that makes calls in the order in which they are given, until closed."""

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]
        self._calls = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._is_stopped = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, call: Callable[[], Result]) -> Future[Result]:
        """Have it called after all that were given before; cancelled if it was stopped."""
        future: Future[Result] = Future()
        with self._lock:
            if self._is_stopped:
                future.cancel()
            else:
                self._calls.put((future, call))
        return future

    def close(self) -> None:
        """End the thread after the calls that were given."""
        self._calls.put(None)

    def stop(self) -> None:
        """Forget the calls that have not begun, and wait for the one that has."""
        with self._lock, contextlib.suppress(queue.Empty):
            self._is_stopped = True
            while (given := self._calls.get_nowait()) is not None:
                given[0].cancel()
        self.close()
        self._thread.join(STOP_SECONDS)

    def _work(self) -> None:
        while (given := self._calls.get()) is not None:
            _run(*given)


def _run(future: Future[Result], call: Callable[[], Result]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
    else:
        future.set_result(result)
