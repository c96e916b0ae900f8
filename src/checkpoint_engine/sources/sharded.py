"""Sharded tensors put together: DTensors of FSDP2, of tensor parallelism, and of both at once.

The shards of several tensors travel in one message for each dimension of their device mesh: to one
rank, or to all. Which part of a tensor a rank holds follows from its placements, so no shape is
sent, and parts that differ in size are padded. Every rank of a mesh must do the same in the same
order; `agree` says so before anything is gathered, where else ranks would wait for each other.

    agree(mesh, digest, timeout_seconds=600)
    tensors = gather([layer.weight, layer.bias], keeper=0, timeout_seconds=600)  # None elsewhere
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import AllgatherOptions
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from checkpoint_engine.errors import SourceError, TransferError

__all__ = ["agree", "check_sharding", "gather", "local_part", "ranks_of", "region"]

ALIGNMENT_BYTES = 16  # so that every part can be viewed in its dtype where it lies


def ranks_of(mesh: DeviceMesh) -> tuple[int, ...]:
    """The global ranks of a mesh, sorted."""
    return tuple(sorted(mesh.mesh.flatten().tolist()))


def local_part(tensor: DTensor) -> torch.Tensor:
    """What this rank holds of a tensor; not a copy."""
    detached = tensor.detach()
    assert isinstance(detached, DTensor)
    return detached.to_local()


def region(tensor: DTensor, coordinate: Sequence[int]) -> tuple[slice, ...]:
    """The part of a tensor that the rank at a coordinate of its mesh holds.

    Raises:
        SourceError: its placements are not shards and replicas, or are in an unknown order.
    """
    mesh, starts, stops = tensor.device_mesh, [0] * tensor.ndim, list(tensor.shape)
    for mesh_dim, dim in _in_order_of_sharding(tensor):
        length = stops[dim] - starts[dim]
        chunk = -(-length // mesh.size(mesh_dim))
        first = starts[dim] + min(length, chunk * coordinate[mesh_dim])
        starts[dim], stops[dim] = first, min(stops[dim], first + chunk)
    return tuple(slice(start, stop) for start, stop in zip(starts, stops, strict=True))


def check_sharding(name: str, tensor: DTensor) -> None:
    """Raise SourceError unless this rank holds what the placements say."""
    coordinate = tensor.device_mesh.get_coordinate()
    if coordinate is None:
        raise SourceError(f"{name!r}: this rank is not in the tensor's device mesh")
    try:
        expected = _shape(region(tensor, coordinate))
    except SourceError as error:
        raise SourceError(f"{name!r}: {error}") from error
    found = tuple(local_part(tensor).shape)
    if found != expected:
        raise SourceError(
            f"{name!r}: this rank holds a part of shape {list(found)}, and not {list(expected)} as "
            f"placements {list(tensor.placements)} of shape {list(tensor.shape)} have it"
        )


def gather(
    tensors: Sequence[DTensor], *, keeper: int | None, timeout_seconds: float
) -> list[torch.Tensor] | None:
    """Put tensors of one mesh together on a rank, or on all; called by every rank of the mesh.

    At most twice their bytes are allocated, half of it until this returns.

    Args:
        tensors: sharded over the same dimensions of the mesh, in any way.
        keeper: global rank that gets them; None for all.
        timeout_seconds: for each message.

    Returns:
        New tensors, contiguous; None where the keeper is another rank.

    Raises:
        TransferError: a rank died, failed, or did not come in time.
    """
    mesh = tensors[0].device_mesh
    own = mesh.get_coordinate()
    wanted = None if keeper is None else _coordinate(mesh, keeper)
    sharded = [n for n, placed in enumerate(tensors[0].placements) if not placed.is_replicate()]
    assert own is not None, "check_sharding comes before gather"
    if wanted and any(own[n] != wanted[n] for n in range(mesh.ndim) if n not in sharded):
        return None  # whoever has a replica on the keeper's side gives it
    places, capacity = _places(tensors)
    parts: torch.Tensor | None = _packed(tensors, places, capacity)
    for n in reversed(sharded):
        assert parts is not None
        root = wanted[n] if wanted else None
        parts = _exchange(mesh.get_group(n), parts, root, timeout_seconds)
        if parts is None:
            return None
    assert parts is not None
    parts = parts.view(*(mesh.size(n) for n in sharded), capacity)
    return [
        _put_together(tensor, place, parts, sharded)
        for tensor, place in zip(tensors, places, strict=True)
    ]


def agree(mesh: DeviceMesh, digest: bytes, *, timeout_seconds: float) -> None:
    """Wait for all ranks of a mesh, and check that they say the same.

    Raises:
        SourceError: one gives another digest.
        TransferError: one died, or did not come in time.
    """
    other = -1  # a rank that says something else; told on to those who share no group with it
    for group in mesh.get_all_groups():
        own = digest + other.to_bytes(4, "little", signed=True)
        said = torch.frombuffer(bytearray(own), dtype=torch.uint8).to(mesh.device_type)
        heard = _exchange(group, said, None, timeout_seconds)
        assert heard is not None
        for index, row in enumerate(heard.view(group.size(), -1).cpu().numpy()):
            found = int.from_bytes(row[-4:].tobytes(), "little", signed=True)
            if row[:-4].tobytes() != digest:
                found = dist.get_global_rank(group, index)
            other = found if other < 0 else other
    if other >= 0:
        raise SourceError(
            f"rank {other} does not give the same weights as rank {dist.get_rank()}: every rank "
            "must ask for the same names, with equal shapes, dtypes and placements"
        )


def _in_order_of_sharding(tensor: DTensor) -> list[tuple[int, int]]:
    """(dimension of the mesh, dimension of the tensor), in the order in which it was cut.

    Placements are read from left to right, but for a strided shard, which was cut after those to
    its right: so FSDP2 does with what tensor parallelism has cut before.
    """
    order: list[tuple[int, int]] = []
    for mesh_dim, placement in reversed(list(enumerate(tensor.placements))):
        if placement.is_replicate():
            continue
        if isinstance(placement, _StridedShard):
            before = [n for n, dim in order if dim == placement.dim % tensor.ndim]
            if placement.split_factor != math.prod(tensor.device_mesh.size(n) for n in before):
                raise SourceError(f"placements {list(tensor.placements)} are in an unknown order")
            order.append((mesh_dim, placement.dim % tensor.ndim))
        elif placement.is_shard():
            order.insert(0, (mesh_dim, placement.dim % tensor.ndim))  # type: ignore[attr-defined]
        else:
            raise SourceError(f"placement {placement} is neither a shard nor a replica")
    return order


def _coordinate(mesh: DeviceMesh, rank: int) -> list[int]:
    found: list[list[int]] = (mesh.mesh == rank).nonzero().tolist()
    assert found, "the keeper is one of the mesh"
    return found[0]


def _shape(part: Sequence[slice]) -> tuple[int, ...]:
    return tuple(one.stop - one.start for one in part)


def _places(tensors: Sequence[DTensor]) -> tuple[list[int], int]:
    """Where each tensor's part begins in a rank's message, and how long that is."""
    places, end = [], 0
    for tensor in tensors:
        largest = _shape(region(tensor, [0] * tensor.device_mesh.ndim))
        places.append(end)
        num_bytes = math.prod(largest) * tensor.element_size()
        end += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return places, max(end, ALIGNMENT_BYTES)


def _packed(tensors: Sequence[DTensor], places: Sequence[int], capacity: int) -> torch.Tensor:
    """This rank's parts in one message, on the device that the mesh speaks through."""
    device_type = tensors[0].device_mesh.device_type
    parts = [local_part(tensor) for tensor in tensors]
    # Parameters that are offloaded lie on the CPU.
    device = parts[0].device if parts[0].device.type == device_type else torch.device(device_type)
    message = torch.zeros(capacity, dtype=torch.uint8, device=device)
    for part, place in zip(parts, places, strict=True):
        flat = part.contiguous().reshape(-1).view(torch.uint8)
        message[place : place + len(flat)].copy_(flat)
    return message


