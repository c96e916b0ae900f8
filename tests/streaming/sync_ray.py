"""A trainer and two samplers as Ray actors, driven by a manager; prints what came of it.

python sync_ray.py
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import ray
import torch

from checkpoint_engine import CheckpointEngineManager, CheckpointEngineMixin, UpdateFailed

SETTINGS: dict[str, Any] = {"bucket_size": 4 << 20, "timeout": 30}


def model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Linear(8, 9))


class Member(CheckpointEngineMixin):
    checkpoint_engine_settings = SETTINGS

    def __init__(self, seed: int) -> None:
        self.model = model(seed)
        self.dies = False

    def hold_requests(self, timeout_seconds: float) -> None:
        if self.dies:
            os._exit(9)

    def change(self, seed: int) -> None:
        self.model.load_state_dict(model(seed).state_dict())

    def die_in_the_next_pause(self) -> None:
        self.dies = True

    def seen(self) -> tuple[str, str | None, list[int]]:
        version = self.served_version()
        assert self._checkpoint_engine is not None
        same = [
            seed
            for seed in range(1, 6)
            if all(map(torch.equal, model(seed).state_dict().values(), self.weights()))
        ]
        return self._checkpoint_engine.name, version and version.label, same

    def weights(self) -> list[torch.Tensor]:
        return list(self.model.state_dict().values())


class Group:
    """As Twinkle holds its actors."""

    def __init__(self, actors: list[Any]) -> None:
        self._actors = actors


def main() -> None:
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        object_store_memory=80 << 20,
        runtime_env={"env_vars": {"PYTHONPATH": os.pathsep.join(sys.path)}},
    )
    actor = ray.remote(num_cpus=0)(Member)
    trainer, samplers = actor.remote(1), [actor.remote(2), actor.remote(3)]
    manager = CheckpointEngineManager(Group([trainer]), samplers, timeout_seconds=60)
    found: dict[str, Any] = {"published": manager.sync_weights(label="one").outcome}
    found["served"] = ray.get([sampler.seen.remote() for sampler in samplers])

    ray.get(trainer.change.remote(4))
    ray.get(samplers[1].die_in_the_next_pause.remote())
    try:
        manager.sync_weights(label="two")
    except UpdateFailed as error:
        found["failed"], found["outcome"] = str(error), error.report.outcome
    found["kept"] = ray.get(samplers[0].seen.remote())

    samplers[1] = actor.remote(5)
    manager = CheckpointEngineManager(trainer, samplers, timeout_seconds=60)
    manager.sync_weights(label="three")
    found["again"] = ray.get([sampler.seen.remote() for sampler in samplers])
    try:
        manager.sync_weights(adapter_name="none")
    except Exception as error:
        found["refused"] = f"{type(error).__name__}: {error}"
    ray.kill(trainer)
    try:
        manager.sync_weights()
    except Exception as error:
        found["lost"] = f"{type(error).__name__}: {error}"
    print(json.dumps(found), flush=True)
    ray.shutdown()


main()
