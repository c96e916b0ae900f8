"""The memory into which a receiver receives, kept from cycle to cycle.

There is a ring of slots for buckets, and one piece for a tensor that is larger than a bucket, whose
parts are received straight to where they belong in it. What is in use is given back by whoever
uses it, which is all the credit that a sender has.

    places = Places(device)
    places.begin(bucket_bytes)
    place = places.find(bucket, stopped)
    ...
    place.release()
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import torch

from checkpoint_engine.errors import ProtocolError
from checkpoint_engine.streaming.carriers import Slots
from checkpoint_engine.streaming.messages import Bucket, Part
from checkpoint_engine.streaming.packing import whole_bytes

__all__ = ["Place", "Places"]

POLL_SECONDS = 0.05


class Place(NamedTuple):
    """Where a bucket goes. `whole` is the memory of the tensor of which it is the last part."""

    data: torch.Tensor
    whole: torch.Tensor | None
    release: Callable[[], None]


class Places:
    """All memory of one receiver, on one device."""

    def __init__(self, device: torch.device) -> None:
        self._memory = Slots(device)
        self._free: deque[torch.Tensor] = deque()
        self._large = torch.empty(0, dtype=torch.uint8)
        self._large_is_free = True
        self._changed = threading.Condition()

    def begin(self, bucket_bytes: int) -> None:
        """All of it is free; what was in use in the last cycle is forgotten."""
        with self._changed:
            self._free = deque(self._memory.of(bucket_bytes))
            self._large_is_free = True

    def find(self, bucket: Bucket, is_over: Callable[[], bool]) -> Place | None:
        """Wait for memory for this bucket; None if the cycle is over before there is any.

        Raises:
            ProtocolError: it has more bytes than were agreed on.
        """
        part = bucket.parts[0] if bucket.parts else None
        if part is not None and part.length < whole_bytes(part):
            return self._find_large(part, is_over)
        if not self._wait(lambda: bool(self._free), is_over):
            return None
        with self._changed:
            free, slot = self._free, self._free.popleft()
        if bucket.length > len(slot):
            raise ProtocolError(f"bucket {bucket.index} has more bytes than were agreed on")
        return Place(slot[: bucket.length], None, lambda: self._give_back(free, slot))

    def _find_large(self, part: Part, is_over: Callable[[], bool]) -> Place | None:
        num_bytes = whole_bytes(part)
        if part.start == 0:
            if not self._wait(lambda: self._large_is_free, is_over):
                return None
            self._large_is_free = False
            if len(self._large) < num_bytes:
                self._large = torch.empty(0, dtype=torch.uint8)
                self._large = self._memory.memory(num_bytes)
        data = self._large[part.start : part.start + part.length]
        if self._large_is_free or len(data) != part.length:
            raise ProtocolError(f"a part of {part.name[:80]!r} is out of order")
        is_last = part.start + part.length == num_bytes
        whole = self._large[:num_bytes] if is_last else None
        return Place(data, whole, self._give_back_large)

    def _wait(self, is_free: Callable[[], bool], is_over: Callable[[], bool]) -> bool:
        """The sender's deadline ends it, if the consumer never gives anything back."""
        with self._changed:
            while not is_free():
                if is_over():
                    return False
                self._changed.wait(POLL_SECONDS)
        return True

    def _give_back(self, free: deque[torch.Tensor], slot: torch.Tensor) -> None:
        with self._changed:
            free.append(slot)
            self._changed.notify_all()

    def _give_back_large(self) -> None:
        with self._changed:
            self._large_is_free = True
            self._changed.notify_all()
