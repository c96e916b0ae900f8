"""The torch module behind an engine's loader: a way back, and what the loader did to it.

A loader maps, fuses and slices names as it likes, skips those that it does not know, and says
nothing. What can be seen from outside is where it wrote. So a load is watched: every parameter
must have been written, or what is served would be a mixture of two versions.

    back = Snapshot.take(model)                      # None where memory is short
    with Watch(model) as watch:
        watch.give(group)
        model.load_weights(group)
    watch.check()                                    # raises AdapterError
    back.restore()
"""

from __future__ import annotations

import bisect
import functools
import os
import re
import sys
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from checkpoint_engine.errors import AdapterError, VerificationError
from checkpoint_engine.store import available_bytes

__all__ = ["Snapshot", "Watch"]

PARTIAL = "CKPT_ENGINE_PARTIAL_LOADS"
SPARE = 1.25  # of the bytes of a snapshot, so that it is not the last memory that it takes


@dataclass(frozen=True)
class _Kept:
    """One tensor: where the module has it, the tensor itself, its live memory, and its content."""

    place: dict[str, Any]
    name: str
    tensor: torch.Tensor
    live: torch.Tensor
    content: torch.Tensor


class Snapshot:
    """Private copies, in host memory, of every parameter and buffer of a module."""

    def __init__(self, kept: Sequence[_Kept]) -> None:
        self._kept = tuple(kept)

    @classmethod
    def take(cls, model: torch.nn.Module) -> Snapshot | None:
        """Copy everything; None if it does not fit in the host's memory."""
        unique = {tensor.data_ptr(): tensor.nbytes for _, _, tensor in _places(model)}
        if sum(unique.values()) * SPARE > available_bytes():
            return None
        contents: dict[tuple[int, torch.Size, tuple[int, ...]], torch.Tensor] = {}
        kept = []
        for place, name, tensor in _places(model):
            live = tensor.detach()
            key = (live.data_ptr(), live.shape, live.stride())
            if key not in contents:
                contents[key] = live.to("cpu", copy=True)
            kept.append(_Kept(place, name, tensor, live, contents[key]))
        return cls(kept)

    def restore(self) -> None:
        """Put every tensor back where it was, with the content that it had, and check that.

        Raises:
            VerificationError: one has another content all the same.
        """
        with torch.no_grad():
            for kept in self._kept:
                if kept.tensor.data_ptr() != kept.live.data_ptr():
                    kept.tensor.data = kept.live
                kept.place[kept.name] = kept.tensor
                kept.live.copy_(kept.content)
        for kept in self._kept:
            if not torch.equal(_bytes(kept.live), _bytes(kept.content)):
                raise VerificationError(f"{kept.name!r} is not what it was before the update")


