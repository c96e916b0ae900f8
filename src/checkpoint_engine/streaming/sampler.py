"""A sampler's side of a sync: versions are received whole, and served when all samplers have them.

What is served is under `Seat`s: one for the model's weights, one for each adapter that is attached
to it. Each knows its version, and goes back to the one before if the transaction fails.

    side = SamplerSide(engine, sampler)
    report = side.sync()
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, cast

import msgspec
import torch

from checkpoint_engine.adapters.attached import AttachedAdapter, Base
from checkpoint_engine.adapters.base import Adapter, Content, Identity, Served
from checkpoint_engine.adapters.callback import CallbackAdapter, Kept
from checkpoint_engine.adapters.held import Held
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import (
    AdapterError,
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
    UpdateFailed,
    UpdateRefused,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.streaming.messages import with_sender
from checkpoint_engine.streaming.threads import blocking
from checkpoint_engine.streaming.transaction import sampler_name, take_part, withdraw
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import Report, decode, explain
from checkpoint_engine.update.session import Outcome

__all__ = ["Ending", "Order", "Sampler", "SamplerSide", "Seats", "raise_failed"]

CPU = torch.device("cpu")
WEIGHTS = ""  # their seat, beside those of adapters, which have names
PATIENCE = 4  # timeouts: all that happens between an order and its end has a deadline of its own


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """What was sent.

    Attributes:
        kind: "weights" of a whole model, "merged" with adapters, a "base" without, or an "adapter".
        version: what it is; of an adapter `parent` is the base that it is made for.
        adapter: its name; of a base, that of the adapter for which it is sent.
    """

    kind: str
    version: Version
    adapter: str = ""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a version ended; `more`: another comes in the same call."""

    report: Report | None = None
    error: RemoteError | None = None
    more: bool = False


class Sampler(Protocol):
    """Who samples: see `CheckpointEngineMixin`, which has all of these."""

    model: Any

    def hold_requests(self, timeout_seconds: float) -> None:
        """Stop them, or raise DeadlineExceeded."""
        ...

    def release_requests(self) -> None:
        """Let them go on."""
        ...


class SamplerSide:
    """This sampler's part in a stream that it has joined. Borrows all that it is given.

    Args:
        engine: has met the others.
        seats: what is served, which outlives this.
    """

    def __init__(self, engine: StreamingEngine, seats: Seats) -> None:
        self._engine, self._seats = engine, seats
        self._keys = engine.link.rendezvous.fork()
        self._timeout_seconds = engine.link.settings.timeout_seconds
        self._past: list[Rendezvous] = []

    def sync(self) -> Report:
        """Take what comes; returns how it went for all samplers.

        Raises:
            UpdateFailed: it is not served; what was served before is, by every sampler, or the
                report says otherwise.
        """
        while True:
            ending = self._one()
            if not ending.more:
                return raise_failed(ending)

    def close(self) -> None:
        """Leave."""
        self._keys.give_back()

    def _one(self) -> Ending:
        try:
            tensors = blocking(self._received())
        except CheckpointEngineError as error:
            raise UpdateFailed(f"nothing was changed: {error}") from error
        keys = self._scope()
        cause: CheckpointEngineError | None = None
        try:
            outcome = self._take(keys, tensors)
        except BaseException as error:
            with contextlib.suppress(PeerLost, DeadlineExceeded):
                withdraw(keys, error)
            if not isinstance(error, CheckpointEngineError):
                raise
            if isinstance(error, (PeerLost, DeadlineExceeded)):  # who would tell how it ended
                raise UpdateFailed(f"nothing was changed: {error}") from error
            cause = error  # before anything was offered
        try:
            with with_sender():
                ending: Ending = decode(keys.get("end", PATIENCE * self._timeout_seconds), Ending)
        except CheckpointEngineError as error:
            if cause is not None:
                raise UpdateFailed(f"nothing was changed: {cause}") from cause
            raise UpdateFailed(f"{outcome.state} here, and no more is known: {error}") from error
        return ending

    async def _received(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to("cpu", copy=True)
            async for name, tensor in self._engine.receive_weights()
        }

    def _take(self, keys: Rendezvous, tensors: dict[str, torch.Tensor]) -> Outcome:
        """Offer what was received to the transaction over all samplers."""
        held = Held(tensors)
        version = self._engine.version
        if version is None or version.digest != held.manifest.digest:
            raise VerificationError("what is held here is not what arrived: memory has changed it")
        with with_sender():
            order = decode(keys.get("order", PATIENCE * self._timeout_seconds), Order)
        seat = self._seats.seat(order, sampler_name(keys.rank))
        outcome: Outcome = seat.take(held, lambda adapter: take_part(keys, adapter))
        if outcome.state == "torn":
            self._seats.torn(order)
        return outcome

    def _scope(self) -> Rendezvous:
        keys = self._keys.scope(f"sync {self._engine.link.number}")
        self._past = [*self._past[-1:], keys]
        if len(self._past) > 1:
            self._past[0].clear()
        return keys


