"""Sources of weights: files at rest, live tensors, both at once, and models in training.

What knows models in training is loaded when it is first used: torch's part for it takes seconds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from checkpoint_engine.lazy import names_from
from checkpoint_engine.plan.layout import TensorSpec, share
from checkpoint_engine.sources.base import Source
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.sources.lora_adapter import LoraSource
from checkpoint_engine.sources.safetensors import SafetensorsSource, safetensors_files
from checkpoint_engine.sources.tensors import TensorSource

if TYPE_CHECKING:
    import torch

    from checkpoint_engine.sources.gathered import GatheredSource
    from checkpoint_engine.sources.lora import (
        adapter_config,
        adapter_weights,
        adapter_weights_of,
        base_weights,
        base_weights_of,
        merged_weights,
        merged_weights_of,
    )
    from checkpoint_engine.sources.training import named_weights, weights_of
    from checkpoint_engine.sources.weight import Weight

__all__ = [
    "GatheredSource",
    "JoinedSource",
    "LoraSource",
    "SafetensorsSource",
    "Share",
    "Source",
    "TensorSource",
    "Weight",
    "adapter_config",
    "adapter_weights",
    "adapter_weights_of",
    "base_weights",
    "base_weights_of",
    "merged_weights",
    "merged_weights_of",
    "named_weights",
    "safetensors_files",
    "weights_of",
]

_HOMES = {
    "GatheredSource": "gathered",
    "Weight": "weight",
    "adapter_config": "lora",
    "adapter_weights": "lora",
    "adapter_weights_of": "lora",
    "base_weights": "lora",
    "base_weights_of": "lora",
    "merged_weights": "lora",
    "merged_weights_of": "lora",
    "named_weights": "training",
    "weights_of": "training",
}

__getattr__ = names_from(__name__, _HOMES)


class JoinedSource:
    """Files and named tensors as one source; the tensors are read under their own names.

    Of tensors that are sharded over ranks, this one keeps a share: see `GatheredSource`. With
    `take`, files in /dev/shm are taken over: see `sources.taken`.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        named_tensors: Mapping[str, torch.Tensor],
        *,
        take: bool = False,
    ) -> None:
        sharded = {name: one for name, one in named_tensors.items() if _is_sharded(one)}
        plain = {name: one for name, one in named_tensors.items() if name not in sharded}
        self._tensors, self._sharded = TensorSource(plain), _gathered(sharded)
        self._named, self._gathered = frozenset(plain), frozenset(sharded)
        self._files = SafetensorsSource(files, take=take)

    @property
    def files(self) -> TensorFiles | None:
        """The files, unless there are tensors beside them."""
        return None if self._named or self._gathered else self._files.files

    @property
    def on_gpu(self) -> bool:
        """Whether some of the tensors are on a GPU."""
        return self._tensors.on_gpu or (self._sharded is not None and self._sharded.on_gpu)

    @property
    def freed_bytes(self) -> int:
        """Of files that are taken over."""
        return self._files.freed_bytes

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of all; a name that is given twice is refused when they are laid out."""
        sharded = self._sharded.specs() if self._sharded else ()
        return [*self._files.specs(), *self._tensors.specs(), *sharded]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from whichever has the tensor."""
        if self._sharded and name in self._gathered:
            self._sharded.read_into(name, start, out)
        else:
            (self._tensors if name in self._named else self._files).read_into(name, start, out)

    def close(self) -> None:
        """Close the files and let go of the tensors; waits for ranks that gather with this one."""
        self._files.close()
        self._tensors.close()
        if self._sharded:
            self._sharded.close()


def _is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor: if so, its module has been loaded."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def _gathered(named_tensors: Mapping[str, torch.Tensor]) -> GatheredSource | None:
    if not named_tensors:
        return None
    from checkpoint_engine.sources.gathered import GatheredSource
    from checkpoint_engine.sources.training import weights_of

    return GatheredSource(weights_of(named_tensors, as_named=True))


class Share:
    """One rank's part of a source that every rank can read. Owns the source."""

    def __init__(self, source: Source, index: int, num_shares: int) -> None:
        self._source, self._index, self._num_shares = source, index, num_shares

    @property
    def files(self) -> TensorFiles | None:
        """Those of the whole source."""
        return self._source.files

    @property
    def on_gpu(self) -> bool:
        """Whether some of the whole source is."""
        return self._source.on_gpu

    @property
    def freed_bytes(self) -> int:
        """None: of files that are taken over, each is read by one rank."""
        return 0

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of this part."""
        return share(self._source.specs(), self._index, self._num_shares)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from the source."""
        self._source.read_into(name, start, out)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
