"""The dtypes of the safetensors format, by their names there, and their torch counterparts.

Manifests carry names ("BF16"), never torch objects, so that metadata is plain data and the
command line needs no torch. torch is imported only by the functions that return torch dtypes.

Two names need care. `F4` packs two values in a byte: torch's `float4_e2m1fn_x2` counts bytes
where safetensors counts values, so the last dimension doubles. `F6_*` have no torch dtype:
their bytes can be stored and moved, but not viewed as a tensor.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from checkpoint_engine.errors import UsageError

if TYPE_CHECKING:
    import torch

__all__ = ["DTYPE_BITS", "dtype_name", "num_bytes", "torch_dtype", "torch_shape"]

DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
    "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64", "F4": "float4_e2m1fn_x2",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_NAMES_OF_TORCH = {f"torch.{torch_name}": name for name, torch_name in _TORCH_NAMES.items()}


def num_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a contiguous tensor.

    Raises:
        UsageError: the dtype is unknown, or its values do not fill whole bytes.
    """
    bits = DTYPE_BITS.get(dtype)
    if bits is None:
        raise UsageError(f"unknown dtype {dtype[:20]!r}; known are {', '.join(DTYPE_BITS)}")
    total_bits = math.prod(shape) * bits
    if total_bits % 8:
        raise UsageError(f"{dtype} of shape {list(shape)} does not fill whole bytes")
    return total_bits // 8


def torch_dtype(dtype: str) -> torch.dtype:
    """The torch dtype that views this dtype's bytes.

    Raises:
        UsageError: this torch has no such dtype.
    """
    import torch

    found = getattr(torch, _TORCH_NAMES.get(dtype, ""), None)
    if found is None:
        raise UsageError(
            f"torch {torch.__version__} has no dtype for {dtype}: it can be moved, not viewed"
        )
    assert isinstance(found, torch.dtype)
    return found


def torch_shape(dtype: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape under which torch views a tensor whose safetensors shape is `shape`.

    Raises:
        UsageError: values of two rows of F4 share a byte.
    """
    if dtype != "F4":
        return shape
    if not shape or shape[-1] % 2:
        raise UsageError(f"torch cannot view F4 of shape {list(shape)}: rows end within a byte")
    return (*shape[:-1], shape[-1] // 2)


def dtype_name(tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """The safetensors dtype and shape of a torch tensor.

    Raises:
        UsageError: the format has no name for the tensor's dtype.
    """
    name = _NAMES_OF_TORCH.get(str(tensor.dtype))
    if name is None:
        raise UsageError(
            f"{tensor.dtype} cannot be stored: the safetensors format has no name for it"
        )
    shape = tuple(tensor.shape)
    if name != "F4":
        return name, shape
    if not shape:
        raise UsageError("a scalar of F4 is two values, for which the format has no shape")
    return name, (*shape[:-1], shape[-1] * 2)