class Seats:
    """What a sampler serves: its weights, and the adapters on them.

    Attributes:
        version: of the weights that are served, None if none was received or they are torn.
        adapters: versions of those that are attached, by name.

    Raises:
        UsageError: the sampler has neither a model nor a loader.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._requests = _Requests(sampler)
        self._weights = Seat(_weights_adapter(sampler), self._requests)
        self._module, self._places = _module(sampler), _places(sampler)
        self._last_base: str | None = None
        self._attached: dict[str, Seat] = {}
        self.version: Version | None = None
        self.adapters: dict[str, Version] = {}

    def seat(self, order: Order, name: str) -> Seat:
        """Where a version of this kind goes; it may refuse it."""
        self._follow()
        seat = self._weights
        if order.kind == "adapter" and not hasattr(self._sampler, "load_weights"):
            if order.adapter not in self._attached:
                attached = AttachedAdapter(self._sampler, order.adapter, self._base)
                self._attached[order.adapter] = Seat(attached, self._requests)
            seat = self._attached[order.adapter]
        seat.adapter.identity = Identity(replica=name, engine=name)
        seat.refusal = self._refusal(order)
        seat.published = partial(self._published, order)
        return seat

    def _follow(self) -> None:
        """If the sampler has another model now, or its tensors lie elsewhere, write to those."""
        if (module := _module(self._sampler)) is not self._module:
            self._module, self._last_base = module, None
            self._attached, self.adapters = {}, {}
            self._requests.torn &= {WEIGHTS}
        elif _places(self._sampler) == self._places:
            return
        self._weights = Seat(_weights_adapter(self._sampler), self._requests)
        self._places, self.version = _places(self._sampler), None

    def _base(self) -> str | None:
        return self.version.digest if self.version else None

    def _refusal(self, order: Order) -> str:
        if order.kind == "adapter" and hasattr(self._sampler, "load_weights"):
            return (
                "this sampler loads weights by itself, and has no model to which an adapter could "
                "be attached; vLLM and SGLang take adapters by ParameterServer.update(lora=...)"
            )
        attached = [*self._all_attached(), *self._own()]
        if order.kind in ("weights", "merged") and attached:
            return (
                f"adapters are attached here ({', '.join(attached)}), and would be applied to what "
                "was merged: take them off by detach_adapter(name), or sync with "
                "merge_and_sync=False"
            )
        others = [name for name in self._on_another(order.version) if name != order.adapter]
        if order.kind == "base" and others:
            return (
                f"adapters are attached here ({', '.join(others)}) that are made for another base: "
                "take them off by detach_adapter(name) first"
            )
        return ""

    def _all_attached(self) -> list[str]:
        return sorted({*self.adapters, *self._requests.torn} - {WEIGHTS})

    def _own(self) -> list[str]:
        """The adapters that the sampler's model has, and that did not come from here."""
        if self._module is None or not hasattr(self._sampler.model, "get_base_model"):
            return []
        return sorted({*self._sampler.model.peft_config} - {*self._all_attached()})

    def _on_another(self, base: Version) -> list[str]:
        """The adapters that are not known to be for this base, if it is not served already.

        The sampler's own are for its first one.
        """
        if base.digest == self._base():
            return []
        known = [name for name, one in self.adapters.items() if one.parent == base.digest]
        own = [] if self._last_base in (None, base.digest) else self._own()
        return [name for name in (*self._all_attached(), *own) if name not in known]

    def _published(self, order: Order) -> None:
        """This is what is served now; requests wait still."""
        if order.kind == "adapter":
            self.adapters[order.adapter] = order.version
            self._requests.torn.discard(order.adapter)
            return
        if order.kind == "base":
            for name in self._on_another(order.version):  # until the one comes that is for it
                self._take_off(name)
        self.version, self._last_base = order.version, order.version.digest
        self._requests.torn.discard(WEIGHTS)

    def torn(self, order: Order) -> None:
        """What is served is no version; requests wait until it is mended."""
        if order.kind == "adapter":
            self.adapters.pop(order.adapter, None)
            self._requests.torn.add(order.adapter)
        else:
            self.version = None
            self._requests.torn.add(WEIGHTS)

    def detach(self, name: str) -> None:
        """Take an adapter off; one that is torn, too, and then requests go on.

        Raises:
            UsageError: there is none of that name.
        """
        names = [*self._all_attached(), *self._own()]
        if name not in names:
            raise UsageError(f"no adapter {name!r} is attached; there are {names}")
        self._take_off(name)
        self._requests.release()

    def _take_off(self, name: str) -> None:
        AttachedAdapter(self._sampler, name, self._base).detach()
        self._attached.pop(name, None)
        self.adapters.pop(name, None)
        self._requests.torn.discard(name)


class _Requests:
    """A sampler's.

    Attributes:
        torn: whose seats are; while there are any, requests are held.
    """

    def __init__(self, sampler: Sampler) -> None:
        self._sampler = sampler
        self._are_held = False
        self.torn: set[str] = set()

    def hold(self, timeout_seconds: float) -> None:
        """Stop them, unless they are."""
        if not self._are_held:
            self._sampler.hold_requests(timeout_seconds)
            self._are_held = True

    def release(self) -> None:
        """Let them go on, if they were held here and may."""
        if self._are_held and not self.torn:
            self._are_held = False  # even if this fails: who writes next is to hold them again
            self._sampler.release_requests()