def _put_together(
    tensor: DTensor, place: int, parts: torch.Tensor, sharded: Sequence[int]
) -> torch.Tensor:
    mesh = tensor.device_mesh
    whole = torch.empty(tensor.shape, dtype=tensor.dtype, device=parts.device)
    if (num_rows := _rows_of_each(tensor, sharded)) is not None:  # as FSDP2 shards most tensors
        num_bytes = num_rows * whole[0].nbytes
        rows = whole.view(torch.uint8).view(-1, num_bytes)
        rows.copy_(parts[:, place : place + num_bytes])
        return whole
    for found in itertools.product(*(range(mesh.size(n)) for n in sharded)):
        coordinate = [0] * mesh.ndim
        for n, index in zip(sharded, found, strict=True):
            coordinate[n] = index
        part = region(tensor, coordinate)
        num_bytes = math.prod(_shape(part)) * tensor.element_size()
        if num_bytes:
            held = parts[found][place : place + num_bytes].view(tensor.dtype)
            whole[part].copy_(held.view(_shape(part)))
    return whole


def _rows_of_each(tensor: DTensor, sharded: Sequence[int]) -> int | None:
    """How many rows each rank has, if it is as many for all, and they have nothing but rows."""
    if len(sharded) != 1 or not tensor.placements[sharded[0]].is_shard(0) or not tensor.numel():
        return None
    rows, left = divmod(tensor.shape[0], tensor.device_mesh.size(sharded[0]))
    return None if left else rows


def _exchange(
    group: ProcessGroup, sent: torch.Tensor, root: int | None, timeout_seconds: float
) -> torch.Tensor | None:
    """All members' bytes one after the other, on member `root` or on all; None elsewhere."""
    size, timeout = group.size(), timedelta(seconds=timeout_seconds)
    receives = root is None or group.rank() == root
    received = sent.new_empty(size * sent.numel() if receives else 0)
    options: Any
    try:
        if root is None:
            options = AllgatherOptions()
            options.timeout = timeout
            work = group._allgather_base(received, sent, options)
        else:
            options = dist.GatherOptions()
            options.rootRank, options.timeout = root, timeout
            outputs = [list(received.view(size, -1).unbind())] if receives else []
            work = group.gather(outputs, [sent], options)
        work.wait(timeout)
    except RuntimeError as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise TransferError(
            f"the weights could not be gathered: a rank died, failed, or did not ask for them "
            f"within {timeout_seconds:g} s: {first_line}"
        ) from error
    return received if receives else None
