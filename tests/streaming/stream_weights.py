"""Weights that every process of a test can make by itself."""

from __future__ import annotations

from typing import Any

import torch

MIB = 1 << 20


def weights(seed: int, *, num_large: int = 2, num_small: int = 40) -> dict[str, torch.Tensor]:
    """Of every kind: some larger than a bucket of 4 MiB, fp8, scalars, empty and tied ones."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    found: dict[str, torch.Tensor] = {"embed": some(700, 33).bfloat16()}
    for number in range(num_large):
        found[f"large-{number}"] = some((9 * MIB + 4 * number) // 4)
        found[f"after-{number}"] = some(number + 1)
    for number in range(num_small):
        found[f"layer-{number}"] = some(100, 7 * number + 1).half()
    found |= {
        "fp8": some(1000).to(torch.float8_e4m3fn),
        "fp8-2": some(3, 5).to(torch.float8_e5m2),
        "flags": some(77) > 0,
        "numbers": torch.arange(101),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 4),
        "turned": some(50, 70).t(),
        "every other": some(64)[::2],
        "head": found["embed"],
    }
    return found


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Byte for byte, dtype and shape too."""

    def data(tensor: torch.Tensor) -> Any:
        return tensor.detach().contiguous().reshape(-1).view(torch.uint8)

    same_kind = (one.dtype, one.shape) == (other.dtype, other.shape)
    return same_kind and torch.equal(data(one), data(other))
