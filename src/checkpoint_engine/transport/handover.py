"""Store memory handed to other processes of the host by descriptor: nothing is copied.

A receiver connects to the owner's socket, holds a segment, and is sent its memfd, which it maps.
The connection is the lease: while it is open and held, the owner neither overwrites nor frees the
bytes. A receiver that dies ends its lease with it, since the kernel closes the connection.

Receivers map privately and writable: loaders of real engines write into the tensors that they are
given, and copy-on-write keeps the staged bytes clean. A map is dropped, never closed, while tensors
view it, and the lease ends with the last of them.

Whoever copies to a GPU maps shared and read-only instead, and pins that: a private map would be
copied, page by page, by being pinned. It stays pinned as long as it is kept.

    attachment = Attachment.open(address, segment_id)       # maps and holds
    tensor = torch.frombuffer(attachment.memory[a:b], dtype=torch.uint8)
    attachment.let_go()                                     # bytes no longer needed; map kept
    attachment.hold()                                       # the same map, new bytes
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import msgspec

from checkpoint_engine import cuda
from checkpoint_engine.errors import (
    DeadlineExceeded,
    HandoverError,
    PeerLost,
    ProtocolError,
    StoreError,
)
from checkpoint_engine.memory import MADV_POPULATE_READ, IdleWorkers, fault_in
from checkpoint_engine.store import F_SEAL_SHRINK, Segment
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel

__all__ = ["Attachment", "Attachments", "Hold", "LetGo", "Part", "serve_lease"]

F_GET_SEALS = 1034
MAP_NORESERVE = 0x4000
LEASE_POLL_SECONDS = 1.0
HOLD_SECONDS = 30.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes [offset, offset + length) of a version's flat space, and where they lie on this host.

    `address` is where the segment's owner listens, `segment` the name it has there, and `start`
    the first of the bytes within it.
    """

    address: str
    segment: str
    start: int
    offset: int
    length: int


class Hold(msgspec.Struct, frozen=True, tag=True):
    """Receiver to owner: lease this segment's bytes to me."""

    segment: str


class LetGo(msgspec.Struct, frozen=True, tag=True):
    """Receiver to owner: I no longer need the bytes, but keep my map."""


class Held(msgspec.Struct, frozen=True, tag=True):
    """Owner to receiver: the lease stands. The first one comes with the memfd."""

    pooled: bool


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Owner to receiver: there is no such segment."""

    reason: str


class Attachment:
    """A segment of another process, mapped here. Make one with `open`.

    Attributes:
        memory: all bytes of the segment; what they say is fixed only while it is held.
        not_pinned: why a GPU does not read them without help; "" if it does.
    """

    def __init__(
        self, channel: Channel[Held | Refused], segment: str, *, for_gpu: bool = False
    ) -> None:
        self._channel, self._segment = channel, segment
        self._pooled = self._request_hold()
        descriptor = channel.take_descriptor()
        try:
            mapped = _map(descriptor, shared=for_gpu)
        finally:
            os.close(descriptor)
        self._unpin: Callable[[], object] | None = None
        self.not_pinned = "" if for_gpu else "not for a GPU"
        if for_gpu:
            try:
                self._unpin = cuda.pin(self, mapped, writable=False)
            except HandoverError as error:
                self.not_pinned = str(error)
        if self._unpin is None:
            _fault_in(mapped)
        self.memory = memoryview(mapped)
        # The lease ends when the last tensor that views the map is gone, not before.
        self._lease = weakref.finalize(mapped, channel.close)

    @classmethod
    def open(cls, address: str, segment: str, *, for_gpu: bool = False) -> Attachment:
        """Connect to the owner, hold the segment and map it.

        Args:
            address: where the owner listens.
            segment: its name there.
            for_gpu: map it read-only and pin it, if that may be.

        Raises:
            HandoverError: the owner is gone or another user's, or the memory is not sealed.
        """
        connection = sockets.connect(address, HOLD_SECONDS)
        channel: Channel[Held | Refused] = Channel(connection, Held | Refused)
        try:
            return cls(channel, segment, for_gpu=for_gpu)
        except BaseException:
            channel.close()
            raise

    def discard_writes(self) -> None:
        """Forget what was written into this private map: it shows the owner's bytes again."""
        mapped = self.memory.obj
        assert isinstance(mapped, mmap.mmap), "an attachment that was closed shows nothing"
        if not self.memory.readonly:
            mapped.madvise(mmap.MADV_DONTNEED)

    @property
    def is_pinned(self) -> bool:
        """Whether a GPU reads the bytes without help."""
        return not self.not_pinned

    def hold(self) -> None:
        """Lease the bytes again after `let_go`; raises PeerLost when the owner is gone."""
        self._request_hold()

    def let_go(self) -> bool:
        """End the lease. Returns whether the map may be kept for the owner's next version."""
        try:
            self._channel.send(LetGo())
        except (PeerLost, DeadlineExceeded):
            return False
        return self._pooled

    @property
    def ended(self) -> bool:
        """Whether the owner has freed the segment, or is gone."""
        return self._channel.ended

    def close(self) -> None:
        """Drop the map; the lease ends when no tensor views it any more."""
        self.memory = memoryview(b"")
        if self._unpin is not None:
            self._unpin()

    def _request_hold(self) -> bool:
        self._channel.send(Hold(self._segment))
        reply = self._channel.receive(HOLD_SECONDS)
        if isinstance(reply, Refused):
            raise HandoverError(reply.reason)
        return reply.pooled


