"""An engine's worker: takes updates through `worker.update_weights_from_ipc`, well or badly."""

from __future__ import annotations

import gc

import torch
import torch.distributed as dist
from ps_tools import digests

from checkpoint_engine.worker import update_weights_from_ipc
from children import commands, say, serve


class Model:
    """Weights and a loader, which fails as told, by default only in its next call."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.given: list[torch.Tensor] = []
        self.behaviour = "load"
        self.always = False
        self.num_hooks = 0

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        behaviour = self.behaviour
        if not self.always:
            self.behaviour = "load"
        say(event="loading", behaviour=behaviour, names=[name for name, _ in named])
        half = len(named) // 2
        if behaviour == "block":
            self.weights.update(copies(named[:half]))
            go = commands()
            assert go is None or go["do"] == "go"
        if behaviour == "raise":
            self.weights.update(copies(named[:half]))
            raise RuntimeError("load_weights refused the last tensor")
        if behaviour == "keep views":
            self.given = [tensor for _, tensor in named]
            self.weights = dict(named)
        else:
            self.weights.update(copies(named))
        if behaviour == "raise at the end":
            raise RuntimeError("load_weights refused after the last tensor")
        if behaviour == "write into what it is given":
            for _, tensor in named:
                tensor.zero_()

    def post_hook(self) -> None:
        self.num_hooks += 1

    def failing_post_hook(self) -> None:
        self.num_hooks += 1
        if self.num_hooks == 1:
            raise RuntimeError("process_weights_after_loading failed")


def copies(named: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in named}


class Engine:
    """The commands."""

    def __init__(self) -> None:
        self.model = Model()

    def reset(self) -> None:
        """A new model, which knows nothing of the one before; what tests left in cycles goes."""
        self.model = Model()
        gc.collect()

    def update(
        self, handle: str, behaviour: str = "load", always: bool = False, hook: str | None = None
    ) -> None:
        self.model.behaviour, self.model.always, self.model.num_hooks = behaviour, always, 0
        post_hook = getattr(self.model, hook) if hook else None
        update_weights_from_ipc(
            None, handle, "cpu", run=self.model.load_weights, post_hook=post_hook
        )

    def join_group(self, rank: int, world_size: int, port: int) -> None:
        """Be one of the workers of one engine, as tensor parallel ranks are."""
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=world_size)

    def update_function(self, handle: str) -> None:
        """With a loader that is no method of anything."""
        update_weights_from_ipc(None, handle, "cpu", run=lambda named: None)

    def update_dict(self, handle: str) -> dict[str, str]:
        """With the loader of a plain dict, which nothing can refer to weakly."""
        weights: dict[str, torch.Tensor] = {}
        update_weights_from_ipc(None, handle, "cpu", run=weights.update)
        return digests(weights)

    def weights(self) -> dict[str, str]:
        return digests(self.model.weights)

    def num_hooks(self) -> int:
        return self.model.num_hooks

    def given(self) -> list[str]:
        """Digests of the tensors that it was given and still holds."""
        return list(digests({f"{n}": t for n, t in enumerate(self.model.given)}).values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Engine())
