"""Whether two sets of weights are the same: by digests, or element by element.

Replicas are known by the digests of their live tensors. A checkpoint's tensors are read chunk by
chunk, and digested as the replica would have them: cast to its dtypes, under its names. Two
checkpoints are compared by their elements. No more than two chunks are in memory at a time.

    expected = Checkpoint(source).as_served(replica)             # digests
    changes = compare_digests(expected, replica.tensors)
    changes = compare_elements(old_source, new_source)           # how much each tensor changed
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal

import msgspec
import torch
import xxhash

from checkpoint_engine.codec.digest import chunk_digest
from checkpoint_engine.dtypes import num_bytes, torch_dtype
from checkpoint_engine.errors import UsageError
from checkpoint_engine.manifest import CHUNK_BYTES, TensorMeta
from checkpoint_engine.sources.base import Source

__all__ = [
    "Change",
    "Checkpoint",
    "TensorDigest",
    "WeightDigests",
    "compare_digests",
    "compare_elements",
    "sample_names",
]

CASTABLE = frozenset({"F32", "BF16", "F16"})  # what an update casts into each other
PIECE_BYTES = 256 << 10  # widened to float64 it stays in cache, which is twice as fast
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NO_NUMBERS = frozenset({"F4", "F6_E2M3", "F6_E3M2"})  # torch has no arithmetic for these

Kind = Literal["only in A", "only in B", "dtype", "shape", "changed", "equal"]


class TensorDigest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tensor of a replica or checkpoint.

    Attributes:
        digest: `TensorMeta.digest` in hex; None if it was not in the sample.
        tied: the other names of the same tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    digest: str | None
    tied: tuple[str, ...] = ()

    @classmethod
    def of(cls, meta: TensorMeta, *, tied: tuple[str, ...], digested: bool) -> TensorDigest:
        """The entry for a tensor that has its chunk digests, if it is `digested`."""
        digest = meta.digest.hex() if digested else None
        return cls(name=meta.name, dtype=meta.dtype, shape=meta.shape, digest=digest, tied=tied)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return num_bytes(self.dtype, self.shape)


class WeightDigests(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica answers at `/weight_digests`.

    Attributes:
        weight_version: label of the version served.
        digest: the version digest over the tensors that were digested.
        tensors: every name of the state dict, in order, digested or not.
        not_persistent: buffers that a checkpoint may hold and an update leaves alone.
    """

    weight_version: str | None
    digest: str
    tensors: tuple[TensorDigest, ...]
    not_persistent: tuple[str, ...] = ()

    @property
    def digested(self) -> list[TensorDigest]:
        """The tensors that were digested, tied ones once."""
        return [
            tensor
            for tensor in self.tensors
            if tensor.digest is not None and tensor.name <= min(tensor.tied, default=tensor.name)
        ]


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one tensor from A to B.

    Attributes:
        num_bytes: of the larger one.
        note: dtypes or shapes, where these differ.
        changed_share: elements whose bits differ, from 0 to 1; None where only digests are known.
        max_difference: largest absolute difference of an element, as float64.
        relative_l2: norm of the difference over the norm of A, infinite where A is zero.
    """

    name: str
    kind: Kind
    num_bytes: int
    note: str = ""
    changed_share: float | None = None
    max_difference: float | None = None
    relative_l2: float | None = None


def sample_names(metas: Iterable[TensorMeta], share: float, seed: int) -> frozenset[str]:
    """Tensors with about this share of the bytes, at least one; a function of names and sizes.

    Raises:
        UsageError: the share is not above 0 and up to 1.
    """
    if not 0 < share <= 1:
        raise UsageError(f"a sample is a share above 0 and up to 1, not {share:g}")
    ordered = sorted(metas, key=lambda meta: xxhash.xxh3_128_digest(f"{seed} {meta.name}".encode()))
    wanted_bytes = share * sum(meta.length for meta in ordered)
    chosen, chosen_bytes = set(), 0
    for meta in ordered:
        if share < 1 and chosen_bytes >= wanted_bytes:
            break
        chosen.add(meta.name)
        chosen_bytes += meta.length
    return frozenset(chosen)


class Checkpoint:
    """A checkpoint's digests, each computed when it is first asked for. Borrows the source."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self._tensors = _tensors(source)
        self._digests: dict[tuple[str, str], str] = {}

    def as_served(self, replica: WeightDigests) -> list[TensorDigest]:
        """The tensors that `replica` would list after an update to this checkpoint.

        Names that the checkpoint lacks are left out, unless the replica ties them to one that it
        has. Names that the replica lacks are kept, unless it leaves them alone.
        """
        served = []
        for live in replica.tensors:
            names = [name for name in (live.name, *live.tied) if name in self._tensors]
            if names:
                served.append(self._as_served(live, self._tensors[names[0]]))
        left = set(self._tensors) - {live.name for live in replica.tensors}
        left -= set(replica.not_persistent)
        return [*served, *(self._tensors[name] for name in sorted(left))]

    def _as_served(self, live: TensorDigest, tensor: TensorDigest) -> TensorDigest:
        cast = {tensor.dtype, live.dtype} <= CASTABLE
        dtype = live.dtype if cast else tensor.dtype
        fits = (dtype, tensor.shape) == (live.dtype, live.shape)
        digest = self._digest(tensor, dtype) if fits and live.digest is not None else None
        return TensorDigest(name=live.name, dtype=dtype, shape=tensor.shape, digest=digest)

    def _digest(self, tensor: TensorDigest, dtype: str) -> str:
        key = (tensor.name, dtype)
        if key not in self._digests:
            chunks = _read_as(self._source, tensor, dtype)
            digests = b"".join(chunk_digest(chunk.numpy().data) for chunk in chunks)
            self._digests[key] = xxhash.xxh3_128_hexdigest(digests)
        return self._digests[key]


