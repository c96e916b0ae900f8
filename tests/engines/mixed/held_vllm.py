"""vLLM's worker, whose loader may be held: `--worker-cls held_vllm.Worker`."""

from __future__ import annotations

from typing import Any

from held import held
from vllm.v1.worker.cpu_worker import CPUWorker


class Worker(CPUWorker):
    def load_model(self, *args: Any, **options: Any) -> None:
        super().load_model(*args, **options)
        model = self.get_model()
        load = model.load_weights
        model.load_weights = lambda weights: load(held(weights))
