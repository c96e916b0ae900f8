"""Versions in host memory: allocated once, pre-faulted, reused, leased.

Fresh pages cost several times what a copy costs, so memory is a memfd that is faulted in once and
used again for version after version. A memfd has no name that could leak or be squatted, its
descriptor is passed over a Unix socket (`transport.handover`), and it is sealed: nobody can
shrink it under a reader, and nobody but its owner can write into it.

A segment is reused or freed only when nothing leases it: not the version registered in it, not an
update under way, not a replica that maps it.

    store = Store()
    shard = store.register("step-120", source)              # bytes copied and digested
    with shard.segment.lease():
        ...                                                 # an update hands it over
    store.unregister("step-120")
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from checkpoint_engine import cuda
from checkpoint_engine.codec.digest import PIECE_BYTES, digest_pieces, piece_bytes
from checkpoint_engine.errors import HandoverError, StoreError, UsageError
from checkpoint_engine.manifest import CHUNK_BYTES, Chunk, Manifest, TensorMeta, align, cut_chunks
from checkpoint_engine.memory import (
    MADV_POPULATE_WRITE,
    IdleWorkers,
    Pace,
    fault_in,
    num_byte_workers,
)
from checkpoint_engine.plan.layout import lay_out
from checkpoint_engine.sources.base import Source

__all__ = ["Segment", "Shard", "Store", "digest_in_place"]

# Not in `fcntl` and `mmap` before Python 3.13; the values are the kernel's.
F_ADD_SEALS = 1033
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 1, 2, 4, 16

PAGE_BYTES = mmap.PAGESIZE
RELEASE_SECONDS = 0.1


class Segment:
    """One memfd, mapped writable by its owner alone. `Store` creates and frees it.

    Attributes:
        name: under which a receiver asks for it; says nothing about its content.
        descriptor: the memfd; owned, valid until `free`.
        capacity_bytes: its size, a multiple of the page size.
        memory: the owner's writable view of all its bytes; dropped by `free`.
        pooled: whether it is kept for the next version when nothing leases it.
    """

    def __init__(self, num_bytes: int, *, pooled: bool, faulted_in: bool = True) -> None:
        self.capacity_bytes = max(PAGE_BYTES, -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)
        self.pooled = pooled
        self.name = secrets.token_hex(8)
        self._num_leases = 0
        self._lock = threading.Lock()
        self._on_idle: Callable[[Segment], None] | None = None
        self._unpin: Callable[[], object] | None = None
        self._freed = False
        try:
            self.descriptor = os.memfd_create("ckpt-engine", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise StoreError(f"cannot make shared memory: {error.strerror}") from error
        try:
            os.ftruncate(self.descriptor, self.capacity_bytes)
            self._map = mmap.mmap(self.descriptor, self.capacity_bytes)
            if faulted_in:
                _fault_in(self._map)
            seals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL
            fcntl.fcntl(self.descriptor, F_ADD_SEALS, seals)
        except OSError as error:
            os.close(self.descriptor)
            raise StoreError(
                f"cannot allocate {num_bytes} bytes of shared memory: {error.strerror}; free "
                "memory or unregister versions"
            ) from error
        self.memory = memoryview(self._map)

    @property
    def num_leases(self) -> int:
        """How many users still need the bytes as they are."""
        return self._num_leases

    def acquire(self) -> None:
        """Lease the bytes: until `release` they are neither overwritten nor freed.

        Raises:
            StoreError: they were freed before.
        """
        with self._lock:
            if self._freed:
                raise StoreError("the segment is gone: its version was unregistered")
            self._num_leases += 1

    def release(self) -> None:
        """End one lease; the last one makes the segment available again."""
        with self._lock:
            self._num_leases -= 1
            assert self._num_leases >= 0, "a segment was released more often than leased"
            idle = self._num_leases == 0
        if idle and self._on_idle is not None:
            self._on_idle(self)

    @contextlib.contextmanager
    def lease(self) -> Iterator[Segment]:
        """Lease the bytes for the duration of a block."""
        self.acquire()
        try:
            yield self
        finally:
            self.release()

    @property
    def is_pinned(self) -> bool:
        """Whether GPUs copy to it at the speed of the bus."""
        return self._unpin is not None

    def pin(self) -> None:
        """Lock the pages until they are freed; where that is not allowed, copies are slower."""
        if self._unpin is None:
            with contextlib.suppress(HandoverError):
                self._unpin = cuda.pin(self, self._map, writable=True)

    def free(self) -> bool:
        """Give the memory back to the system, unless somebody has leased it after all."""
        with self._lock:
            if self._num_leases:
                return False
            self._freed = True
        if self._unpin is not None:
            self._unpin()
            self._unpin = None
        # Dropped, not closed: a view that somebody still holds keeps the map until it goes.
        del self.memory, self._map
        os.close(self.descriptor)
        return True


@dataclass(frozen=True)
class Shard:
    """A registered version, or this rank's part of it: its manifest and the memory behind it."""

    manifest: Manifest
    segment: Segment

    @property
    def memory(self) -> memoryview:
        """The flat byte space, valid while the segment is leased."""
        return self.segment.memory[: self.manifest.num_bytes]


