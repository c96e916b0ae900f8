"""The updates of one vLLM worker, as vLLM's `/collective_rpc` asks for them.

    begin ─► state: preparing ─► waiting ─► finish: published, kept or torn

Attaching and verifying happen while vLLM serves; only `finish` keeps it from its next step.

Every method answers with plain data and raises nothing: with more than one worker, an exception
would shift the answers of the others to the next call. So vLLM's 200 says nothing; `error` does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from checkpoint_engine.adapters.turn import Turn
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import UpdateRefused, UsageError
from checkpoint_engine.update.background import Background, Progress

if TYPE_CHECKING:
    from checkpoint_engine.adapters.vllm import Target, VllmAdapter

__all__ = ["IMPORTED_NS", "VllmUpdates", "register_weight_transfer"]

# vLLM imports this with its worker's class, before it loads a model.
IMPORTED_NS = time.time_ns()


@dataclass(frozen=True)
class _Last:
    """The last update of a model, whichever way it was asked for: the next one returns to it."""

    adapter: VllmAdapter
    session: Background


_last: dict[object, _Last] = {}  # by model, which lives as long as its process


class VllmUpdates:
    """See the module's text.

    Args:
        device: the worker's.
        target: what is updated.
    """

    def __init__(self, device: torch.device, target: Target) -> None:
        self._device, self._target = device, target
        self._model, _ = target.models[0]

    @classmethod
    def of_worker(cls, worker: Any) -> VllmUpdates:
        """Those of vLLM's worker, and of its draft model if that is of the same checkpoint."""
        from checkpoint_engine.adapters.vllm import Target

        config = worker.vllm_config
        models = [(worker.get_model(), config.model_config)]
        draft = worker.get_draft_model()
        if draft is not None:
            draft_config = config.speculative_config.draft_model_config
            if draft_config.model == config.model_config.model:
                models.append((draft, draft_config))
        return cls(
            worker.device,
            Target(
                vllm_config=config,
                rank=worker.rank,
                models=tuple(models),
                unchanged_since_ns=IMPORTED_NS,
                reloaded=worker.model_runner.reset_lora_state,
            ),
        )

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

    def check_lora(self, worker: Any, folder: str) -> dict[str, Any]:
        """Whether vLLM's worker would take the LoRA adapter in a folder."""
        return self._answer(lambda: self._try_lora(worker, folder))

    def _try_lora(self, worker: Any, folder: str) -> Progress:
        from checkpoint_engine.adapters.vllm_lora import LoraTrial  # which imports vllm

        LoraTrial(worker.model_runner.lora_manager).run(folder)
        return Progress(rank=self._target.rank, state="waiting")

    def _answer(self, act: Callable[[], Progress]) -> dict[str, Any]:
        try:
            progress = act()
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            progress = Progress(rank=self._target.rank, state="kept", error=said)
        answer: dict[str, Any] = msgspec.to_builtins(progress)
        return answer

    def _begin(self, handles: Mapping[str, str]) -> Progress:
        from checkpoint_engine.adapters.vllm import VllmAdapter  # which imports vllm

        last = _last.get(self._model)
        if last is not None and not last.session.has_ended:
            raise UpdateRefused("another update of this worker is under way; try again later")
        handle, turn = self._handle(handles), Turn()
        adapter = VllmAdapter(self._target, turn, last.adapter.keep() if last else None)
        _last[self._model] = _Last(adapter, Background(handle, adapter, turn))
        return self._progress()

    def _handle(self, handles: Mapping[str, str]) -> str:
        uuid = device_uuid(self._device.type, self._device.index or 0)
        if uuid in handles:
            return handles[uuid]
        if len(handles) == 1:  # of a server of one rank, where all workers say hello
            return next(iter(handles.values()))
        raise UsageError(f"no handle for device {uuid!r}, only for {sorted(handles)}")

    def _progress(self) -> Progress:
        if self._model not in _last:
            return Progress(rank=self._target.rank, state="none")
        return _last[self._model].session.progress()

    def _finish(self, *, at_once: bool) -> Progress:
        state = self._progress().state
        if state == "none" or (state == "preparing" and not at_once):
            raise UsageError("no update waits to be finished: begin one, and ask for its state")
        return _last[self._model].session.finish()


def register_weight_transfer() -> None:
    """Let users choose `--weight-transfer-config '{"backend": "checkpoint_engine"}'`."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    module = "checkpoint_engine.update.vllm_backend"
    WeightTransferEngineFactory.register_engine("checkpoint_engine", module, "Backend")
