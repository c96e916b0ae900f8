"""Buckets made smaller on the way, where that pays.

Weights hardly compress: bf16 to 78 % at 0.3 GB/s a core, which gains only on a link slower than
0.1 GB/s. So a sample of each bucket is compressed first, and the bucket only if what it would save
on the link, at the rate that was seen there, takes longer than to compress it.

    compressor = Compressor()
    data = compressor.pack(data)            # the same tensor where it does not pay
    compressor.moved(num_bytes, seconds)    # what the link did
    unpack(packed, into=data)
"""

from __future__ import annotations

import time
from importlib import import_module
from typing import Any

import torch

from checkpoint_engine.errors import ProtocolError, UsageError

__all__ = ["COMPRESSIONS", "Compressor", "check_compression", "pays", "unpack"]

COMPRESSIONS = ("none", "zstd")
LEVEL = 1
SAMPLE_BYTES = 1 << 20
LEAST_BYTES = 64 << 10  # less than that is on its way sooner than this is thought about
MARGIN = 1.2


def check_compression(name: str) -> None:
    """Raise UsageError unless there is a compression of this name, and its library is here."""
    if name not in COMPRESSIONS:
        raise UsageError(f"compression={name!r}: there are {', '.join(COMPRESSIONS)}")
    if name == "zstd":
        _library()


def pays(
    sample_bytes: int, packed_bytes: int, pack_seconds: float, bytes_per_second: float
) -> bool:
    """Whether to compress takes less time than the link needs for what it saves."""
    return (sample_bytes - packed_bytes) / bytes_per_second > MARGIN * pack_seconds


class Compressor:
    """The sender's. Knows how fast the link was last."""

    def __init__(self) -> None:
        self._zstd = _library().ZstdCompressor(level=LEVEL)
        self._bytes_per_second = 0.0

    def moved(self, num_bytes: int, seconds: float) -> None:
        """Note that the link took so long."""
        if num_bytes >= LEAST_BYTES:
            self._bytes_per_second = num_bytes / seconds

    def pack(self, data: torch.Tensor) -> torch.Tensor:
        """The bytes compressed, or as they are: too few, of no pattern, or the link is too fast.

        The first bucket goes as it is, which tells how fast the link is.
        """
        if len(data) < LEAST_BYTES or not self._bytes_per_second:
            return data
        whole = data.numpy()
        middle = len(whole) // 2
        sample = whole[middle : middle + SAMPLE_BYTES]
        start = time.perf_counter()
        packed_bytes = len(self._zstd.compress(sample.data))
        seconds = time.perf_counter() - start
        if not pays(len(sample), packed_bytes, seconds, self._bytes_per_second):
            return data
        packed = bytearray(self._zstd.compress(whole.data))
        return torch.frombuffer(packed, dtype=torch.uint8) if len(packed) < len(data) else data


def unpack(packed: torch.Tensor, into: torch.Tensor) -> None:
    """Decompress a bucket into the memory of exactly its size.

    Raises:
        ProtocolError: it is not of that size, or no zstd at all.
    """
    library = _library()
    target = into.numpy()
    end = 0
    try:
        reader = library.ZstdDecompressor().stream_reader(packed.numpy().data)
        while end < len(target):
            num_read = reader.readinto(target[end:].data)
            if not num_read:
                break
            end += num_read
        is_over = not reader.read(1)
    except library.ZstdError as error:
        raise ProtocolError(f"a compressed bucket is malformed: {error}") from error
    if end != len(target) or not is_over:
        raise ProtocolError(f"a compressed bucket does not hold {len(target)} bytes")


def _library() -> Any:
    try:
        return import_module("zstandard")
    except ImportError as error:
        raise UsageError(
            'compression="zstd" needs the package zstandard: pip install "ckpt-engine[zstd]"'
        ) from error
