"""A torch model's live parameters: what may be written into them, writing, and digesting.

Every name of the model's state dict counts, tied names included; buffers that are not persistent
are no part of a version. Copies and digests run chunk by chunk on a few threads, and a chunk is
digested from the live parameter right after it was written, while it is in the cache: checking
costs a fraction of a second pass. Everything that is not a copy or a digest is done beforehand.

    live = LiveModel(model)
    plan = live.bind(staged)                         # refuses what does not fit
    written = write(plan, pool)                      # digests of what is now live
    names = live.differing(written.__getitem__)      # later: is it still?
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from checkpoint_engine.adapters.base import Content
from checkpoint_engine.codec.digest import PIECE_BYTES, chunk_digests, digest_pieces
from checkpoint_engine.dtypes import dtype_name, torch_dtype, torch_shape
from checkpoint_engine.errors import AdapterError, DeadlineExceeded, VerificationError
from checkpoint_engine.manifest import (
    CHUNK_BYTES,
    TensorMeta,
    num_chunks,
    version_digest,
)
from checkpoint_engine.memory import Workers
from checkpoint_engine.sources.training import tensors_of

__all__ = [
    "Copy",
    "LiveModel",
    "Plan",
    "Storage",
    "check_fit",
    "check_names",
    "check_written",
    "write",
]

CASTABLE = frozenset({torch.float32, torch.bfloat16, torch.float16})
GROUP_BYTES = 32 << 20

Storage = str | tuple[int, tuple[int, ...]]
"""What tied tensors have in common: see `_storage`."""


@dataclass(frozen=True)
class Copy:
    """One live tensor and what is to be written into it.

    Attributes:
        name: the first of the tensor's names.
        whole: gives all of it: same shape; another dtype if it is to be cast.
        chunk: gives the bytes of a digest chunk, from its start and end; None where bytes cannot be
            copied as they are: into another dtype, or into what is not contiguous.
        target: the live tensor.
        expected: chunk digests that the target must have afterwards.
    """

    name: str
    whole: Callable[[], torch.Tensor]
    chunk: Callable[[int, int], Callable[[], memoryview]] | None
    target: torch.Tensor
    expected: bytes


_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Piece:
    """What gives the bytes of one chunk of a copy, and where they go; None for a whole copy."""

    copy: Copy
    chunk: tuple[Callable[[], memoryview], _Bytes] | None

    @property
    def num_bytes(self) -> int:
        return self.copy.target.nbytes if self.chunk is None else self.chunk[1].nbytes


@dataclass(frozen=True)
class Plan:
    """Copies, cut into pieces for a few threads: making the views takes longer than a pause may.

    Attributes:
        groups: the pieces in the order of the copies, small ones together.
    """

    copies: tuple[Copy, ...] = ()
    groups: tuple[tuple[_Piece, ...], ...] = ()

    @classmethod
    def of(cls, copies: Iterable[Copy]) -> Plan:
        """Cut copies into pieces."""
        ordered = tuple(copies)
        return cls(ordered, _grouped(piece for copy in ordered for piece in _pieces(copy)))


class LiveModel:
    """The state dict of a model that is serving. Borrows the model; holds no copies."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors_of(model).items()}
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self._not_persistent = buffers - set(self._tensors)

    @property
    def names(self) -> frozenset[str]:
        """Every name of the state dict."""
        return frozenset(self._tensors)

    def bind(self, content: Content) -> Plan:
        """Pair every live tensor with its new content.

        What must be cast is cast here once, to know the digest that it will have.

        Raises:
            AdapterError: a name is unknown or missing, a shape differs, a dtype cannot be cast, or
                two names that the model ties have different content.
        """
        tensors = content.manifest.tensors
        metas = {meta.name: meta for meta in tensors if meta.name not in self._not_persistent}
        check_names(metas, self._tensors)
        copies: dict[Storage, Copy] = {}
        for name, meta in metas.items():
            target = self._tensors[name]
            check_fit(
                meta.name, torch_shape(meta.dtype, meta.shape), torch_dtype(meta.dtype), target
            )
            copy = _bound(meta, target, content)
            first = copies.setdefault(_storage(name, target), copy)
            if first.expected != copy.expected:
                raise AdapterError(
                    f"{name!r} and {first.name!r} are one tensor in this model, but differ in the "
                    "checkpoint"
                )
        return Plan.of(copies.values())

    def snapshot(self) -> Plan:
        """Private copies of every live tensor: a way back that needs nobody else."""
        return Plan.of(_copied(name, tensor) for name, tensor in self._unique().values())

    @property
    def not_persistent(self) -> frozenset[str]:
        """Buffers of the model that are no part of a version."""
        return frozenset(self._not_persistent)

    @property
    def num_chunks(self) -> int:
        """Steps of a pass over every live tensor."""
        return sum(max(1, num_chunks(tensor.nbytes)) for _, tensor in self._unique().values())

    def tied(self) -> dict[str, tuple[str, ...]]:
        """Every name, with the other names of its tensor."""
        groups: dict[Storage, list[str]] = {}
        for name, tensor in sorted(self._tensors.items()):
            groups.setdefault(_storage(name, tensor), []).append(name)
        return {
            name: tuple(other for other in names if other != name)
            for names in groups.values()
            for name in names
        }

    def metas(self, digests: Mapping[Storage, bytes]) -> list[TensorMeta]:
        """Every name of the state dict with what is known of its tensor; offsets are 0."""
        return [
            _live_meta(name, tensor, digests.get(_storage(name, tensor), b""))
            for name, tensor in sorted(self._tensors.items())
        ]

    def digesting(self, names: Iterable[str]) -> Generator[None, None, dict[Storage, bytes]]:
        """Chunk digests of the live tensors under these names, recomputed, one in each step.

        Weights must not change in a step. If they change between two, what is returned is of no
        version. A tensor that is not contiguous is one step.
        """
        found: dict[Storage, bytes] = {}
        for name in names:
            key = _storage(name, self._tensors[name])
            if key not in found:
                digests = []
                for digest in _chunk_digests(self._tensors[name]):
                    digests.append(digest)
                    yield
                found[key] = b"".join(digests)
        return found

    def differing(self, recorded: Callable[[Storage], bytes]) -> Iterator[str | None]:
        """Compare every live tensor with its recorded chunk digests, one chunk in each step.

        Yields the tensor's name if the chunk differs, else None. Weights and their record may
        change between two steps, together.
        """
        for key, (name, tensor) in self._unique().items():
            at = 0
            for digest in _chunk_digests(tensor):
                expected = recorded(key)[at : at + len(digest)]
                yield None if digest == expected else name
                at += len(digest)

    def digests(self) -> dict[Storage, bytes]:
        """Chunk digests of every live tensor, recomputed."""
        return {key: _digests(tensor) for key, (_, tensor) in self._unique().items()}

    def digest(self) -> str:
        """The version digest of the live tensors under all names, recomputed."""
        return self.digest_of(self.digests(), self.names)

    def digest_of(self, written: Mapping[Storage, bytes], names: Iterable[str]) -> str:
        """The version digest under these names, from chunk digests such as `write` returns."""
        return version_digest(
            _live_meta(name, self._tensors[name], written[_storage(name, self._tensors[name])])
            for name in names
        )

    def _unique(self) -> dict[Storage, tuple[str, torch.Tensor]]:
        """Every live tensor once, under one of its names."""
        return {_storage(name, tensor): (name, tensor) for name, tensor in self._tensors.items()}


