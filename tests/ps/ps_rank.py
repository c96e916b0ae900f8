"""One rank of a parameter server, whose engine is a loader in this same process."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
from ps_tools import DEVICE, Handles, digests, large_version, version

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import LoraSource, SafetensorsSource, Share, safetensors_files
from checkpoint_engine.startup import CkptEngineConnector
from checkpoint_engine.transport.peer import Range, Way
from checkpoint_engine.transport.rendezvous import Log
from checkpoint_engine.transport.zeromq import ZeroMqReader
from checkpoint_engine.update import conductor
from checkpoint_engine.worker import update_weights_from_ipc
from children import commands, say, serve


class Model:
    """Weights and a loader that fails when told to."""

    def __init__(self) -> None:
        self.weights: dict[str, torch.Tensor] = {}
        self.failing = False

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        if self.failing:
            self.failing = False
            raise RuntimeError("load_weights refused")
        self.weights = {name: tensor.clone() for name, tensor in named}
        say(event="loaded")


class Rank:
    """The commands."""

    def __init__(self) -> None:
        self.model = Model()
        self.server: ParameterServer | None = None

    def meet(self, **arguments: Any) -> tuple[int, int]:
        self.server = ParameterServer(**arguments)
        return self.server.rank, self.server.world_size

    def register(
        self, name: str, seed: int, share: tuple[int, int] | None = None, pooled: bool = False
    ) -> None:
        """All tensors of a version, or every n-th of them."""
        self._register(name, version(seed), share, pooled)

    def register_model(self, name: str, seed: int) -> None:
        """What the replicas of these tests can serve."""
        from ps_replicas import weights

        assert self.server is not None
        self.server.register_checkpoint(name, named_tensors=weights(seed))
        self.server.gather_metas(name)

    def register_files(
        self, name: str, files: list[str], mode: str, share: tuple[int, int] | None = None
    ) -> None:
        """All tensors of some files, or this rank's share of them."""
        assert self.server is not None
        source = SafetensorsSource(files)
        part = Share(source, *share) if share else source
        self.server.register_source(name, part, mode=mode)
        self.server.gather_metas(name)

    def register_large(
        self,
        name: str,
        seed: int,
        num_tensors: int,
        share: tuple[int, int] | None = None,
        pooled: bool = False,
    ) -> dict[str, str]:
        """As `register`; returns the digests of all tensors."""
        tensors = large_version(seed, num_tensors)
        self._register(name, tensors, share, pooled)
        return digests(tensors)

    def register_share(self, name: str, folder: str, halting: bool = False) -> int:
        """This rank's part of a checkpoint on disk; returns how much the process has read.

        If it is halting it waits, in the middle of reading, for "go".
        """
        assert self.server is not None
        source = SafetensorsSource(safetensors_files(folder))
        first, read_into = threading.Lock(), source.read_into

        def halting_read(name: str, start: int, out: memoryview) -> None:
            if first.acquire(blocking=False):
                say(event="reading")
                go = commands()
                assert go is None or go["do"] == "go"
            read_into(name, start, out)

        if halting:
            source.read_into = halting_read  # type: ignore[method-assign]
        before = num_bytes_read()
        self.server.register_source(name, Share(source, self.server.rank, self.server.world_size))
        return num_bytes_read() - before

    def gather(self, name: str) -> None:
        assert self.server is not None
        self.server.gather_metas(name)

    def connect(self, url: str) -> None:
        """Get first weights as the worker of an engine does."""
        with CkptEngineConnector(url, timeout_seconds=30.0) as connector:
            connector.update_weights_from_ipc(self.model.load_weights)

    def metas(self) -> dict[int, Any]:
        assert self.server is not None
        return self.server.get_metas()

    def load_metas(self, metas: dict[str, Any], mode: str = "auto") -> None:
        assert self.server is not None
        self.server.load_metas(metas, mode=mode)

    def join(self, metas: dict[str, Any], timeout: float = 30.0) -> dict[str, Any]:
        """Follow another server until this rank's engine serves what that has published."""
        assert self.server is not None
        report = self.server.join(metas, [self.request], timeout=timedelta(seconds=timeout))
        return {"error": None, **msgspec.to_builtins(report)}

    def block(self, seconds: float) -> None:
        """Do nothing in the thread that does everything."""
        say(event="blocked")
        time.sleep(seconds)

    def read_at(self, bytes_per_second: int) -> None:
        """Read from peers no faster than this, and tell of every bucket."""
        os.environ["CKPT_ENGINE_STAGING_BYTES_PER_SECOND"] = str(bytes_per_second)
        read = ZeroMqReader.read

        def told(reader: ZeroMqReader, way: Way, *arguments: Any) -> Iterator[Range]:
            for arrived in read(reader, way, *arguments):
                say(event="arrived", source=way.address, **msgspec.to_builtins(arrived))
                yield arrived

        ZeroMqReader.read = told  # type: ignore[method-assign]

    def num_leases(self) -> int:
        """Of the memory that peers could read here."""
        assert self.server is not None
        return sum(segment.num_leases for segment in self.server._store._segments)

    def unregister(self, name: str) -> None:
        assert self.server is not None
        self.server.unregister_checkpoint(name)

    def flip(self, name: str) -> None:
        """Bad memory: one bit of what was registered."""
        assert self.server is not None
        self.server._store[name].memory[0] ^= 1

    def barrier(self, timeout: float = 30.0) -> None:
        assert self.server is not None
        self.server.store_based_barrier(timedelta(seconds=timeout))

    def join_group(self) -> int:
        """What the ranks' numbers add up to, over torch's default group."""
        import torch.distributed as dist

        assert self.server is not None
        self.server.init_process_group(timeout=timedelta(seconds=30))
        total = torch.tensor(dist.get_rank() + 1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        return int(total)

    def update(
        self,
        name: str,
        failing: bool = False,
        calls_engine: bool = True,
        die_while_staging: bool = False,
        timeout: float = 30.0,
        **options: Any,
    ) -> dict[str, Any]:
        """The outcome, with the error's text if it was not published."""
        assert self.server is not None
        self.model.failing = failing
        if die_while_staging:
            conductor.deliver = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)

        def request(handles: Handles) -> None:
            say(event="called", handles=handles)
            if calls_engine:
                self.request(handles)

        return self._outcome(name, [request], timeout, **options)

    def request(self, handles: Handles) -> None:
        """Make this rank's engine take an update, wherever it comes among those that do."""
        assert self.server is not None
        handle = next(h for _, h in handles if h == self.server._door.address)
        update_weights_from_ipc(None, handle, "cpu", run=self.model.load_weights)

    def update_engines(self, name: str, endpoints: list[str], others: int = 0) -> dict[str, Any]:
        """Engines behind HTTP, and some that whoever hears "called" has to call."""
        ended = threading.Event()

        def announce(handles: Handles) -> None:
            say(event="called", handle=dict(handles)[DEVICE])
            ended.wait(60)

        requests = engine_requests(endpoints, rank=0, world_size=1, timeout_seconds=60)
        return self._outcome(name, [*requests, *[announce] * others], 60.0)

    def update_lora(self, folder: str, endpoints: list[str], lora: str) -> dict[str, Any]:
        """An adapter that the first rank alone has, to the engine of each."""
        assert self.server is not None
        rank, world_size = self.server.rank, self.server.world_size
        if rank == 0:
            self.server.register_source(folder, LoraSource.of_folder(folder))
        self.server.gather_metas(folder)
        requests = engine_requests(endpoints, rank=rank, world_size=world_size)
        return self._outcome(folder, list(requests), 30.0, lora=lora)

    def read_slowly(self, seconds: float) -> None:
        """Hear of every decision a little later than the others."""
        next_entry = Log.next

        def late(log: Log, timeout_seconds: float) -> bytes:
            time.sleep(seconds)
            return next_entry(log, timeout_seconds)

        Log.next = late  # type: ignore[method-assign]

    def weights(self) -> dict[str, str]:
        return digests(self.model.weights)

    def num_sockets(self) -> int:
        return len(os.listdir(os.environ["CKPT_ENGINE_SOCKET_DIR"]))

    def _register(
        self,
        name: str,
        tensors: dict[str, torch.Tensor],
        share: tuple[int, int] | None,
        pooled: bool,
    ) -> None:
        assert self.server is not None
        if share is not None:
            tensors = dict(list(tensors.items())[share[0] :: share[1]])
        self.server.register_checkpoint(name, named_tensors=tensors, use_shared_memory_pool=pooled)
        self.server.gather_metas(name)

    def _outcome(
        self, name: str, requests: list[Any], timeout: float, **options: Any
    ) -> dict[str, Any]:
        assert self.server is not None
        try:
            report = self.server.update(
                name, requests, timeout=timedelta(seconds=timeout), **options
            )
        except UpdateFailed as failure:
            return {"error": str(failure), **msgspec.to_builtins(failure.report)}
        return {"error": None, **msgspec.to_builtins(report)}


def num_bytes_read() -> int:
    """By this process, from whatever it was."""
    return int(Path("/proc/self/io").read_text().split()[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve(Rank())
