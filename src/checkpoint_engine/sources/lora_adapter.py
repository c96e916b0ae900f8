"""LoRA adapters as sources: tensors, and the configuration that says what they mean.

Scale and targets are no less part of an adapter than its tensors, so the configuration is one of
them: bytes under the name of PEFT's file, digested and sent like every other. It is written the
same way whether it came from a file or an object, so that equal adapters have equal digests.

    source = LoraSource.of_folder("./adapter")                       # as PEFT has saved it
    source = LoraSource.of_tensors(dict(adapter_weights(model, "it")), adapter_config(model, "it"))
"""

from __future__ import annotations

import enum
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from checkpoint_engine.errors import MALFORMED, SourceError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.sources.base import Source
from checkpoint_engine.sources.safetensors import SafetensorsSource
from checkpoint_engine.sources.tensors import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["CONFIG_NAME", "TENSORS_NAME", "LoraSource", "encoded_config", "is_lora"]

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
MAX_CONFIG_BYTES = 1 << 20


class _Config(msgspec.Struct, frozen=True):
    """What every LoRA's configuration must say; the rest is the engine's to judge."""

    r: int
    lora_alpha: float
    target_modules: list[str] | str
    peft_type: str = "LORA"


def is_lora(manifest: Manifest | None) -> bool:
    """Whether a version is a LoRA adapter rather than a model's weights."""
    return manifest is not None and any(meta.name == CONFIG_NAME for meta in manifest.tensors)


class LoraSource:
    """See the module's text. Owns the tensors' source.

    Args:
        tensors: the adapter's, under PEFT's names.
        config: as in PEFT's file; sets and enumerations may stand for lists and texts.
        origin: what to call it in messages.

    Raises:
        SourceError: the configuration is not that of a LoRA adapter, or there are no tensors.
    """

    def __init__(self, tensors: Source, config: Mapping[str, Any], origin: str) -> None:
        self._tensors = tensors
        self._config = encoded_config(config, origin)
        if not tensors.specs():
            raise SourceError(f"{origin}: an adapter without tensors")

    @classmethod
    def of_folder(cls, folder: str | os.PathLike[str]) -> LoraSource:
        """What PEFT's `save_pretrained` has written.

        Raises:
            SourceError: a file is missing, unreadable, garbled or lying.
        """
        folder = Path(folder)
        if not (folder / TENSORS_NAME).exists():
            raise SourceError(
                f"{folder}: holds no {TENSORS_NAME}; save the adapter with safe_serialization=True"
            )
        tensors = SafetensorsSource([folder / TENSORS_NAME])
        try:
            return cls(tensors, _read_config(folder / CONFIG_NAME), str(folder))
        except BaseException:
            tensors.close()
            raise

    @classmethod
    def of_tensors(
        cls, named_tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | Any
    ) -> LoraSource:
        """Tensors on any device, and a mapping or PEFT's `LoraConfig`.

        Raises:
            SourceError: a value is no dense tensor, or the configuration not that of an adapter.
        """
        as_mapping = config if isinstance(config, Mapping) else config.to_dict()
        return cls(TensorSource(named_tensors), as_mapping, "the adapter")

    @property
    def files(self) -> None:
        """None: an adapter is always staged."""
        return None

    @property
    def on_gpu(self) -> bool:
        """Whether some of the tensors are on a GPU."""
        return self._tensors.on_gpu

    @property
    def freed_bytes(self) -> int:
        """None: the tensors stay where they are."""
        return 0

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors, and the configuration as one of bytes."""
        config = TensorSpec(names=(CONFIG_NAME,), dtype="U8", shape=(len(self._config),))
        return [*self._tensors.specs(), config]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` from the tensors or the configuration."""
        if name == CONFIG_NAME:
            out[:] = self._config[start : start + len(out)]
        else:
            self._tensors.read_into(name, start, out)

    def close(self) -> None:
        """Close the tensors' source."""
        self._tensors.close()


def _read_config(path: Path) -> dict[str, Any]:
    try:
        # A pipe would be waited for; not to block has no effect on a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > MAX_CONFIG_BYTES:
        raise SourceError(f"{path}: has more than the {MAX_CONFIG_BYTES} bytes allowed")
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except MALFORMED as error:
        raise SourceError(f"{path}: not the configuration of an adapter: {error}") from error


def encoded_config(config: Mapping[str, Any], origin: str = "the adapter") -> bytes:
    """A configuration as it is digested and sent.

    Raises:
        SourceError: it is not that of a LoRA adapter.
    """
    try:
        encoded = json.dumps(config, default=_plain, sort_keys=True, indent=1, allow_nan=False)
        known = msgspec.json.decode(encoded, type=_Config)
    except (TypeError, ValueError, RecursionError) as error:
        raise SourceError(f"{origin}: not the configuration of an adapter: {error}") from error
    if known.peft_type != "LORA" or known.r < 1:
        raise SourceError(f"{origin}: a {known.peft_type} of rank {known.r} is no LoRA adapter")
    return encoded.encode()


def _plain(value: object) -> object:
    """What PEFT's objects hold beside plain data; the order of a set means nothing."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    raise TypeError(f"{type(value).__name__} is no plain data")
