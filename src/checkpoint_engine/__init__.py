"""Transactional, verified weight updates for running LLM inference engines.

Names are loaded when they are first used, so that importing this package imports no torch.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING as _TYPE_CHECKING

if _TYPE_CHECKING:
    from checkpoint_engine.calls import engine_requests, request_inference_to_update
    from checkpoint_engine.errors import (
        AdapterError,
        CheckpointEngineError,
        DeadlineExceeded,
        ForeignPeer,
        HandoverError,
        ManifestError,
        PeerLost,
        ProtocolError,
        RemoteError,
        SourceError,
        StoreError,
        TransferError,
        UpdateFailed,
        UpdateRefused,
        UsageError,
        VerificationError,
    )
    from checkpoint_engine.manifest import Manifest, TensorMeta, Version
    from checkpoint_engine.ps import ParameterServer
    from checkpoint_engine.sources.lora_adapter import LoraSource
    from checkpoint_engine.streaming import (
        CheckpointEngine,
        CheckpointEngineManager,
        CheckpointEngineMixin,
        CudaIpcCheckpointEngine,
        GlooCheckpointEngine,
        HCCLCheckpointEngine,
        NCCLCheckpointEngine,
        RayCheckpointEngine,
        SharedMemoryCheckpointEngine,
        StreamReport,
    )
    from checkpoint_engine.update.probe import Probe, http_check
    from checkpoint_engine.update.protocol import ReplicaReport, Report
    from checkpoint_engine.worker import update_weights_from_ipc

__all__ = [
    "AdapterError",
    "CheckpointEngine",
    "CheckpointEngineError",
    "CheckpointEngineManager",
    "CheckpointEngineMixin",
    "CudaIpcCheckpointEngine",
    "DeadlineExceeded",
    "ForeignPeer",
    "GlooCheckpointEngine",
    "HCCLCheckpointEngine",
    "HandoverError",
    "LoraSource",
    "Manifest",
    "ManifestError",
    "NCCLCheckpointEngine",
    "ParameterServer",
    "PeerLost",
    "Probe",
    "ProtocolError",
    "RayCheckpointEngine",
    "RemoteError",
    "ReplicaReport",
    "Report",
    "SharedMemoryCheckpointEngine",
    "SourceError",
    "StoreError",
    "StreamReport",
    "TensorMeta",
    "TransferError",
    "UpdateFailed",
    "UpdateRefused",
    "UsageError",
    "VerificationError",
    "Version",
    "engine_requests",
    "http_check",
    "request_inference_to_update",
    "update_weights_from_ipc",
]

_HOMES = {
    "CheckpointEngine": "streaming",
    "CudaIpcCheckpointEngine": "streaming",
    "CheckpointEngineManager": "streaming",
    "CheckpointEngineMixin": "streaming",
    "GlooCheckpointEngine": "streaming",
    "HCCLCheckpointEngine": "streaming",
    "NCCLCheckpointEngine": "streaming",
    "RayCheckpointEngine": "streaming",
    "SharedMemoryCheckpointEngine": "streaming",
    "StreamReport": "streaming",
    "LoraSource": "sources.lora_adapter",
    "Manifest": "manifest",
    "ParameterServer": "ps",
    "Probe": "update.probe",
    "ReplicaReport": "update.protocol",
    "Report": "update.protocol",
    "TensorMeta": "manifest",
    "Version": "manifest",
    "engine_requests": "calls",
    "http_check": "update.probe",
    "request_inference_to_update": "calls",
    "update_weights_from_ipc": "worker",
}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(_import_module(f"{__name__}.{_HOMES.get(name, 'errors')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
