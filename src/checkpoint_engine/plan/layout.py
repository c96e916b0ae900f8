"""Where the tensors of a version lie in its flat byte space.

Tensors are laid out by name, each at the next multiple of 256 bytes; tied names share the bytes
of the first of them. The order depends on names alone, so the same model always has the same
layout and a segment of store memory can be reused from version to version.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from checkpoint_engine.dtypes import num_bytes
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.manifest import TensorMeta, align

__all__ = ["TensorSpec", "lay_out"]


class TensorSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A tensor as its source announces it: safetensors dtype and shape, and all its names.

    `names` has more than one entry for tied tensors; bytes are read under the first.
    """

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]


def lay_out(specs: Iterable[TensorSpec]) -> tuple[TensorMeta, ...]:
    """Give every tensor its place; digests are still empty.

    Raises:
        SourceError: a name occurs twice, or a dtype is unknown.
    """
    tensors: list[TensorMeta] = []
    seen: set[str] = set()
    offset = 0
    for spec in sorted(specs, key=lambda spec: spec.names[0]):
        try:
            length = num_bytes(spec.dtype, spec.shape)
        except UsageError as error:
            raise SourceError(f"tensor {spec.names[0]!r}: {error}") from error
        for name in spec.names:
            if name in seen:
                raise SourceError(f"tensor {name!r} is given twice")
            seen.add(name)
            tensors.append(
                TensorMeta(
                    name=name, dtype=spec.dtype, shape=spec.shape, offset=offset, length=length
                )
            )
        offset = align(offset + length)
    return tuple(tensors)
