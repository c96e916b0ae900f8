"""Weights in motion: a trainer streams named tensors to samplers. See docs/streaming.md.

Names are loaded when they are first used, so that importing one engine loads no other.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from checkpoint_engine.streaming.base import CheckpointEngine, StreamReport
    from checkpoint_engine.streaming.collective import (
        GlooCheckpointEngine,
        HCCLCheckpointEngine,
        NCCLCheckpointEngine,
    )
    from checkpoint_engine.streaming.cuda_ipc import CudaIpcCheckpointEngine
    from checkpoint_engine.streaming.manager import CheckpointEngineManager
    from checkpoint_engine.streaming.mixin import CheckpointEngineMixin
    from checkpoint_engine.streaming.names import engine_class, engine_names, new_engine
    from checkpoint_engine.streaming.ray_actors import RayCheckpointEngine
    from checkpoint_engine.streaming.shared_memory import SharedMemoryCheckpointEngine

__all__ = [
    "CheckpointEngine",
    "CheckpointEngineManager",
    "CheckpointEngineMixin",
    "CudaIpcCheckpointEngine",
    "GlooCheckpointEngine",
    "HCCLCheckpointEngine",
    "NCCLCheckpointEngine",
    "RayCheckpointEngine",
    "SharedMemoryCheckpointEngine",
    "StreamReport",
    "engine_class",
    "engine_names",
    "new_engine",
]

_HOMES = {
    "CheckpointEngine": "base",
    "CudaIpcCheckpointEngine": "cuda_ipc",
    "CheckpointEngineManager": "manager",
    "CheckpointEngineMixin": "mixin",
    "GlooCheckpointEngine": "collective",
    "HCCLCheckpointEngine": "collective",
    "NCCLCheckpointEngine": "collective",
    "RayCheckpointEngine": "ray_actors",
    "SharedMemoryCheckpointEngine": "shared_memory",
    "StreamReport": "base",
    "engine_class": "names",
    "engine_names": "names",
    "new_engine": "names",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value
