"""An engine's worker with its parameters on the first GPU."""

from __future__ import annotations

import torch

from checkpoint_engine.worker import update_weights_from_ipc
from children import serve


class Model:
    """Parameters that are written in place, as engines do."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.failing = False

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            assert tensor.is_cuda
            own = self.weights.setdefault(name, torch.empty_like(tensor))
            own.copy_(tensor)
        if self.failing:
            self.failing = False
            raise RuntimeError("load_weights refused")


class Engine:
    """The commands."""

    def __init__(self) -> None:
        self.model = Model()

    def update(self, handle: str, failing: bool = False) -> None:
        self.model.failing = failing
        update_weights_from_ipc(None, handle, 0, run=self.model.load_weights)

    def sums(self) -> dict[str, float]:
        return {name: float(own.double().sum()) for name, own in self.model.weights.items()}

    def used_bytes(self) -> int:
        """Of the GPU by all its processes, without what is merely cached here."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free


if __name__ == "__main__":
    serve(Engine())
