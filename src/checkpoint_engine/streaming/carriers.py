"""How the bytes of a bucket get from the sender's memory into the receivers'.

Whatever else a cycle needs (who takes part, what a bucket holds, credit, digests, the end) is the
same for all carriers, and done by `sending` and `receiving`.

    way = carrier.plan("stream-3", kept=[...], bucket_bytes=..., rebuild=False)     # told to all
    carrier.join(way, timeout_seconds)
    landed = carrier.send(data, wait_ready, timeout_seconds)        # the sender
    landed = carrier.receive(index, data, timeout_seconds)          # receivers
    landed()
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch

from checkpoint_engine.errors import StoreError, UsageError
from checkpoint_engine.streaming.messages import Hello
from checkpoint_engine.transport.collective import MOST_UNDER_WAY, Collective
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.transport.sockets import own_host

__all__ = ["NUM_SLOTS", "Carrier", "CollectiveCarrier", "Landed", "RingCarrier", "Slots"]

NUM_SLOTS = (
    MOST_UNDER_WAY  # one is filled, two move, for the link idles from one's end on, and one is used
)

Landed = Callable[[], None]  # waits until bytes have moved; raises TransferError if they do not


class Slots:
    """Memory for as many buckets as are under way, kept as long as it is large enough."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._slots: list[torch.Tensor] = []

    def of(self, bucket_bytes: int) -> list[torch.Tensor]:
        """`NUM_SLOTS` times so many bytes."""
        if not self._slots or len(self._slots[0]) < bucket_bytes:
            self._slots = []
            self._slots = [self.memory(bucket_bytes) for _ in range(NUM_SLOTS)]
        return [slot[:bucket_bytes] for slot in self._slots]

    def memory(self, num_bytes: int) -> torch.Tensor:
        """So many bytes of their own, on the same device; raises StoreError if there are none."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        except RuntimeError as error:
            raise StoreError(
                f"no memory for {num_bytes} bytes on {self._device}: a bucket, or the largest "
                "tensor, does not fit"
            ) from error


class Carrier(ABC):
    """One end of the way that bytes take.

    Attributes:
        early: whether a receiver says that it is ready before a bucket moves, not after it has it.
        kept: what of the last cycle's way still stands here; "" for nothing.
    """

    early: ClassVar[bool]
    kept: str = ""

    def check(self, hellos: Mapping[int, Hello]) -> None:  # noqa: B027 - most have no conditions
        """Raise UsageError if bytes cannot get to one of these receivers; names its rank."""

    @abstractmethod
    def plan(self, name: str, kept: Sequence[str], bucket_bytes: int, *, rebuild: bool) -> str:
        """Say which way bytes take in this cycle: that of the last, or a new one under `name`."""

    @abstractmethod
    def slots(self, bucket_bytes: int) -> list[torch.Tensor]:
        """The sender's memory, in which bucket i is packed into slot i mod `NUM_SLOTS`."""

    @abstractmethod
    def join(self, way: str, timeout_seconds: float) -> None:
        """Go this way; raises TransferError if the others do not."""

    @abstractmethod
    def send(
        self, data: torch.Tensor, wait_ready: Callable[[], None], timeout_seconds: float
    ) -> Landed:
        """Begin to. Once they have landed, the receivers have the bytes; `data` may be filled anew.

        The next bucket may be begun before that.
        """

    @abstractmethod
    def receive(self, index: int, data: torch.Tensor, timeout_seconds: float) -> Landed:
        """Begin to fill `data` with the next bucket's bytes, which is the one of this index."""

    @abstractmethod
    def abandon(self) -> None:
        """Leave the way: something failed; who waits on it fails too."""

    def close(self) -> None:
        """Let go of everything."""
        self.abandon()


