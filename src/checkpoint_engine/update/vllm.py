"""The updates of one vLLM worker, as vLLM's `/collective_rpc` asks for them.

    begin ─► state: preparing ─► waiting ─► finish: published, kept or torn

Attaching and verifying happen while vLLM serves; only `finish` keeps it from its next step.

Every method answers with plain data and raises nothing: with more than one worker, an exception
would shift the answers of the others to the next call. So vLLM's 200 says nothing; `error` does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from checkpoint_engine.adapters.turn import Turn
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import UpdateRefused, UsageError
from checkpoint_engine.update.background import Background, Progress

__all__ = ["VllmUpdates"]


class VllmUpdates:
    """See the module's text. Must be made where vLLM runs, by its worker."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker
        self._adapter: Any = None
        self._session: Background | None = None

    def begin(self, handles: Mapping[str, str]) -> dict[str, Any]:
        """Start a session with the handle of this worker's device, and return at once."""
        return self._answer(lambda: self._begin(handles))

    def state(self) -> dict[str, Any]:
        """How far the session has come."""
        return self._answer(self._progress)

    def finish(self) -> dict[str, Any]:
        """Let a session that waits change the weights, on this thread; says how it has ended."""
        return self._answer(lambda: self._finish(at_once=False))

    def update(self, handles: Mapping[str, str]) -> dict[str, Any]:
        """Begin and finish, while vLLM waits."""
        begun = self.begin(handles)
        return begun if begun["error"] else self._answer(lambda: self._finish(at_once=True))

    def _answer(self, act: Callable[[], Progress]) -> dict[str, Any]:
        try:
            progress = act()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            progress = Progress(rank=self._worker.rank, state="kept", error=said)
        answer: dict[str, Any] = msgspec.to_builtins(progress)
        return answer

    def _begin(self, handles: Mapping[str, str]) -> Progress:
        from checkpoint_engine.adapters.vllm import VllmAdapter  # imports vllm

        if self._session is not None and not self._session.has_ended:
            raise UpdateRefused("another update of this worker is under way; try again later")
        device = self._worker.device
        uuid = device_uuid(device.type, device.index or 0)
        if uuid not in handles:
            raise UsageError(f"no handle for device {uuid!r}, only for {sorted(handles)}")
        turn, kept = Turn(), self._adapter and self._adapter.keep()
        self._adapter = VllmAdapter(self._worker, turn, kept)
        self._session = Background(handles[uuid], self._adapter, turn)
        return self._progress()

    def _progress(self) -> Progress:
        if self._session is None:
            return Progress(rank=self._worker.rank, state="none")
        return self._session.progress()

    def _finish(self, *, at_once: bool) -> Progress:
        if self._session is None:
            raise UsageError("no update was begun")
        if not at_once and self._progress().state == "preparing":
            raise UsageError("the update is not ready yet: ask for its state until it waits")
        return self._session.finish()