class Attachments:
    """Where a replica gets its maps from, and gives them back.

    Faulting a map in costs as much as a copy, and a store reuses few segments over and over, so
    whoever keeps no tensor after an update keeps the maps instead, until their owners free them.

    Args:
        keep_maps: whether bytes are let go of when they are released. Whoever keeps maps must not
            write into them: what is written stays, and fails the next verification. Without it, a
            lease lasts until the last tensor is gone, as it must where a loader may keep some.
        for_gpu: whether maps are read-only, and pinned where that may be.
    """

    def __init__(self, *, keep_maps: bool, for_gpu: bool = False) -> None:
        self._keep_maps, self._for_gpu = keep_maps, for_gpu
        self._idle: dict[tuple[str, str], Attachment] = {}
        self._lock = threading.Lock()
        self._is_watched = False

    def attach(self, address: str, segment: str) -> Attachment:
        """Hold a segment, through the map kept for it if there is one."""
        with self._lock:
            self._close_ended()
            kept = self._idle.pop((address, segment), None)
        if kept is not None:
            try:
                kept.hold()
            except (PeerLost, HandoverError):
                kept.close()
            else:
                return kept
        return Attachment.open(address, segment, for_gpu=self._for_gpu)

    def release(self, address: str, segment: str, attachment: Attachment) -> None:
        """Take an attachment back, and keep its map where the owner will use it again."""
        if not (self._keep_maps and attachment.let_go()):
            attachment.close()
            return
        with self._lock:
            self._idle[address, segment] = attachment
            if not self._is_watched:
                self._is_watched = True
                watch = threading.Thread(target=_watch, args=(weakref.ref(self),), daemon=True)
                watch.start()

    def close(self) -> None:
        """Drop the maps that are kept."""
        with self._lock:
            while self._idle:
                self._idle.popitem()[1].close()

    def _close_ended(self) -> None:
        for place, idle in tuple(self._idle.items()):
            if idle.ended:
                self._idle.pop(place).close()

    def _goes_on(self) -> bool:
        """Drop what no owner will use again; whether some is left to be watched."""
        with self._lock:
            self._close_ended()
            self._is_watched = bool(self._idle)
            return self._is_watched


def _watch(reference: weakref.ref[Attachments]) -> None:
    """Drop maps when their owners do: memory that is mapped, or pinned, is not free."""
    while True:
        time.sleep(LEASE_POLL_SECONDS)
        attachments = reference()
        if attachments is None or not attachments._goes_on():
            return
        del attachments


def serve_lease(
    channel: Channel[Any], first: Hold, segment: Callable[[str], Segment | None]
) -> None:
    """Grant one receiver's leases until it goes. Runs on a thread of its own, owns the channel.

    `segment` finds what is asked for by name.
    """
    held: Segment | None = None
    mapped, name = False, first.segment
    request: Any = first
    try:
        while True:
            if isinstance(request, LetGo):
                if held is not None:
                    held.release()
                held = None
            elif not isinstance(request, Hold):
                raise ProtocolError(f"a lease is held or let go, not {type(request).__name__}")
            elif held is None:
                held = _lease(segment(request.segment))
                if held is None:
                    channel.send(Refused("the segment is gone: its version was unregistered"))
                    return
                channel.send(Held(held.pooled), () if mapped else (held.descriptor,))
                mapped, name = True, request.segment
            else:
                raise ProtocolError("a segment is held already")
            while (following := _next_request(channel)) is None:
                if held is None and segment(name) is None:
                    return  # freed: nobody should keep a map of it
            request = following
    except (PeerLost, ProtocolError, DeadlineExceeded):
        return  # the receiver let go, died, or broke the protocol: the lease is over
    finally:
        if held is not None:
            held.release()
        channel.close()


def _lease(found: Segment | None) -> Segment | None:
    if found is not None:
        try:
            found.acquire()
        except StoreError:
            return None  # freed since it was found
    return found


def _next_request(channel: Channel[Any]) -> Any:
    """The next message, or None for now: a lease has no deadline but the life of its holder."""
    try:
        return channel.receive(LEASE_POLL_SECONDS)
    except DeadlineExceeded:
        return None


def _map(descriptor: int, *, shared: bool) -> mmap.mmap:
    try:
        seals = fcntl.fcntl(descriptor, F_GET_SEALS)
    except OSError:
        seals = 0  # not memory at all
    if not seals & F_SEAL_SHRINK or not os.fstat(descriptor).st_size:
        raise HandoverError("what was handed over is no memory that is sealed against shrinking")
    size = os.fstat(descriptor).st_size
    if shared:
        return mmap.mmap(descriptor, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    return mmap.mmap(
        descriptor,
        size,
        flags=mmap.MAP_PRIVATE | MAP_NORESERVE,
        prot=mmap.PROT_READ | mmap.PROT_WRITE,
    )


def _fault_in(mapped: mmap.mmap) -> None:
    """Only speed: before Linux 5.14 pages fault in one by one."""
    with contextlib.suppress(OSError), IdleWorkers() as pool:
        fault_in(mapped, MADV_POPULATE_READ, pool)
