"""A session that runs beside an engine, which goes on serving until it is asked to finish.

What needs the engine's thread waits until that is lent; all else happens on a thread of its own.

    session = Background(handle, adapter, turn)     # returns at once
    session.progress()                              # "preparing", "waiting", then how it ended
    session.finish()                                # on the engine's own thread
"""

from __future__ import annotations

import contextlib
import os
import threading

import msgspec

from checkpoint_engine.adapters.base import Adapter
from checkpoint_engine.adapters.turn import Turn
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session

__all__ = ["Background", "Progress"]


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a session, as data that an engine passes on to whoever called it.

    Attributes:
        state: "preparing", "waiting" for the engine's thread, "published", "kept" (the base, as
            before), "torn", or "none" if no session was ever begun.
        label: of the version that was published.
        error: why an ended session is not well.
    """

    rank: int
    state: str
    label: str | None = None
    error: str | None = None


class Background:
    """See the module's text.

    Args:
        handle: of the rank that serves this worker.
        adapter: takes `turn` in its `pause`.
        turn: of this session alone.
    """

    def __init__(self, handle: str, adapter: Adapter, turn: Turn) -> None:
        self._handle, self._adapter, self._turn = handle, adapter, turn
        self._ended: Progress | None = None
        threading.Thread(target=self._run, name="ckpt-update", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        """Whether nothing more comes of it."""
        return self._ended is not None

    def progress(self) -> Progress:
        """How far it has come."""
        state = "waiting" if self._turn.is_wanted else "preparing"
        return self._ended or Progress(rank=self._adapter.identity.rank, state=state)

    def finish(self) -> Progress:
        """Lend this thread to the session until it has ended, and say how."""
        self._turn.lend()
        return self.progress()

    def _run(self) -> None:
        _leave_bound_cores()
        rank = self._adapter.identity.rank
        try:
            outcome = session.run(self._handle, self._adapter, Attachments(keep_maps=False))
            error = None if outcome.error is None else str(outcome.error)
            state, label = outcome.state, outcome.label
            self._ended = Progress(rank=rank, state=state, label=label, error=error)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            self._ended = Progress(rank=rank, state="kept", error=said)
        finally:
            self._turn.end()


def _leave_bound_cores() -> None:
    """Let this thread, and those that it starts, use every core that the engine as a whole may use.

    On a CPU vLLM binds a worker to cores, where idle threads get little while it serves.
    """
    with contextlib.suppress(OSError):  # then it takes longer
        cores = os.sched_getaffinity(0) | os.sched_getaffinity(os.getppid())
        os.sched_setaffinity(0, cores)
