"""Lines from processes that this one has started, each awaited with a deadline.

line = next_line(process, 60.0, "source 0 of the benchmark")              # here
say(meta)                                                                 # there
"""

from __future__ import annotations

import selectors
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.errors import DeadlineExceeded, PeerLost

__all__ = ["next_line", "say"]

MAX_WORDS = 2000


def next_line(
    process: subprocess.Popen[bytes], timeout_seconds: float, who: str, log: Path | None = None
) -> bytes:
    """What a child says next; it says one line, and waits to be asked for another.

    Args:
        process: its output is a pipe, which nobody else reads.
        timeout_seconds: the longest wait.
        who: what to call it in an error.
        log: where its complaints go; default where those of this process go.

    Raises:
        PeerLost: it ended.
        DeadlineExceeded: it says nothing.
    """
    assert process.stdout is not None, "its output is a pipe"
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_seconds):
            raise DeadlineExceeded(f"{who} said nothing for {timeout_seconds:.0f} s")
    line = process.stdout.readline()
    if not line:
        words = log.read_text()[-MAX_WORDS:] if log else "its last words are above"
        raise PeerLost(f"{who} ended: {words}")
    return line


def say(what: Any) -> None:
    """Write a line of JSON to whoever started this process."""
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()
