"""Weights of a model that peft trains with LoRA: merged, the base alone, or the adapters alone.

Merging never touches the model. Each layer is merged by peft's own code, in a twin of the layer
whose base weights are copies, one layer at a time; so there is nothing to restore, and the
optimizer sees nothing of it. To merge and unmerge in place would not give back the same bits.

    for name, tensor in merged_weights(model): ...    # a full model, as merge_and_unload makes it
    for name, tensor in base_weights(model): ...      # once, and then after every step:
    for name, tensor in adapter_weights(model, "default"): ...
    adapter_config(model, "default")                  # what adapter_config.json would hold

What sends a model is given the weights themselves: `GatheredSource(merged_weights_of(model))`.
peft is imported when it is first needed.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.sources.saved import as_saved
from checkpoint_engine.sources.training import (
    inner_model,
    named_weights,
    plain_name,
    state_of,
    tied_names,
    tied_weights,
    unwrapped,
)
from checkpoint_engine.sources.weight import Weight, identity_of, spec_of

__all__ = [
    "PREFIX",
    "BaseSeen",
    "adapter_config",
    "adapter_parameters",
    "adapter_weights",
    "adapter_weights_of",
    "base_weights",
    "base_weights_of",
    "merged_weights",
    "merged_weights_of",
]

PREFIX = "base_model.model."
MERGEABLE = ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d", "ParamWrapper")

State = dict[str, torch.Tensor]


def merged_weights(
    model: torch.nn.Module, *, adapters: Sequence[str] | None = None, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """The base with adapters merged, under the names of the base's checkpoint.

    Args:
        model: a model of peft's; FSDP2 may have sharded it.
        adapters: which to merge, in this order; default those that are active.
        options: `to`, `bucket_bytes` and `timeout_seconds` of `named_weights`.

    Raises:
        UsageError: this is no model with LoRA adapters, or has none of that name.
        SourceError: peft could not merge this either, or as `named_weights`.
        TransferError: as `named_weights`.
    """
    return named_weights(merged_weights_of(model, adapters), **options)


def base_weights(model: torch.nn.Module, **options: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The base without adapters; else as `merged_weights`."""
    return named_weights(base_weights_of(model), **options)


def adapter_weights(
    model: torch.nn.Module, adapter: str, **options: Any
) -> Iterator[tuple[str, torch.Tensor]]:
    """One adapter, under the names that it has in peft's files; else as `merged_weights`.

    Base weights of targeted embeddings, which peft saves beside them, belong to the base here.
    """
    return named_weights(adapter_weights_of(model, adapter), **options)


def adapter_config(model: torch.nn.Module, adapter: str) -> dict[str, Any]:
    """What peft writes into the adapter's adapter_config.json; JSON can express it."""
    found = {**_peft(model, [adapter]).peft_config[adapter].to_dict(), "inference_mode": True}
    return {
        key: sorted(value) if isinstance(value, (set, frozenset)) else value
        for key, value in found.items()
    }


def adapter_weights_of(model: torch.nn.Module, adapter: str) -> tuple[Weight, ...]:
    """What one adapter has to send."""
    tensors = adapter_parameters(model, adapter)
    return tuple(Weight.of((name,), tensor) for name, tensor in tensors.items())


