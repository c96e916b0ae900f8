"""vLLM's worker: one rank of one engine, whose weights are replaced between two of its steps.

Names and shapes are compared, before the pause, with those of the version before: a tensor that
never comes would leave a mixture. A replacement that fails is followed by one with the version
before, before any forward pass. Of a checkpoint that drafts for itself (MTP), the draft model is
loaded from the same version. How a model's weights are replaced: `adapters.vllm_model`.

The way back is the version before, in staged memory or open files; before the first update it is
the folder that vLLM has loaded, if nobody has written into it since.

    adapter = VllmAdapter(target, turn, kept)       # inside a worker; imports vllm
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.config import set_current_vllm_config

from checkpoint_engine.adapters.base import Content, Identity
from checkpoint_engine.adapters.callback import CallbackAdapter, Kept
from checkpoint_engine.adapters.module import Watch
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.adapters.turn import Turn
from checkpoint_engine.adapters.vllm_model import (
    is_as_loaded,
    load_directly,
    load_layerwise,
    put_back,
)
from checkpoint_engine.errors import AdapterError, SourceError
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources import SafetensorsSource, safetensors_files
from checkpoint_engine.store import digest_in_place

__all__ = ["Target", "VllmAdapter"]


@dataclass(frozen=True)
class Target:
    """What one worker loads a version into, in vLLM's own objects.

    Attributes:
        rank: among the workers of one engine.
        models: each with its configuration; those after the first draft for it.
        unchanged_since_ns: a folder whose files are newer is not what vLLM has loaded.
        reloaded: called on the worker's thread after every reload.
    """

    vllm_config: Any
    rank: int
    models: tuple[tuple[Any, Any], ...]
    unchanged_since_ns: int
    reloaded: Callable[[], object]


class VllmAdapter(CallbackAdapter):
    """See the module's text; the methods are those of `adapters.base.Adapter`.

    Args:
        target: models that vLLM has loaded.
        turn: lends the worker's own thread, between `pause` and the end of the session.
        kept: what the adapter of this worker's last update remembered; None before the first.
    """

    def __init__(self, target: Target, turn: Turn, kept: Kept | None) -> None:
        super().__init__(lambda named: None, None, torch.device("cpu"), kept or Kept())
        self.identity = _identity(target)
        self._target, self._turn = target, turn
        self._is_first = kept is None

    def base(self) -> str | None:
        """Digest of what is served; before the first update that of the folder, read for it."""
        if self._is_first:
            self._served, self._is_first = _loaded_folder(self._target), False
        return super().base()

    def prepare(self, content: Content, version: Version) -> str:
        """While serving: verify the bytes, and that they are as many tensors of the same shapes.

        Raises:
            VerificationError, SourceError: the bytes are not the version's.
            AdapterError: the version does not fit the model.
        """
        way_back = super().prepare(content, version)
        if self._served is not None:
            _check_fits(content, self._served, _optional(self._target))
        return way_back

    def pause(self, timeout_seconds: float) -> None:
        """Wait for the worker's own thread, which is lent between two steps of the engine."""
        self._turn.take(timeout_seconds)

    def _load(self, content: Content, watch: Watch | None) -> None:
        assert watch is None, "each of several models is looked after by itself"
        self._loaded = True
        self._turn.do(lambda: self._reload(content))

    def _reload(self, content: Content) -> None:
        with set_current_vllm_config(self._target.vllm_config):
            for number, (model, config) in enumerate(self._target.models):
                put_back(model)
                if is_as_loaded(model, config):
                    load_directly(model, config, self._groups(content), is_draft=number > 0)
                else:
                    load_layerwise(model, config, content.tensors(), is_draft=number > 0)
        self._target.reloaded()


def _identity(target: Target) -> Identity:
    """Workers of one engine share their parent process."""
    world_size = target.vllm_config.parallel_config.world_size
    process = f"parent {os.getppid()}" if world_size > 1 else f"process {os.getpid()}"
    return Identity(
        replica=f"vllm {process} rank {target.rank}",
        engine=process,
        rank=target.rank,
        world_size=world_size,
    )


def _loaded_folder(target: Target) -> Content | None:
    """The files that vLLM has loaded, unless they may be others by now."""
    _, config = target.models[0]
    if target.vllm_config.load_config.load_format not in ("auto", "hf", "safetensors"):
        return None
    try:
        source = SafetensorsSource(safetensors_files(Path(config.model)))
    except SourceError:
        return None
    if max(file.modified_ns for file, _ in source.files.opened) > target.unchanged_since_ns:
        source.close()
        return None
    return Streamed(digest_in_place(source), source.files)


def _optional(target: Target) -> frozenset[str]:
    """A head that is tied to the embeddings may be there, or not."""
    _, config = target.models[0]
    tied = getattr(config.hf_text_config, "tie_word_embeddings", False)
    return frozenset(["lm_head.weight"] if tied else [])


def _check_fits(content: Content, served: Content, optional: frozenset[str]) -> None:
    new = {meta.name: meta.shape for meta in content.manifest.tensors}
    known = {meta.name: meta.shape for meta in served.manifest.tensors}
    for name in sorted((known.keys() ^ new.keys()) - optional):
        has = "lacks" if name in known else "has a tensor that the model does not know,"
        raise AdapterError(f"the version {has} {name!r}; nothing has changed, send a whole one")
    for name in sorted(known.keys() & new.keys()):
        if new[name] != known[name]:
            raise AdapterError(
                f"tensor {name!r} has shape {list(new[name])}, the model has {list(known[name])}"
            )
