"""SGLang's Qwen3."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from held import held
from sglang.srt.models import qwen3


class Qwen3ForCausalLM(qwen3.Qwen3ForCausalLM):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        super().load_weights(held(weights))


EntryClass = Qwen3ForCausalLM
