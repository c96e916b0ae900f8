"""A trainer's engine and a sampler's, in one process and one event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from stream_weights import MIB

from checkpoint_engine.streaming import GlooCheckpointEngine, SharedMemoryCheckpointEngine

KINDS = [GlooCheckpointEngine, SharedMemoryCheckpointEngine]
Pair = tuple[Any, Any]


def connected(kind: Any, **settings: Any) -> Pair:
    settings = {"bucket_size": 4 * MIB, "timeout": 20, **settings}
    trainer, sampler = kind(**settings, is_master=True), kind(**settings)
    metadata = [trainer.prepare(), sampler.prepare()]
    of_trainer, of_sampler = kind.build_topology(1, 1, metadata)
    for engine, arguments in ((trainer, of_trainer), (sampler, of_sampler)):
        engine.init_process_group(**{name: values[0] for name, values in arguments.items()})
    return trainer, sampler


async def received(engine: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {name: tensor async for name, tensor in engine.receive_weights(**options)}


def sync(pair: Pair, sent: Any, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    async def both() -> Any:
        return await asyncio.gather(
            pair[0].send_weights(sent, **options), received(pair[1], copy=True)
        )

    return tuple(asyncio.run(both()))  # type: ignore[return-value]


def failing(pair: Pair, sent: Any, **options: Any) -> list[BaseException]:
    """What both ends raise."""

    async def both() -> Any:
        return await asyncio.gather(
            pair[0].send_weights(sent, **options), received(pair[1]), return_exceptions=True
        )

    return asyncio.run(both())  # type: ignore[no-any-return]
