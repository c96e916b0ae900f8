"""Work beside those who serve: idle threads, a pace, pages touched without the lock."""

from __future__ import annotations

import hashlib
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from checkpoint_engine.errors import UsageError
from checkpoint_engine.memory import (
    MADV_POPULATE_WRITE,
    IdleWorkers,
    Pace,
    byte_workers,
    fault_in,
    num_byte_workers,
)

NUM_BYTES = 128 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def priority(_: object) -> int:
    return os.sched_getscheduler(0)


def test_idle_threads_are_idle_and_others_are_not() -> None:
    with IdleWorkers() as idle, byte_workers() as others:
        assert set(idle.map(priority, range(8))) == {os.SCHED_IDLE}
        assert set(others.map(priority, range(8))) == {os.SCHED_OTHER}
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


@pytest.fixture
def contended_core() -> Iterator[None]:
    """The one core that this thread, and those that it starts, may use; another process does."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    burn = "print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", burn], stdout=subprocess.PIPE) as burner:
        assert burner.stdout is not None
        burner.stdout.readline()
        yield
        burner.kill()
    os.sched_setaffinity(0, cores)


@pytest.mark.usefixtures("contended_core")
def test_where_idle_threads_starve_others_take_over() -> None:
    content = bytes(8 << 20)

    def digest(number: int) -> tuple[int, int, str]:
        return number, priority(None), hashlib.sha256(content).hexdigest()

    with IdleWorkers() as idle:
        done = list(idle.map(digest, range(40)))
    numbers, priorities, digests = zip(*done, strict=True)
    assert numbers == tuple(range(40))
    assert set(digests) == {hashlib.sha256(content).hexdigest()}
    assert priorities[0] == os.SCHED_IDLE
    assert priorities[-1] == os.SCHED_OTHER


def test_after_a_failure_no_item_is_begun() -> None:
    begun = []

    def fail_third(number: int) -> None:
        begun.append(number)
        time.sleep(0.01)
        if number == 2:
            raise ValueError("the third")

    with IdleWorkers() as idle, pytest.raises(ValueError, match="the third"):
        idle.map(fail_third, range(1000))
    assert len(begun) <= 3 + 2 * num_byte_workers()


class Interrupted(BaseException):
    pass


@pytest.fixture
def interrupt() -> Iterator[Callable[[], None]]:
    """Interrupts this thread as Ctrl-C does, which a background job may have turned off."""

    def raise_it(*_: object) -> None:
        raise Interrupted

    before, thread = signal.signal(signal.SIGUSR1, raise_it), threading.get_ident()
    yield lambda: signal.pthread_kill(thread, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_after_an_interruption_no_item_is_begun(interrupt: Callable[[], None]) -> None:
    begun = []

    def interrupt_at_third(number: int) -> None:
        begun.append(number)
        time.sleep(0.05)
        if number == 2:
            interrupt()

    with pytest.raises(Interrupted), IdleWorkers() as idle:
        idle.map(interrupt_at_third, range(1000))
    assert len(begun) < 100


def test_pages_are_there_afterwards_and_other_threads_ran_meanwhile() -> None:
    mapped = mmap.mmap(-1, NUM_BYTES)
    before, num_turns, ended = resident_bytes(), 0, threading.Event()

    def count() -> None:
        nonlocal num_turns
        while not ended.is_set():
            num_turns += 1
            time.sleep(0)

    counter = threading.Thread(target=count)
    counter.start()
    with byte_workers() as pool:
        started = num_turns
        fault_in(mapped, MADV_POPULATE_WRITE, pool)
        turned = num_turns - started
    ended.set()
    counter.join()
    assert resident_bytes() - before > NUM_BYTES // 2
    assert turned > 10, "the interpreter's lock was held"
    mapped.close()


def test_an_advice_that_the_kernel_does_not_know_is_an_error() -> None:
    mapped = mmap.mmap(-1, mmap.PAGESIZE)
    with byte_workers() as pool, pytest.raises(OSError, match="Invalid argument"):
        fault_in(mapped, 9999, pool)
    mapped.close()


def test_a_pace_holds_for_all_threads_together() -> None:
    pace = Pace(100e6)
    started = time.monotonic()
    with byte_workers(4) as pool:
        list(pool.map(pace.take, [1_000_000] * 40))
    assert time.monotonic() - started >= 0.39 - 0.05, "40 MB at 100 MB/s, less the burst"


def test_without_a_pace_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", None)  # calling it would fail
    Pace(None).take(1 << 40)


def test_a_pace_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "CKPT_ENGINE_STAGING_BYTES_PER_SECOND"
    monkeypatch.setenv(name, "fast")
    with pytest.raises(UsageError, match="fast"):
        Pace.of_environment()
    monkeypatch.setenv(name, "1000000")
    pace = Pace.of_environment()
    started = time.monotonic()
    for _ in range(2):
        pace.take(200_000)
    assert time.monotonic() - started >= 0.1
