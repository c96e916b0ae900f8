"""One model of a vLLM worker: every weight of it replaced, or an error that says what was not.

Most often vLLM does not keep what it was given. It prepacks on a CPU, shuffles experts, quantises,
so that what is live has other shapes, or none, or others are derived from it. Then vLLM's own
layerwise reload does the work: each layer is put back to the shapes of a checkpoint, filled,
post-processed once, and copied to where it was. A model whose layers all run on what was loaded is
loaded directly: live parameters are written, keep their addresses, and no layer is there twice.

What vLLM does not see to, is seen to here:

- A layerwise reload that fails leaves layers without storage, and a forward pass on them kills the
  engine. Layers also keep what they were given so far, and would take it for part of the next
  reload. So every reload begins by putting such layers back.
- A layer keeps references to tensors until it is complete. Views of staged memory stay valid.
- A tensor that never comes leaves a layer as it was, or its memory as it is: a mixture. So layers
  are asked what they were given, and live parameters are watched (`adapters.module`).
- On a CPU, experts are prepacked by a kernel that is made once, and would go on with the old ones;
  so would a head that is tied to the embeddings, since nothing is loaded into it.

    with set_current_vllm_config(vllm_config):                      # on the worker's own thread
        put_back(model)
        if is_as_loaded(model, model_config):
            load_directly(model, model_config, groups)
        else:
            load_layerwise(model, model_config, tensors)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from vllm.model_executor.layers.attention import Attention, is_deferred_attention_layer
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import (
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
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

from checkpoint_engine.adapters.module import Watch
from checkpoint_engine.errors import AdapterError

__all__ = ["is_as_loaded", "load_directly", "load_layerwise", "put_back"]

Group = list[tuple[str, torch.Tensor]]

# What they make of weights after a load is made of live parameters alone, and made anew each time.
PLAIN_METHODS = (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)


def put_back(model: Any) -> None:
    """End what a reload that failed has begun, and the next would go on with."""
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()


def is_as_loaded(model: Any, model_config: Any) -> bool:
    """Whether a model that was put back runs on what its loader writes: if all its layers do."""
    return model_config.quantization is None and all(map(_is_as_loaded, model.modules()))


def load_directly(
    model: Any, model_config: Any, groups: Iterable[Group], *, is_draft: bool = False
) -> None:
    """Have vLLM's loader write over every weight of a model that `is_as_loaded`.

    Args:
        model: one that vLLM has loaded.
        model_config: vLLM's, of this model.
        groups: of whole tensors under the checkpoint's names; together they are the version.
        is_draft: names of the target are in the version, too, and it may share layers with it.

    Raises:
        AdapterError: a parameter was not written, or in part only; names it.
    """
    watch = Watch(model)
    with disable_mtp_completeness_check():
        for group in groups:
            with watch:
                watch.give(group)
                model.load_weights(group)
    if not is_draft:
        watch.check(_padded(model))
    for layer in model.modules():
        if is_deferred_attention_layer(layer):
            layer.process_weights_after_loading(model_config.dtype)
        else:
            _process(layer)


def load_layerwise(
    model: Any,
    model_config: Any,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    is_draft: bool = False,
) -> None:
    """Have every layer of a model that was put back made anew, whatever vLLM makes of it.

    A failure leaves a model that must not run before the next reload.

    Args:
        model: one that vLLM has loaded.
        model_config: vLLM's, of this model.
        tensors: the version; a layer holds those that it is given until it has all.
        is_draft: as for `load_directly`.

    Raises:
        AdapterError: a layer did not get all that it needs; names it.
    """
    if current_platform.is_cpu():
        for layer in model.modules():
            _forget_experts(layer)
    tied = _tied_layers(model)
    initialize_layerwise_reload(model)
    with disable_mtp_completeness_check():
        model.load_weights(tensors)
    if not is_draft and model_config.quantization is None:
        _check_complete(model, tied)
    finalize_layerwise_reload(model, model_config)
    if current_platform.is_cpu():
        for layer in tied:  # what was packed of the parameters that it shares, is of before
            _process(layer)


def _is_as_loaded(layer: torch.nn.Module) -> bool:
    """Whether a layer runs on what a loader writes into it: the kinds that are known to."""
    method = getattr(layer, "quant_method", None)
    if method is not None and type(method) not in PLAIN_METHODS:
        return False
    if hasattr(layer, "process_weights_after_loading") and type(layer) is not Attention:
        return False  # MLA, say, multiplies with matrices of its own making
    recorded, _ = get_layerwise_info(layer).restore_metadata
    own = dict(layer.named_parameters(recurse=False))
    return recorded.keys() == own.keys() - {"bias"} and all(  # vLLM does not record biases
        (own[name].shape, own[name].stride(), own[name].dtype)
        == (meta.shape, meta.stride(), meta.dtype)
        for name, meta in recorded.items()
    )


def _padded(model: torch.nn.Module) -> frozenset[str]:
    """Parameters with rows for which no checkpoint has a token."""
    return frozenset(
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, VocabParallelEmbedding)
    )


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


def _process(layer: torch.nn.Module) -> None:
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
