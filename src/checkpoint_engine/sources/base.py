"""Where new weights come from.

A source announces its tensors and reads their bytes straight into memory that someone else
owns. It makes no tensors on the way, and its reads may run on several threads at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.sources.files import TensorFiles

__all__ = ["Source"]


class Source(Protocol):
    """Weights at rest, or a trainer's live tensors.

    A source is closed by its user; after that no read may start.
    """

    @property
    def files(self) -> TensorFiles | None:
        """The open files that hold every tensor; None if one lies elsewhere."""
        ...

    @property
    def on_gpu(self) -> bool:
        """Whether some of it is read from a GPU's memory."""
        ...

    @property
    def freed_bytes(self) -> int:
        """How much of the host's memory is free again once all has been read."""
        ...

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors, each with all its names; raises SourceError where they contradict."""
        ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from byte `start` on; called from many threads.

        Raises:
            SourceError: the bytes are not there.
        """
        ...

    def close(self) -> None:
        """Let go of files and tensors; may be called twice."""
        ...
