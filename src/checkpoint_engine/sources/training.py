"""Weights of a model in training, under the names that its checkpoint has.

Wrappers leave no trace in the names, tied weights are sent once, and buffers that are not
persistent stay where they are. Tensors that are sharded over ranks are gathered a bucket at a
time, so that no rank ever holds the whole model, and to one rank, unless all need them.

    for name, tensor in named_weights(model):  # on every rank, in step
        ...                                    # runs on rank 0 alone
"""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES
from checkpoint_engine.sources.saved import as_saved
from checkpoint_engine.sources.sharded import agree, gather, ranks_of
from checkpoint_engine.sources.weight import Weight, identity_of

__all__ = [
    "Keeper", "kept", "named_weights", "own_rank", "plain_name", "share_out", "stream",
    "tensors_of", "weights_of",
]  # fmt: skip

TIMEOUT_SECONDS = 600.0

WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module"}
"""What torch.compile and activation checkpointing put into names; FSDP2 puts nothing."""

Keeper = Callable[[int, tuple[int, ...]], "int | None"]
"""Who gets bucket number n, whose tensors lie on these ranks: a rank, or None for all of them."""


@dataclass(frozen=True)
class Bucket:
    """Weights that are gathered together; all their parts lie on the same meshes."""

    weights: tuple[Weight, ...]
    meshes: tuple[DeviceMesh, ...]