def write(
    plan: Plan,
    pool: Workers,
    digest: Callable[[Iterable[memoryview]], bytes] = digest_pieces,
    deadline: float = math.inf,
) -> dict[Storage, bytes]:
    """Write everything into its target; returns what is live now, by storage.

    The digests are recomputed from the targets, piece by piece, after each was written. `digest`
    is called with the pieces of a chunk, which are written as it asks for them. What is streamed is
    read by one thread while another writes.

    Raises:
        DeadlineExceeded: `deadline` came, by the monotonic clock, before everything was written.
        VerificationError, SourceError: what was read for a target is not what it should be.
    """

    def in_time(piece: _Piece) -> bytes:
        if time.monotonic() > deadline:
            raise DeadlineExceeded("the new weights could not be read and written in time")
        return _write(piece, digest)

    results = pool.map(lambda group: [in_time(piece) for piece in group], plan.groups)
    written: dict[Storage, bytes] = {}
    for group, digests in zip(plan.groups, results, strict=True):
        for piece, live in zip(group, digests, strict=True):
            key = _storage(piece.copy.name, piece.copy.target)
            written[key] = written.get(key, b"") + live
    if _overlap(plan.copies):  # one write may have changed what another wrote
        return {_storage(copy.name, copy.target): _digests(copy.target) for copy in plan.copies}
    return written


def check_written(plan: Plan, written: Mapping[Storage, bytes]) -> None:
    """Compare what is live with what was to be written.

    Raises:
        VerificationError: a tensor differs; names it.
    """
    for copy in plan.copies:
        if written[_storage(copy.name, copy.target)] != copy.expected:
            raise VerificationError(f"{copy.name!r} is live with other bytes than were sent")


def _bound(meta: TensorMeta, target: torch.Tensor, content: Content) -> Copy:
    whole = functools.partial(content.tensor, meta)
    if torch_dtype(meta.dtype) != target.dtype:
        return Copy(meta.name, whole, None, target, _digests(whole().to(target.dtype)))
    chunk = functools.partial(content.chunk, meta) if target.is_contiguous() else None
    return Copy(meta.name, whole, chunk, target, meta.chunk_digests)


