"""A version's tensors on a GPU, group by group, each checked there before it is handed out.

While a loader writes one group into its model, the next is on its way: copied from pinned maps of
the staged bytes at the speed of the bus or, where nothing is pinned, through small pinned slots
that a few threads fill. The digest of every chunk is taken from the GPU's memory, so what a loader
is given is what was registered, bus included. Two groups are there at a time; their memory is
torch's, which uses it again when nobody views it any more: a loader may keep what it is given.
Whoever is done with a feed has torch return what it caches (`torch.cuda.empty_cache`).

    feed = Feed(content, torch.device("cuda", 0))       # while serving: plans, finds memory
    for group in feed.groups():                         # while requests wait
        load(group)
        del group
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from checkpoint_engine import cuda
from checkpoint_engine.adapters.base import Content
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.codec.device_digest import DevicePlan
from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import AdapterError, VerificationError
from checkpoint_engine.manifest import CHUNK_BYTES, Chunk, TensorMeta, align, cut_chunks
from checkpoint_engine.memory import byte_workers

__all__ = ["Feed"]

GROUP_BYTES = 256 << 20
MAX_THREADS = 8  # that fill slots: one alone is much slower than the bus
SLOTS_PER_THREAD = 2

Named = list[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class _Group:
    """Whole tensors that lie one after the other, in bytes [start, end) of the flat space."""

    metas: tuple[TensorMeta, ...]
    start: int
    end: int
    chunks: tuple[Chunk, ...]
    plan: DevicePlan

    @property
    def num_bytes(self) -> int:
        """Of memory that it needs."""
        return align(self.end - self.start)


@dataclass(frozen=True)
class _Coming:
    """A group's memory on the device, and the copies into it: each is done when its event is."""

    group: _Group
    data: torch.Tensor
    copies: tuple[Future[torch.cuda.Event], ...]


