"""A trainer and two samplers as Ray actors, on a Ray of their own; prints what came of it.

python stream_ray.py
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
from stream_weights import equal, weights

from checkpoint_engine.errors import CheckpointEngineError
from checkpoint_engine.streaming import RayCheckpointEngine

SETTINGS: dict[str, Any] = {"bucket_size": 4 << 20, "timeout": 60, "group_name": "test"}


@ray.remote(num_cpus=0)
class Trainer:
    def __init__(self) -> None:
        self._engine = RayCheckpointEngine(**SETTINGS, is_master=True)
        self._engine.prepare()
        self._engine.init_process_group(rank=0, world_size=3)

    async def send(self, seed: int) -> str:
        try:
            report = await self._engine.send_weights(weights(seed))
        except CheckpointEngineError as error:
            return f"{type(error).__name__}: {error}"
        assert report is not None
        return report.digest

    def finalize(self) -> None:
        self._engine.finalize()


@ray.remote(num_cpus=0)
class Sampler:
    def __init__(self, rank: int) -> None:
        self._engine = RayCheckpointEngine(**SETTINGS)
        self._engine.prepare()
        self._engine.init_process_group(rank=rank, world_size=3)

    async def receive(self, seed: int, die: bool = False) -> str:
        expected = weights(seed)
        try:
            async for name, tensor in self._engine.receive_weights():
                if die:
                    os._exit(9)
                assert equal(tensor, expected.pop(name))
        except CheckpointEngineError as error:
            return f"{type(error).__name__}: {error}"
        assert not expected
        assert self._engine.version is not None
        return self._engine.version.digest

    def finalize(self) -> None:
        self._engine.finalize()


def elsewhere() -> str:
    """Where a master of another kind is."""
    engine = RayCheckpointEngine(**SETTINGS)
    where = {"master_addr": "127.0.0.1", "master_port": 1}
    try:
        engine.init_process_group(rank=1, world_size=3, master_metadata=where)
    except CheckpointEngineError as error:
        return f"{type(error).__name__}: {error}"
    return "met"


def main() -> None:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    samplers = [Sampler.remote(1), Sampler.remote(2)]  # before the trainer has left its address
    trainer = Trainer.remote()
    found = ray.get([trainer.send.remote(1), *(one.receive.remote(1) for one in samplers)])
    lost = [trainer.send.remote(2), samplers[0].receive.remote(2)]
    samplers[1].receive.remote(2, die=True)
    said = {"digests": found, "lost": ray.get(lost), "elsewhere": elsewhere()}
    print(json.dumps(said), flush=True)
    ray.get(samplers[0].finalize.remote())
    ray.get(trainer.finalize.remote())
    ray.shutdown()


main()
