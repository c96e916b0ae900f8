"""A model in the place of Qwen/Qwen2.5-7B-Instruct, which takes a while to load."""

from __future__ import annotations

from typing import Any

import torch


def make_model(seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Embedding(2000, 64), torch.nn.Linear(64, 300), torch.nn.Linear(300, 64)
    ).bfloat16()


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


class TransformersModel:
    """Trains; its steps change nothing here but what is sent."""

    def __init__(self, model_id: str) -> None:
        self.model = make_model(seed=1)

    def forward_backward(self, *inputs: Any) -> float:
        return 0.0

    def clip_grad_and_step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.mul_(0.5)


class _Engine:
    def __init__(self, model: torch.nn.Module) -> None:
        self._parameters = model.state_dict()

    def update_weight(self, name: str, tensor: torch.Tensor) -> None:
        self._parameters[name].copy_(tensor)


class vLLMSampler:  # noqa: N801 - its name in the example
    """Samples; what it does with a weight is a copy."""

    def __init__(self, model_id: str) -> None:
        self.model = make_model(seed=2)
        self.engine = _Engine(self.model)
