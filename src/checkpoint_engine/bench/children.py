"""Lines of JSON between the benchmark and processes of its own, each awaited with a deadline.

meta = decode(next_line(process, 60.0, "source 0 of the benchmark"))      # here
say(meta)                                                                 # there
"""

from __future__ import annotations

import selectors
import subprocess
import sys
from typing import Any

import msgspec

from checkpoint_engine.errors import DeadlineExceeded, PeerLost

__all__ = ["next_line", "say"]


def next_line(process: subprocess.Popen[bytes], timeout_seconds: float, who: str) -> bytes:
    """What a child says next; it says one line, and waits to be asked for another.

    Args:
        process: its output is a pipe, which nobody else reads.
        timeout_seconds: the longest wait.
        who: what to call it in an error.

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
        raise PeerLost(f"{who} ended; its last words are above")
    return line


def say(what: Any) -> None:
    """Write a line to whoever started this process."""
    sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
    sys.stdout.buffer.flush()
