"""An engine for one host: the sender packs into memory that every receiver maps.

A ring of buckets lies in one sealed memfd, handed over once (`transport.handover`). A receiver
copies a bucket out of it, checks it and says so; when all have, the sender fills it anew. What a
consumer gets is its own, so it may write there.

    engine = SharedMemoryCheckpointEngine()     # used as any other
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch

from checkpoint_engine.errors import (
    MALFORMED,
    HandoverError,
    ProtocolError,
    TransferError,
)
from checkpoint_engine.manifest import align
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.streaming.carriers import NUM_SLOTS, Carrier, RingCarrier
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.transport.handover import Attachment
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.sessions import Door

__all__ = ["SharedMemoryCheckpointEngine"]


class _Way(msgspec.Struct, frozen=True):
    """Where the ring is: a segment of this name, of `NUM_SLOTS` slots, at this address."""

    address: str
    segment: str
    slot_bytes: int


class SharedMemoryCheckpointEngine(StreamingEngine):
    """Between processes of one host and user.

    The ring is allocated at once, four buckets large, however small the model.
    """

    name = "shm"

    def make_carrier(self, rendezvous: Rendezvous) -> Carrier:
        """A ring, once it is known how large."""
        return _SharedMemory()


class _SharedMemory(RingCarrier):
    between_hosts = "GlooCheckpointEngine"

    def __init__(self) -> None:
        self._store: Store | None = None
        self._door: Door | None = None
        self._segment: Segment | None = None
        self._attachment: Attachment | None = None
        self._way = _Way("", "", 0)

    def plan(self, name: str, kept: Sequence[str], bucket_bytes: int, *, rebuild: bool) -> str:
        """The ring of before, if it is large enough."""
        if self._segment is None or self.slot_bytes < bucket_bytes or rebuild:
            self.close()
            self._store = Store.of_environment()
            self._door = Door(self._store.segment)
            self.slot_bytes = align(bucket_bytes)
            self._segment = self._store.allocate(NUM_SLOTS * self.slot_bytes, pooled=False)
            self._way = _Way(self._door.address, self._segment.name, self.slot_bytes)
        return msgspec.json.encode(self._way).decode()

    def ring(self) -> torch.Tensor:
        """The segment, or the receiver's map of it."""
        if self._segment is not None:
            return torch.frombuffer(self._segment.memory, dtype=torch.uint8)
        if self._attachment is None:
            raise TransferError("the sender's memory was let go of meanwhile")
        return torch.frombuffer(self._attachment.memory, dtype=torch.uint8)

    def join(self, way: str, timeout_seconds: float) -> None:
        """Map the ring, unless this one is mapped already."""
        if way == self.kept or self._segment is not None:
            return
        self.close()
        try:
            self._way = msgspec.json.decode(way, type=_Way)
            self._attachment = Attachment.open(self._way.address, self._way.segment)
        except MALFORMED as error:
            raise ProtocolError(f"a malformed way: {error}") from error
        except HandoverError as error:
            raise TransferError(f"the sender's memory cannot be mapped: {error}") from error
        self.slot_bytes = self._way.slot_bytes
        if NUM_SLOTS * self.slot_bytes > len(self._attachment.memory):
            raise ProtocolError("the sender's memory is smaller than it says")
        self.kept = way

    def close(self) -> None:
        """Unmap the ring; the sender's is freed when the last receiver has let go of it."""
        self.kept = ""
        if self._attachment is not None:
            self._attachment.close()
        if self._segment is not None:
            self._segment.release()
        if self._door is not None:
            self._door.close()
        if self._store is not None:
            self._store.close()
        self._attachment = self._segment = self._door = self._store = None
