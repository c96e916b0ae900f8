"""Digests of bytes in memory: xxh3-128 over chunks, spread over a few threads.

xxhash releases the interpreter lock, so threads add up until memory bandwidth is reached, which
two of them do on common hosts.

    with workers() as pool:
        digested = digest_tensors(tensors, memory, pool)
        wrong = first_mismatch(plan_chunks(manifest), memory, pool)
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor

import msgspec
import xxhash

from checkpoint_engine.manifest import CHUNK_BYTES, TensorMeta
from checkpoint_engine.plan.buckets import Chunk

__all__ = ["chunk_digest", "chunk_digests", "digest_tensors", "first_mismatch", "workers"]

Buffer = memoryview


def workers(num_threads: int | None = None) -> ThreadPoolExecutor:
    """Threads for work that is bound by memory: more than four gain nothing."""
    return ThreadPoolExecutor(
        num_threads or min(4, os.cpu_count() or 1), thread_name_prefix="ckpt-bytes"
    )


def chunk_digest(chunk: Buffer) -> bytes:
    """xxh3-128 of one chunk, 16 bytes."""
    return xxhash.xxh3_128_digest(chunk)


def chunk_digests(data: Buffer) -> bytes:
    """The digests of all 4 MiB chunks of a tensor's bytes, one after the other."""
    return b"".join(
        chunk_digest(data[start : start + CHUNK_BYTES])
        for start in range(0, len(data), CHUNK_BYTES)
    )


def digest_tensors(
    tensors: Sequence[TensorMeta], memory: Buffer, pool: Executor
) -> tuple[TensorMeta, ...]:
    """The tensors with their chunk digests, computed from `memory`, the flat byte space."""
    jobs = [
        [
            pool.submit(chunk_digest, memory[start : min(start + CHUNK_BYTES, tensor.end)])
            for start in range(tensor.offset, tensor.end, CHUNK_BYTES)
        ]
        for tensor in tensors
    ]
    return tuple(
        msgspec.structs.replace(tensor, chunk_digests=b"".join(job.result() for job in chunks))
        for tensor, chunks in zip(tensors, jobs, strict=True)
    )


def first_mismatch(chunks: Iterable[Chunk], memory: Buffer, pool: Executor) -> Chunk | None:
    """The first chunk whose bytes in `memory` are not what its digest promises, or None."""
    pending = [
        (chunk, pool.submit(chunk_digest, memory[chunk.offset : chunk.offset + chunk.length]))
        for chunk in chunks
    ]
    wrong = [chunk for chunk, job in pending if job.result() != chunk.digest]
    return wrong[0] if wrong else None
