"""Digests of bytes in memory: xxh3-128 over chunks, spread over a few threads.

xxhash releases the interpreter lock, so threads add up until memory bandwidth is reached, which
two of them do on common hosts.

    with IdleWorkers() as pool:
        wrong = first_mismatch(manifest.chunks(), staged.memory, pool)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import xxhash

from checkpoint_engine.errors import VerificationError
from checkpoint_engine.manifest import CHUNK_BYTES, Chunk
from checkpoint_engine.memory import Workers
from checkpoint_engine.plan.buckets import Bucket, plan_buckets

__all__ = [
    "PIECE_BYTES",
    "check_bucket",
    "chunk_digest",
    "chunk_digests",
    "digest_pieces",
    "first_mismatch",
    "piece_bytes",
]

PIECE_BYTES = 512 << 10  # stays in a core's own cache between being written and being digested
FEW_THREADS = 4


def chunk_digest(chunk: memoryview) -> bytes:
    """xxh3-128 of one chunk, 16 bytes."""
    return xxhash.xxh3_128_digest(chunk)


def piece_bytes(num_threads: int) -> int:
    """How much of a chunk so many threads should each write before they digest it.

    Many of them lose more by waiting for the interpreter between pieces than cache gives.
    """
    return PIECE_BYTES if num_threads <= FEW_THREADS else CHUNK_BYTES


def digest_pieces(pieces: Iterable[memoryview]) -> bytes:
    """xxh3-128 of a chunk whose pieces are written one by one as they are asked for."""
    digest = xxhash.xxh3_128()
    for piece in pieces:
        digest.update(piece)
    return digest.digest()


def chunk_digests(data: memoryview) -> bytes:
    """The digests of all 4 MiB chunks of one tensor's bytes, one after the other."""
    return b"".join(
        chunk_digest(data[start : start + CHUNK_BYTES])
        for start in range(0, len(data), CHUNK_BYTES)
    )


def first_mismatch(
    chunks: Iterable[Chunk], memory: Callable[[int, int], memoryview], pool: Workers
) -> Chunk | None:
    """The first chunk whose bytes break the promise of its digest, or None.

    `memory(start, end)` gives the bytes of that range of the flat byte space.
    """

    def is_wrong(group: Sequence[Chunk]) -> Chunk | None:
        for chunk in group:
            if chunk_digest(memory(chunk.offset, chunk.end)) != chunk.digest:
                return chunk
        return None

    groups = [bucket.chunks for bucket in plan_buckets(chunks, bucket_bytes=2 * CHUNK_BYTES)]
    return next((chunk for chunk in pool.map(is_wrong, groups) if chunk is not None), None)


def check_bucket(bucket: Bucket, memory: memoryview, where: str) -> None:
    """Check every chunk of a bucket, whose bytes `memory` holds.

    Raises:
        VerificationError: one breaks the promise of its digest; names the tensor and `where`.
    """
    for chunk in bucket.chunks:
        start = chunk.offset - bucket.offset
        if chunk_digest(memory[start : start + chunk.length]) != chunk.digest:
            raise VerificationError(
                f"tensor {chunk.tensor!r}: bytes differ from the manifest {where}"
            )