def named_weights(
    source: torch.nn.Module | Mapping[str, torch.Tensor] | Sequence[Weight],
    *,
    to: int | None = 0,
    bucket_bytes: int = DEFAULT_BUCKET_BYTES,
    timeout_seconds: float = TIMEOUT_SECONDS,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The full tensors of a model, one after the other.

    Every rank that holds a part of the model iterates to the end, whether it gets tensors or not:
    gathering is collective. Sharded tensors are put together in new memory, a bucket at a time:
    at most twice `bucket_bytes` of it, or twice the largest tensor, is in use. Others are the live
    tensors themselves, detached: nobody may write into them, and they change when training goes on.

    With pipeline parallelism each stage sends its own: `to` must be a rank of the stage.

    Args:
        source: the model, or its state dict, or what `weights_of` made of it.
        to: global rank that gets the tensors, the others get none; None for all ranks.
        bucket_bytes: full tensors that are gathered at once.
        timeout_seconds: for each message, and for a rank that is late.

    Raises:
        SourceError: a tensor cannot be sent, what should be tied is not, or ranks disagree.
        TransferError: a rank died, failed, or did not come in time.
    """
    weights = source if isinstance(source, Sequence) else weights_of(source)
    for bucket in stream(weights, lambda *_: to, bucket_bytes, timeout_seconds):
        while bucket:
            weight, tensors = bucket.pop(0)
            for spec, tensor in zip(weight.specs, tensors, strict=True):
                yield spec.names[0], tensor
            del tensors, tensor


def weights_of(
    source: torch.nn.Module | Mapping[str, torch.Tensor], *, as_named: bool = False
) -> tuple[Weight, ...]:
    """What a model, or its state dict, has to send.

    Args:
        source: the model, or its state dict.
        as_named: whether a state dict's names stay as they are, tied ones under all their names;
            else those of wrappers go, and tied weights have one.

    Raises:
        SourceError: a tensor cannot be sent, or what the model declares as tied is not.
    """
    if isinstance(source, torch.nn.Module):
        state = state_of(source)
        weights = tied_weights(state, tied_names(source, state))
        return weights if as_named else as_saved(weights, inner_model(source))
    return tied_weights(dict(source) if as_named else unwrapped(source), (), as_named=as_named)


def tied_weights(
    state: Mapping[str, torch.Tensor], tied: Collection[str], *, as_named: bool = False
) -> tuple[Weight, ...]:
    """Every tensor once; else as `weights_of`.

    Args:
        state: by the names that they are to have.
        tied: which of these a checkpoint leaves out, since they are tied to others.
        as_named: as for `weights_of`.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in state.items():
        groups.setdefault(identity_of(name, tensor), []).append(name)
    check_tied(groups.values(), tied)
    return tuple(
        Weight.of(
            tuple(sorted(names)) if as_named else (checkpoint_name(names, tied),),
            state[names[0]],
        )
        for names in groups.values()
    )


def stream(
    weights: Sequence[Weight], keeper: Keeper, bucket_bytes: int, timeout_seconds: float
) -> Iterator[list[tuple[Weight, Sequence[torch.Tensor]]]]:
    """Buckets of weights with their tensors, where the keeper is this rank; else nothing.

    Whoever takes a bucket owns the list: what it removes is freed.

    Raises:
        SourceError, TransferError: as `named_weights`.
    """
    if bucket_bytes < 1:
        raise UsageError("a bucket has at least one byte")
    buckets = _buckets(weights, bucket_bytes)
    meshes = tuple(dict.fromkeys(mesh for bucket in buckets for mesh in bucket.meshes))
    for mesh in meshes:
        digest = _digest(weight for weight in weights if mesh in weight.meshes)
        agree(mesh, digest, timeout_seconds=timeout_seconds)
    for index, bucket in enumerate(buckets):
        keeping = keeper(index, _common_ranks(bucket.meshes))
        made = _gathered(bucket, keeping, timeout_seconds)
        if made is not None:
            yield made
        del made
    for mesh in meshes:  # a rank that was not waited for hears here that another has failed
        agree(mesh, b"end", timeout_seconds=timeout_seconds)


def share_out(index: int, ranks: tuple[int, ...]) -> int | None:
    """The keeper by which ranks get buckets in turn, and what is not sharded each for itself."""
    return ranks[index % len(ranks)] if ranks else None


def kept(weights: Sequence[Weight], keeper: Keeper, bucket_bytes: int) -> list[Weight]:
    """The weights of which `stream` gives this rank the tensors."""
    return [
        weight
        for index, bucket in enumerate(_buckets(weights, bucket_bytes))
        if keeper(index, _common_ranks(bucket.meshes)) in (None, own_rank())
        for weight in bucket.weights
    ]


def inner_model(module: torch.nn.Module) -> torch.nn.Module:
    """The model within what wraps all of it: by torch.compile, or as DistributedDataParallel does.

    That one has all of its tensors in one part, `module`.
    """
    while True:
        parts = {name: part for name, part in module.named_children() if _has_tensors(part)}
        if len(parts) != 1 or not {"_orig_mod", "module"} & parts.keys():
            return module
        if _has_tensors(module, recurse=False):
            return module
        (module,) = parts.values()


def _has_tensors(module: torch.nn.Module, *, recurse: bool = True) -> bool:
    tensors = itertools.chain(module.parameters(recurse), module.buffers(recurse))
    return next(tensors, None) is not None


def tensors_of(module: torch.nn.Module, *, keep_vars: bool = False) -> dict[str, torch.Tensor]:
    """A module's parameters and persistent buffers by name; what else it keeps is no weight."""
    state = module.state_dict(keep_vars=keep_vars)
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and persistent buffers, by their names in its checkpoint."""
    if any(type(part).__name__ == "FullyShardedDataParallel" for part in module.modules()):
        raise SourceError("FSDP of the first kind gathers the whole model: use fully_shard")
    with torch.no_grad():
        return unwrapped(tensors_of(inner_model(module), keep_vars=True))


def unwrapped(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors, without what wrappers have put into their names."""
    named = {plain_name(name): tensor for name, tensor in state.items()}
    if named and all(name.startswith("module.") for name in named):  # DistributedDataParallel's
        named = {name.removeprefix("module."): tensor for name, tensor in named.items()}
    if len(named) != len(state):
        raise SourceError("two tensors have one name, once the names of wrappers are removed")
    return named


def plain_name(name: str) -> str:
    """A name without the parts that wrappers have put into it."""
    if not any(wrapper in name for wrapper in WRAPPERS):
        return name
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def tied_names(module: torch.nn.Module, names: Collection[str]) -> frozenset[str]:
    """Which of these names transformers leaves out of the model's checkpoint, as tied to others."""
    tied: set[str] = set()
    for path, part in inner_model(module).named_modules():
        patterns = getattr(part, "all_tied_weights_keys", None)
        if patterns is None and getattr(
            getattr(part, "config", None), "tie_word_embeddings", False
        ):
            patterns = getattr(part, "_tied_weights_keys", None)  # transformers 4
        prefix = plain_name(path + "." if path else "")
        for pattern in patterns or ():
            whole = re.compile(re.escape(prefix) + pattern)
            tied.update(name for name in names if whole.fullmatch(name))
    return frozenset(tied)


def check_tied(groups: Iterable[Sequence[str]], tied: Collection[str]) -> None:
    """Raise SourceError if a weight that should be tied is a tensor of its own.

    An engine that ties would never load it, and serve another model than is trained.
    """
    for names in groups:
        if len(names) == 1 and names[0] in tied:
            raise SourceError(
                f"{names[0]!r} should be tied to another weight, and is a tensor of its own: call "
                "tie_weights before the model is sharded, or set tie_word_embeddings=False in the "
                "config of trainer and engines"
            )


def checkpoint_name(names: Sequence[str], tied: Collection[str]) -> str:
    """The name of these that a checkpoint has."""
    return next((name for name in names if name not in tied), names[0])


def own_rank() -> int:
    """This rank; 0 where there are no others."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _buckets(weights: Sequence[Weight], bucket_bytes: int) -> list[Bucket]:
    buckets: list[Bucket] = []
    room = 0
    for weight in weights:
        meshes, num_bytes = weight.meshes, weight.num_bytes
        if buckets and meshes == buckets[-1].meshes and num_bytes <= room:
            buckets[-1] = Bucket((*buckets[-1].weights, weight), meshes)
            room -= num_bytes
        else:
            buckets.append(Bucket((weight,), meshes))
            room = bucket_bytes - num_bytes
    return buckets


def _common_ranks(meshes: Sequence[DeviceMesh]) -> tuple[int, ...]:
    """The ranks of a single mesh; of several none, since not all ranks see the same of them."""
    return ranks_of(meshes[0]) if len(meshes) == 1 else ()


def _digest(weights: Iterable[Weight]) -> bytes:
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(repr(weight.specs).encode())
        for part in weight.parts:
            digest.update(f"{part.dtype} {tuple(part.shape)} ".encode())
            if isinstance(part, DTensor):
                digest.update(f"{part.placements} {tuple(part.device_mesh.shape)}".encode())
    return digest.digest()


def _gathered(
    bucket: Bucket, keeper: int | None, timeout_seconds: float
) -> list[tuple[Weight, Sequence[torch.Tensor]]] | None:
    messages: dict[object, list[DTensor]] = {}
    for part in (part for weight in bucket.weights for part in weight.parts):
        if isinstance(part, DTensor) and keeper in (None, *ranks_of(part.device_mesh)):
            cut = tuple(placement.is_replicate() for placement in part.placements)
            messages.setdefault((part.device_mesh, cut), []).append(part)
    whole: dict[int, torch.Tensor] = {}
    for tensors in messages.values():
        gathered = gather(tensors, keeper=keeper, timeout_seconds=timeout_seconds)
        for part, tensor in zip(tensors, gathered or (), strict=False):
            whole[id(part)] = tensor
    if keeper not in (None, own_rank()):
        return None
    return [
        (weight, weight.make([whole.get(id(part), part) for part in weight.parts]))
        for weight in bucket.weights
    ]