class Store:
    """The versions of one process.

    A version is kept until it is unregistered. A pooled one (`pooled=True`) is also let go when
    `retain` newer pooled ones have been registered, and its memory is used again, never returned
    to the system before `unregister(force=True)` or `close`.

    Args:
        retain: how many pooled versions are kept: the new one, and those to go back to.
        budget_bytes: most bytes of segments at any time; None for what the host has available.
    """

    def __init__(self, *, retain: int = 2, budget_bytes: int | None = None) -> None:
        self._retain = retain
        self._budget_bytes = budget_bytes
        self._lock = threading.RLock()
        self._released = threading.Condition(self._lock)
        self._shards: dict[str, Shard] = {}
        self._segments: list[Segment] = []
        self._coming: set[str] = set()
        self._closed = False

    @classmethod
    def of_environment(cls) -> Store:
        """One with the budget of `$CKPT_ENGINE_MEMORY_BYTES`, if that is set.

        Raises:
            UsageError: it is no number.
        """
        configured = os.environ.get("CKPT_ENGINE_MEMORY_BYTES")
        if configured is not None and not configured.isdigit():
            raise UsageError(f"CKPT_ENGINE_MEMORY_BYTES={configured!r} is not a number of bytes")
        return cls(budget_bytes=int(configured) if configured else None)

    @property
    def allocated_bytes(self) -> int:
        """Bytes of all segments, used or kept for reuse."""
        with self._lock:
            return sum(segment.capacity_bytes for segment in self._segments)

    def segment(self, name: str) -> Segment | None:
        """The segment called `name`, if this store still has it."""
        with self._lock:
            return next((s for s in self._segments if s.name == name), None)

    @property
    def labels(self) -> list[str]:
        """The registered versions, oldest first."""
        with self._lock:
            return list(self._shards)

    def __getitem__(self, label: str) -> Shard:
        """The shard registered as `label`; StoreError where there is none."""
        with self._lock:
            if label not in self._shards:
                known = ", ".join(self._shards) or "none"
                raise StoreError(f"version {label!r} is not registered here; registered: {known}")
            return self._shards[label]

    def register(self, label: str, source: Source, *, pooled: bool = False) -> Shard:
        """Copy a source's bytes into a segment and digest them on the way.

        The source may be closed, and its tensors may change, once this returns. If anything
        fails, nothing of the version remains; a pooled one may have let the oldest go already,
        whose memory it was to use.

        Raises:
            SourceError: the source contradicts itself or cannot be read.
            StoreError: the label is taken, or memory or budget does not suffice.
        """
        with self._lock:
            if label in self._shards or label in self._coming:
                raise StoreError(f"version {label!r} is already registered; unregister it first")
            self._coming.add(label)
        try:
            tensors = lay_out(source.specs())
            if pooled:
                self._retire(keep=self._retain - 1)
            num_bytes = max((tensor.end for tensor in tensors), default=0)
            segment = self.allocate(num_bytes, pooled=pooled, freed_bytes=source.freed_bytes)
            try:
                if source.on_gpu:
                    segment.pin()
                shard = Shard(_fill(tensors, source, segment.memory), segment)
            except BaseException as error:
                # Views in the frames of the failure would keep the memory as long as the error.
                traceback.clear_frames(error.__traceback__)
                segment.release()
                raise
            with self._lock:
                self._shards[label] = shard
            return shard
        finally:
            with self._lock:
                self._coming.discard(label)

    def allocate(self, num_bytes: int, *, pooled: bool, freed_bytes: int = 0) -> Segment:
        """A segment of at least `num_bytes`, leased once to the caller; its bytes are arbitrary.

        Args:
            num_bytes: to be written.
            pooled: whether idle memory serves, and this memory later.
            freed_bytes: of the host's memory that are free once this is written; pages come then.

        Raises:
            StoreError: memory or budget does not suffice.
        """
        with self._lock:
            segment = self._idle_segment(num_bytes) if pooled else None
            if segment is None:
                self._check_budget(align(num_bytes), freed_bytes)
                segment = Segment(num_bytes, pooled=pooled, faulted_in=not freed_bytes)
                segment._on_idle = self._idle
                self._segments.append(segment)
            segment.acquire()
            return segment

    def lack(self, num_bytes: int, *, pooled: bool, num_sharing: int = 1) -> str:
        """Why a version of so many bytes is better not staged here; "" if it may be.

        A host that stages keeps two copies beside the engines: the new version, and the one to go
        back to. Memory that is allocated already is one of them, or is used again.

        Args:
            num_bytes: to be allocated here.
            pooled: as `allocate`.
            num_sharing: processes of this host that will allocate, and have allocated, as much.
        """
        with self._lock:
            used = self.allocated_bytes
            retiring = [self[label].segment for label in self._surplus(self._retain - 1)]
            idle = self._idle_pool() + [s for s in retiring if s.num_leases == 1]
        if pooled and any(segment.capacity_bytes >= num_bytes for segment in idle):
            return ""
        free, budget = available_bytes(), self._budget_bytes
        if budget is not None and num_bytes > budget - used:
            return f"{_size(num_bytes)} do not fit in the {_size(budget - used)} left of the budget"
        needed, room = num_sharing * num_bytes, free + num_sharing * used
        if needed > free or 2 * needed > room:
            return f"{_size(needed)} do not fit twice in {_size(room)} of memory"
        return ""

    def unregister(self, label: str, *, force: bool = False) -> None:
        """Forget a version. Its memory is free once no update and no replica leases it.

        Args:
            label: the version.
            force: also return pooled memory that nothing leases to the system.

        Raises:
            StoreError: there is no such version.
        """
        with self._lock:
            self[label].segment.release()
            del self._shards[label]
            if force:
                self._free(self._idle_pool())

    @contextlib.contextmanager
    def leased(self, label: str) -> Iterator[None]:
        """Keep a version as it is, if it is here, whatever is registered or unregistered."""
        if label in self.labels:
            with self[label].segment.lease():
                yield
        else:
            yield

    def close(self) -> None:
        """Forget every version and return all memory, what is leased as soon as it no longer is."""
        with self._lock:
            self._closed = True
            for label in self.labels:
                self.unregister(label)
            self._free(self._idle_pool())

    def _retire(self, keep: int) -> None:
        with self._lock:
            for label in self._surplus(keep):
                self.unregister(label)

    def _surplus(self, keep: int) -> list[str]:
        """The oldest pooled versions, without the last `keep`."""
        pooled = [label for label, shard in self._shards.items() if shard.segment.pooled]
        return pooled[: max(0, len(pooled) - keep)]

    def _idle(self, segment: Segment) -> None:
        with self._lock:
            self._released.notify_all()
            keeps = segment.pooled and not self._closed
            if not keeps and segment in self._segments:
                self._free([segment])

    def _idle_pool(self) -> list[Segment]:
        return [s for s in self._segments if s.pooled and s.num_leases == 0]

    def _idle_segment(self, num_bytes: int) -> Segment | None:
        """The smallest idle segment that fits; those too small to fit are returned.

        A replica that has let go of one may not have been heard yet: new memory costs more, and for
        longer, than to listen for a moment.
        """
        fitting = [s for s in self._segments if s.pooled and s.capacity_bytes >= num_bytes]

        def idle() -> list[Segment]:
            return [segment for segment in fitting if segment.num_leases == 0]

        registered = [shard.segment for shard in self._shards.values()]
        if any(segment not in registered for segment in fitting):
            self._released.wait_for(idle, RELEASE_SECONDS)
        if found := idle():
            return min(found, key=lambda segment: segment.capacity_bytes)
        self._free(self._idle_pool())
        return None

    def _free(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            if segment.free():
                self._segments.remove(segment)

    def _check_budget(self, num_bytes: int, freed_bytes: int) -> None:
        used, budget = self.allocated_bytes, self._budget_bytes
        if budget is not None and used + num_bytes > budget:
            raise StoreError(
                f"a version of {num_bytes} bytes exceeds the store's budget: {used} of {budget} "
                "bytes are in use; unregister versions or raise the budget"
            )
        available = available_bytes(freed_bytes)
        if num_bytes > available:
            raise StoreError(
                f"a version of {num_bytes} bytes does not fit in the {available} bytes of memory "
                "that this host has available; unregister versions or free memory"
            )


def digest_in_place(source: Source) -> Manifest:
    """Read a source once, to digest it, and keep nothing of it.

    Raises:
        SourceError: the source contradicts itself or cannot be read.
    """
    return _fill(lay_out(source.specs()), source, None)


def _fill(tensors: tuple[TensorMeta, ...], source: Source, memory: memoryview | None) -> Manifest:
    """Read every chunk into its place, if it has one, and digest it while it is in the cache."""
    pace, num_threads = Pace.of_environment(), num_byte_workers()
    origins = {tensor.name: tensor.offset for tensor in tensors}
    step = PIECE_BYTES if memory is None else piece_bytes(num_threads)

    def read_pieces(chunk: Chunk) -> Iterator[memoryview]:
        scratch = memoryview(bytearray(step if memory is None else 0))
        for start in range(chunk.offset, chunk.end, step):
            end = min(start + step, chunk.end)
            piece = scratch[: end - start] if memory is None else memory[start:end]
            pace.take(len(piece))
            source.read_into(chunk.tensor, start - origins[chunk.tensor], piece)
            yield piece

    def digested(chunk: Chunk) -> tuple[int, bytes]:
        return chunk.offset, digest_pieces(read_pieces(chunk))

    with IdleWorkers() as pool:
        digests = dict(pool.map(digested, cut_chunks(tensors)))
    return Manifest.of(
        msgspec.structs.replace(
            tensor,
            chunk_digests=b"".join(
                digests[start] for start in range(tensor.offset, tensor.end, CHUNK_BYTES)
            ),
        )
        for tensor in tensors
    )


def _fault_in(memory: mmap.mmap) -> None:
    """Touch every page now, so that no copy pays for it later and shortage shows here."""
    try:
        with IdleWorkers() as pool:
            fault_in(memory, MADV_POPULATE_WRITE, pool)
    except OSError as error:
        if error.errno != 22:  # EINVAL: Linux before 5.14
            raise
        for start in range(0, len(memory), PAGE_BYTES):
            memory[start] = 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def available_bytes(freed_bytes: int = 0, group: Path = Path("/sys/fs/cgroup")) -> int:
    """What this process may still allocate: the host's memory or its control group's.

    `freed_bytes` of shared memory will be free then; another group's do not help this one.
    """
    available = [_entry(Path("/proc/meminfo"), "MemAvailable:", sys.maxsize) * 1024 + freed_bytes]
    limit = group / "memory.max"
    if limit.exists() and (maximum := limit.read_text().strip()) != "max":
        used = int((group / "memory.current").read_text())
        # Files that were read stay until somebody needs their memory.
        unused = int(maximum) - used + _entry(group / "memory.stat", "inactive_file", 0)
        available.append(unused + min(freed_bytes, _entry(group / "memory.stat", "shmem", 0)))
    return min(available)


def _entry(table: Path, name: str, default: int) -> int:
    """The number beside a name."""
    lines = (line.split() for line in table.read_text().splitlines())
    return next((int(line[1]) for line in lines if line[0] == name), default)
