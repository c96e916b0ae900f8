"""One rank of a trainer: a model that is sharded over real gloo ranks."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from train_models import Odd, as_text, make

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import GatheredSource, named_weights, weights_of
from checkpoint_engine.worker import update_weights_from_ipc
from children import serve

LIMIT = timedelta(seconds=30)


class Rank:
    """The commands."""

    def meet(self, rank: int, world_size: int, port: int) -> None:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=world_size,
            timeout=LIMIT,
        )

    def build(self, kind: str, seed: int, how: str) -> None:
        """A model, sharded as said."""
        self.model = make(kind, seed)
        world_size = dist.get_world_size()
        if how == "fsdp":
            shard(self.model, init_device_mesh("cpu", (world_size,)))
        elif how == "hsdp":
            shard(
                self.model,
                init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("copy", "dp")),
            )
        elif how == "fsdp and tp":
            mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
            for block in self.model.blocks:  # type: ignore[union-attr]
                plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
                parallelize_module(block, mesh["tp"], plan)
            shard(self.model, mesh["dp"])
        else:
            assert how == "whole"

    def step(self) -> None:
        """Train a little."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model(torch.arange(7)).sum().backward()
        optimizer.step()

    def full(self) -> dict[str, str]:
        """The whole model, by torch's own way."""
        whole = {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.model.state_dict().items()
        }
        return as_text(whole)

    def weights(self, as_state_dict: bool = False, **options: Any) -> list[tuple[str, str]]:
        """What this rank gets, in order."""
        source = self.model.state_dict() if as_state_dict else self.model
        return [
            (name, as_text({name: tensor})[name])
            for name, tensor in named_weights(source, **options)
        ]

    def peak(self, bucket_bytes: int) -> tuple[int, int]:
        """Bytes that were seen, and by how much memory was exceeded while they were."""
        seen, before = 0, memory("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")
        for _, tensor in named_weights(self.model, bucket_bytes=bucket_bytes):
            seen += tensor.nbytes
        return seen, memory("VmHWM:") - before

    def die_after(self, num_tensors: int, bucket_bytes: int) -> None:
        """In the middle."""
        for number, _ in enumerate(named_weights(self.model, to=None, bucket_bytes=bucket_bytes)):
            if number == num_tensors:
                os.kill(os.getpid(), signal.SIGKILL)

    def lose(self, name: str) -> None:
        """Have one tensor less than the others."""
        model, self.model = self.model, torch.nn.Module()
        for key, value in model.named_parameters():
            if key != name:
                self.model.register_parameter(key.replace(".", "_"), value)  # type: ignore[arg-type]

    def roundtrip(
        self, shape: list[int], sizes: list[int], dims: list[int | None], dtype: str, to: int | None
    ) -> tuple[bool, bool]:
        """Cut a tensor from the last mesh dimension to the first; is it put together again?"""
        mesh = self.mesh(tuple(sizes))
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape).to(getattr(torch, dtype))
        part = whole
        placements: list[Any] = [Replicate()] * len(sizes)
        coordinate = mesh.get_coordinate()
        assert coordinate is not None
        for n in reversed(range(len(sizes))):
            dim = dims[n]
            if dim is None:
                continue
            before = [sizes[m] for m in range(n + 1, len(sizes)) if dims[m] == dim]
            factor = int(torch.tensor(before).prod()) if before else 1
            placements[n] = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
            chunks = part.chunk(sizes[n], dim)
            mine = coordinate[n]
            part = chunks[mine] if mine < len(chunks) else part.narrow(dim, 0, 0)
        tensor = DTensor.from_local(
            part.clone(), mesh, placements, run_check=False, shape=whole.shape,
            stride=whole.stride(),
        )  # fmt: skip
        got = dict(named_weights({"w": tensor}, to=to))
        return "w" in got, all(torch.equal(one, whole) and one.dtype == whole.dtype
                               for one in got.values())  # fmt: skip

    def mesh(self, sizes: tuple[int, ...]) -> DeviceMesh:
        self.meshes: dict[tuple[int, ...], DeviceMesh] = getattr(self, "meshes", {})
        if sizes not in self.meshes:
            self.meshes[sizes] = init_device_mesh("cpu", sizes)
        return self.meshes[sizes]

    # The trainer's ranks as those of a parameter server

    def serve_weights(self) -> None:
        self.server = ParameterServer()

    def register(self, name: str, how: str, bucket_bytes: int = 1 << 20) -> list[str]:
        """This rank's share; returns what it has."""
        if how == "state dict":
            self.server.register_checkpoint(name, named_tensors=self.model.state_dict())
        else:
            source = GatheredSource(weights_of(self.model), bucket_bytes=bucket_bytes)
            self.server.register_source(name, source)
        share = [tensor.name for tensor in self.server._store[name].manifest.tensors]
        self.server.gather_metas(name)
        return share

    def update(self, name: str) -> tuple[str, dict[str, str]]:
        """What the engine of this rank has then, and what its version is called."""
        loaded: dict[str, torch.Tensor] = {}

        def load(named: list[tuple[str, torch.Tensor]]) -> None:
            loaded.update({key: tensor.clone() for key, tensor in named})

        def request(handles: Any) -> None:
            handle = next(h for _, h in handles if h == self.server._door.address)
            update_weights_from_ipc(None, handle, "cpu", run=load)

        report = self.server.update(name, [request], timeout=LIMIT)
        self.server.unregister_checkpoint(name)
        return report.digest, as_text(loaded)


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Every block for itself, as trainers do, then the rest."""
    layers = getattr(model, "blocks", None) or getattr(model, "layers", None) or ()
    for layer in layers or model.model.layers:  # type: ignore[union-attr]
        fully_shard(layer, mesh=mesh)
    if isinstance(model, Odd):  # what is sharded together has one dtype
        fully_shard(model.low, mesh=mesh)
    fully_shard(model, mesh=mesh)


def memory(entry: str) -> int:
    """Bytes of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == entry)


class Nursery:
    """Starts ranks in no time: what they import is imported once, here."""

    def fork(self, address: str, environment: dict[str, str]) -> int:
        """The pid of a rank that speaks through the socket at `address`."""
        child = os.fork()
        if child == 0:
            live(address, environment)
        return child


def live(address: str, environment: dict[str, str]) -> NoReturn:
    try:
        os.environ.update(environment)
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(address)
            sys.stdin, sys.stdout = connection.makefile("r"), connection.makefile("w")
            serve(Rank())
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    serve(Nursery())
