"""Weights as a checkpoint has them, where transformers keeps them otherwise in the model.

Since its version 5, transformers stacks experts and fuses or renames other weights when it loads a
model, and takes that back when it saves one. Engines load checkpoints, so what is sent is taken
back too: by transformers' own code, for as few weights at a time as depend on each other.

    weights = as_saved(weights, model)
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence

import torch

from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.sources.weight import Weight, spec_of

__all__ = ["as_saved"]

Convert = Callable[[Mapping[str, torch.Tensor]], Mapping[str, torch.Tensor]]


def as_saved(weights: Sequence[Weight], model: torch.nn.Module) -> tuple[Weight, ...]:
    """The weights of a model under the names, and in the shapes, that its checkpoint has.

    Raises:
        SourceError: transformers does not take this back piece by piece.
    """
    convert = _conversion(model)
    if convert is None:
        return tuple(weights)
    expected = _specs(convert, weights)
    if set(expected) == {spec.names[0] for weight in weights for spec in weight.specs}:
        return tuple(weights)
    converted = [_converted(convert, group) for group in _groups(convert, weights)]
    if {spec for weight in converted for spec in weight.specs} != set(expected.values()):
        raise SourceError(
            "transformers does not save this model weight by weight: send its state_dict(), whose "
            "names are the model's own"
        )
    return tuple(converted)


def _conversion(model: torch.nn.Module) -> Convert | None:
    """What transformers does to a state dict before it saves it; None if it does nothing."""
    if not hasattr(model, "all_tied_weights_keys"):  # no model of transformers 5
        return None
    revert = importlib.import_module("transformers.core_model_loading").revert_weight_conversion

    @torch.no_grad()
    def convert(state: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        found: Mapping[str, torch.Tensor] = revert(model, dict(state))
        return found

    return convert


def _groups(convert: Convert, weights: Sequence[Weight]) -> list[list[Weight]]:
    """Weights of which the same saved tensors are made."""
    groups: list[tuple[set[str], list[Weight]]] = []
    owners: dict[str, int] = {}
    for weight in weights:
        names = set(_specs(convert, [weight]))
        index = next((owners[name] for name in names if name in owners), len(groups))
        if index == len(groups):
            groups.append((set(), []))
        groups[index][1].append(weight)
        owners.update(dict.fromkeys(names, index))
    return [group for _, group in groups]


def _converted(convert: Convert, group: Sequence[Weight]) -> Weight:
    weight, specs = Weight.together(group), _specs(convert, group)
    names = [spec.names[0] for spec in weight.specs]
    if list(specs) == names:
        return weight

    def make(parts: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        saved = convert(dict(zip(names, weight.make(parts), strict=True)))
        return [saved[name] for name in specs]

    return Weight(tuple(specs.values()), weight.parts, make)


def _specs(convert: Convert, weights: Sequence[Weight]) -> dict[str, TensorSpec]:
    """What would be saved of these weights, by name."""
    try:
        state = {
            spec.names[0]: torch.empty(
                torch_shape(spec.dtype, spec.shape), dtype=torch_dtype(spec.dtype), device="meta"
            )
            for weight in weights
            for spec in weight.specs
        }
        saved = convert(state)
    except (AttributeError, KeyError, RuntimeError, TypeError, UsageError, ValueError) as error:
        raise SourceError(
            f"transformers cannot tell how it saves this model: {error}; send its state_dict(), "
            "whose names are the model's own"
        ) from error
    return {name: spec_of((name,), tensor) for name, tensor in saved.items()}
