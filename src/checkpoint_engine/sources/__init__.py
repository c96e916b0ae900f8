"""Sources of weights: files at rest, live tensors, and both at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from checkpoint_engine.plan.layout import TensorSpec, share
from checkpoint_engine.sources.base import Source
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.sources.safetensors import SafetensorsSource, safetensors_files
from checkpoint_engine.sources.tensors import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = [
    "JoinedSource",
    "SafetensorsSource",
    "Share",
    "Source",
    "TensorSource",
    "safetensors_files",
]


class JoinedSource:
    """Files and named tensors as one source; the tensors are read under their own names."""

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        named_tensors: Mapping[str, torch.Tensor],
    ) -> None:
        self._tensors = TensorSource(named_tensors)
        self._files = SafetensorsSource(files)
        self._named = set(named_tensors)

    @property
    def files(self) -> TensorFiles | None:
        """The files, unless there are tensors beside them."""
        return None if self._named else self._files.files

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of both; a name in both is refused when they are laid out."""
        return [*self._files.specs(), *self._tensors.specs()]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from whichever has the tensor."""
        (self._tensors if name in self._named else self._files).read_into(name, start, out)

    def close(self) -> None:
        """Close the files and let go of the tensors."""
        self._files.close()
        self._tensors.close()


class Share:
    """One rank's part of a source that every rank can read. Owns the source."""

    def __init__(self, source: Source, index: int, num_shares: int) -> None:
        self._source, self._index, self._num_shares = source, index, num_shares

    @property
    def files(self) -> TensorFiles | None:
        """Those of the whole source."""
        return self._source.files

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of this part."""
        return share(self._source.specs(), self._index, self._num_shares)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from the source."""
        self._source.read_into(name, start, out)

    def close(self) -> None:
        """Close the source."""
        self._source.close()
