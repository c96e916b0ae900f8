"""Where the tensors of a version lie in its flat byte space.

Tensors are laid out by name, each at the next multiple of 256 bytes; tied names share the bytes
of the first of them. The order depends on names alone, so the same model always has the same
layout and a segment of store memory can be reused from version to version.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from checkpoint_engine.dtypes import num_bytes
from checkpoint_engine.errors import ManifestError, SourceError, UsageError
from checkpoint_engine.manifest import TensorMeta, align, check_tensor

__all__ = ["TensorSpec", "lay_out", "place", "share"]


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
        for name in spec.names:
            if name in seen:
                raise SourceError(f"tensor {name!r} is given twice")
            seen.add(name)
            tensors.append(place(spec, name, offset))
        offset = align(tensors[-1].end)
    return tuple(tensors)


def place(spec: TensorSpec, name: str, offset: int) -> TensorMeta:
    """One tensor at its place, not yet digested; raises SourceError if it cannot be."""
    try:
        length = num_bytes(spec.dtype, spec.shape)
        tensor = TensorMeta(
            name=name, dtype=spec.dtype, shape=spec.shape, offset=offset, length=length
        )
        check_tensor(tensor)
    except (UsageError, ManifestError) as error:
        raise SourceError(f"tensor {name[:80]!r}: {error}") from error
    return tensor


def share(specs: Sequence[TensorSpec], index: int, num_shares: int) -> list[TensorSpec]:
    """One of `num_shares` parts of about equal bytes: a run of the tensors in their order.

    Together the shares are all tensors, each once.
    """
    total_bytes = sum(num_bytes(spec.dtype, spec.shape) for spec in specs)
    taken, seen_bytes = [], 0
    for spec in specs:
        # A tensor belongs to the share in which its first byte falls.
        if min(num_shares - 1, seen_bytes * num_shares // max(1, total_bytes)) == index:
            taken.append(spec)
        seen_bytes += num_bytes(spec.dtype, spec.shape)
    return taken
