"""A trainer or a sampler on the first GPU, told what to do on its standard input."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import msgspec
import torch

from checkpoint_engine.streaming import new_engine, packing
from checkpoint_engine.transport.collective import Collective
from children import serve


def weights(seed: int, device: str) -> dict[str, torch.Tensor]:
    """Of every kind: some larger than a bucket of 4 MiB, fp8, scalars, empty and tied ones."""
    generator = torch.Generator().manual_seed(seed)
    found = {
        "large": torch.randn(5_000_003, generator=generator),
        "fp8": torch.randn(1000, generator=generator).to(torch.float8_e4m3fn),
        "flags": torch.randn(77, generator=generator) > 0,
        "scalar": torch.tensor(float(seed)),
        "empty": torch.empty(0, 4),
        "turned": torch.randn(50, 70, generator=generator).t(),
    }
    found |= {
        f"layer-{number}": torch.randn(100, 7 * number + 1, generator=generator).bfloat16()
        for number in range(100)
    }
    there = {name: tensor.to(device) for name, tensor in found.items()}
    return {**there, "tied": there["layer-3"]}


class Member:
    def make(self, engine: str, is_master: bool, settings: dict[str, Any]) -> dict[str, Any]:
        self._engine: Any = new_engine(engine, **settings)
        self._engine.is_master = is_master
        metadata: dict[str, Any] = self._engine.prepare()
        return metadata

    def meet(self, rank: int, world_size: int, metadata: dict[str, Any]) -> None:
        self._engine.init_process_group(rank, world_size, master_metadata=metadata)

    def send(self, seed: int) -> Any:
        report = asyncio.run(self._engine.send_weights(weights(seed, "cuda")))
        return msgspec.to_builtins(report)

    def receive(self, seed: int, die_after: int = -1) -> Any:
        """Compare what comes with what was to come, on the GPU; returns what it was."""
        expected = weights(seed, "cuda")

        async def run() -> None:
            async for name, tensor in self._engine.receive_weights():
                assert tensor.is_cuda
                wanted = expected.pop(name)
                assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
                mine, theirs = (
                    one.contiguous().reshape(-1).view(torch.uint8) for one in (tensor, wanted)
                )
                assert torch.equal(mine, theirs), name
                mine.zero_()  # a consumer may write there
                if len(expected) == die_after:
                    os._exit(9)

        asyncio.run(run())
        assert not expected
        return self._engine.version.digest

    def spoil(self) -> None:
        """Change a byte of every bucket after it was digested."""
        closed = packing.OpenBucket.closed

        def spoiled(bucket: packing.OpenBucket) -> Any:
            bucket.memory[7] ^= 1
            torch.cuda.synchronize()
            return closed(bucket)

        packing.OpenBucket.closed = spoiled  # type: ignore[method-assign]

    def leave_broadcast(self, how: str) -> None:
        """Let the others broadcast without this process, which then is gone or hangs."""

        def leave(*_: Any) -> None:
            if how == "die":
                os._exit(9)
            time.sleep(3600)

        Collective.begin = leave  # type: ignore[method-assign]

    def send_plain(self, num_tensors: int, num_bytes: int) -> Any:
        """Time so many tensors of so many bytes."""
        data = torch.ones(num_bytes, dtype=torch.uint8, device="cuda")
        pairs = ((str(number), data) for number in range(num_tensors))
        return msgspec.to_builtins(asyncio.run(self._engine.send_weights(pairs)))

    def receive_plain(self) -> float:
        async def run() -> None:
            async for _ in self._engine.receive_weights():
                pass

        start = time.monotonic()
        asyncio.run(run())
        return time.monotonic() - start

    def finalize(self) -> None:
        self._engine.finalize()

    def used_bytes(self) -> int:
        """Of the GPU, by all its processes."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info()
        return total - free


if __name__ == "__main__":
    serve(Member())
