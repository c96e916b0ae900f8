"""LoRA adapters on a torch model, which peft attaches under their names.

Each is a version of its own: staged, attached, digested where it lies, and taken off again if the
transaction fails. It is made for one base, and refused by whoever serves another. What was there
under the name before is copied first, and is the way back.

    attached = AttachedAdapter(host, "tenant-1", base=lambda: digest)
    with host.model.disable_adapter(): ...
    host.model.set_adapter("tenant-1")
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from checkpoint_engine.adapters.base import Content, Identity, Served
from checkpoint_engine.errors import AdapterError, UpdateRefused, VerificationError
from checkpoint_engine.manifest import Version
from checkpoint_engine.memory import IdleWorkers
from checkpoint_engine.sources.lora import PREFIX, adapter_config, adapter_parameters
from checkpoint_engine.sources.lora_adapter import CONFIG_NAME, encoded_config
from checkpoint_engine.sources.tensors import TensorSource
from checkpoint_engine.sources.training import plain_name, tensors_of
from checkpoint_engine.store import digest_in_place

__all__ = ["AttachedAdapter", "Base", "Host", "LacksBase", "config_tensor"]

Tensors = dict[str, torch.Tensor]


class LacksBase(UpdateRefused):
    """The adapter is made for another base than is served here."""


class Host(Protocol):
    """Whoever has the model; `model` is replaced by peft's around it, and back.

    Attributes:
        model: what serves.
    """

    model: Any


def config_tensor(model: torch.nn.Module, adapter: str) -> torch.Tensor:
    """An adapter's configuration as a tensor of bytes, to be sent under `CONFIG_NAME`."""
    encoded = encoded_config(adapter_config(model, adapter))
    return torch.frombuffer(bytearray(encoded), dtype=torch.uint8)


@dataclass(frozen=True)
class _Use:
    """Which adapters a model samples with."""

    active: tuple[str, ...]
    is_enabled: bool = True


