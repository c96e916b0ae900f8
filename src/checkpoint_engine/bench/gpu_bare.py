"""What there is at best, and what is done otherwise: copies to a GPU, and tensors by CUDA IPC.

A process with an engine's parameters, spoken to in lines of JSON. Handles of CUDA IPC come as plain
fields, and are opened by one fixed function of torch.

    python -m checkpoint_engine.bench.gpu_bare 16       # 16 layers
"""

from __future__ import annotations

import sys
import time
from typing import Any

import msgspec
import torch

from checkpoint_engine.bench.gpu_weights import make_weights, sums
from checkpoint_engine.children import say

__all__ = ["Command", "Handle", "share"]


class Handle(msgspec.Struct, frozen=True):
    """A tensor on a GPU that another process may open, in the order in which torch wants it."""

    name: str
    memory: bytes
    memory_bytes: int
    memory_offset: int
    counter: bytes
    counter_offset: int
    event: bytes
    event_sync: bool


class Command(msgspec.Struct, frozen=True):
    """What to do: "pinned", "pageable", "ipc" with handles, "end of ipc" or "sums"."""

    do: str
    handle: Handle | None = None


def share(name: str, tensor: torch.Tensor) -> Handle:
    """The handle of a tensor that has all of its storage; keep the tensor until it was copied."""
    _, *fields = tensor.untyped_storage()._share_cuda_()  # type: ignore[no-untyped-call]
    return Handle(name, *fields)


def _opened(handle: Handle, like: torch.Tensor) -> torch.Tensor:
    _, *fields = msgspec.structs.astuple(handle)
    storage = torch.UntypedStorage._new_shared_cuda(torch.cuda.current_device(), *fields)
    tensor = torch.empty(0, dtype=like.dtype, device=like.device)
    return tensor.set_(storage, 0, like.shape, like.stride())


class _Engine:
    def __init__(self, num_layers: int) -> None:
        self._parameters = make_weights(num_layers, "cuda")
        self._pageable = make_weights(num_layers, "cpu")
        self._pinned = {name: one.pin_memory() for name, one in self._pageable.items()}

    def do(self, command: Command) -> Any:
        """Seconds, or what was asked for."""
        if command.do == "sums":
            return sums(self._parameters)
        start = time.perf_counter()
        if command.handle is not None:
            target = self._parameters[command.handle.name]
            target.copy_(_opened(command.handle, target))
        elif command.do != "end of ipc":
            sources = self._pinned if command.do == "pinned" else self._pageable
            for name, target in self._parameters.items():
                target.copy_(sources[name], non_blocking=command.do == "pinned")
        torch.cuda.synchronize()
        return time.perf_counter() - start


def _main(num_layers: str) -> None:
    engine = _Engine(int(num_layers))
    say("ready")
    for line in sys.stdin.buffer:
        say(engine.do(msgspec.json.decode(line, type=Command)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
