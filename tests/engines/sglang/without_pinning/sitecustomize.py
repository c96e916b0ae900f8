"""SGLang pins memory for LoRA adapters whatever the device is; without a GPU torch cannot."""

from __future__ import annotations

import functools
from typing import Any

import torch


def unpinned(make: Any) -> Any:
    @functools.wraps(make)
    def made(*args: Any, **options: Any) -> Any:
        return make(*args, **{k: v for k, v in options.items() if k != "pin_memory"})

    return made


for name in ("tensor", "empty", "zeros", "ones"):
    setattr(torch, name, unpinned(getattr(torch, name)))
torch.Tensor.pin_memory = lambda self, *_: self  # type: ignore[method-assign]