class Base(torch.nn.Module):
    """A model without its adapters: the names that its base had before peft wrapped it.

    Borrows the model's tensors.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self._found = [model]  # not a submodule, whose names would be this one's

    def state_dict(self, *_: Any, **__: Any) -> Any:
        """The base's tensors by its own names."""
        return dict(self._plain(tensors_of(self._found[0]).items()))

    def named_buffers(self, *_: Any, **options: Any) -> Any:
        """The base's buffers by its own names."""
        return self._plain(self._found[0].named_buffers(**options))

    @staticmethod
    def _plain(pairs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in pairs:
            if ".lora_" in name or ".modules_to_save." in name:
                continue
            parts = plain_name(name).removeprefix(PREFIX).split(".")
            yield ".".join(p for p in parts if p not in ("base_layer", "original_module")), tensor


class AttachedAdapter:
    """See the module's text; the methods are those of `adapters.base.Adapter`.

    Requests must wait between `pause` and `resume`, which is its caller's affair.

    Args:
        host: has the model.
        name: of the adapter.
        base: digest of the base that is served, None if it is no version.
    """

    def __init__(self, host: Host, name: str, base: Callable[[], str | None]) -> None:
        self.identity = Identity(replica=name, engine=name)
        self.epoch = 0
        self.undecided: str | None = None
        self._host, self._name, self._base = host, name, base
        self._incoming: Content | None = None
        self._config = torch.empty(0, dtype=torch.uint8)
        self._served: str | None = None
        self._before: tuple[Tensors, torch.Tensor, str] | None = None
        self._use = _Use((name,))
        self._changed = False

    def base(self) -> str | None:
        """Digest of what is attached, None if nothing is that came from here."""
        return self._served

    def recall(self, digest: str) -> Content | None:
        """None: no version is kept but the one attached."""
        return None

    def prepare(self, content: Content, version: Version) -> str:
        """Verify, and copy what is attached now.

        Raises:
            LacksBase: it is made for another base.
            AdapterError: this is no adapter.
        """
        self._incoming = content
        if version.parent != self._base():
            raise LacksBase(f"{version.label!r} is made for another base than is served here")
        with IdleWorkers() as pool:
            content.verify(pool)
        tensors = dict(content.tensors())
        if CONFIG_NAME not in tensors:
            raise AdapterError(f"{version.label!r} has no {CONFIG_NAME}: it is no adapter")
        _settings(tensors[CONFIG_NAME])  # which is to fail before requests wait
        self._before = self._copied()
        if self._before is not None:
            _settings(self._before[1])  # the way back is to be one
        return "snapshot"

    def abort(self) -> None:
        """Release what was staged."""
        if self._incoming is not None:
            self._incoming.release()
        self._incoming = self._before = None
        self._changed = False

    def pause(self, timeout_seconds: float) -> None:
        """Nothing: see the class."""

    def apply(self) -> None:
        """Attach the staged adapter.

        Raises:
            AdapterError: it does not fit the model.
        """
        assert self._incoming is not None, "prepare comes before apply"
        tensors = dict(self._incoming.tensors())
        config = tensors.pop(CONFIG_NAME)
        self._use = self._used()
        self._changed = True
        self._attach(tensors, config)

    def check(self) -> Served:
        """Digest what is attached.

        Raises:
            VerificationError: it is not what was sent.
        """
        assert self._incoming is not None, "prepare comes before check"
        digest = self._digest()
        if digest != self._incoming.manifest.digest:
            raise VerificationError(
                f"adapter {self._name!r} is attached with other bytes than sent"
            )
        return Served(digest=digest, served_digest=digest)

    def publish(self) -> None:
        """What is attached is the version."""
        assert self._incoming is not None, "prepare comes before publish"
        self._served = self._incoming.manifest.digest
        self.abort()

    def roll_back(self) -> None:
        """Attach what was attached before, or take the adapter off.

        Raises:
            VerificationError: what is attached is not what it was.
        """
        if self._changed:
            if self._before is None:
                self.detach()  # what there is of it
                self._sample_as_before()
            else:
                tensors, config, digest = self._before
                self._attach(tensors, config)
                if self._digest() != digest:
                    raise VerificationError(f"adapter {self._name!r} is not what it was before")
        self.abort()

    def resume(self) -> None:
        """Nothing: see the class."""

    def quarantine(self, reason: str) -> None:
        """Nothing: the other adapters are none the worse."""

    def tear(self, reason: str) -> None:
        """What is attached is of no version."""
        self._served = None
        self.abort()

    def _peft(self) -> Any:
        """The model of peft's, None while there is none."""
        model = self._host.model
        return model if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else None

    def _has(self) -> bool:
        model = self._peft()
        return model is not None and self._name in model.peft_config

    def _live(self) -> Tensors:
        live = adapter_parameters(self._peft(), self._name)
        tensors = {name: tensor.detach() for name, tensor in live.items()}
        if self._served is None and not self._changed:  # it was there before anything was sent
            self._config = config_tensor(self._peft(), self._name)
        return tensors

    def _digest(self) -> str:
        found = {**self._live(), CONFIG_NAME: self._config}
        return digest_in_place(TensorSource(found)).digest

    def _copied(self) -> tuple[Tensors, torch.Tensor, str] | None:
        if not self._has():
            return None
        copies = {name: tensor.clone() for name, tensor in self._live().items()}
        return copies, self._config, self._digest()

    def _attach(self, tensors: Tensors, config: torch.Tensor) -> None:
        from peft import PeftModel

        kind = _settings(config)
        was_training = self._host.model.training
        if self._has() and not torch.equal(self._config, config):
            self.detach()  # another rank or other layers: its tensors are others
        with torch.random.fork_rng(devices=[]):  # what peft begins with is drawn, and not wanted
            if self._peft() is None:
                _unwrap(self._host.model)
                self._host.model = PeftModel(
                    self._host.model, kind, self._name, autocast_adapter_dtype=False
                )
            elif not self._has():
                self._peft().add_adapter(self._name, kind, autocast_adapter_dtype=False)
        self._config = config.clone()
        self._load(tensors)
        self._sample_as_before()
        self._host.model.train(was_training)

    def _used(self) -> _Use:
        from peft.tuners.tuners_utils import BaseTunerLayer

        model = self._peft()
        if model is None:
            return _Use((self._name,))
        layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
        return _Use(
            tuple(model.active_adapters), is_enabled=not any(one.disable_adapters for one in layers)
        )

    def _sample_as_before(self) -> None:
        """Whatever peft has made active meanwhile; a first adapter is."""
        model = self._peft()
        if model is None:
            return
        model.base_model.set_adapter([one for one in self._use.active if one in model.peft_config])
        if not self._use.is_enabled:
            model.base_model.disable_adapter_layers()

    def _load(self, tensors: Tensors) -> None:
        """Give the adapter's parameters copies of these tensors, dtypes included."""
        live = adapter_parameters(self._peft(), self._name)
        if wrong := sorted(live.keys() ^ tensors.keys()):
            raise AdapterError(
                f"adapter {self._name!r} does not fit the model: only one of them has {wrong[0]!r}"
            )
        for name, tensor in tensors.items():
            if live[name].shape != tensor.shape:
                raise AdapterError(
                    f"adapter {self._name!r}: {name!r} has shape {list(tensor.shape)}, the model "
                    f"{list(live[name].shape)}"
                )
        for name, tensor in tensors.items():
            live[name].data = tensor.to(live[name].device, copy=True)

    def detach(self) -> None:
        """Take it off; the model is as it was before peft wrapped it if there is no other."""
        model = self._peft()
        if model is None:
            _unwrap(self._host.model)
            return
        others = [name for name in model.peft_config if name != self._name]
        if not others:
            if self._has():  # else peft leaves the modules that it has trained in the base
                model.delete_adapter(self._name)
            self._host.model = model.unload()
            return
        active = [name for name in model.active_adapters if name != self._name]
        model.base_model.set_adapter(active or others[:1])
        if self._has():
            model.delete_adapter(self._name)


def _settings(config: torch.Tensor) -> Any:
    """What peft makes of an adapter's configuration.

    Raises:
        AdapterError: it can make nothing of it, or the adapter has parameters of the base.
    """
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise AdapterError(
            f"this sampler cannot attach adapters: {error}; pip install 'ckpt-engine[lora]'"
        ) from error
    try:
        settings = json.loads(config.numpy().tobytes())
        kind: Any = PeftConfig.from_peft_type(**settings)  # type: ignore[no-untyped-call]
    except (KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"peft here can make nothing of {CONFIG_NAME}: {error}") from error
    if (bias := getattr(kind, "bias", "none")) != "none":
        raise AdapterError(
            f"the adapter is trained with bias={bias!r}: biases are the base's, which adapters "
            "share; sync it with merge_and_sync=True"
        )
    kind.init_lora_weights = False  # PiSSA and its like begin by writing to the base
    return kind


def _unwrap(model: torch.nn.Module) -> None:
    """Take out layers that peft has put in before it failed; the base's own are within them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in tuple(model.modules()):
        for name, layer in tuple(module.named_children()):
            if isinstance(layer, BaseTunerLayer):
                setattr(module, name, layer.get_base_layer())
