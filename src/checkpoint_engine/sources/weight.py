"""What is sent of a model in training, and what it is made of.

A weight of a checkpoint is most often a tensor of the model. It may also be made of several, when
its shards have been put together: a layer that adapters are merged into, a stack that is saved as
many tensors.

    weight = Weight.of(("lm_head.weight",), model.lm_head.weight)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.sources.sharded import check_sharding, local_part
from checkpoint_engine.sources.tensors import checked, identity

__all__ = ["Weight", "identity_of", "spec_of"]


@dataclass(frozen=True)
class Weight:
    """One or more tensors of a checkpoint, and the tensors of training that they are made of.

    Attributes:
        specs: what is made, each with all its names.
        parts: what it is made of; borrowed, and sharded or not.
        make: given the parts, put together, returns a tensor for each spec. It may write into
            those that were sharded, not into the others.
    """

    specs: tuple[TensorSpec, ...]
    parts: tuple[torch.Tensor, ...]
    make: Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]] = lambda parts: parts

    @classmethod
    def of(cls, names: tuple[str, ...], tensor: torch.Tensor) -> Weight:
        """A tensor as it is; raises SourceError if it has no bytes to send."""
        if isinstance(tensor, DTensor):
            check_sharding(names[0], tensor)
            return cls((spec_of(names, tensor),), (tensor,))
        return cls((spec_of(names, tensor),), (checked(names[0], tensor),))

    @classmethod
    def together(cls, weights: Sequence[Weight]) -> Weight:
        """Several as one, so that they are gathered and made at the same time."""
        if len(weights) == 1:
            return weights[0]

        def make(parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
            made: list[torch.Tensor] = []
            left = list(parts)
            for weight in weights:
                made += weight.make(left[: len(weight.parts)])
                del left[: len(weight.parts)]
            return made

        specs = tuple(spec for weight in weights for spec in weight.specs)
        return cls(specs, tuple(part for weight in weights for part in weight.parts), make)

    @property
    def num_bytes(self) -> int:
        """Of all parts, put together."""
        return sum(part.numel() * part.element_size() for part in self.parts)

    @property
    def meshes(self) -> tuple[DeviceMesh, ...]:
        """Over which its parts are sharded."""
        meshes = (part.device_mesh for part in self.parts if isinstance(part, DTensor))
        return tuple(dict.fromkeys(meshes))


def spec_of(names: tuple[str, ...], tensor: torch.Tensor) -> TensorSpec:
    """How a tensor is announced; raises SourceError if its dtype has no name."""
    try:
        dtype, shape = dtype_name(tensor)
    except UsageError as error:
        raise SourceError(f"tensor {names[0]!r}: {error}") from error
    return TensorSpec(names=names, dtype=dtype, shape=shape)


def identity_of(name: str, tensor: torch.Tensor) -> object:
    """Equal for tied tensors, on every rank alike: also where this rank's part is empty."""
    if not isinstance(tensor, DTensor):
        return identity(name, checked(name, tensor))
    part = checked(name, local_part(tensor))
    # An empty part of FSDP2's is padded, so its storage is one all the same.
    memory = part.untyped_storage().data_ptr() or id(tensor)
    layout = (part.storage_offset(), tuple(part.shape), tuple(part.stride()))
    return (memory, layout, tensor.dtype, tensor.shape, tensor.placements)
