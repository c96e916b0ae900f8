"""What an engine's worker calls to take an update: the names that vLLM and SGLang import.

    update_weights_from_ipc(zmq_ctx, handles[device_uuid], "cpu", run=model.load_weights)

returns when the new version is published, and raises if it is not, in which case the weights are
those of before: the loader was not called, or was called again with the version before.

    vllm serve MODEL --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension

gives vLLM's workers the methods that its `/collective_rpc` then calls, and the weight transfer
backend "checkpoint_engine".
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from checkpoint_engine.adapters.callback import CallbackAdapter, Kept, Run
from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session
from checkpoint_engine.update.vllm import VllmUpdates, register_weight_transfer

__all__ = ["VllmColocateWorkerExtension", "update_weights_from_ipc"]

# The function has nowhere else to keep what a model was given last, which is its way back.
_kept: weakref.WeakKeyDictionary[Any, Kept] = weakref.WeakKeyDictionary()
_pinned = Attachments(keep_maps=True, for_gpu=True)  # to pin a map takes longer than an update
_updates: dict[VllmColocateWorkerExtension, VllmUpdates] = {}  # of one worker, for ever


def update_weights_from_ipc(
    zmq_ctx: object,
    zmq_handle: str,
    device_id: int | str,
    *,
    run: Run,
    post_hook: Callable[[], object] | None = None,
) -> None:
    """Take one update through an engine's own loader.

    Args:
        zmq_ctx: accepted for compatibility; a handle is a Unix socket of its own protocol.
        zmq_handle: the handle that the parameter server gave for this worker's device.
        device_id: index of the worker's device, or "cpu".
        run: takes a list of (name, tensor). On "cpu" the tensors are private views of staged
            memory, valid as long as somebody holds them; those of a streamed version own their
            memory, and come in several calls, as on a GPU. A method of a model is remembered with
            the model: the next update can go back to what this one brought.
        post_hook: called after the last `run`.

    Raises:
        AdapterError: the update was not published; says why.
        HandoverError: nobody that is trusted listens at the handle.
    """
    model = getattr(run, "__self__", None)
    if type(model).__weakrefoffset__ == 0 or type(model).__hash__ is None:
        model = None  # a plain container, say: it cannot be remembered without keeping it alive
    kept = _kept.get(model, Kept()) if model is not None else Kept()
    device = _device(device_id)
    adapter = CallbackAdapter(run, post_hook, device, kept)
    attachments = _pinned if device.type == "cuda" else Attachments(keep_maps=False)
    try:
        outcome = session.run(zmq_handle, adapter, attachments)
    finally:
        if model is not None:
            _kept[model] = adapter.keep()
    if outcome.state != "published":
        raise AdapterError(f"the update was not published ({outcome.state}): {outcome.error}")


def _device(device_id: int | str) -> torch.device:
    if not isinstance(device_id, str):
        return torch.device(DeviceManager().device_type, device_id)
    device = torch.device(device_id)
    if device == torch.device("cuda"):
        return torch.device("cuda", torch.cuda.current_device())
    return device


class VllmColocateWorkerExtension:
    """What vLLM adds to its worker's bases; see `update.vllm`, whose answers these are."""

    def update_weights_from_ipc(self, zmq_handles: Mapping[str, str]) -> dict[str, Any]:
        """Take one update, while vLLM waits: for callers that know of one call only."""
        return _vllm_updates(self).update(zmq_handles)

    def ckpt_begin_update(self, zmq_handles: Mapping[str, str]) -> dict[str, Any]:
        """Begin one beside vLLM, which goes on serving."""
        return _vllm_updates(self).begin(zmq_handles)

    def ckpt_update_state(self) -> dict[str, Any]:
        """Whether the update waits to be finished, or how it has ended."""
        return _vllm_updates(self).state()

    def ckpt_finish_update(self) -> dict[str, Any]:
        """Finish an update that waits; call it while vLLM is paused."""
        return _vllm_updates(self).finish()

    def ckpt_check_lora(self, folder: str) -> dict[str, Any]:
        """Whether this worker would take the LoRA adapter in a folder."""
        return _vllm_updates(self).check_lora(self, folder)


def _vllm_updates(worker: VllmColocateWorkerExtension) -> VllmUpdates:
    if worker not in _updates:
        _updates[worker] = VllmUpdates.of_worker(worker)
    return _updates[worker]


if "vllm.distributed.weight_transfer" in sys.modules:  # vLLM imports this with its worker's class
    register_weight_transfer()
