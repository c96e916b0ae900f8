"""The background check of live parameters against what was loaded or published.

Memory fails, and other code in the process has bugs. A thread digests one chunk after the other
and sleeps in between, so that a pass over all parameters takes about as long as it is told; a
chunk keeps the weights to itself for a millisecond or so. It has the priority of any other
thread: at a lower one it could be kept from running while it holds the interpreter's lock.

    with scrubbing(replica, pass_seconds=600.0):
        serve(...)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from checkpoint_engine.replica.replica import Replica

__all__ = ["scrubbing"]

STOP_SECONDS = 10.0


@contextmanager
def scrubbing(replica: Replica, pass_seconds: float) -> Iterator[None]:
    """Scrub while the block runs, one pass in `pass_seconds`; 0 turns it off."""
    stopping = threading.Event()

    def run() -> None:
        while not stopping.wait(pass_seconds / replica.num_chunks):
            replica.scrub()

    thread = threading.Thread(target=run, name="scrub", daemon=True)
    if pass_seconds > 0:
        thread.start()
    try:
        yield
    finally:
        stopping.set()
        if thread.ident is not None:
            thread.join(STOP_SECONDS)
