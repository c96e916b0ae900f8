"""How a sampler's weights are written: in place, through a loader for a GPU's, or by itself.

A model that peft has wrapped is written to by the names that its base had before.

    adapter = weights_adapter(sampler)
    is_moved = places_of(sampler) != places    # then it is to be made anew
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch

from checkpoint_engine.adapters.attached import Base
from checkpoint_engine.adapters.base import Adapter, Content, Identity, Served
from checkpoint_engine.adapters.callback import CallbackAdapter, Kept
from checkpoint_engine.adapters.held import Held
from checkpoint_engine.adapters.live import check_fit, check_names
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import UsageError, VerificationError
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources.tensors import TensorSource
from checkpoint_engine.sources.training import inner_model, tensors_of
from checkpoint_engine.store import digest_in_place

__all__ = ["Sampler", "loads_by_itself", "module_of", "places_of", "weights_adapter"]

CPU = torch.device("cpu")


class Sampler(Protocol):
    """Who samples: see `CheckpointEngineMixin`, which has all of these."""

    model: Any

    def hold_requests(self, timeout_seconds: float) -> None:
        """Stop them, or raise DeadlineExceeded."""
        ...

    def release_requests(self) -> None:
        """Let them go on."""
        ...


class _Quiet:
    """The server around a model, whose requests the seats hold."""

    def accept(self, version: Version) -> None:
        """Any version."""

    def hold(self, timeout_seconds: float) -> None:
        """Held already."""

    def publish(self, version: Version, served: Served) -> None:
        """The seats are told."""

    def release(self) -> None:
        """Released afterwards."""

    def quarantine(self, reason: str) -> None:
        """The report says it."""

    def tear(self, reason: str) -> None:
        """Requests stay held."""


class _Loader:
    """Writes whole versions into a model that is not in host memory, and reads them back."""

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler

    def live(self) -> dict[str, torch.Tensor]:
        """By the names of the base, which peft's layers may have come around since."""
        return tensors_of(_base_of(self._sampler.model))

    def check(self, named: Mapping[str, torch.Tensor]) -> None:
        """Raise AdapterError unless these can be written."""
        live = self.live()
        check_names(named, live)
        for name, tensor in named.items():
            check_fit(name, tensor.shape, tensor.dtype, live[name])

    @torch.no_grad()
    def __call__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        live = self.live()
        for name, tensor in named:  # cast in host memory, where every value has one outcome
            live[name].copy_(tensor.to(live[name].dtype))
        for name, tensor in named:
            found = live[name].cpu()
            if not torch.equal(_bytes(found), _bytes(tensor.to(found.dtype))):
                raise VerificationError(f"{name!r} is live with other values than were sent")


class _LoadedAdapter(CallbackAdapter):
    """Of such a model: what does not fit is refused while requests go on."""

    def __init__(self, loader: _Loader) -> None:
        before = {name: tensor.to("cpu", copy=True) for name, tensor in loader.live().items()}
        super().__init__(loader, None, CPU, Kept(served=Held(before)))
        self._loader = loader

    def prepare(self, content: Content, version: Version) -> str:
        """As of any loader, and then see whether it fits."""
        way_back = super().prepare(content, version)
        self._loader.check(dict(content.tensors()))
        return way_back


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Of which, unlike of numbers, all are equal to themselves."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def loads_by_itself(sampler: Sampler) -> bool:
    """Whether it has a `load_weights`, so that no model of its is written to from here."""
    return hasattr(sampler, "load_weights")


def module_of(sampler: Sampler) -> torch.nn.Module | None:
    """A sampler's model without what peft has put around it; None if it loads by itself."""
    model = getattr(sampler, "model", None)
    if loads_by_itself(sampler) or not isinstance(model, torch.nn.Module):
        return None
    inner: Any = inner_model(model)
    return inner_model(inner.get_base_model() if hasattr(inner, "get_base_model") else inner)


def places_of(sampler: Sampler) -> dict[str, tuple[Any, ...]]:
    """Of what kind a sampler's tensors are, where they lie, and how often torch wrote to them."""
    if module_of(sampler) is None:
        return {}
    return {
        name: (
            tensor.data_ptr() if tensor.is_cpu else 0,
            tensor.device,
            tensor.dtype,
            tensor.shape,
            _content(tensor) if tensor.is_inference() else tensor._version,
        )
        for name, tensor in tensors_of(_base_of(sampler.model)).items()
    }


def _content(tensor: torch.Tensor) -> str:
    """Of a tensor made in inference mode, whose writes torch does not count."""
    return digest_in_place(TensorSource({"content": tensor})).digest


def weights_adapter(sampler: Sampler) -> Adapter:
    """What writes a version of the sampler's weights; borrows its tensors, if it has a model.

    Raises:
        UsageError: it has neither a model nor `load_weights`.
    """
    if loads_by_itself(sampler):
        load: Any = sampler
        return CallbackAdapter(load.load_weights, None, CPU, Kept())
    model = getattr(sampler, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            "a sampler has a torch module as `model`, or takes lists of (name, tensor) by a method "
            "`load_weights`"
        )
    tensors = tensors_of(model)
    if meta := [name for name, tensor in tensors.items() if tensor.is_meta]:
        raise UsageError(f"{meta[0]!r} of the sampler's model has no memory yet: it is on meta")
    if all(tensor.is_cpu for tensor in tensors.values()):
        identity = Identity(replica="sampler", engine="sampler")
        return TransformersAdapter(_base_of(model), identity, _Quiet())
    return _LoadedAdapter(_Loader(sampler))


def _base_of(model: torch.nn.Module) -> torch.nn.Module:
    inner = inner_model(model)
    return Base(inner) if hasattr(inner, "get_base_model") else inner
