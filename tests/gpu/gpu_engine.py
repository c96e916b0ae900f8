"""An engine's worker with its parameters on the first GPU."""

from __future__ import annotations

import mmap
from typing import Any

import torch

from checkpoint_engine import cuda, worker
from checkpoint_engine.errors import HandoverError
from children import serve


class Model:
    """Parameters that are written in place, as engines do."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.given: dict[str, torch.Tensor] = {}
        self.failing = self.keeping = False

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            assert tensor.is_cuda
            own = self.weights.setdefault(name, torch.empty_like(tensor))
            own.copy_(tensor)
            if self.keeping:
                self.given[name] = tensor
        if self.failing:
            self.failing = False
            raise RuntimeError("load_weights refused")


class Engine:
    """The commands."""

    def __init__(self) -> None:
        self.model = Model()

    def update(self, handle: str, failing: bool = False, keeping: bool = False) -> None:
        self.model.failing, self.model.keeping = failing, keeping
        worker.update_weights_from_ipc(None, handle, 0, run=self.model.load_weights)

    def leave_free(self, num_bytes: int) -> None:
        """Let torch have so much more than its tensors have; the rest is another's."""
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(
            min(1.0, (torch.cuda.memory_reserved() + num_bytes) / total)
        )

    def forbid_pins(self) -> None:
        """As a host does that limits locked memory."""

        def refuse(owner: object, mapped: mmap.mmap, *, writable: bool) -> Any:
            raise HandoverError(f"{len(mapped)} bytes cannot be pinned: the limit is 0")

        cuda.pin = refuse

    def pinned(self) -> list[str]:
        """Why the maps that are kept are not pinned; "" for each that is."""
        kept = worker._kept[self.model]
        return [
            attachment.not_pinned
            for content in (kept.served, kept.previous)
            if content is not None
            for _, attachment in content._held
        ]

    def num_pinned_maps(self) -> int:
        """That are kept for the next update, beside those of versions."""
        return sum(idle.is_pinned for idle in worker._pinned._idle.values())

    def sums(self, given: bool = False) -> dict[str, float]:
        tensors = self.model.given if given else self.model.weights
        return {name: float(tensor.double().sum()) for name, tensor in tensors.items()}

    def used_bytes(self) -> dict[str, int]:
        """Of the GPU: by all its processes, by torch in this one, and by its tensors."""
        free, total = torch.cuda.mem_get_info()
        return {
            "all": total - free,
            "torch": torch.cuda.memory_reserved(),
            "tensors": torch.cuda.memory_allocated(),
        }


if __name__ == "__main__":
    serve(Engine())