def adapter_parameters(model: torch.nn.Module, adapter: str) -> State:
    """One adapter's live parameters, under the names that they have in peft's files."""
    from peft import get_peft_model_state_dict

    found = _peft(model, [adapter])
    state_of(found)  # has FSDP2 take back what a forward pass has left gathered
    # peft looks for the names of modules, which are not a state dict's where there are wrappers.
    state = dict(found.named_parameters(remove_duplicate=False)) | dict(found.named_buffers())
    tensors: State = get_peft_model_state_dict(
        found, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    return unwrapped(tensors)


def base_weights_of(model: torch.nn.Module) -> tuple[Weight, ...]:
    """What the base has to send, whatever adapters there are."""
    found = _peft(model, None)
    state, layers = _state(found), _layers(found)
    base = {
        name: tensor
        for name, tensor in _without_copies(found, state, active=None).items()
        if (layer := _layer_of(name, layers)) is None or _is_base(name, layer)
    }
    base = {_base_name(name): tensor for name, tensor in base.items()}
    weights = tied_weights(base, tied_names(found.get_base_model(), base))
    return as_saved(weights, found.get_base_model())


class BaseSeen:
    """A model's base as it is now, to be asked later whether it still is. Borrows its tensors.

    Torch counts what is done to a tensor in place, but neither what is written through `.data` nor
    all that optimizers do, fused ones or those of DTensors. So what is trained has always changed.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._seen = [(weakref.ref(one), _num_writes(one)) for one in _base_tensors(model)]

    def is_of(self, model: torch.nn.Module) -> bool:
        """Whether this model's base is of the same tensors, and none was written to since."""
        found = _base_tensors(model)
        return len(found) == len(self._seen) and all(
            known() is one and num_writes == _num_writes(one) and not one.requires_grad
            for one, (known, num_writes) in zip(found, self._seen, strict=True)
        )


def merged_weights_of(
    model: torch.nn.Module, adapters: Sequence[str] | None = None
) -> tuple[Weight, ...]:
    """What the merged model has to send."""
    found = _peft(model, adapters)
    active = list(found.active_adapters if adapters is None else adapters)
    state, layers = _state(found), _layers(found)
    _check_ties(state, layers, active)
    state = _without_copies(found, state, active=active)
    plain = {name: tensor for name, tensor in state.items() if _layer_of(name, layers) is None}
    weights = list(tied_weights(plain, tied_names(found.get_base_model(), plain)))
    for path, layer in layers.items():
        weights.append(_merged(path, layer, state, active))
    return as_saved(weights, found.get_base_model())


def _base_tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    """The tensors themselves, whatever is sent of them."""
    return [
        tensor
        for name, tensor in state_of(_peft(model, None)).items()
        if ".lora_" not in name and ".modules_to_save." not in name
    ]


def _num_writes(tensor: torch.Tensor) -> tuple[int, ...]:
    """A DTensor's own count is of what was done to all of it; its part has another."""
    if isinstance(tensor, DTensor):
        return tensor._version, tensor.to_local()._version
    return (tensor._version,)


def _peft(model: torch.nn.Module, adapters: Sequence[str] | None) -> Any:
    """The model of peft's within wrappers, if it has these adapters, and they are LoRA."""
    found: Any = inner_model(model)
    if not hasattr(found, "peft_config"):
        raise UsageError(f"a {type(found).__name__} is no model of peft's: wrap it first")
    if not hasattr(found, "get_base_model"):
        raise UsageError("pass the model that get_peft_model gave, not the base that it wraps")
    for name in found.active_adapters if adapters is None else adapters:
        if name not in found.peft_config:
            known = ", ".join(found.peft_config)
            raise UsageError(f"there is no adapter {name!r}; the model has {known}")
        kind = found.peft_config[name].peft_type
        if getattr(kind, "value", kind) != "LORA":
            raise UsageError(f"adapter {name!r} is of type {kind}: only LoRA can be sent")
    return found


def _state(model: Any) -> State:
    """By the names of the base model, with what peft has put into them."""
    return {name.removeprefix(PREFIX): tensor for name, tensor in state_of(model).items()}


def _layers(model: Any) -> dict[str, Any]:
    """The outermost layers with adapters, by name.

    Raises:
        SourceError: a layer is of a kind that is not merged here, or is merged already.
    """
    from peft.tuners import lora, trainable_tokens
    from peft.tuners.tuners_utils import BaseTunerLayer

    kinds = tuple(getattr(lora.layer, kind) for kind in MERGEABLE)
    layers: dict[str, Any] = {}
    for path, module in model.get_base_model().named_modules():
        name = plain_name(path)
        if isinstance(module, trainable_tokens.TrainableTokensLayer):
            raise SourceError(f"{name}: tokens that are trained one by one cannot be sent")
        if not isinstance(module, BaseTunerLayer) or _layer_of(name, layers) is not None:
            continue
        if _own_kind(module) not in kinds or _holds_more(module, BaseTunerLayer):
            raise SourceError(
                f"{name}: a {_own_kind(module).__name__} cannot be merged tensor by tensor; merge "
                "a copy of the model with merge_and_unload, and send that"
            )
        if module.merged:
            raise SourceError(f"{name}: its adapters are merged in place: call unmerge_adapter")
        layers[name] = module
    return layers


def _holds_more(layer: Any, kind: type) -> bool:
    """Whether layers with adapters are within the base of one."""
    return any(isinstance(inner, kind) for inner in layer.get_base_layer().modules())


def _layer_of(name: str, layers: Mapping[str, Any]) -> str | None:
    """The layer that a name leads into."""
    parts = name.split(".")
    heads = (".".join(parts[:count]) for count in range(1, len(parts)))
    return next((head for head in heads if head in layers), None)


def _without_copies(model: Any, state: State, active: Sequence[str] | None) -> State:
    """With one of the copies of each module that peft trains: an adapter's, else the original."""
    from peft.utils.other import ModulesToSaveWrapper

    found = dict(state)
    for path, module in model.get_base_model().named_modules():
        if not isinstance(module, ModulesToSaveWrapper):
            continue
        name = plain_name(path)
        used = [one for one in active or () if one in module.modules_to_save]
        kept = f"{name}.modules_to_save.{used[0]}." if used else f"{name}.original_module."
        if len(used) > 1:
            raise SourceError(f"{name}: adapters {used} each have a copy of it: merge one of them")
        for key in [key for key in found if key.startswith(f"{name}.")]:
            tensor = found.pop(key)
            if key.startswith(kept):
                found[f"{name}.{key.removeprefix(kept)}"] = tensor
    return found


def _check_ties(state: State, layers: Mapping[str, Any], active: Sequence[str]) -> None:
    """Raise SourceError if an adapter changes one of two weights that are tied."""
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(identity_of(name, tensor), []).append(name)
    for names in groups.values():
        changed = [path for name in names if (path := _layer_of(name, layers)) is not None]
        if len(names) > 1 and any(_has_adapter(layers[path], active) for path in changed):
            raise SourceError(
                f"{_base_name(names[0])!r} and {_base_name(names[1])!r} are tied, and an adapter "
                "changes one of them: untie them in trainer and engines, or adapt neither"
            )


def _has_adapter(layer: Any, active: Sequence[str]) -> bool:
    return any(name in active for name in (*layer.lora_A, *layer.lora_embedding_A))


def _merged(path: str, layer: Any, state: State, active: Sequence[str]) -> Weight:
    """A layer's base weights, as they are when they are merged."""
    parts = {
        name: tensor
        for name, tensor in state.items()
        if name.startswith(f"{path}.") and not _is_of_others(name[len(path) :], layer, active)
    }
    base = {_base_name(name): name for name in parts if _is_base(name, path)}
    specs = tuple(spec_of((name,), parts[part]) for name, part in base.items())
    for name, part in base.items():
        Weight.of((name,), parts[part])  # refuses what cannot be sent

    def make(tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        own = {
            id(part): torch.nn.Parameter(
                # What was gathered is a copy already.
                tensor.clone() if name in base.values() and tensor is part else tensor,
                requires_grad=False,
            )
            for (name, part), tensor in zip(parts.items(), tensors, strict=True)
        }
        merged = _unloaded(_twin(layer, own), active).state_dict()
        return [merged[name.removeprefix(f"{path}.")] for name in base]

    return Weight(specs, tuple(parts.values()), make)


def _is_base(name: str, path: str) -> bool:
    """Whether a tensor of a layer is its base's, and of no adapter that is nested in it."""
    rest = name.removeprefix(f"{path}.")
    return rest.startswith("base_layer.") and ".lora_" not in rest


def _is_of_others(name: str, layer: Any, active: Sequence[str]) -> bool:
    """Whether a tensor of a layer is an adapter's that is not to be merged."""
    others = {*layer.lora_A, *layer.lora_embedding_A} - set(active)
    return ".lora_" in name and not others.isdisjoint(name.split("."))


@torch.no_grad()
def _unloaded(layer: Any, active: Sequence[str]) -> torch.nn.Module:
    """A layer without its adapters, which are merged into it: as merge_and_unload does it."""
    adapters = list(active)
    try:
        if hasattr(layer, "unload_and_optionally_merge_module"):
            return layer.unload_and_optionally_merge_module(  # type: ignore[no-any-return]
                merge=True, safe_merge=False, adapter_names=adapters
            )
        layer.merge(adapter_names=adapters)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise SourceError(f"peft cannot merge this layer: {error}") from error
    return layer.get_base_layer()  # type: ignore[no-any-return]


def _twin(module: torch.nn.Module, own: Mapping[int, torch.nn.Parameter]) -> Any:
    """A module like another, with parameters of its own where there are any, and without hooks.

    A deep copy would copy every tensor and gradient first, and FSDP2 forbids it.
    """
    twin: Any = object.__new__(_own_kind(module))
    twin.__dict__ = {
        key: copy.copy(value) if isinstance(value, (dict, list)) else value
        for key, value in module.__dict__.items()
    }
    for key in twin.__dict__:
        if key.endswith("_hooks") and isinstance(twin.__dict__[key], dict):
            twin.__dict__[key] = OrderedDict()
    twin._parameters = {
        key: None if tensor is None else own.get(id(tensor), tensor)
        for key, tensor in module._parameters.items()
    }
    twin._modules = {
        key: None if inner is None else _twin(inner, own) for key, inner in module._modules.items()
    }
    return twin


def _own_kind(module: object) -> type:
    """A module's class without what fully_shard has put before it."""
    return type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)


def _base_name(name: str) -> str:
    """A name as it was before peft wrapped the layer."""
    return ".".join(part for part in name.split(".") if part != "base_layer")
