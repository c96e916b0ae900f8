from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from core_tools import BITS, PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.dtypes import DTYPE_BITS, dtype_name, num_bytes, torch_dtype, torch_shape
from checkpoint_engine.errors import UsageError

TORCH = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16,
    "I16": torch.int16, "F16": torch.float16, "BF16": torch.bfloat16, "U32": torch.uint32,
    "I32": torch.int32, "F32": torch.float32, "U64": torch.uint64, "I64": torch.int64,
    "F64": torch.float64, "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F4": torch.float4_e2m1fn_x2,
}  # fmt: skip


def test_the_dtypes_are_those_of_the_format() -> None:
    assert DTYPE_BITS == BITS
    assert {dtype: torch_dtype(dtype) for dtype in TORCH} == TORCH
    assert set(BITS) - set(TORCH) == {"F6_E2M3", "F6_E3M2"}


@PROPERTY
@given(dtype=st.sampled_from(list(TORCH)), shape=st.lists(st.integers(0, 5), max_size=4))
def test_name_and_shape_survive_the_way_through_torch(dtype: str, shape: list[int]) -> None:
    if dtype == "F4":
        shape = [*shape, 2]
    tensor = torch.empty(torch_shape(dtype, tuple(shape)), dtype=torch_dtype(dtype))
    assert dtype_name(tensor) == (dtype, tuple(shape))
    assert num_bytes(dtype, tuple(shape)) == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize(
    ("dtype", "shape", "expected"),
    [("F32", (), 4), ("F4", (3, 2), 3), ("F6_E2M3", (4,), 3), ("F6_E3M2", (0, 3), 0)],
)
def test_bytes_of_scalars_and_packed_values(
    dtype: str, shape: tuple[int, ...], expected: int
) -> None:
    assert num_bytes(dtype, shape) == expected


@pytest.mark.parametrize(("dtype", "shape"), [("F4", (3,)), ("F4", ()), ("F6_E2M3", (1, 2))])
def test_values_that_do_not_fill_bytes_are_refused(dtype: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="does not fill whole bytes"):
        num_bytes(dtype, shape)


def test_unknown_dtypes_are_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"'F7'.*BF16"):
        num_bytes("F7", (1,))
    with pytest.raises(UsageError, match="it can be moved, not viewed"):
        torch_dtype("F6_E2M3")
    with pytest.raises(UsageError, match="complex128 cannot be stored"):
        dtype_name(torch.empty(1, dtype=torch.complex128))


def test_a_packed_scalar_has_no_place_in_the_format() -> None:
    """Torch has scalars of F4, one byte and two values; safetensors has no shape for them."""
    scalar = torch.zeros((), dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    with pytest.raises(UsageError, match="F4"):
        dtype_name(scalar)


def test_values_that_share_a_byte_across_rows_cannot_be_viewed() -> None:
    """[2, 3] of F4 fills three bytes, and no torch shape holds them."""
    with pytest.raises(UsageError, match="F4"):
        torch_shape("F4", (2, 3))


def test_metadata_needs_no_torch() -> None:
    code = "import sys, checkpoint_engine.dtypes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
