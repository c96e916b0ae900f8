"""A replica of a toy model: torch alone, the real adapter and the real session.

It serves all the time, one forward pass after another, and misbehaves where it is told to.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from toy import Faults, answer, label, listening, make_model

from checkpoint_engine.adapters import transformers
from checkpoint_engine.adapters.base import Identity, Served
from checkpoint_engine.adapters.live import LiveModel, write
from checkpoint_engine.codec.digest import digest_pieces
from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.manifest import Version
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session
from children import serve

PASS_SECONDS = 0.001
ANSWER_SECONDS = 20.0
HALF_OF_THE_PIECES = 8


class Adapter(transformers.TransformersAdapter):
    """The real one, which may fail before it does what it is asked."""

    faults: Faults

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._take_snapshot = self._live.snapshot
        self._live.snapshot = self._snapshot

    def _snapshot(self) -> Any:
        self.faults.strike("snapshot")
        return self._take_snapshot()

    def prepare(self, *arguments: Any) -> str:
        self.faults.strike("prepare")
        return super().prepare(*arguments)

    def pause(self, timeout_seconds: float) -> None:
        self.faults.strike("pause")
        super().pause(timeout_seconds)

    def check(self) -> Served:
        self.faults.strike("check")
        return super().check()

    def roll_back(self) -> None:
        self.faults.strike("roll_back")
        super().roll_back()


class Server:
    """The server around the model: what `replica.Replica` is around a real one."""

    def __init__(self, faults: Faults, seed: int) -> None:
        self._faults, self._model = faults, make_model(seed)
        self._weights = threading.Lock()  # held by a pass, and by an update while weights change
        self._label, self._trouble = label(seed), ""
        self._asked: queue.SimpleQueue[queue.SimpleQueue[dict[str, Any]]] = queue.SimpleQueue()
        threading.Thread(target=self._pass_for_ever, daemon=True).start()

    def _pass_for_ever(self) -> None:
        while True:
            with self._weights:
                said, serves = answer(self._model), self._label
                while not self._asked.empty():
                    self._asked.get().put({"label": serves, "answer": said})
            time.sleep(PASS_SECONDS)

    @property
    def state(self) -> str:
        return self._trouble or "serving"

    def ask(self) -> dict[str, Any]:
        """One request."""
        if self._trouble:
            return {"refused": self._trouble}
        mine: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._asked.put(mine)
        return mine.get(timeout=ANSWER_SECONDS)

    def accept(self, version: Version) -> None:
        self._faults.strike("accept")

    def hold(self, timeout_seconds: float) -> None:
        if self._trouble == "torn":
            return
        if not self._weights.acquire(timeout=timeout_seconds):
            raise DeadlineExceeded("requests did not end")

    def publish(self, version: Version, served: Served) -> None:
        self._label, self._trouble = version.label, ""
        self._faults.strike("publish")

    def release(self) -> None:
        if self._trouble == "torn":
            self._trouble = ""
        self._weights.release()
        self._faults.strike("resume")

    def quarantine(self, reason: str) -> None:
        self._trouble = "quarantined"

    def tear(self, reason: str) -> None:
        self._trouble = "torn"


class Replica:
    """The commands."""

    def __init__(self, name: str, seed: int) -> None:
        self._faults = Faults()
        self._server = Server(self._faults, seed)
        identity = Identity(replica=name, engine=f"process {os.getpid()}")
        self._adapter = Adapter(self._server._model, identity, self._server)
        self._adapter.faults = self._faults
        self._attachments = Attachments(keep_maps=True)
        self._updating = threading.Lock()
        self._make_fragile()

    def arm(self, point: str, what: str) -> None:
        self._faults.arm(point, what)

    def recover(self) -> None:
        """Forget a fault that was not met."""
        self._faults.disarm()

    def ask(self) -> dict[str, Any]:
        return self._server.ask()

    def info(self) -> dict[str, Any]:
        """As the live parameters have it; while an update is under way, its state alone."""
        if not self._updating.acquire(blocking=False):
            return {"state": "updating"}
        try:
            return {
                "state": self._server.state,
                "label": self._server._label,
                "digest": LiveModel(self._server._model).digest(),
                "base": self._adapter.base(),
                "undecided": self._adapter.undecided,
            }
        finally:
            self._updating.release()

    def update(self, handle: str) -> str:
        """Take one; returns what went wrong."""
        if not self._updating.acquire(blocking=False):
            return "UpdateRefused: another update of this replica is under way"
        try:
            outcome = session.run(handle, self._adapter, self._attachments)
            return "" if outcome.state == "published" else str(outcome.error)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self._updating.release()

    def take_updates(self, path: str) -> None:
        """Answer each handle with what became of it, for ever."""
        with listening(path) as listener:
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._take, args=(connection,), daemon=True).start()

    def _take(self, connection: Any) -> None:
        # Whoever called may have died.
        with connection, suppress(BrokenPipeError), connection.makefile("rw") as stream:
            error = self.update(stream.readline().strip())
            stream.write((error.replace("\n", " ") or "published") + "\n")

    def _make_fragile(self) -> None:
        """Faults in the middle of the copies, and between a vote and its answer."""
        num_pieces = 0

        def digest(pieces: Any) -> bytes:
            def counted() -> Any:
                nonlocal num_pieces
                for piece in pieces:
                    yield piece
                    num_pieces += 1
                    if num_pieces == HALF_OF_THE_PIECES:
                        self._faults.strike("apply")

            return digest_pieces(counted())

        def writing(plan: Any, pool: Any, **options: Any) -> Any:
            nonlocal num_pieces
            num_pieces = 0
            return write(plan, pool, digest, **options)

        transformers.write = writing
        self._faults.after_message(Channel, {"Applied": "waiting"})


def main(name: str, seed: int, path: str) -> None:
    replica = Replica(name, seed)
    threading.Thread(target=replica.take_updates, args=(path,), daemon=True).start()
    serve(replica)
    os._exit(0)  # in the middle of a pass, as ever


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
