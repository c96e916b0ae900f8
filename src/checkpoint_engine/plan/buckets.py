"""Which bytes travel together.

A bucket is a run of the flat byte space: the unit of transfer, of checking, of retry and of
pipelining. Buckets are cut only where digest chunks begin, so that whoever receives one can
check every chunk of it against the manifest without seeing the rest. A tensor larger than a
bucket is split; many small tensors share one.

    for bucket in plan_buckets(manifest, bucket_bytes=32 << 20):
        send(memory[bucket.offset : bucket.end])
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from checkpoint_engine.errors import UsageError
from checkpoint_engine.manifest import CHUNK_BYTES, DIGEST_BYTES, Manifest

__all__ = ["DEFAULT_BUCKET_BYTES", "Bucket", "Chunk", "plan_buckets", "plan_chunks"]

DEFAULT_BUCKET_BYTES = 32 << 20


class Chunk(msgspec.Struct, frozen=True):
    """Up to 4 MiB of one tensor, and the digest that the manifest promises (empty if none yet)."""

    offset: int
    length: int
    digest: bytes
    tensor: str


class Bucket(msgspec.Struct, frozen=True):
    """Bytes [offset, offset + length) of the flat space, which are exactly its chunks' and padding.

    `index` counts from 0 in the order of offsets.
    """

    index: int
    offset: int
    length: int
    chunks: tuple[Chunk, ...]

    @property
    def end(self) -> int:
        """The byte after the last."""
        return self.offset + self.length


def plan_chunks(manifest: Manifest) -> Iterator[Chunk]:
    """Every chunk once, in the order of offsets; the bytes of tied tensors are one chunk."""
    end = 0
    for tensor in manifest.tensors:
        if tensor.length == 0 or tensor.offset < end:
            continue
        end = tensor.end
        for number, start in enumerate(range(0, tensor.length, CHUNK_BYTES)):
            place = number * DIGEST_BYTES
            yield Chunk(
                tensor.offset + start,
                min(CHUNK_BYTES, tensor.length - start),
                tensor.chunk_digests[place : place + DIGEST_BYTES],
                tensor.name,
            )


def plan_buckets(
    manifest: Manifest, bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> tuple[Bucket, ...]:
    """Cut the flat byte space into buckets of at most `bucket_bytes`; every byte of every tensor
    is in exactly one.

    Raises:
        UsageError: `bucket_bytes` is smaller than one 4 MiB chunk.
    """
    if bucket_bytes < CHUNK_BYTES:
        raise UsageError(f"a bucket holds at least one chunk of {CHUNK_BYTES} bytes")
    buckets: list[Bucket] = []
    pending: list[Chunk] = []

    def close() -> None:
        start, last = pending[0].offset, pending[-1]
        length = last.offset + last.length - start
        buckets.append(Bucket(len(buckets), start, length, tuple(pending)))
        pending.clear()

    for chunk in plan_chunks(manifest):
        if pending and chunk.offset + chunk.length - pending[0].offset > bucket_bytes:
            close()
        pending.append(chunk)
    if pending:
        close()
    return tuple(buckets)
