"""vLLM's worker on a CPU without its packed kernels: layers run on what was loaded, as on a GPU.

`--worker-cls unpacked.Worker`. A layerwise reload fails there, so an update that is published was
loaded directly. While the file `$FAIL` exists, a load fails after some tensors.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import vllm.model_executor.layers.utils as dispatch
from vllm import _custom_ops as ops
from vllm.v1.worker.cpu_worker import CPUWorker

from checkpoint_engine.adapters import vllm_model

T = TypeVar("T")
NUM_LOADED = 9


def refuse(*_: Any) -> None:
    raise RuntimeError("the layers of this model need no reload")


def failing(weights: Iterable[T]) -> Iterator[T]:
    """The weights; or some of them, once."""
    fail = Path(os.environ["FAIL"])
    for number, weight in enumerate(weights):
        if number == NUM_LOADED and fail.exists():
            fail.unlink()
            raise RuntimeError("the loader fails half-way")
        yield weight


class Worker(CPUWorker):
    def load_model(self, *args: Any, **options: Any) -> None:
        ops._supports_onednn = False
        dispatch.check_cpu_sgl_kernel = lambda *_: False
        super().load_model(*args, **options)
        vllm_model.initialize_layerwise_reload = refuse
        model = self.get_model()
        load = model.load_weights
        model.load_weights = lambda weights: load(failing(weights))
