"""Named tensors and plain state dicts: a trainer's live weights.

Tensors that are views of the same elements (tied embeddings) are announced once under all their
names. Non-contiguous tensors are made contiguous one at a time, while they are read; everything
else is copied straight from where it lies, on any device that torch can copy from.

    source = TensorSource(model.state_dict())
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from checkpoint_engine.dtypes import dtype_name
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.plan.layout import TensorSpec

__all__ = ["TensorSource", "checked", "copy_bytes", "identity"]


class TensorSource:
    """A state dict as a source. Borrows the tensors: they must not change until registered.

    Raises:
        SourceError: this is no state dict, a value no dense tensor, or its dtype has no name in
            safetensors.
    """

    def __init__(self, named_tensors: Mapping[str, torch.Tensor]) -> None:
        if not isinstance(named_tensors, Mapping):
            raise SourceError(
                f"a {type(named_tensors).__name__} is no state dict: pass model.state_dict(), or a "
                "dict of names and tensors"
            )
        self._tensors = {name: checked(name, tensor) for name, tensor in named_tensors.items()}
        self._flat = {
            name: tensor.reshape(-1).view(torch.uint8).numpy()
            for name, tensor in self._tensors.items()
            if tensor.is_cpu and tensor.is_contiguous()
        }
        wait_until_made(self._tensors.values())
        self._lock = threading.Lock()
        self._contiguous = functools.lru_cache(maxsize=2)(self._make_contiguous)

    @property
    def files(self) -> None:
        """None: these tensors lie in memory."""
        return None

    @property
    def on_gpu(self) -> bool:
        """Whether some of the tensors are on a GPU."""
        return any(tensor.is_cuda for tensor in self._tensors.values())

    @property
    def freed_bytes(self) -> int:
        """None: the tensors stay where they are."""
        return 0

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors, tied ones once under all their names."""
        tied: dict[object, list[str]] = {}
        for name, tensor in self._tensors.items():
            tied.setdefault(identity(name, tensor), []).append(name)
        return [self._spec(tuple(sorted(names))) for names in tied.values()]

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Copy bytes [start, start + len(out)) of a tensor, row-major, into `out`."""
        flat = self._flat.get(name)
        if flat is not None:
            np.copyto(np.frombuffer(out, dtype=np.uint8), flat[start : start + len(out)])
            return
        tensor = self._tensors[name]
        if not tensor.is_contiguous():
            with self._lock:
                tensor = self._contiguous(name)
        copy_bytes(tensor, start, out)

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors, self._flat = {}, {}
        self._contiguous.cache_clear()

    def _spec(self, names: tuple[str, ...]) -> TensorSpec:
        try:
            dtype, shape = dtype_name(self._tensors[names[0]])
        except UsageError as error:
            raise SourceError(f"tensor {names[0]!r}: {error}") from error
        return TensorSpec(names=names, dtype=dtype, shape=shape)

    def _make_contiguous(self, name: str) -> torch.Tensor:
        return self._tensors[name].contiguous()


def wait_until_made(tensors: Iterable[torch.Tensor]) -> None:
    """Before other threads read them, whose streams do not wait for what this one has queued."""
    for device in {tensor.device for tensor in tensors} - {torch.device("cpu")}:
        torch.accelerator.current_stream(device).synchronize()


def copy_bytes(tensor: torch.Tensor, start: int, out: memoryview) -> None:
    """Fill `out` with the bytes of a contiguous tensor from byte `start` on."""
    wanted = tensor.reshape(-1).view(torch.uint8)[start : start + len(out)]
    if wanted.is_cpu:  # numpy copies in this thread; torch would start threads from each
        np.copyto(np.frombuffer(out, dtype=np.uint8), wanted.numpy())
    else:
        torch.frombuffer(out, dtype=torch.uint8).copy_(wanted)


def checked(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same elements, detached; raises SourceError if they have no bytes to send."""
    if not isinstance(tensor, torch.Tensor):
        raise SourceError(f"{name!r} is a {type(tensor).__name__}, not a tensor")
    if isinstance(tensor, (UninitializedParameter, UninitializedBuffer)):
        raise SourceError(f"{name!r} is not initialized yet")
    kind = type(tensor).__name__
    custom = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    if custom or kind == "DTensor":
        raise SourceError(f"{name!r} is a {kind}: pass a plain tensor, such as full_tensor()")
    if tensor.is_nested or tensor.layout is not torch.strided:
        raise SourceError(f"{name!r} has no dense bytes to send: it is sparse or nested")
    if tensor.is_meta or tensor.is_quantized:
        raise SourceError(f"{name!r} has no dense bytes to send: it is meta or quantized")
    return tensor.detach().resolve_conj().resolve_neg()


def identity(name: str, tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements in memory."""
    if tensor.numel() == 0:
        return name
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
