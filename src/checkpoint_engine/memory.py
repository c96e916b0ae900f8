"""Threads and page faults for work that must not disturb whoever serves on the same cores.

Staging a version moves gigabytes beside engines that answer requests. Its threads run at the
kernel's idle priority (SCHED_IDLE), which gets what nobody else wants, and may be capped in bytes
per second. Where others want every core, that is nothing: a version would never be staged, and the
whole process would stand still whenever such a thread has the interpreter's lock. So threads of
common priority take over from those that starve. Pages are faulted in by the same threads and
without the interpreter's lock, which Python's own madvise holds for seconds.

    with IdleWorkers() as pool:
        fault_in(mapped, MADV_POPULATE_WRITE, pool)
        pool.map(read, buckets)
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Protocol, TypeVar

import numpy as np

from checkpoint_engine.errors import UsageError

__all__ = [
    "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE",
    "IdleWorkers",
    "Pace",
    "Workers",
    "byte_workers",
    "fault_in",
    "num_byte_workers",
]

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # not in `mmap`; the values are the kernel's
SLICE_BYTES = 32 << 20
MAX_THREADS = 16
BURST_SECONDS = 0.05
STARVING_SECONDS = 1.0  # before it is looked at whether a thread gets a core
STARVING_SHARE = 0.05  # of one, next to nothing

Item = TypeVar("Item")
Result = TypeVar("Result")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def num_byte_workers() -> int:
    """One for each core of this process, up to 16: these come near what memory gives on hosts."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


class Workers(Protocol):
    """Threads that share work."""

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """What `work` gives for each item, in their order."""


def byte_workers(num_threads: int | None = None) -> ThreadPoolExecutor:
    """Threads for work that is bound by memory; by default `num_byte_workers()`."""
    return ThreadPoolExecutor(num_threads or num_byte_workers(), thread_name_prefix="ckpt-bytes")


class IdleWorkers:
    """As `byte_workers`, for all that is done while serving: they run when nobody else wants to."""

    def __init__(self) -> None:
        self._num_threads = num_byte_workers()
        self._pool = ThreadPoolExecutor(
            self._num_threads, thread_name_prefix="ckpt-idle", initializer=_be_idle
        )
        self._are_starving = False

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], /) -> Iterator[Result]:
        """What `work` gives for each item, in their order; after a failure, none is begun.

        Each thread takes the next item by itself: whoever hands them out one by one would need the
        interpreter as often as all threads together.
        """
        numbered = tuple(enumerate(items))
        waiting, num_threads = iter(numbered), min(self._num_threads, len(numbered))

        def take(core: _Core | None) -> dict[int, Result]:
            done = {}
            try:
                for number, item in waiting:
                    done[number] = work(item)
                    if core is not None and (self._are_starving or core.is_withheld()):
                        self._are_starving = True
                        break
            except BaseException:
                deque(waiting, maxlen=0)
                raise
            return done

        done: dict[int, Result] = {}
        try:
            for part in self._pool.map(lambda _: take(_Core()), range(num_threads)):
                done |= part
            if self._are_starving:
                with byte_workers() as others:
                    for part in others.map(take, [None] * num_threads):
                        done |= part
        except BaseException:  # an interruption, too
            deque(waiting, maxlen=0)
            raise
        return (done[number] for number in range(len(done)))

    def __enter__(self) -> IdleWorkers:
        return self

    def __exit__(
        self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None
    ) -> None:
        self._pool.shutdown()


class _Core:
    """Whether the calling thread gets one when it wants to run."""

    def __init__(self) -> None:
        self._at, self._ran, self._waited = time.monotonic(), *self._seconds()

    def is_withheld(self) -> bool:
        """Whether it has waited for one since this was last looked at, and hardly run."""
        before, now = self._at, time.monotonic()
        if now - before < STARVING_SECONDS:
            return False
        ran, waited = self._ran, self._waited
        self._at, self._ran, self._waited = now, *self._seconds()
        ran, waited = self._ran - ran, self._waited - waited
        return waited > (now - before) / 2 and ran < STARVING_SHARE * waited

    @staticmethod
    def _seconds() -> tuple[float, float]:
        """On a core, and waiting for one; zeros where the kernel does not count them."""
        try:
            ran, waited, _ = Path("/proc/thread-self/schedstat").read_text().split()
        except OSError:
            return 0.0, 0.0
        return int(ran) / 1e9, int(waited) / 1e9


def fault_in(mapped: mmap.mmap, advice: int, pool: Workers) -> None:
    """Touch every page of a map now, so that no copy pays for it later.

    Raises:
        OSError: there is no memory for them, or (EINVAL) the kernel is older than Linux 5.14.
    """
    view = np.frombuffer(mapped, dtype=np.uint8)  # keeps the map where it is
    start = view.ctypes.data

    def touch(offset: int) -> None:
        length = min(SLICE_BYTES, len(mapped) - offset)
        if _libc.madvise(start + offset, length, advice):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    try:
        for _ in pool.map(touch, range(0, len(mapped), SLICE_BYTES)):
            pass
    finally:
        del view


class Pace:
    """At most so many bytes a second, over all threads that ask; None for as fast as it goes."""

    def __init__(self, bytes_per_second: float | None) -> None:
        self._bytes_per_second = bytes_per_second
        self._lock = threading.Lock()
        self._free_at = 0.0

    @classmethod
    def of_environment(cls) -> Pace:
        """`$CKPT_ENGINE_STAGING_BYTES_PER_SECOND`, if it is set.

        Raises:
            UsageError: it is not a number above 0.
        """
        configured = os.environ.get("CKPT_ENGINE_STAGING_BYTES_PER_SECOND")
        if configured is None:
            return cls(None)
        if not configured.isdigit() or not int(configured):
            raise UsageError(
                f"CKPT_ENGINE_STAGING_BYTES_PER_SECOND={configured!r} is no number of bytes"
            )
        return cls(int(configured))

    def take(self, num_bytes: int) -> None:
        """Wait until so many bytes may be moved."""
        if self._bytes_per_second is None:
            return
        with self._lock:
            now = time.monotonic()
            start = max(self._free_at, now - BURST_SECONDS)
            self._free_at = start + num_bytes / self._bytes_per_second
        time.sleep(max(0.0, start - now))


def _be_idle() -> None:
    with contextlib.suppress(OSError):  # a container may forbid it: then it is merely not polite
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
