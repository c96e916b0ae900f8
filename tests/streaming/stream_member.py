"""A trainer or a sampler in a process of its own, told what to do on its standard input.

python stream_member.py
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from stream_weights import equal, weights
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from checkpoint_engine.streaming import new_engine
from checkpoint_engine.streaming.messages import Ear
from checkpoint_engine.transport.group_store import GroupStore
from children import say, serve


def sharded_model() -> torch.nn.Module:
    torch.manual_seed(7)
    return torch.nn.Sequential(
        torch.nn.Embedding(1501, 32), torch.nn.Linear(32, 99), torch.nn.LayerNorm(99)
    )


class Member:
    def __init__(self) -> None:
        self._engine: Any = None

    def make(self, kind: str, is_master: bool, settings: dict[str, Any]) -> dict[str, Any]:
        self._engine = new_engine(kind, **settings)
        self._engine.is_master = is_master
        return self._engine.prepare()

    def meet(self, rank: int, world_size: int, metadata: dict[str, Any] | None = None) -> None:
        self._engine.init_process_group(rank, world_size, master_metadata=metadata)

    def send(
        self,
        seed: int,
        label: str = "",
        fail_after: int = -1,
        die_after: int = -1,
        **sizes: int,
    ) -> Any:
        def generated() -> Iterator[tuple[str, torch.Tensor]]:
            for number, pair in enumerate(weights(seed, **sizes).items()):
                if number == fail_after:
                    raise RuntimeError("the trainer has no such tensor")
                if number == die_after:
                    os._exit(9)
                yield pair

        report = asyncio.run(self._engine.send_weights(generated(), label=label))
        return msgspec.to_builtins(report)

    def receive(
        self,
        seed: int,
        pause: float = 0.0,
        pause_at: int = 0,
        stop_after: int = -1,
        die_after: int = -1,
        die_within: float = -1,
        hang_after: int = -1,
        scribble: bool = False,
        die_joining: bool = False,
        die_connecting: float = -1,
        say_joining: bool = False,
        **sizes: int,
    ) -> Any:
        """Compare what comes with what was to come; returns what it was."""
        expected = weights(seed, **sizes)
        if die_joining:  # it has said hello, and the others meet it in the group, as they think
            self._engine.link.carrier.join = lambda *_: os._exit(9)
        if say_joining:  # it has said hello, and hears nothing yet
            hear = Ear.next
            Ear.next = lambda ear, seconds: (say(event="joining"), hear(ear, seconds))[1]
        if die_connecting >= 0:  # so many seconds after it has told where it listens
            tell = GroupStore.set
            GroupStore.set = lambda *entry: (
                tell(*entry),
                time.sleep(die_connecting),
                os._exit(9),
            )

        async def run() -> list[str]:
            names = []
            stream = self._engine.receive_weights()
            async for name, tensor in stream:
                assert equal(tensor, expected[name]), name
                names.append(name)
                if len(names) == 1 and die_within >= 0:
                    threading.Timer(die_within, os._exit, (9,)).start()
                if len(names) == die_after:
                    say(event="dying")
                    os._exit(9)
                if len(names) == hang_after:
                    os.kill(os.getpid(), signal.SIGSTOP)
                if len(names) == stop_after:
                    await stream.aclose()
                    break
                if pause and len(names) == pause_at:
                    say(event="slow")
                    time.sleep(pause)
                if scribble:
                    tensor.reshape(-1).view(torch.uint8).fill_(0xFF)
            return names

        names = asyncio.run(run())
        version = self._engine.version
        return {"names": names, "version": version and msgspec.to_builtins(version)}

    def send_sharded(self, rank: int, port: int) -> Any:
        """Send a model of which two processes have a half each."""
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
        )
        model = sharded_model()
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

        def gathered() -> Iterator[tuple[str, torch.Tensor]]:
            for name, parameter in model.named_parameters():
                yield name, parameter.full_tensor()

        report = asyncio.run(self._engine.send_weights(gathered()))
        dist.destroy_process_group()
        return msgspec.to_builtins(report)

    def receive_sharded(self) -> dict[str, bool]:
        """Whether each tensor that comes is the whole one."""
        expected = dict(sharded_model().named_parameters())

        async def run() -> dict[str, bool]:
            return {
                name: equal(tensor, expected[name])
                async for name, tensor in self._engine.receive_weights()
            }

        return asyncio.run(run())

    def finalize(self) -> None:
        if self._engine is not None:
            self._engine.finalize()
            self._engine = None


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Member())