class Feed:
    """See the module's text. Borrows the content.

    Raises:
        AdapterError: digests cannot be taken on this device, or it has no memory for two groups;
            says why.
    """

    def __init__(self, content: Content, device: torch.device) -> None:
        self._content, self._device = content, device
        with torch.cuda.device(device):
            self._copies, self._checks = cuda.new_stream(device), cuda.new_stream(device)
            self._groups = tuple(_planned(content.manifest.tensors, device))
            self._find_memory()
        self._thread = threading.local()

    def groups(self) -> Generator[Named, None, None]:
        """Every name with its tensor, in the order of the manifest. One caller at a time.

        Raises:
            VerificationError: bytes on the device are not the version's; names the tensor.
            SourceError: bytes of a streamed version cannot be read.
        """
        pinned = isinstance(self._content, Staged) and self._content.is_pinned
        threads = byte_workers(1 if pinned else min(MAX_THREADS, os.cpu_count() or 1))
        ahead: list[_Coming] = []
        with threads:
            try:
                for group in self._groups:
                    ahead.append(self._begin(group, threads, pinned=pinned))
                    if len(ahead) > 1:
                        yield self._finish(ahead.pop(0))
                while ahead:
                    yield self._finish(ahead.pop(0))
            finally:  # nothing is copied into memory that is about to be used for something else
                threads.shutdown(cancel_futures=True)
                self._copies.synchronize()
                self._checks.synchronize()

    def _find_memory(self) -> None:
        """Have torch cache what two neighbours need at most, before requests wait for it."""
        sizes = [group.num_bytes for group in self._groups]
        needed = max(sizes, default=0), max(map(min, pairwise(sizes)), default=0)
        try:
            found = [_memory(num_bytes, self._device) for num_bytes in needed]
        except torch.OutOfMemoryError as error:
            torch.cuda.empty_cache()
            raise AdapterError(
                f"{self._device} has no room for the {sum(needed)} bytes that an update is copied "
                f"through: leave it more ({error})"
            ) from error
        del found

    def _begin(self, group: _Group, threads: Executor, *, pinned: bool) -> _Coming:
        data = _memory(group.num_bytes, self._device)
        # What a loader does with an earlier group in the same memory comes first.
        self._copies.wait_stream(torch.cuda.current_stream(self._device))
        if pinned:
            return _Coming(group, data, (threads.submit(self._copy_spans, group, data),))
        return _Coming(
            group,
            data,
            tuple(
                threads.submit(self._copy_chunk, meta, start, data[meta.offset - group.start :])
                for meta in _unique(group.metas)
                for start in range(0, meta.length, CHUNK_BYTES)
            ),
        )

    def _finish(self, coming: _Coming) -> Named:
        group, data = coming.group, coming.data
        for copy in coming.copies:
            self._checks.wait_event(copy.result())
        with torch.cuda.stream(self._checks):
            digests = group.plan.begin(data)
        for chunk, digest in zip(group.chunks, digests.wait(), strict=True):
            if digest != chunk.digest:
                raise VerificationError(
                    f"tensor {chunk.tensor!r}: its bytes on {self._device} are not those of the "
                    "manifest; register the checkpoint again, and check the host's memory"
                )
        return [(meta.name, _view(meta, data, group.start)) for meta in group.metas]

    def _copy_spans(self, group: _Group, data: torch.Tensor) -> torch.cuda.Event:
        """Queue copies straight from pinned maps."""
        assert isinstance(self._content, Staged)
        at, done = 0, cuda.new_event()
        with torch.cuda.stream(self._copies):
            for span in self._content.spans(group.start, group.end):
                data[at : at + len(span)].copy_(_host_tensor(span), non_blocking=True)
                at += len(span)
            done.record(self._copies)
        return done

    def _copy_chunk(self, meta: TensorMeta, start: int, data: torch.Tensor) -> torch.cuda.Event:
        """Read a chunk into a slot of this thread, as soon as that is free, and queue its copy."""
        end = min(start + CHUNK_BYTES, meta.length)
        with torch.cuda.stream(self._copies):
            slot, done = self._next_slot()
            cuda.wait(done)
            np.copyto(
                slot[: end - start].numpy(),
                np.frombuffer(self._content.chunk(meta, start, end)(), dtype=np.uint8),
            )
            data[start:end].copy_(slot[: end - start], non_blocking=True)
            done.record(self._copies)
        return done

    def _next_slot(self) -> tuple[torch.Tensor, torch.cuda.Event]:
        slots: list[tuple[torch.Tensor, torch.cuda.Event]] | None
        slots = getattr(self._thread, "slots", None)
        if slots is None:  # they go with the thread, and torch keeps the memory for the next
            slots = self._thread.slots = [
                (torch.empty(CHUNK_BYTES, dtype=torch.uint8, pin_memory=True), cuda.new_event())
                for _ in range(SLOTS_PER_THREAD)
            ]
        slots.append(slots.pop(0))
        return slots[-1]


def _planned(tensors: Iterable[TensorMeta], device: torch.device) -> Iterator[_Group]:
    """Whole tensors, as many as fit, in the order of their offsets."""
    pending: list[TensorMeta] = []
    for meta in tensors:
        if pending and meta.end - pending[0].offset > GROUP_BYTES:
            yield _group(pending, device)
            pending = []
        pending.append(meta)
    if pending:
        yield _group(pending, device)


def _group(metas: Sequence[TensorMeta], device: torch.device) -> _Group:
    filled = [meta for meta in metas if meta.length]
    start = min((meta.offset for meta in filled), default=0)
    chunks = tuple(cut_chunks(metas))
    return _Group(
        metas=tuple(metas),
        start=start,
        end=max((meta.end for meta in filled), default=0),
        chunks=chunks,
        plan=DevicePlan.of([(chunk.offset - start, chunk.length) for chunk in chunks], device),
    )


def _memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    return torch.empty(num_bytes, dtype=torch.uint8, device=device)


def _unique(metas: Sequence[TensorMeta]) -> list[TensorMeta]:
    """Tied tensors once."""
    return list({meta.offset: meta for meta in metas if meta.length}.values())


def _view(meta: TensorMeta, data: torch.Tensor, start: int) -> torch.Tensor:
    dtype, shape = torch_dtype(meta.dtype), torch_shape(meta.dtype, meta.shape)
    if meta.length == 0:
        return torch.empty(shape, dtype=dtype, device=data.device)
    return data[meta.offset - start : meta.end - start].view(dtype).view(shape)


def _host_tensor(memory: memoryview) -> torch.Tensor:
    """A tensor of read-only memory, which is only read: torch would warn of it."""
    address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
    return torch.frombuffer((ctypes.c_ubyte * len(memory)).from_address(address), dtype=torch.uint8)
