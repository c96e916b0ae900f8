"""Weights of 8 GB with the shapes of a Llama-3 of half its layers, bf16, new in every round.

Imports nothing but torch: it is loaded by processes whose checkpoint_engine is another.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["change", "make_weights", "sums"]

HIDDEN, FEED_FORWARD, KEYS, VOCABULARY = 4096, 14336, 1024, 128256
LAYER_BYTES = 2 * HIDDEN * (2 * HIDDEN + 2 * KEYS + 3 * FEED_FORWARD)
PATTERN_BYTES = 64 << 20


def make_weights(num_layers: int, device: str) -> dict[str, torch.Tensor]:
    """One pattern of random bits, over and over: what is copied does not matter, that it fits does.

    Every page is touched.
    """
    shapes = {"embed": (VOCABULARY, HIDDEN), "norm": (HIDDEN,)}
    for number in range(num_layers):
        layer = {
            "q": (HIDDEN, HIDDEN),
            "k": (KEYS, HIDDEN),
            "v": (KEYS, HIDDEN),
            "o": (HIDDEN, HIDDEN),
            "gate": (FEED_FORWARD, HIDDEN),
            "up": (FEED_FORWARD, HIDDEN),
            "down": (HIDDEN, FEED_FORWARD),
            "norm": (HIDDEN,),
            "norm_after": (HIDDEN,),
        }
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**15), 2**15, (PATTERN_BYTES // 2,), generator=generator)
    pattern = pattern.to(torch.int16).to(device)
    weights = {}
    for name, shape in shapes.items():
        tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
        for piece in _pieces(tensor):
            piece.copy_(pattern[: len(piece)])
        weights[name] = tensor
    return weights


def change(weights: dict[str, torch.Tensor]) -> None:
    """Change every weight, each tensor in its own way."""
    for number, tensor in enumerate(weights.values()):
        _bits(tensor).add_(2 * number + 1)


def sums(weights: dict[str, torch.Tensor]) -> dict[str, int]:
    """What tells two versions apart: sums of the bits, of every fifth tensor."""
    return {
        name: sum(int(piece.sum()) for piece in _pieces(weights[name]))
        for name in sorted(weights)[::5]
    }


def _pieces(tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """Small ones, as sums need four times their memory."""
    pieces: Iterable[torch.Tensor]
    pieces = _bits(tensor).split(PATTERN_BYTES // 2)  # type: ignore[no-untyped-call]
    return pieces


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(-1).view(torch.int16)
