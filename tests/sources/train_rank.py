"""One rank of a trainer: a model that is sharded over real gloo ranks."""

from __future__ import annotations

import itertools
import os
import re
import signal
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

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
from torch.nn.parallel import DistributedDataParallel
from train_models import Odd, as_text, make

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import (
    GatheredSource,
    adapter_weights,
    merged_weights,
    merged_weights_of,
    named_weights,
    training,
    weights_of,
)  # fmt: skip
from checkpoint_engine.sources.sharded import agree
from checkpoint_engine.worker import update_weights_from_ipc
from children import commands, say, serve

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
        elif how == "fsdp of leaves":
            mesh = init_device_mesh("cpu", (world_size,))
            for module in reversed(list(self.model.modules())):
                if hasattr(module, "base_layer") or module._parameters:
                    fully_shard(module, mesh=mesh)
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
        elif how == "ddp":
            self.model = torch.compile(DistributedDataParallel(self.model), backend="eager")  # type: ignore[assignment]

    def step(self) -> None:
        """Train a little."""
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.model(torch.arange(3)).sum().backward()
        optimizer.step()

    def agree(self, mesh: list[int], said: str) -> None:
        """Whether all ranks of a mesh say the same."""
        agree(init_device_mesh("cpu", tuple(mesh)), said.encode(), timeout_seconds=1000.0)

    def look(self) -> None:
        """A forward pass, after which the root stays gathered."""
        with torch.no_grad():
            self.model(torch.arange(3))
        assert not isinstance(self.model.embed.weight, DTensor)  # type: ignore[union-attr]

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

    def peak_registering(self, bucket_bytes: int) -> tuple[int, int]:
        """Bytes that this rank registered, and by how much memory was exceeded beside them."""
        source = GatheredSource(weights_of(self.model), bucket_bytes=bucket_bytes)
        before = memory("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")
        self.server.register_source("wide", source)
        peak, share = memory("VmHWM:") - before, self.server._store["wide"].manifest.num_bytes
        self.server.unregister_checkpoint("wide")
        return share, peak - share

    def die(self, at_message: int) -> None:
        """When this many have been gathered, the next time that weights are asked for."""
        num_gathered, gather = itertools.count(1), training.gather

        def fatal(*arguments: Any, **options: Any) -> Any:
            if next(num_gathered) == at_message:
                os.kill(os.getpid(), signal.SIGKILL)
            return gather(*arguments, **options)

        training.gather = fatal

    def merged(self, **options: Any) -> list[tuple[str, str]]:
        """The merged model, as this rank gets it."""
        return [
            (name, as_text({name: tensor})[name])
            for name, tensor in merged_weights(self.model, **options)
        ]

    def adapter(self) -> dict[str, str]:
        return as_text(dict(adapter_weights(self.model, "default")))

    def local(self) -> dict[str, str]:
        """What this rank holds of the model, and of the optimizer."""
        held = {
            name: tensor.to_local() if isinstance(tensor, DTensor) else tensor
            for name, tensor in self.model.state_dict().items()
        }
        return as_text(held)

    def weights_without(self, name: str) -> None:
        """Ask for one tensor less than the others do."""
        state = {key: value for key, value in self.model.state_dict().items() if key != name}
        for _ in named_weights(state):
            pass

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
        # Two in one message, so that the second begins where the first one's bytes end.
        got = dict(named_weights({"v": tensor.clone(), "w": tensor.double()}, to=to))
        due = {"v": whole, "w": whole.double()}
        return "w" in got, all(
            torch.equal(one, due[name]) and one.dtype == due[name].dtype
            for name, one in got.items()
        )

    def mesh(self, sizes: tuple[int, ...]) -> DeviceMesh:
        self.meshes: dict[tuple[int, ...], DeviceMesh] = getattr(self, "meshes", {})
        if sizes not in self.meshes:
            self.meshes[sizes] = init_device_mesh("cpu", sizes)
        return self.meshes[sizes]

    # The trainer's ranks as those of a parameter server

    def serve_weights(self) -> None:
        self.server = ParameterServer()

    def register(self, name: str, how: str, without: str = "") -> list[str]:
        """This rank's share; returns what it has."""
        if how == "state dict":
            self.server.register_checkpoint(name, named_tensors=self.model.state_dict())
        else:
            made: Any = merged_weights_of(self.model) if how == "merged" else weights_of(self.model)
            made = [weight for weight in made if weight.specs[0].names != (without,)]
            source = GatheredSource(made, bucket_bytes=1000, timeout_seconds=20)
            self.server.register_source(name, source)
        return [tensor.name for tensor in self.server._store[name].manifest.tensors]

    def gather(self, name: str) -> None:
        self.server.gather_metas(name)

    def unregister(self, name: str) -> None:
        self.server.unregister_checkpoint(name)

    def update(self, name: str) -> str:
        """What the version is called; whoever hears "called" has to call this rank's engine."""

        def request(handles: Any) -> None:
            own = next(handle for _, handle in handles if handle == self.server._door.address)
            say(event="called", handle=own)
            go = commands()
            assert go is None or go["do"] == "go"

        report = self.server.update(name, [request], timeout=LIMIT)
        self.server.unregister_checkpoint(name)
        return report.digest


class Engine:
    """The commands of an engine, which serves whatever it is given."""

    def update(self, handle: str) -> dict[str, str]:
        """What it has been given."""
        loaded: dict[str, torch.Tensor] = {}

        def load(named: list[tuple[str, torch.Tensor]]) -> None:
            loaded.update({key: tensor.clone() for key, tensor in named})

        update_weights_from_ipc(None, handle, "cpu", run=load)
        return as_text(loaded)


ROLES = {"rank": Rank, "engine": Engine}


def shard(model: torch.nn.Module, mesh: DeviceMesh) -> None:
    """Every block for itself, as trainers do, then the rest."""
    for name, layer in model.named_modules():
        if re.fullmatch(r"(.*\.)?(blocks|layers)\.\d+", name):
            fully_shard(layer, mesh=mesh)
    if isinstance(model, Odd):  # what is sharded together has one dtype
        fully_shard(model.low, mesh=mesh)
    fully_shard(model, mesh=mesh)


def memory(entry: str) -> int:
    """Bytes of this process."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return next(int(line[1]) * 1024 for line in lines if line[0] == entry)


if __name__ == "__main__":
    serve(ROLES[sys.argv[1]]())
