"""Which bytes travel together.

A bucket is a run of the flat byte space: the unit of transfer, of checking, of retry and of
pipelining. Buckets are cut only where digest chunks begin, so that whoever receives one can
check every chunk of it against the manifest without seeing the rest. A tensor larger than a
bucket is split; many small tensors share one.

    for bucket in plan_buckets(manifest.chunks(), bucket_bytes=32 << 20):
        send(memory[bucket.offset : bucket.end])
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from checkpoint_engine.errors import UsageError
from checkpoint_engine.manifest import CHUNK_BYTES, Chunk

__all__ = ["DEFAULT_BUCKET_BYTES", "Bucket", "plan_buckets"]

DEFAULT_BUCKET_BYTES = 32 << 20


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


def plan_buckets(
    chunks: Iterable[Chunk], bucket_bytes: int = DEFAULT_BUCKET_BYTES
) -> tuple[Bucket, ...]:
    """Group chunks, sorted by offset, into buckets of at most `bucket_bytes`.

    Every byte of every tensor is in exactly one bucket.

    Raises:
        UsageError: `bucket_bytes` is smaller than one 4 MiB chunk.
    """
    if bucket_bytes < CHUNK_BYTES:
        raise UsageError(f"a bucket holds at least one chunk of {CHUNK_BYTES} bytes")
    buckets: list[Bucket] = []
    pending: list[Chunk] = []

    def close() -> None:
        start, last = pending[0].offset, pending[-1]
        length = last.end - start
        buckets.append(Bucket(len(buckets), start, length, tuple(pending)))
        pending.clear()

    for chunk in chunks:
        if pending and chunk.end - pending[0].offset > bucket_bytes:
            close()
        pending.append(chunk)
    if pending:
        close()
    return tuple(buckets)
