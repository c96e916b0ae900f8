"""Named tensors into buckets and out of them again.

Tensors are packed in the order in which they are given, each at a multiple of 256 bytes. One that
does not fit in what is left of a bucket begins the next; one that is larger than a bucket is cut
into parts at digest chunks, and each part has a bucket to itself. Bytes are digested while they are
copied, so the version's digest is known when the last tensor has gone by, on either side.

    bucket = OpenBucket(index, memory)
    for start, length in cuts(weight, bucket_bytes):
        ledger.add(bucket.put(weight, start, length))
    announced = bucket.closed()
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from checkpoint_engine.codec.device_digest import chunk_digests_there
from checkpoint_engine.codec.digest import PIECE_BYTES, chunk_digests, digest_pieces
from checkpoint_engine.dtypes import dtype_name, num_bytes, torch_dtype, torch_shape
from checkpoint_engine.errors import (
    ManifestError,
    ProtocolError,
    SourceError,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import (
    ALIGNMENT_BYTES,
    CHUNK_BYTES,
    DIGEST_BYTES,
    TensorMeta,
    align,
    check_tensor,
    num_chunks,
    version_digest,
)
from checkpoint_engine.sources.tensors import checked
from checkpoint_engine.streaming.base import Weights
from checkpoint_engine.streaming.messages import Bucket, Part

__all__ = [
    "Ledger",
    "OpenBucket",
    "Weight",
    "check_arrived",
    "cuts",
    "named",
    "view",
    "weight_of",
    "whole_bytes",
    "whole_tensors",
]


class Weight(NamedTuple):
    """A tensor to be sent: its name, its safetensors dtype and shape, and its bytes, row-major."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: torch.Tensor


def weight_of(name: str, tensor: torch.Tensor) -> Weight:
    """A tensor as bytes; nothing is copied unless it is not contiguous.

    Raises:
        SourceError: it has no dense bytes, or its dtype no name in safetensors.
    """
    tensor = checked(name, tensor)
    try:
        dtype, shape = dtype_name(tensor)
    except UsageError as error:
        raise SourceError(f"tensor {name!r}: {error}") from error
    return Weight(name, dtype, shape, tensor.contiguous().reshape(-1).view(torch.uint8))


async def named(weights: Weights) -> AsyncIterator[tuple[str, torch.Tensor]]:
    """The pairs of whatever holds them. The next is asked for only when one has been used.

    Raises:
        SourceError: they are none.
    """
    if isinstance(weights, Mapping):
        weights = weights.items()
    if isinstance(weights, Iterable):
        for pair in weights:
            yield _checked_pair(pair)
    elif isinstance(weights, AsyncIterable):
        async for pair in weights:
            yield _checked_pair(pair)
    else:
        raise SourceError(f"a {type(weights).__name__} holds no pairs of a name and a tensor")


def _checked_pair(pair: Any) -> tuple[str, torch.Tensor]:
    if not (isinstance(pair, (tuple, list)) and len(pair) == 2 and isinstance(pair[0], str)):
        raise SourceError(f"a {type(pair).__name__} is no pair of a name and a tensor")
    return pair[0], pair[1]


def cuts(weight: Weight, bucket_bytes: int) -> Iterator[tuple[int, int]]:
    """Start and length of the parts in which a tensor travels; one, if it fits in a bucket."""
    length = len(weight.data)
    if length <= bucket_bytes:
        yield 0, length
        return
    most = bucket_bytes // CHUNK_BYTES * CHUNK_BYTES
    for start in range(0, length, most):
        yield start, min(most, length - start)


class OpenBucket:
    """A bucket that is being filled. Borrows its memory, flat bytes on any device."""

    def __init__(self, index: int, memory: torch.Tensor) -> None:
        self.index, self.memory = index, memory
        self._parts: list[Part] = []
        self._end = 0

    @property
    def num_parts(self) -> int:
        """How many there are in it."""
        return len(self._parts)

    def fits(self, length: int) -> bool:
        """Whether so many bytes fit in what is left."""
        return align(self._end) + length <= len(self.memory)

    def put(self, weight: Weight, start: int, length: int) -> Part:
        """Copy bytes of a tensor to the end, and digest them on the way."""
        offset = align(self._end)
        self._end = offset + length
        digests = _copy(weight.data[start : start + length], self.memory[offset : self._end])
        part = Part(weight.name, weight.dtype, weight.shape, start, length, offset, digests)
        self._parts.append(part)
        return part

    def closed(self) -> Bucket:
        """What is in it."""
        return Bucket(index=self.index, length=self._end, packed=0, parts=tuple(self._parts))


