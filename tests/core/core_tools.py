"""What the tests of the core share: weights as plain bytes, and the recipe of their digest."""

from __future__ import annotations

import hashlib
import math
import os
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from msgspec.structs import replace

from checkpoint_engine.codec.digest import chunk_digests
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.plan.layout import TensorSpec, lay_out

TIMEOUT_SECONDS = 30.0
MIB = 1 << 20

# The documented dtypes of the safetensors format, and the bits of one value.
BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip

PROPERTY = settings(deadline=None, max_examples=100)


class Weight(NamedTuple):
    """A tensor as its bytes, row-major."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


Weights = Mapping[str, Weight]


def pattern(num_bytes: int, seed: int = 0) -> bytes:
    """Bytes that look random and are always the same."""
    return hashlib.shake_128(seed.to_bytes(8, "little")).digest(num_bytes)


def u8(num_bytes: int, seed: int = 0) -> Weight:
    return Weight("U8", (num_bytes,), pattern(num_bytes, seed))


class BytesSource:
    """A source of weights that are bytes already; `aliases` are the further names of tied ones."""

    def __init__(self, weights: Weights, aliases: Mapping[str, Sequence[str]] | None = None):
        self._weights, self._aliases = weights, aliases or {}
        self.on_gpu, self.files, self.freed_bytes = False, None, 0

    def specs(self) -> list[TensorSpec]:
        return [
            TensorSpec(
                names=(name, *self._aliases.get(name, ())), dtype=weight.dtype, shape=weight.shape
            )
            for name, weight in self._weights.items()
        ]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        out[:] = self._weights[name].data[start : start + len(out)]

    def close(self) -> None:
        pass


def digest_by_recipe(weights: Weights) -> str:
    """The version's digest as documented, without the code under test: right, not just stable."""
    version = hashlib.sha256(b"ckpt-engine version 1\n")
    for name, weight in sorted(weights.items(), key=lambda item: item[0].encode()):
        chunks = [weight.data[i : i + 4 * MIB] for i in range(0, len(weight.data), 4 * MIB)]
        tensor = xxhash.xxh3_128(b"".join(xxhash.xxh3_128(chunk).digest() for chunk in chunks))
        for text in (name.encode(), weight.dtype.encode()):
            version.update(struct.pack("<I", len(text)) + text)
        version.update(struct.pack("<I", len(weight.shape)))
        version.update(b"".join(struct.pack("<Q", dim) for dim in weight.shape))
        version.update(tensor.digest())
    return version.hexdigest()


def placed(source: BytesSource) -> tuple[Manifest, bytearray]:
    """A manifest and the flat byte space that it describes, without a store."""
    tensors = lay_out(source.specs())
    memory = bytearray(max((-(-tensor.end // 256) * 256 for tensor in tensors), default=0))
    readable = {name: spec.names[0] for spec in source.specs() for name in spec.names}
    digested = []
    for tensor in tensors:
        view = memoryview(memory)[tensor.offset : tensor.end]
        source.read_into(readable[tensor.name], 0, view)
        digested.append(replace(tensor, chunk_digests=chunk_digests(view)))
    return Manifest.of(digested), memory


def num_fds() -> int:
    """Open descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for what other threads and processes bring about."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.002)


class Background:
    """A call on a thread of its own; `result` waits for it and raises what it raised."""

    def __init__(self, call: Callable[[], object]) -> None:
        self._call = call
        self._value: object = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def result(self) -> object:
        self._thread.join(TIMEOUT_SECONDS)
        assert not self._thread.is_alive(), "the call did not return"
        if self._error is not None:
            raise self._error
        return self._value

    def is_done(self, within_seconds: float) -> bool:
        self._thread.join(within_seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@st.composite
def some_weight(draw: st.DrawFn) -> Weight:
    """A small tensor of any dtype and shape: scalars and empty ones too."""
    dtype = draw(st.sampled_from(sorted(BITS)))
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    if BITS[dtype] % 8:
        shape = (*shape, 4 * draw(st.integers(0, 2)))
    num_bytes = BITS[dtype] * math.prod(shape) // 8
    return Weight(dtype, shape, draw(st.binary(min_size=num_bytes, max_size=num_bytes)))


some_weights = st.dictionaries(names, some_weight(), max_size=6)
