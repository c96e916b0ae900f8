"""Threads and page faults for work that must not disturb whoever serves on the same cores.

Staging a version moves gigabytes beside engines that answer requests. Its threads run at the
kernel's idle priority (SCHED_IDLE), which gets what nobody else wants, and may be capped in bytes
per second. Pages are faulted in by the same threads and without the interpreter's lock, which
Python's own madvise holds for seconds.

    with byte_workers(idle=True) as pool:
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
from concurrent.futures import Executor, ThreadPoolExecutor

import numpy as np

from checkpoint_engine.errors import UsageError

__all__ = [
    "MADV_POPULATE_READ",
    "MADV_POPULATE_WRITE",
    "Pace",
    "byte_workers",
    "fault_in",
    "num_byte_workers",
]

MADV_POPULATE_READ, MADV_POPULATE_WRITE = 22, 23  # not in `mmap`; the values are the kernel's
SLICE_BYTES = 32 << 20
MAX_THREADS = 16
BURST_SECONDS = 0.05

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def num_byte_workers() -> int:
    """One for each core of this process, up to 16: these come near what memory gives on hosts."""
    return min(MAX_THREADS, len(os.sched_getaffinity(0)))


def byte_workers(num_threads: int | None = None, *, idle: bool = False) -> ThreadPoolExecutor:
    """Threads for work that is bound by memory.

    Args:
        num_threads: default `num_byte_workers()`.
        idle: run only when nobody else wants the core; for all that is done while serving.
    """
    return ThreadPoolExecutor(
        num_threads or num_byte_workers(),
        thread_name_prefix="ckpt-bytes",
        initializer=_be_idle if idle else None,
    )


def fault_in(mapped: mmap.mmap, advice: int, pool: Executor) -> None:
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