def _copy(source: torch.Tensor, target: torch.Tensor) -> bytes:
    """Copy bytes; returns the digests of their chunks."""
    if not (source.is_cpu and target.is_cpu):
        target.copy_(source)
        return _digests(target)
    read, written = source.numpy(), target.numpy()
    if len(read) <= PIECE_BYTES:
        np.copyto(written, read)
        return chunk_digests(written.data)

    def pieces(start: int, end: int) -> Iterator[memoryview]:
        for first in range(start, end, PIECE_BYTES):
            last = min(first + PIECE_BYTES, end)
            np.copyto(written[first:last], read[first:last])
            yield written[first:last].data

    length = len(read)
    return b"".join(
        digest_pieces(pieces(start, min(start + CHUNK_BYTES, length)))
        for start in range(0, length, CHUNK_BYTES)
    )


def _digests(data: torch.Tensor) -> bytes:
    if data.is_cuda:
        return chunk_digests_there(data)
    return chunk_digests(data.cpu().numpy().data)


def whole_bytes(part: Part) -> int:
    """Bytes of the tensor of which this is a part.

    Raises:
        UsageError: there is no such dtype, or not of this shape.
    """
    return num_bytes(part.dtype, part.shape)


class Ledger:
    """The tensors of one version, as their parts go by in order."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}
        self._tensors: list[TensorMeta] = []
        self._coming: tuple[TensorMeta, int] | None = None

    @property
    def num_tensors(self) -> int:
        """That are whole."""
        return len(self._tensors)

    @property
    def is_within(self) -> bool:
        """Whether a tensor has begun whose rest is to come."""
        return self._coming is not None

    @property
    def num_bytes(self) -> int:
        """Of those that are whole."""
        return sum(tensor.length for tensor in self._tensors)

    def add(self, part: Part) -> None:
        """Note a part.

        Raises:
            SourceError: the tensor was there before, or cannot be.
            ProtocolError: the part is not the one that comes next.
        """
        begun = self._coming
        if part.start == 0 and begun is None:
            meta = _meta(part)
            if meta.name in self._digests:
                raise SourceError(f"tensor {meta.name!r} is given twice")
            self._digests[meta.name] = b""
            begun = meta, 0
        if begun is None or (begun[0].name, begun[1]) != (part.name, part.start):
            raise ProtocolError(f"a part of {part.name[:80]!r} is out of order")
        meta, end = begun[0], part.start + part.length
        is_whole = end == meta.length
        if (part.dtype, part.shape) != (meta.dtype, meta.shape) or not (
            part.start < end < meta.length or is_whole
        ):
            raise ProtocolError(f"a part of {part.name!r} is not of the tensor that began")
        if len(part.digests) != DIGEST_BYTES * num_chunks(part.length) or (
            not is_whole and end % CHUNK_BYTES
        ):
            raise ProtocolError(f"a part of {part.name!r} is not cut at digest chunks")
        self._digests[part.name] += part.digests
        self._coming = None if is_whole else (meta, end)
        if is_whole:
            self._tensors.append(
                TensorMeta(
                    name=meta.name,
                    dtype=meta.dtype,
                    shape=meta.shape,
                    offset=0,
                    length=meta.length,
                    chunk_digests=self._digests[meta.name],
                )
            )

    def digest(self) -> str:
        """The version's.

        Raises:
            ProtocolError: a tensor is not whole yet.
        """
        if self._coming is not None:
            raise ProtocolError(f"the rest of {self._coming[0].name!r} never came")
        return version_digest(self._tensors)


def _meta(part: Part) -> TensorMeta:
    try:
        meta = TensorMeta(
            name=part.name, dtype=part.dtype, shape=part.shape, offset=0, length=whole_bytes(part)
        )
        check_tensor(meta)
    except (UsageError, ManifestError) as error:
        raise SourceError(f"tensor {part.name[:80]!r}: {error}") from error
    return meta


def check_arrived(bucket: Bucket, memory: torch.Tensor) -> None:
    """Check every chunk of a bucket, whose bytes `memory` holds.

    Raises:
        ProtocolError: a part lies where none can.
        VerificationError: one is not what was sent; names the tensor.
    """
    here = None if memory.is_cuda else memory.cpu().numpy().data
    for part in bucket.parts:
        start, end = part.offset, part.offset + part.length
        if start % ALIGNMENT_BYTES or end > bucket.length:
            raise ProtocolError(f"a part of {part.name!r} lies outside of its bucket")
        digests = (
            chunk_digests_there(memory[start:end])
            if here is None
            else chunk_digests(here[start:end])
        )
        if digests != part.digests:
            raise VerificationError(f"tensor {part.name!r}: bytes differ from what was sent")


def whole_tensors(bucket: Bucket, memory: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a bucket, as views of its memory."""
    for part in bucket.parts:
        yield part.name, view(part, memory[part.offset : part.offset + part.length])


def view(part: Part, data: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor as what they are.

    Raises:
        UsageError: torch has no such dtype.
    """
    shape = torch_shape(part.dtype, part.shape)
    return data.view(torch_dtype(part.dtype)).view(shape)
