"""One version from the shards of many ranks.

Every rank registers some of the tensors in a flat byte space of its own. The version's byte space
is those spaces one after the other, as runs: a tensor that several ranks registered alike counts
once, so a run is a stretch of one shard without the tensors that another rank already gave.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from checkpoint_engine.errors import UsageError
from checkpoint_engine.manifest import Manifest, TensorMeta, align

__all__ = ["Run", "merge"]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes [offset, offset + length) of the version: those of a rank's shard from `start` on."""

    rank: int
    start: int
    offset: int
    length: int

    @property
    def end(self) -> int:
        """The byte after the last, in the version's space."""
        return self.offset + self.length


def merge(shards: Sequence[Manifest]) -> tuple[Manifest, tuple[Run, ...]]:
    """The version that the ranks' shards make together, and whose bytes lie where.

    Args:
        shards: by rank; an empty manifest for a rank that registered nothing.

    Raises:
        UsageError: two ranks registered one name with different content, or nobody anything.
    """
    merged: list[TensorMeta] = []
    runs: list[Run] = []
    owners: dict[str, tuple[int, TensorMeta]] = {}
    end = 0
    for rank, shard in enumerate(shards):
        for tensor in shard.tensors:
            if not _is_new(tensor, rank, owners):
                continue
            if not (runs and runs[-1].rank == rank and tensor.offset <= _shard_end(runs[-1])):
                runs.append(Run(rank=rank, start=tensor.offset, offset=end, length=0))
            run = runs[-1]
            end = max(end, run.offset + align(tensor.end) - run.start)
            runs[-1] = msgspec.structs.replace(run, length=end - run.offset)
            place = tensor.offset + run.offset - run.start
            merged.append(msgspec.structs.replace(tensor, offset=place))
    if not merged:
        raise UsageError("no rank registered any tensor; call register_checkpoint first")
    return Manifest.of(merged), tuple(run for run in runs if run.length)


def _shard_end(run: Run) -> int:
    return run.start + run.length


def _is_new(tensor: TensorMeta, rank: int, owners: dict[str, tuple[int, TensorMeta]]) -> bool:
    owner, first = owners.setdefault(tensor.name, (rank, tensor))
    if (first.dtype, first.shape, first.chunk_digests) != (
        tensor.dtype, tensor.shape, tensor.chunk_digests,
    ):  # fmt: skip
        raise UsageError(
            f"ranks {owner} and {rank} registered different tensors as {tensor.name!r}; "
            "every name must mean one tensor"
        )
    return owner == rank
