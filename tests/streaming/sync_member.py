"""A trainer's process or a sampler, with a manager of its own, told what to do on standard input.

python sync_member.py
"""

from __future__ import annotations

import os
import signal
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from sync_models import Sampler, Trainer, as_text, llama, logits, with_adapter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpoint_engine import CheckpointEngineManager
from checkpoint_engine.adapters import transformers as adapter
from checkpoint_engine.streaming import sending, transaction
from checkpoint_engine.update.protocol import Decision
from children import serve

SIZES: dict[str, Any] = {"plain": {}, "adapter": {}, "large": {"vocab_size": 300_000}}


class Member:
    def __init__(self) -> None:
        self._manager: CheckpointEngineManager | None = None
        self._side: Any = None

    def distribute(self, rank: int, port: int) -> None:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )

    def train(self, kind: str) -> None:
        """A model of which each of two processes has a half."""
        torch.manual_seed(1)
        model = with_adapter(llama(1)) if kind == "adapter" else llama(1, **SIZES[kind])
        mesh = init_device_mesh("cpu", (2,))
        for layer in model.modules():
            if type(layer).__name__ == "LlamaDecoderLayer":
                fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        self._side = Trainer(model)

    def train_alone(self) -> None:
        """A model that is whole here, whoever else is in torch's group."""
        self._side = Trainer(llama(1))

    def sample(self, seed: int, kind: str = "plain", engine: str = "gloo") -> None:
        self._side = Sampler(llama(seed, **SIZES[kind]))
        self._side.checkpoint_engine_name = engine

    def manage(self, rank: int, world_size: int, **where: Any) -> None:
        """Meet at MASTER_ADDR and MASTER_PORT."""
        os.environ.update(where)
        side = {"sampler" if rank > 0 else "model": self._side}
        self._manager = CheckpointEngineManager(
            **side, rank=rank, world_size=world_size, timeout_seconds=60
        )

    def step(self) -> None:
        self._side.step()

    def write_to_base(self) -> None:
        """As by loading another checkpoint; by all processes, each to its part."""
        self.step()  # after which it has no more than that
        with torch.no_grad():
            self._side.model.get_base_model().lm_head.weight.add_(0.5)

    def sync(self, label: str, merge_and_sync: bool = True) -> Any:
        assert self._manager is not None
        report = self._manager.sync_weights(merge_and_sync, label=label)
        return msgspec.to_builtins(report)

    def weights(self) -> dict[str, str]:
        """The whole model, however it is sharded."""
        return as_text(self._side.model.state_dict())

    def answer(self) -> dict[str, str]:
        return as_text({"logits": logits(self._side.model)})

    def served(self) -> str | None:
        version = self._side.served_version()
        return version and version.label

    def adapters(self) -> dict[str, str]:
        return {name: version.label for name, version in self._side.adapters().items()}

    def die_when_written(self) -> None:
        """In the middle of the next pause, after the weights have been replaced."""
        write = adapter.write

        def fatal(*arguments: Any, **options: Any) -> Any:
            write(*arguments, **options)
            os.kill(os.getpid(), signal.SIGKILL)

        adapter.write = fatal

    def fail_packing(self) -> None:
        """With an error that is not of this package, when others are in a collective."""

        def fail(*_: Any) -> None:
            sending.weight_of = weight_of
            raise MemoryError("no memory for a copy")

        weight_of, sending.weight_of = sending.weight_of, fail

    def die_when_received(self) -> None:
        """With the first tensor, when others are still to be made."""

        async def fatal() -> Any:
            async for _ in receive():
                os.kill(os.getpid(), signal.SIGKILL)
                yield

        engine = self._side._engine()
        receive, engine.receive_weights = engine.receive_weights, fatal

    def die_when_decided(self) -> None:
        """In the middle of the next pause, before anybody hears that all have written."""
        record = transaction.record

        def fatal(decided: list[Decision], *arguments: Any) -> Any:
            if any(decision.step == "publish" for decision in decided):
                os.kill(os.getpid(), signal.SIGKILL)
            return record(decided, *arguments)

        transaction.record = fatal

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()
            self._manager = None


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Member())
