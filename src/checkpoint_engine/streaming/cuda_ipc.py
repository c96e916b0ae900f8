"""An engine for GPUs of one host: the sender packs into its GPU's memory, which receivers open.

A ring of buckets lies on the sender's GPU, beside what torch allocates, and is handed over once by
CUDA IPC: as plain fields, from which one function makes a tensor. A receiver copies a bucket out of
it, on the same GPU or from a neighbour, checks it there and says so; when all have, the sender
fills it anew. Digests are taken by the GPU.

    engine = CudaIpcCheckpointEngine()      # on the current device; used as any other
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import torch

from checkpoint_engine import cuda
from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.errors import (
    MALFORMED,
    HandoverError,
    ProtocolError,
    TransferError,
    UsageError,
)
from checkpoint_engine.manifest import align
from checkpoint_engine.streaming.carriers import NUM_SLOTS, Carrier, Landed, RingCarrier
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["CudaIpcCheckpointEngine"]


class _Way(msgspec.Struct, frozen=True):
    """Where the ring is: on the GPU of this uuid, of `NUM_SLOTS` slots, opened by this handle.

    `nonce`: no ring of before is taken for it, whose handle may have been the same.
    """

    uuid: str
    handle: bytes
    slot_bytes: int
    nonce: str


class CudaIpcCheckpointEngine(StreamingEngine):
    """Between processes of one host and user: of each the GPU that is current when it is made.

    Every receiver must see the sender's GPU, which may be its own.

    Raises:
        UsageError: there is no GPU.
    """

    name = "cuda_ipc"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not torch.cuda.is_available():
            raise UsageError(
                "CudaIpcCheckpointEngine needs a GPU: use GlooCheckpointEngine, or "
                "SharedMemoryCheckpointEngine on one host"
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        self._rings: dict[str, torch.Tensor] = {}
        super().__init__(*args, **kwargs)

    def make_carrier(self, rendezvous: Rendezvous) -> Carrier:
        """A ring, once it is known how large."""
        return _CudaMemory(self.device, self._rings)

    def _leave(self) -> None:
        super()._leave()
        self._rings.clear()  # which must not be freed before the others have closed it


class _CudaMemory(RingCarrier):
    """See the module's text.

    Args:
        device: this process's.
        rings: the sender's by the way to each, of which receivers may have any open; the last is
            in use.
    """

    between_hosts = "NCCLCheckpointEngine"

    def __init__(self, device: torch.device, rings: dict[str, torch.Tensor]) -> None:
        self._device, self._rings = device, rings
        self._opened: torch.Tensor | None = None

    def plan(self, name: str, kept: Sequence[str], bucket_bytes: int, *, rebuild: bool) -> str:
        """The ring of before, if it is large enough."""
        for way in [way for way in list(self._rings)[:-1] if way not in kept]:
            del self._rings[way]
        if not self._rings or self.slot_bytes < bucket_bytes or rebuild:
            slot_bytes = align(bucket_bytes)
            ring, handle = cuda.share(NUM_SLOTS * slot_bytes, self._device)  # if there is room
            self.slot_bytes = slot_bytes
            uuid = device_uuid("cuda", self._device.index)
            of_it = _Way(uuid, handle, slot_bytes, secrets.token_hex(8))
            self._rings[msgspec.json.encode(of_it).decode()] = ring
        return list(self._rings)[-1]

    def ring(self) -> torch.Tensor:
        """The sender's own, or what a receiver has opened."""
        if self._rings:
            return list(self._rings.values())[-1]
        if self._opened is None:
            raise TransferError("the sender's memory was let go of meanwhile")
        return self._opened

    def join(self, way: str, timeout_seconds: float) -> None:
        """Open the ring, unless this one is open already."""
        if way == self.kept or self._rings:
            return
        self.close()
        try:
            told = msgspec.json.decode(way, type=_Way)
            self.slot_bytes = told.slot_bytes
            num_bytes = NUM_SLOTS * self.slot_bytes
            self._opened = cuda.opened(told.handle, num_bytes, _device_of(told.uuid))
        except MALFORMED as error:
            raise ProtocolError(f"a malformed way: {error}") from error
        except HandoverError as error:
            raise TransferError(f"the sender's memory: {error}") from error
        self.kept = way

    def send(
        self, data: torch.Tensor, wait_ready: Callable[[], None], timeout_seconds: float
    ) -> Landed:
        """It is where it belongs already."""
        landed = super().send(data, wait_ready, timeout_seconds)
        for way in list(self._rings)[:-1]:  # everybody has joined, and so closed those
            del self._rings[way]
        return landed

    def receive(self, index: int, data: torch.Tensor, timeout_seconds: float) -> Landed:
        """Copy it out."""
        landed = super().receive(index, data, timeout_seconds)
        torch.cuda.current_stream(data.device).synchronize()
        return landed

    def close(self) -> None:
        """Close a ring that was opened; the sender's are freed when everybody has left."""
        self.kept = ""
        self._opened = None


def _device_of(uuid: str) -> torch.device:
    """The GPU of this uuid among those that this process sees, in whatever order."""
    for index in range(torch.cuda.device_count()):
        if device_uuid("cuda", index) == uuid:
            return torch.device("cuda", index)
    raise HandoverError(
        f"this process does not see {uuid}: add that to its CUDA_VISIBLE_DEVICES, or use "
        "SharedMemoryCheckpointEngine"
    )