def _copied(name: str, tensor: torch.Tensor) -> Copy:
    kept, digests = tensor.clone(), _digests(tensor)
    if not tensor.is_contiguous():
        return Copy(name, lambda: kept, None, tensor, digests)
    memory = _bytes(kept).numpy().data
    return Copy(name, lambda: kept, lambda start, end: lambda: memory[start:end], tensor, digests)


def _pieces(copy: Copy) -> Iterator[_Piece]:
    """Chunks where bytes can be copied as they are, else all at once."""
    if copy.chunk is None or copy.target.nbytes == 0:
        yield _Piece(copy, None)
        return
    target = _bytes(copy.target).numpy()
    for start in range(0, target.nbytes, CHUNK_BYTES):
        place = target[start : start + CHUNK_BYTES]
        yield _Piece(copy, (copy.chunk(start, start + place.nbytes), place))


def _grouped(pieces: Iterable[_Piece]) -> tuple[tuple[_Piece, ...], ...]:
    """Small pieces together, so that handing them to a thread costs nothing."""
    groups: list[list[_Piece]] = [[]]
    group_bytes = 0
    for piece in pieces:
        if groups[-1] and group_bytes + piece.num_bytes > GROUP_BYTES:
            groups.append([])
            group_bytes = 0
        groups[-1].append(piece)
        group_bytes += piece.num_bytes
    return tuple(map(tuple, groups))


def _write(piece: _Piece, digest: Callable[[Iterable[memoryview]], bytes]) -> bytes:
    if piece.chunk is None:
        with torch.inference_mode():
            piece.copy.target.copy_(piece.copy.whole())
        return _digests(piece.copy.target)
    read, target = piece.chunk
    return digest(_written(read(), target))


def _written(memory: memoryview, target: _Bytes) -> Iterator[memoryview]:
    source = np.frombuffer(memory, dtype=np.uint8)
    for at in range(0, target.nbytes, PIECE_BYTES):
        done = target[at : at + PIECE_BYTES]
        np.copyto(done, source[at : at + PIECE_BYTES])  # never starts threads, as torch's does
        yield done.data


def check_names(names: Collection[str], live: Mapping[str, torch.Tensor]) -> None:
    """Raise AdapterError unless these are a model's tensors, tied ones under one name or more."""
    if unknown := sorted(set(names) - set(live)):
        raise AdapterError(f"the model has no tensor {unknown[0]!r}{_more(unknown)}")
    given = {_storage(name, live[name]) for name in names}
    missing = sorted(name for name, tensor in live.items() if _storage(name, tensor) not in given)
    if missing:
        raise AdapterError(f"the checkpoint lacks {missing[0]!r}{_more(missing)}")


def check_fit(name: str, shape: Sequence[int], dtype: torch.dtype, target: torch.Tensor) -> None:
    """Raise AdapterError unless such a tensor can be written into this one."""
    if tuple(shape) != tuple(target.shape):
        raise AdapterError(
            f"{name!r}: the checkpoint has shape {list(shape)}, the model {list(target.shape)}"
        )
    if any(n > 1 and not step for n, step in zip(target.shape, target.stride(), strict=True)):
        raise AdapterError(f"{name!r}: elements of the model's share memory: it was expanded")
    if dtype != target.dtype and not {dtype, target.dtype} <= CASTABLE:
        raise AdapterError(f"{name!r}: {dtype} is not cast to {target.dtype}")


def _overlap(copies: Sequence[Copy]) -> bool:
    """Whether two live tensors share memory without being one, as views of a fused tensor do."""
    ranges = []
    for copy in copies:
        strides = zip(copy.target.shape, copy.target.stride(), strict=True)
        span = sum((size - 1) * stride for size, stride in strides) + 1
        if copy.target.numel():
            start = copy.target.data_ptr()
            ranges.append((start, start + span * copy.target.itemsize))
    ranges.sort()
    return any(end > start for (_, end), (start, _) in itertools.pairwise(ranges))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _digests(tensor: torch.Tensor) -> bytes:
    return chunk_digests(_bytes(tensor.contiguous()).numpy().data)


def _chunk_digests(tensor: torch.Tensor) -> Iterator[bytes]:
    """The digest of each chunk, taken when it is asked for; without chunks to see, all at once."""
    if not tensor.is_contiguous():
        yield _digests(tensor)
        return
    data = _bytes(tensor).numpy().data
    for at in range(0, len(data), CHUNK_BYTES):
        yield chunk_digests(data[at : at + CHUNK_BYTES])


def _live_meta(name: str, tensor: torch.Tensor, digests: bytes) -> TensorMeta:
    dtype, shape = dtype_name(tensor)
    return TensorMeta(
        name=name, dtype=dtype, shape=shape, offset=0, length=tensor.nbytes, chunk_digests=digests
    )


def _storage(name: str, tensor: torch.Tensor) -> Storage:
    """Equal for tied tensors; empty ones are never tied."""
    return (tensor.data_ptr(), tuple(tensor.shape)) if tensor.numel() else name


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