class Seat:
    """An adapter, the version that it is to take, and the requests that wait meanwhile.

    What it does not say itself, its adapter does; together they are an `adapters.base.Adapter`.
    """

    def __init__(self, adapter: Adapter, requests: _Requests) -> None:
        self.adapter, self._requests = adapter, requests
        self.refusal = ""
        self.published: Callable[[], None] = lambda: None
        self._offered: Held | None = None
        self._served: Held | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.adapter, name)

    def take(self, held: Held, transact: Callable[[Adapter], Any]) -> Any:
        """Offer what was received to a transaction; it is released unless it is served."""
        self._offered = held
        try:
            outcome = transact(cast(Adapter, self))
        finally:
            self._offered = None
        if outcome.state == "published":
            before, self._served = self._served, held
            if before is not None:
                before.release()  # an adapter would keep it to return to it later
        return outcome

    def recall(self, digest: str) -> Content | None:
        """What was received is here already."""
        return self._offered

    def prepare(self, content: Content, version: Version) -> str:
        """Refuse what cannot be served here, else as the adapter."""
        if self.refusal:
            content.release()
            raise UpdateRefused(self.refusal)
        return self.adapter.prepare(content, version)

    def pause(self, timeout_seconds: float) -> None:
        """Stop requests."""
        self._requests.hold(timeout_seconds)
        self.adapter.pause(timeout_seconds)

    def publish(self) -> None:
        """It is what is served."""
        self.adapter.publish()
        self.published()

    def resume(self) -> None:
        """Let requests go on."""
        self.adapter.resume()
        self._requests.release()


class _Quiet:
    """The server around a model, whose requests a `Seat` holds."""

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

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model

    def live(self) -> dict[str, torch.Tensor]:
        """What the model has, by the names of its base."""
        found: dict[str, torch.Tensor] = _base_of(self._model).state_dict()
        return found

    @torch.no_grad()
    def __call__(self, named: list[tuple[str, torch.Tensor]]) -> None:
        live = self.live()
        given = {live[name].data_ptr() for name, _ in named if name in live}
        missing = [name for name, tensor in live.items() if tensor.data_ptr() not in given]
        for name, tensor in named:
            of_it = (tensor.shape, tensor.dtype)
            if name not in live or (live[name].shape, live[name].dtype) != of_it:
                raise AdapterError(
                    f"the model has no {name!r} of shape {list(tensor.shape)} and {tensor.dtype}"
                )
        if missing:
            raise AdapterError(f"the version lacks {missing[0]!r}")
        for name, tensor in named:
            live[name].copy_(tensor)
        for name, tensor in named:
            if not torch.equal(_bytes(live[name].cpu()), _bytes(tensor)):
                raise VerificationError(f"{name!r} is live with other values than were sent")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Of which, unlike of numbers, all are equal to themselves."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _module(sampler: Sampler) -> torch.nn.Module | None:
    """A sampler's model without what peft has put around it; None if it loads by itself."""
    model = getattr(sampler, "model", None)
    if hasattr(sampler, "load_weights") or not isinstance(model, torch.nn.Module):
        return None
    base: Any = getattr(model, "get_base_model", lambda: model)
    return cast(torch.nn.Module, base())


def _places(sampler: Sampler) -> dict[str, tuple[Any, ...]]:
    """Of what kind the tensors of a sampler's base are, and where those that are written to lie."""
    if _module(sampler) is None:
        return {}
    return {
        name: (tensor.data_ptr() if tensor.is_cpu else 0, tensor.device, tensor.dtype, tensor.shape)
        for name, tensor in _base_of(sampler.model).state_dict().items()
    }


def _weights_adapter(sampler: Sampler) -> Adapter:
    load = getattr(sampler, "load_weights", None)
    identity = Identity(replica="sampler", engine="sampler")
    if load is not None:
        return CallbackAdapter(load, None, CPU, Kept())
    model = getattr(sampler, "model", None)
    if not isinstance(model, torch.nn.Module):
        raise UsageError(
            "a sampler has a torch module as `model`, or takes lists of (name, tensor) by a method "
            "`load_weights`"
        )
    if all(tensor.is_cpu for tensor in model.state_dict().values()):
        return TransformersAdapter(_base_of(model), identity, _Quiet())
    loader = _Loader(model)
    before = Held({name: one.to("cpu", copy=True) for name, one in loader.live().items()})
    return CallbackAdapter(loader, None, CPU, Kept(served=before))


def _base_of(model: torch.nn.Module) -> torch.nn.Module:
    return Base(model) if hasattr(model, "get_base_model") else model


def raise_failed(ending: Ending) -> Report:
    """The report of a version that is served; raises UpdateFailed of one that is not."""
    report = ending.report
    if report is None:
        raise UpdateFailed(ending.error.message if ending.error else "it ended without a report")
    if report.outcome != "published":
        raise UpdateFailed(explain(report), report)
    return report
