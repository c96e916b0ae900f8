"""LoRA adapters in vLLM's worker: tried before they are loaded, and read once.

vLLM loads adapters by itself; here is what it does not see to:

- A worker that raises where it loads one, as for a rank that is too high, shifts the answers of the
  others to the next call. So an adapter is tried before, and errors are answered as data.
- Tensors for layers that the model does not have are skipped in silence. They are refused.
- `load_inplace` stays set in what requests carry: each step would read the adapter from its folder
  again, and a request that is older than the adapter would put the one before back for everybody.
  So steps use what was loaded last, whatever they carry.

    LoraTrial(worker.model_runner.lora_manager).run("/dev/shm/...")      # raises if it does not fit
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from vllm.lora.request import LoRARequest

from checkpoint_engine.errors import AdapterError

__all__ = ["LoraTrial"]

TRIAL_ID = (1 << 30) - 1  # vLLM counts adapters from 1
FOLLOWING = "_checkpoint_engine_loaded"


class LoraTrial:
    """Tries adapters in vLLM's own manager of them, between two of the worker's steps."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager

    def run(self, folder: str) -> None:
        """Load an adapter as vLLM would, and let go of it. What is served stays as it is.

        Adapters that made room for it are read again when they are needed.

        Raises:
            AdapterError: it has tensors for layers that the model does not have.
            Exception: whatever vLLM says.
        """
        _follow(self._manager)
        request = LoRARequest("ckpt-engine trial", TRIAL_ID, folder)
        try:
            self._manager.add_adapter(request)
            inner = self._manager._adapter_manager
            unknown = _unknown(inner.get_adapter(TRIAL_ID).loras, inner.modules)
            if unknown:
                raise AdapterError(
                    f"the model has no layer {unknown[0]!r}, which the adapter is for"
                )
        finally:
            self._manager.remove_adapter(TRIAL_ID)
            getattr(self._manager, FOLLOWING).pop(TRIAL_ID, None)


def _follow(manager: Any) -> None:
    """Have steps use what was loaded last under a number, and read nothing again while it is there.

    The manager is asked for what each step's requests carry, by the method that is replaced here,
    and for what is loaded by hand, by the other.
    """
    if hasattr(manager, FOLLOWING):
        return
    loaded: dict[int, LoRARequest] = {}
    add, apply = manager.add_adapter, manager._apply_adapters

    def add_adapter(request: LoRARequest) -> bool:
        added = bool(add(request))
        loaded[request.lora_int_id] = _once(request)
        return added

    def apply_adapters(requests: Iterable[LoRARequest]) -> None:
        apply({loaded.get(one.lora_int_id, one) for one in requests if one})

    setattr(manager, FOLLOWING, loaded)
    manager.add_adapter, manager._apply_adapters = add_adapter, apply_adapters


def _once(request: LoRARequest) -> LoRARequest:
    """The same adapter, to be read only when it is not there."""
    return LoRARequest(
        lora_name=request.lora_name,
        lora_int_id=request.lora_int_id,
        lora_path=request.lora_path,
        base_model_name=request.base_model_name,
        is_3d_lora_weight=request.is_3d_lora_weight,
    )


def _unknown(names: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Layers of an adapter that are none of the model's; experts have names of their own."""
    known = {name.removeprefix("model.") for name in modules}
    plain = (name for name in names if ".experts" not in name)
    return sorted(name for name in plain if name.removeprefix("model.") not in known)
