"""The streaming engines by name: ours, and those of third parties.

Others add theirs by entry points of the group `checkpoint_engine.streaming`, each a subclass of
`CheckpointEngine`, which may replace one of ours.

    engine = new_engine("gloo", bucket_size=64 << 20)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, cast

from checkpoint_engine.errors import UsageError
from checkpoint_engine.streaming.base import CheckpointEngine

__all__ = ["engine_class", "engine_names", "new_engine"]

GROUP = "checkpoint_engine.streaming"
BUILT_IN = {
    "gloo": "GlooCheckpointEngine",
    "nccl": "NCCLCheckpointEngine",
    "hccl": "HCCLCheckpointEngine",
    "cuda_ipc": "CudaIpcCheckpointEngine",
    "shm": "SharedMemoryCheckpointEngine",
    "ray": "RayCheckpointEngine",
}


def engine_names() -> list[str]:
    """All of them, those of third parties first."""
    return list(dict.fromkeys([*(found.name for found in entry_points(group=GROUP)), *BUILT_IN]))


def engine_class(name: str) -> type[CheckpointEngine]:
    """The engine of this name; raises UsageError where there is none."""
    for found in entry_points(group=GROUP, name=name):
        return cast(type[CheckpointEngine], found.load())
    if name not in BUILT_IN:
        raise UsageError(f"there is no streaming engine {name!r}; there are {engine_names()}")
    streaming = import_module("checkpoint_engine.streaming")
    return cast(type[CheckpointEngine], getattr(streaming, BUILT_IN[name]))


def new_engine(name: str, **settings: Any) -> CheckpointEngine:
    """One of this name, made with these settings."""
    return engine_class(name)(**settings)
