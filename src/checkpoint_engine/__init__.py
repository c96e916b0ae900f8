"""Transactional, verified weight updates for running LLM inference engines.

Names are loaded when they are first used, so that importing this package imports no torch.
"""

from typing import TYPE_CHECKING as _TYPE_CHECKING

from checkpoint_engine.lazy import names_from as _names_from

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
    "CheckpointEngineManager": "streaming",
    "CheckpointEngineMixin": "streaming",
    "CudaIpcCheckpointEngine": "streaming",
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


__getattr__ = _names_from(__name__, {name: _HOMES.get(name, "errors") for name in __all__})


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
