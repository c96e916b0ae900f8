"""Engines that broadcast by torch.distributed: one implementation, a backend each.

Gloo moves bytes between CPUs of any hosts and needs nothing but this package. NCCL and HCCL move
them between GPUs and between Ascend NPUs, whose buckets lie on the device; GPUs take digests there,
of what is on NPUs they are taken of copies in host memory.

    engine = GlooCheckpointEngine(bucket_size=64 << 20, timeout=120)
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any, ClassVar

import torch

from checkpoint_engine.errors import UsageError
from checkpoint_engine.streaming.carriers import Carrier, CollectiveCarrier
from checkpoint_engine.streaming.compression import COMPRESSIONS
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["GlooCheckpointEngine", "HCCLCheckpointEngine", "NCCLCheckpointEngine"]


class _Collective(StreamingEngine):
    backend: ClassVar[str]

    def make_carrier(self, rendezvous: Rendezvous) -> Carrier:
        """A process group of all ranks."""
        return CollectiveCarrier(rendezvous, self.backend, self.device)


class GlooCheckpointEngine(_Collective):
    """Between CPUs, on one host or several; the embedded default."""

    name = backend = "gloo"
    compressions = COMPRESSIONS


class NCCLCheckpointEngine(_Collective):
    """Between GPUs: of each process the one that is current when it is made.

    Raises:
        UsageError: there is no GPU, or this torch has no NCCL.
    """

    name = backend = "nccl"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
            raise UsageError(
                "NCCLCheckpointEngine needs a GPU and a torch with NCCL: use "
                "GlooCheckpointEngine, or SharedMemoryCheckpointEngine on one host"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        super().__init__(*args, **kwargs)


class HCCLCheckpointEngine(_Collective):
    """Between Ascend NPUs: of each process the one that is current when it is made.

    Raises:
        UsageError: there is none, or torch_npu is not installed.
    """

    name = backend = "hccl"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        npu = import_module("torch_npu").npu if find_spec("torch_npu") else None
        if npu is None or not npu.is_available():
            raise UsageError(
                "HCCLCheckpointEngine needs an Ascend NPU and torch_npu: use GlooCheckpointEngine, "
                "or SharedMemoryCheckpointEngine on one host"
            )
        self.device = torch.device("npu", npu.current_device())
        super().__init__(*args, **kwargs)
