"""A version that was received as tensors, in this process's own memory.

It needs nobody else: whoever sent it may die, and it may be the way back of the next version.

    held = Held({name: tensor.to("cpu", copy=True) for name, tensor in received})
    assert held.manifest.digest == announced.digest
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch

from checkpoint_engine.errors import VerificationError
from checkpoint_engine.manifest import TensorMeta
from checkpoint_engine.memory import Workers
from checkpoint_engine.sources.tensors import TensorSource
from checkpoint_engine.store import digest_in_place

__all__ = ["Held"]


class Held:
    """See the module's text; the methods are those of `adapters.base.Content`.

    Args:
        tensors: contiguous, in host memory, and nobody else's from here on.

    Attributes:
        manifest: what they are, digested when this is made.
    """

    way_back = "staged"

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)
        self.manifest = digest_in_place(TensorSource(self._tensors))

    def verify(self, pool: Workers) -> None:
        """Digest the bytes again.

        Raises:
            VerificationError: they are not what they were, or were let go of.
        """
        if digest_in_place(TensorSource(self._tensors)).digest != self.manifest.digest:
            raise VerificationError("the weights held here are not those that were received")

    def is_there(self) -> bool:
        """Whether they were not let go of."""
        return len(self._tensors) == len(self.manifest.tensors)

    def tensor(self, meta: TensorMeta) -> torch.Tensor:
        """The tensor itself."""
        return self._tensors[meta.name]

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All of them."""
        return iter(self._tensors.items())

    def chunk(self, meta: TensorMeta, start: int, end: int) -> Callable[[], memoryview]:
        """A view of bytes of a tensor."""
        flat = self._tensors[meta.name].reshape(-1).view(torch.uint8)
        view = flat[start:end].numpy().data
        return lambda: view

    def discard_writes(self) -> None:
        """Nothing: there is no other copy. `verify` says whether anybody has written."""

    def rest(self) -> None:
        """Nothing: what is kept is kept in memory."""

    def release(self) -> None:
        """Let go of the tensors."""
        self._tensors.clear()
