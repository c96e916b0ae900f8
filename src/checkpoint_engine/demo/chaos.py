"""Trouble for the demo: one update is refused by a replica, and one kills a replica in its middle.

Neither is simulated. The refusal is a replica's own: it is told to expect another version than the
one that is offered. The death is SIGKILL, as soon as the replica says that it is updating; it is
then started anew, with the weights from before training, and joins at the next update.

    chaos = Chaos(fleet, requests)
    report = server.update(label, chaos.requests(step))       # may raise UpdateFailed
    trouble = chaos.settle(step)
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import httpx

from checkpoint_engine.demo.fleet import Fleet
from checkpoint_engine.errors import UsageError
from checkpoint_engine.update.conductor import Request

__all__ = ["Chaos", "check_chaos"]

REFUSED_STEP, DEADLY_STEP = 2, 3
MIN_STEPS, MIN_REPLICAS = DEADLY_STEP + 1, 2
REFUSING, VICTIM = 0, 1
WATCH_SECONDS = 30.0


def check_chaos(num_steps: int, num_replicas: int) -> None:
    """Raise UsageError if these are too few to show it."""
    if num_steps < MIN_STEPS or num_replicas < MIN_REPLICAS:
        raise UsageError(f"chaos needs {MIN_STEPS} steps and {MIN_REPLICAS} replicas")


class Chaos:
    """Which requests bring trouble at which step."""

    def __init__(self, fleet: Fleet, requests: Sequence[Request]) -> None:
        self._fleet, self._requests = fleet, list(requests)

    def requests(self, step: int) -> list[Request]:
        """The calls that make the engines take the update of this step."""
        requests = list(self._requests)
        if step == REFUSED_STEP:
            requests[REFUSING] = self._refuse
        elif step == DEADLY_STEP:
            requests[VICTIM] = self._kill
        return requests

    def settle(self, step: int) -> str:
        """What the trouble was; whoever died of it is back when this returns."""
        if step == REFUSED_STEP:
            return f"{self._fleet.replicas[REFUSING].name} refused"
        if step == DEADLY_STEP:
            self._fleet.restart(VICTIM)
            return f"{self._fleet.replicas[VICTIM].name} was killed, and is back"
        return ""

    def _refuse(self, handles: Sequence[tuple[str, str]]) -> None:
        self._fleet.replicas[REFUSING].update(dict(handles), "a version that nobody offers")

    def _kill(self, handles: Sequence[tuple[str, str]]) -> None:
        called = threading.Event()
        killer = threading.Thread(target=self._kill_in_the_middle, args=(called,), daemon=True)
        killer.start()
        try:
            self._requests[VICTIM](handles)
        finally:
            called.set()
            killer.join(WATCH_SECONDS)

    def _kill_in_the_middle(self, called: threading.Event) -> None:
        """At the latest when its update is over, so that the demo goes on."""
        with httpx.Client(timeout=WATCH_SECONDS) as client:
            health = f"{self._fleet.endpoints[VICTIM]}/health"
            while not called.is_set() and client.get(health).json()["status"] != "updating":
                pass
        self._fleet.kill(VICTIM)
