"""Asking replicas over HTTP, all at once and each within a deadline.

for url, answer in zip(urls, fetch_digests(urls, sample=1.0, seed=0, timeout_seconds=60)):
    if isinstance(answer, str): ...                  # why there is no answer
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import msgspec

from checkpoint_engine.errors import MALFORMED, UsageError

if TYPE_CHECKING:
    import httpx

    from checkpoint_engine.compare import WeightDigests

__all__ = ["checked_url", "fetch_digests", "get"]


def checked_url(url: str) -> str:
    """The URL without a slash at its end; raises UsageError if it is none."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(f"--endpoint {url!r} is no URL such as http://127.0.0.1:8000")
    return url.rstrip("/")


def fetch_digests(
    urls: Sequence[str], *, sample: float, seed: int, timeout_seconds: float
) -> list[WeightDigests | str]:
    """What each replica answers at `/weight_digests`, or why there is no answer."""

    async def ask_all() -> list[WeightDigests | str]:
        return await asyncio.gather(
            *(_digests(f"{url}/weight_digests?{query}", timeout_seconds) for url in urls)
        )

    query = f"sample={sample:g}&seed={seed}"
    return asyncio.run(ask_all())


async def _digests(url: str, timeout_seconds: float) -> WeightDigests | str:
    import httpx

    from checkpoint_engine.compare import WeightDigests

    # Replicas are asked directly: a proxy in the environment would not reach them.
    async with httpx.AsyncClient(trust_env=False, timeout=timeout_seconds) as client:
        answer = await get(client, url, timeout_seconds)
    if isinstance(answer, str):
        return answer
    if not answer.is_success:
        return f"HTTP {answer.status_code}: {answer.text[:200]}"
    try:
        return msgspec.json.decode(answer.content, type=WeightDigests)
    except MALFORMED as error:
        return f"not a replica of ours: {error}"


async def get(client: httpx.AsyncClient, url: str, timeout_seconds: float) -> httpx.Response | str:
    """The answer, or why there is none."""
    import httpx

    try:
        return await asyncio.wait_for(client.get(url), timeout_seconds)
    except (asyncio.TimeoutError, httpx.TimeoutException):
        return f"no answer within {timeout_seconds:g} s"
    except httpx.HTTPError as error:
        return _reason(error)


def _reason(error: BaseException) -> str:
    """What the system said, which HTTP libraries wrap several times."""
    reason = str(error) or type(error).__name__
    cause = error.__cause__
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno is not None:
            reason = os.strerror(cause.errno) if cause.errno > 0 else str(cause.strerror)
        cause = cause.__cause__ or cause.__context__
    return reason
