"""Small models with the peculiarities of real ones, and the server around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from checkpoint_engine.adapters.base import Served
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.manifest import CHUNK_BYTES, Version
from checkpoint_engine.replica.replica import Replica

WAIT_SECONDS = 30.0
LARGE = CHUNK_BYTES // 4 + 1000  # elements of float32: two chunks, the second a short one


class Odd(nn.Module):
    """Tied, transposed, empty, scalar, integer and large parameters and buffers."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator).to(dtype)

        self.embedding = nn.Parameter(random(6, 4))
        self.head = self.embedding
        self.transposed = nn.Parameter(random(3, 5).t())
        self.scale = nn.Parameter(random())
        self.empty = nn.Parameter(random(0, 4))
        self.large = nn.Parameter(random(LARGE))
        self.register_buffer("mean", random(7))
        self.register_buffer("num_steps", torch.tensor(seed))
        self.register_buffer("frequencies", random(3), persistent=False)


def fresh(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """What a checkpoint of `Odd` holds: contiguous, and tied tensors under both names."""
    state = Odd(seed, dtype).state_dict()
    tensors = {name: tensor.detach().contiguous() for name, tensor in state.items()}
    tensors["head"] = tensors["embedding"]
    return tensors


def bytes_of(model: nn.Module) -> dict[str, bytes]:
    """Every byte of the state dict, by name."""
    return {
        name: bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, tensor in model.state_dict().items()
    }


def make_qwen3(seed: int, *, tie_word_embeddings: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def flip(tensor: torch.Tensor, index: int = 0) -> None:
    """Change one bit of a live tensor."""
    with torch.no_grad():
        tensor.detach().view(-1).view(torch.uint8)[index] ^= 1


def make_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))


def save_folder(model: PreTrainedModel, folder: Path) -> None:
    """What `ckpt-engine replica --model` takes."""
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)


@contextmanager
def running_replica(model: PreTrainedModel, label: str = "initial") -> Iterator[Replica]:
    """A real replica of this model, whose engine generates."""
    replica = Replica(model, make_tokenizer(), name="r", label=label)
    replica.engine.start()
    yield replica
    replica.engine.stop(WAIT_SECONDS)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)


def recompute(adapter: TransformersAdapter) -> Served:
    """What is live now; nobody else changes it meanwhile."""
    steps = adapter.recompute()
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


@dataclass
class Server:
    """What `TransformersAdapter` asks of the server around its model, as strict as `Replica`."""

    label: str = "initial"
    served: Served | None = None
    quarantined: str | None = None
    torn: str | None = None
    refusal: Exception | None = None
    held: bool = False

    def accept(self, version: Version) -> None:
        if self.refusal is not None:
            raise self.refusal

    def hold(self, timeout_seconds: float) -> None:
        assert self.held == (self.torn is not None), "held twice"
        self.held = True

    def publish(self, version: Version, served: Served) -> None:
        assert self.held, "the label changed while requests were served"
        self.label, self.served, self.torn, self.quarantined = version.label, served, None, None

    def release(self) -> None:
        assert self.held, "nobody held the requests"
        self.held, self.torn = False, None

    def quarantine(self, reason: str) -> None:
        self.quarantined = reason

    def tear(self, reason: str) -> None:
        self.torn = reason
