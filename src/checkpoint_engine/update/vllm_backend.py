"""vLLM's own weight transfer endpoints, with our transaction behind them.

    vllm serve MODEL --worker-extension-cls checkpoint_engine.worker.VllmColocateWorkerExtension
        --weight-transfer-config '{"backend": "checkpoint_engine"}'

    POST /pause?mode=keep, /start_weight_update
    POST /update_weights {"update_info": {"zmq_handles": {device uuid: handle}}}
    POST /finish_weight_update {"weight_version": label}
    POST /resume

`/update_weights` is the whole transaction and fails if that does. Then no label may be set: call
`/finish_weight_update` without one, which ends the update. It answers with an error, since for the
worker that failed it has ended already.

vLLM reads the answers of its workers one after the other and stops at the first that failed; the
rest would be taken for answers to the next call. All workers have one outcome, so only the last one
raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.parallel_state import get_world_group
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from checkpoint_engine.adapters.vllm import Target
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.update.vllm import IMPORTED_NS, VllmUpdates

__all__ = ["Backend"]


@dataclass
class InitInfo(WeightTransferInitInfo):  # type: ignore[misc]
    """Nothing has to be known beforehand."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):  # type: ignore[misc]
    """What `ParameterServer.update` gives its `req_func`."""

    zmq_handles: dict[str, str]


class Backend(WeightTransferEngine[InitInfo, UpdateInfo]):  # type: ignore[misc]
    """One worker's; see the module's text. A draft model takes an update of its own."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        super().__init__(config, vllm_config, device, model)
        self._updates: dict[torch.nn.Module, VllmUpdates] = {}

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Nothing to do."""

    def start_weight_update(self) -> None:
        """Nothing to do: up to the handles nothing changes."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take one update, from greeting to publishing or back.

        Raises:
            AdapterError: it was not published; only from the last worker.
        """
        rank = int(get_world_group().rank_in_group)
        if self.model not in self._updates:
            self._updates[self.model] = VllmUpdates(self.device, self._target(rank))
        answer = self._updates[self.model].update(update_info.zmq_handles)
        if answer["error"] and rank == self.parallel_config.world_size - 1:
            raise AdapterError(
                f"the update was not published ({answer['state']}): {answer['error']}"
            )

    def finish_weight_update(self) -> None:
        """Nothing to do: the layers were finished in the transaction."""

    def shutdown(self) -> None:
        """Nothing to do: what is kept is the way back of the next update."""

    def _target(self, rank: int) -> Target:
        return Target(
            vllm_config=self.vllm_config,
            rank=rank,
            models=((self.model, self.model_config),),
            unchanged_since_ns=IMPORTED_NS,
            reloaded=lambda: None,  # vLLM does it when the update is finished
        )
