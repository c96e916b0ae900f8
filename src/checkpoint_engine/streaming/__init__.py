"""Weights in motion: a trainer streams named tensors to samplers. See docs/streaming.md.

Names are loaded when they are first used, so that importing one engine loads no other.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from checkpoint_engine.lazy import names_from as _names_from

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
    "CheckpointEngineManager": "manager",
    "CheckpointEngineMixin": "mixin",
    "CudaIpcCheckpointEngine": "cuda_ipc",
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

__getattr__ = _names_from(__name__, _HOMES)