def compare_digests(a: Iterable[TensorDigest], b: Iterable[TensorDigest]) -> list[Change]:
    """Every name of either, in order; a tensor that one has not digested counts as equal."""

    def settle(old: TensorDigest, new: TensorDigest) -> Change:
        changed = None not in (old.digest, new.digest) and old.digest != new.digest
        return Change(
            name=old.name, kind="changed" if changed else "equal", num_bytes=new.num_bytes
        )

    return list(_compare({t.name: t for t in a}, {t.name: t for t in b}, settle))


def compare_elements(a: Source, b: Source) -> Iterator[Change]:
    """Every name of either, in order; yields each when its tensors have been read.

    Raises:
        SourceError: a file cannot be read.
    """
    return _compare(_tensors(a), _tensors(b), lambda tensor, _: _measure(a, b, tensor))


def _compare(
    a: Mapping[str, TensorDigest],
    b: Mapping[str, TensorDigest],
    settle: Callable[[TensorDigest, TensorDigest], Change],
) -> Iterator[Change]:
    """Settle what is told by names, dtypes and shapes; the rest is left to `settle`."""
    for name in sorted({*a, *b}):
        old, new = a.get(name), b.get(name)
        if old is None or new is None:
            only = new or old
            assert only is not None
            kind: Kind = "only in B" if old is None else "only in A"
            yield Change(name=name, kind=kind, num_bytes=only.num_bytes, note=_about(only))
        elif (old.dtype, old.shape) != (new.dtype, new.shape):
            yield Change(
                name=name,
                kind="shape" if old.shape != new.shape else "dtype",
                num_bytes=max(old.num_bytes, new.num_bytes),
                note=f"{_about(old)} to {_about(new)}",
            )
        else:
            yield settle(old, new)


def _measure(a: Source, b: Source, tensor: TensorDigest) -> Change:
    """Compare the elements of two tensors of one name, dtype and shape."""

    def pieces(piece_bytes: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(_read(a, tensor, piece_bytes), _read(b, tensor, piece_bytes), strict=True)

    num_bytes = tensor.num_bytes
    if all(torch.equal(old, new) for old, new in pieces(CHUNK_BYTES)):
        return Change(name=tensor.name, kind="equal", num_bytes=num_bytes)
    if tensor.dtype in NO_NUMBERS:
        return Change(name=tensor.name, kind="changed", num_bytes=num_bytes)
    dtype = torch_dtype(tensor.dtype)
    bits = BITS[dtype.itemsize]
    num_changed, largest = 0, torch.zeros((), dtype=torch.float64)
    squares, base_squares = torch.zeros_like(largest), torch.zeros_like(largest)
    for old, new in pieces(PIECE_BYTES):
        differs = old.view(bits) != new.view(bits)
        before, after = _wide(old.view(dtype)), _wide(new.view(dtype))
        difference = (after - before).abs().masked_fill(~differs, 0.0)  # so that inf equals inf
        num_changed += int(differs.sum())
        largest = torch.maximum(largest, difference.max())
        squares += difference.square().sum()
        base_squares += before.abs().square().sum()
    norm, base_norm = float(squares.sqrt()), float(base_squares.sqrt())
    return Change(
        name=tensor.name,
        kind="changed",
        num_bytes=num_bytes,
        changed_share=num_changed * dtype.itemsize / num_bytes,
        max_difference=float(largest),
        relative_l2=norm / base_norm if base_norm else (math.inf if norm else 0.0),
    )


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def _tensors(source: Source) -> dict[str, TensorDigest]:
    """What a source announces, under every name; not digested."""
    return {
        name: TensorDigest(name=name, dtype=spec.dtype, shape=spec.shape, digest=None)
        for spec in source.specs()
        for name in spec.names
    }


def _read(source: Source, tensor: TensorDigest, piece_bytes: int) -> Iterator[torch.Tensor]:
    """The tensor's bytes in pieces, each valid until the next."""
    buffer = torch.empty(min(piece_bytes, tensor.num_bytes), dtype=torch.uint8)
    for start in range(0, tensor.num_bytes, piece_bytes):
        piece = buffer[: tensor.num_bytes - start]
        source.read_into(tensor.name, start, piece.numpy().data)
        yield piece


def _read_as(source: Source, tensor: TensorDigest, dtype: str) -> Iterator[torch.Tensor]:
    """The bytes of the tensor as `dtype`, in chunks of 4 MiB, each valid until the next."""
    if dtype == tensor.dtype:
        yield from _read(source, tensor, CHUNK_BYTES)
        return
    old, new = torch_dtype(tensor.dtype), torch_dtype(dtype)
    for piece in _read(source, tensor, CHUNK_BYTES // new.itemsize * old.itemsize):
        yield piece.view(old).to(new).view(torch.uint8)


def _about(tensor: TensorDigest) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