class CollectiveCarrier(Carrier):
    """Broadcasts from rank 0 by torch.distributed, in a group of our own.

    Args:
        rendezvous: of all ranks.
        backend: one of `transport.collective.BACKENDS`.
        device: where the backend takes bytes from.
    """

    early = True

    def __init__(self, rendezvous: Rendezvous, backend: str, device: torch.device) -> None:
        self._keys = rendezvous.scope("ways")
        self._collective = Collective(
            self._keys, index=rendezvous.rank, size=rendezvous.world_size, backend=backend
        )
        self._slots = Slots(device)
        self._is_alone = rendezvous.world_size == 1

    def plan(self, name: str, kept: Sequence[str], bucket_bytes: int, *, rebuild: bool) -> str:
        """See `Carrier`, as for all of these."""
        stands = bool(self.kept) and all(one == self.kept for one in kept)
        return self.kept if stands and not rebuild else name

    def slots(self, bucket_bytes: int) -> list[torch.Tensor]:
        """Own memory."""
        return self._slots.of(bucket_bytes)

    def join(self, way: str, timeout_seconds: float) -> None:
        """Meet in the group of this name."""
        if way != self.kept:
            self.abandon()
            self._keys.clear()  # of the group of before, in which everybody has met, or never will
        if not self._is_alone:
            self._collective.connect(way, timeout_seconds)
        self.kept = way

    def send(
        self, data: torch.Tensor, wait_ready: Callable[[], None], timeout_seconds: float
    ) -> Landed:
        """Broadcast, once everybody has memory."""
        wait_ready()
        return self._broadcast(data, timeout_seconds)

    def receive(self, index: int, data: torch.Tensor, timeout_seconds: float) -> Landed:
        """Take part in a broadcast."""
        return self._broadcast(data, timeout_seconds)

    def abandon(self) -> None:
        """Close the group."""
        self.kept = ""
        self._collective.abandon()

    def _broadcast(self, data: torch.Tensor, timeout_seconds: float) -> Landed:
        if self._is_alone or not len(data):
            return _have_landed
        landed = self._collective.begin(data, 0, timeout_seconds)
        if data.is_cpu:
            return landed

        def have_landed() -> None:
            landed()  # digests and copies of other streams come after it, too
            torch.accelerator.current_stream(data.device).synchronize()

        return have_landed


class RingCarrier(Carrier):
    """One host: the sender packs into `NUM_SLOTS` slots of one memory, which receivers see, too.

    Attributes:
        between_hosts: the engine to use where there are several.
        slot_bytes: of the ring that is in use.
    """

    early = False
    between_hosts: ClassVar[str]
    slot_bytes: int = 0

    def check(self, hellos: Mapping[int, Hello]) -> None:
        """All must be of this host."""
        for rank, hello in hellos.items():
            if hello.host != own_host():
                raise UsageError(
                    f"rank {rank} is on another host, or has another CKPT_ENGINE_SOCKET_DIR: "
                    f"between hosts use {self.between_hosts}"
                )

    def slots(self, bucket_bytes: int) -> list[torch.Tensor]:
        """The ring itself."""
        return [self.slot(index, bucket_bytes) for index in range(NUM_SLOTS)]

    def slot(self, index: int, num_bytes: int) -> torch.Tensor:
        """The first bytes of the slot that the bucket of this index is in."""
        start = index % NUM_SLOTS * self.slot_bytes
        return self.ring()[start : start + num_bytes]

    @abstractmethod
    def ring(self) -> torch.Tensor:
        """The memory, as it is seen here; raises TransferError if it is no longer."""

    def send(
        self, data: torch.Tensor, wait_ready: Callable[[], None], timeout_seconds: float
    ) -> Landed:
        """It is where it belongs already."""
        wait_ready()
        return _have_landed

    def receive(self, index: int, data: torch.Tensor, timeout_seconds: float) -> Landed:
        """Copy it out."""
        data.copy_(self.slot(index, len(data)))
        return _have_landed

    def abandon(self) -> None:
        """Nothing is broken: what is in the ring is checked by whoever reads it."""


def _have_landed() -> None:
    """They are there."""
