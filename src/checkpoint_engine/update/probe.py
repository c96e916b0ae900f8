"""Watching a fleet after an update, by whatever measure its user has.

A digest says that the right weights are served, not that they are good. A probe is asked again and
again for a while after publish; when it has said no too often, the fleet is brought back.

    probe = Probe(http_check("http://127.0.0.1:8000/health"), window_seconds=30, max_failures=2)
    error = watch(probe)                                     # None: it is well
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import httpx

from checkpoint_engine.errors import AdapterError, RemoteError, UsageError

__all__ = ["Probe", "http_check", "watch"]


@dataclass(frozen=True)
class Probe:
    """What is asked after an update was published, and for how long.

    Attributes:
        check: raises, or returns False, when the fleet is not well. Must have deadlines of its own.
        window_seconds: how long it is asked, from publish on.
        interval_seconds: between the starts of two checks.
        max_failures: checks that may fail; one more brings the fleet back.

    Raises:
        UsageError: a number is out of range.
    """

    check: Callable[[], object]
    window_seconds: float = 10.0
    interval_seconds: float = 1.0
    max_failures: int = 0

    def __post_init__(self) -> None:
        if self.window_seconds < 0 or self.interval_seconds <= 0 or self.max_failures < 0:
            raise UsageError("a probe's window, interval and failures are not negative")


def watch(probe: Probe) -> RemoteError | None:
    """Ask until the window ends; returns the failure that was one too many, if there was one."""
    end = time.monotonic() + probe.window_seconds
    num_failures = 0
    while True:
        started = time.monotonic()
        error = _ask(probe)
        num_failures += error is not None
        if num_failures > probe.max_failures:
            return error
        pause = started + probe.interval_seconds - time.monotonic()
        if time.monotonic() + pause >= end:
            return None
        time.sleep(max(0.0, pause))


def http_check(url: str, timeout_seconds: float = 5.0) -> Callable[[], None]:
    """A check that fails unless `url` answers with a status below 400."""

    def check() -> None:
        try:
            response = httpx.get(url, timeout=timeout_seconds)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise AdapterError(f"{url}: {type(error).__name__}: {error}") from error
        if response.status_code >= 400:
            raise AdapterError(f"{url}: answered {response.status_code}: {response.text[:500]}")

    return check


def _ask(probe: Probe) -> RemoteError | None:
    try:
        if probe.check() is False:
            return RemoteError(type="AdapterError", message="the check says no", where="probe")
    except Exception as error:  # whatever a user's check raises says no
        return RemoteError.of(error, "probe")
    return None
