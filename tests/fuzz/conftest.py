"""Bounds on memory for what decoders do, and the number of cases that were run."""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz_tools import NUM_CASES, num_run

SPARE_BYTES = 1 << 30


@pytest.fixture(autouse=True, scope="module")
def little_memory() -> Iterator[None]:
    """No decoder may ask for much more than its input: what does meets a MemoryError."""
    gc.collect()  # what tests before these left open is not these tests'
    limits = resource.getrlimit(resource.RLIMIT_AS)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    used_bytes = num_pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used_bytes + SPARE_BYTES, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if num_run:
        terminalreporter.write_line(f"fuzz: {num_run.total()} cases in {len(num_run)} tests")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """`make fuzz` has run what it says, or has failed."""
    if NUM_CASES and len(num_run) and num_run.total() < NUM_CASES and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