class Watch(TorchDispatchMode):
    """Records what a loader reads of the tensors it is given, and writes into a module's.

    A thread that the loader starts is not seen: then nothing is concluded.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._model = model
        self._before = {name: _Range.of(tensor) for name, tensor in _parameters(model)}
        self._written = dict.fromkeys(self._before, 0)
        self._targets = _Ranges(self._before)
        self._sources = _Ranges({})
        self._unread: set[str] = set()
        self._pending: set[str] = set()
        with self:  # the first operator that is watched imports for a second
            torch.zeros(1)
        self._had_threads = False

    def give(self, group: Sequence[tuple[str, torch.Tensor]]) -> None:
        """These tensors are what the loader is given next."""
        self._unread |= self._pending
        self._pending = {name for name, tensor in group if tensor.numel()}
        self._sources = _Ranges({name: _Range.of(tensor) for name, tensor in group})

    def check(self, padded: Collection[str] | None = None) -> None:
        """Raise unless the loader has replaced the whole content of the module.

        Parameters of one element are let pass: scales that no checkpoint has. What was written in
        part is let pass if it is of those `padded`. Where they are not known, it is if the loader
        has made use of all that it was given, and has written as much of its like in other layers.

        Raises:
            AdapterError: a parameter was not written, or in part only; names it.
        """
        if self._had_threads or os.environ.get(PARTIAL) == "allow":
            return
        unread = sorted(self._unread | self._pending)
        after = {name: _Range.of(tensor) for name, tensor in _parameters(self._model)}
        extents: dict[tuple[str, int], set[int]] = {}
        for name, range_ in self._before.items():
            extents.setdefault(_kind(name, range_), set()).add(self._written[name])
        for name in sorted(self._before, key=self._written.__getitem__):
            range_, written = self._before[name], self._written[name]
            size = range_.num_elements
            replaced = name not in after or after[name].start != range_.start
            is_alike = not unread and len(extents[_kind(name, range_)]) == 1
            is_padded = name in padded if padded is not None else is_alike
            if replaced or size <= 1 or written >= size or (written and is_padded):
                continue
            what = "nothing of" if not written else f"{written} of {size} elements of"
            skipped = f"; it made no use of {unread[0]!r}{_more(unread)}" if unread else ""
            raise AdapterError(
                f"the loader wrote {what} the model's {name!r}{skipped}: the checkpoint's names or "
                f"shapes are not this model's ({PARTIAL}=allow loads it all the same)"
            )

    def __enter__(self) -> Watch:
        self._profile = threading.getprofile()
        threading.setprofile(self._saw_thread)  # called in threads that start from here on
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        threading.setprofile(self._profile)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Do what was asked for, and note what it reads and writes."""
        for number, name, writes in _uses(func):
            value = args[number] if number < len(args) else (kwargs or {}).get(name)
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                    self._note(tensor, writes=writes)
        return func(*args, **(kwargs or {}))

    def _note(self, tensor: torch.Tensor, *, writes: bool) -> None:
        address = tensor.data_ptr()
        if not writes:
            if source := self._sources.find(address):
                self._pending.discard(source)
        elif target := self._targets.find(address):
            self._written[target] += tensor.numel()

    def _saw_thread(self, *_: Any) -> None:
        """Called once by each new thread, as its profiler."""
        self._had_threads = True
        sys.setprofile(None)


@functools.cache
def _uses(func: Any) -> tuple[tuple[int, str, bool], ...]:
    """The arguments of an operator that it reads or writes, and does not merely view."""
    return tuple(
        (number, argument.name, argument.alias_info is not None)
        for number, argument in enumerate(func._schema.arguments)
        if argument.alias_info is None or argument.alias_info.is_write
    )


@dataclass(frozen=True)
class _Range:
    """The addresses of a tensor."""

    start: int
    end: int
    num_elements: int

    @classmethod
    def of(cls, tensor: torch.Tensor) -> _Range:
        start = tensor.data_ptr()
        strides = zip(tensor.shape, tensor.stride(), strict=True)
        span = 1 + sum((size - 1) * stride for size, stride in strides) if tensor.numel() else 0
        return cls(start, start + span * tensor.itemsize, tensor.numel())


def _kind(name: str, range_: _Range) -> tuple[str, int]:
    """What parameters of like layers have in common."""
    return re.sub(r"\d+", "#", name), range_.num_elements


class _Ranges:
    """Finds the name of the tensor that an address lies in."""

    def __init__(self, ranges: Mapping[str, _Range]) -> None:
        self._sorted = sorted(
            (r.start, r.end, name) for name, r in ranges.items() if r.end > r.start
        )
        self._starts = [start for start, _, _ in self._sorted]

    def find(self, address: int) -> str | None:
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        _, end, name = self._sorted[at]
        return name if address < end else None


def _places(model: torch.nn.Module) -> Iterator[tuple[dict[str, Any], str, torch.Tensor]]:
    """Every parameter and buffer, wherever the model has it, tied ones more than once."""
    for module in model.modules():
        places: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for place in places:
            for name, tensor in place.items():
                if tensor is not None:
                    yield place, name, tensor


def _parameters(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of ordinary memory; tied ones once."""
    return (
        (name, tensor)
        for name, tensor in model.named_parameters()
        if tensor.layout is torch.strided and tensor.device.type != "meta"
    )


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
