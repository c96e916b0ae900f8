"""vLLM's worker: one rank of one engine, whose weights are reloaded between two of its steps.

vLLM does not keep what it was given. It prepacks on a CPU, shuffles experts, fuses and shards, so
that what is live has other shapes, or none. So its own layerwise reload does the work: each layer
is put back to the shapes of a checkpoint, filled, post-processed once, and copied to where it was.

What it does not see to, is seen to here:

- A reload that fails half-way leaves layers without storage, and a forward pass on them kills the
  engine. Layers also keep what they were given so far, and would take it for part of the next
  reload. So a reload begins by putting such layers back, and one that fails is followed by one of
  the version before, before any forward pass.
- A layer keeps references to tensors until it is complete. Views of staged memory stay valid.
- A tensor that never comes leaves a layer as it was, or its memory as it is: a mixture. So names
  and shapes are compared before the pause with those of the version before, and layers are asked.
- On a CPU, experts are prepacked by a kernel that is made once, and would go on with the old ones;
  so would a head that is tied to the embeddings, since nothing is loaded into it.
- Of a checkpoint that drafts for itself (MTP), the draft model is loaded from the same version.

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
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)
from vllm.model_executor.model_loader.reload.layerwise import (
    _place_kernel_tensors,
    get_layerwise_info,
)
from vllm.platforms import current_platform

from checkpoint_engine.adapters.base import Content, Identity
from checkpoint_engine.adapters.callback import CallbackAdapter, Kept
from checkpoint_engine.adapters.module import Watch
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.adapters.turn import Turn
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
        assert watch is None, "vLLM's layers are asked what they were given, not watched"
        self._loaded = True
        self._turn.do(lambda: self._reload(content))

    def _reload(self, content: Content) -> None:
        with set_current_vllm_config(self._target.vllm_config):
            for number, (model, config) in enumerate(self._target.models):
                _reload_model(model, config, content, is_draft=number > 0)
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


def _reload_model(
    model: Any, model_config: Any, content: Content, *, is_draft: bool = False
) -> None:
    """Replace every weight; a failure leaves a model that must not run before the next reload."""
    for layer in model.modules():
        _put_back(layer)
        if current_platform.is_cpu():
            _forget_experts(layer)
    tied = _tied_layers(model)
    initialize_layerwise_reload(model)
    with disable_mtp_completeness_check():
        model.load_weights(content.tensors())
    if not is_draft and model_config.quantization is None:
        _check_complete(model, tied)
    finalize_layerwise_reload(model, model_config)
    if current_platform.is_cpu():
        for layer in tied:
            _pack_again(layer)


def _put_back(layer: torch.nn.Module) -> None:
    """End what a reload that failed has begun, and would go on with."""
    info = get_layerwise_info(layer)
    if info.can_load():
        _place_kernel_tensors(layer, info)
        info.reset()


def _forget_experts(layer: torch.nn.Module) -> None:
    """A kernel of experts holds weights of its own, and is made only where there is none."""
    method: Any = getattr(layer, "quant_method", None)
    if getattr(method, "moe_kernel", None) is not None:
        method.moe_kernel = None


def _tied_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Those whose parameters are all of layers before them, and are loaded there."""
    tied: list[torch.nn.Module] = []
    seen: set[torch.nn.Parameter] = set()
    for layer in model.modules():
        own = set(layer.parameters(recurse=False))
        if own and own <= seen:
            tied.append(layer)
        seen |= own
    return tied


def _pack_again(layer: torch.nn.Module) -> None:
    """What was packed from the parameters that it shares is of the version before."""
    method: Any = getattr(layer, "quant_method", None)
    if method is not None:
        method.process_weights_after_loading(layer)


def _check_complete(model: torch.nn.Module, tied: list[torch.nn.Module]) -> None:
    """Raise unless every parameter was given every element, but for padding of vocabularies."""
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer) or layer in tied:
            continue
        num_elements = sum(p.numel() for p in layer.parameters(recurse=False))
        is_padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        if info.load_numel < num_elements and not is_padded:
            raise AdapterError(
                f"layer {name!r} was given {info.load_numel} of {num_elements} elements: the "
                "version is not a whole one"
            )
