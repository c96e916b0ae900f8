"""A tiny real model and tokenizer, a gate for its forward passes, and a stand-in replica."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from checkpoint_engine.errors import UpdateRefused
from checkpoint_engine.replica.engine import Engine

TIMEOUT_SECONDS = 60.0
EOS = "<eos>"
SENTENCES = (
    "The weights of a running model change between two tokens.",
    "Ein Satz mit Umlauten: äöüß, und einer mit Zeichen: 你好, 🙂.",
    "A replica serves exactly the old version or exactly the new one.",
)


def make_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE; it has an end-of-sequence token but does not declare it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[EOS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_model(seed: int) -> PreTrainedModel:
    """Random float32 weights, large enough for lively greedy text."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=1024,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


def greedy(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers itself generates."""
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=num_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return output[0, len(prompt) :].tolist()


def load_in_place(model: PreTrainedModel, source: PreTrainedModel) -> None:
    with torch.no_grad():
        for parameter, new in zip(model.parameters(), source.parameters(), strict=True):
            parameter.copy_(new)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.002)


class Gate:
    """Lets as many forward passes begin as it has permits, and records each one's input length."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.num_inputs: list[int] = []
        self._permits = threading.Semaphore(0)
        self._is_open = True
        model.register_forward_pre_hook(self._before_pass, with_kwargs=True)

    def _before_pass(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if not self._is_open:
            assert self._permits.acquire(timeout=TIMEOUT_SECONDS), "no permit for the pass"
        self.num_inputs.append(kwargs["input_ids"].shape[1])

    def close(self, num_permits: int) -> None:
        """Let `num_permits` more passes begin; the next one waits inside the pass."""
        self._is_open = False
        self._permits.release(num_permits)

    def open(self) -> None:
        self._is_open = True
        self._permits.release()


class StandInReplica:
    """Swaps whole models in place; a handle is the label of one of `sources`."""

    def __init__(self, engine: Engine, model: PreTrainedModel) -> None:
        self.engine = engine
        self.state = "serving"
        self.sources: dict[str, PreTrainedModel] = {}
        self.updating = threading.Event()
        self.may_finish = threading.Event()
        self.may_finish.set()
        self._model = model
        self._lock = threading.Lock()

    def info(self) -> Mapping[str, Any]:
        version = self.engine.weight_version
        return {
            "weight_version": version.version,
            "digest": version.digest,
            "served_digest": "served",
            "state": self.state,
            "history": [],
        }

    def update(self, handle: str, *, weight_version: str | None, flush_cache: bool) -> None:
        if not self._lock.acquire(blocking=False):
            raise UpdateRefused("an update is running")
        try:
            source = self.sources.get(handle)
            if source is None:
                raise UpdateRefused(f"nothing listens on {handle!r}")
            self.engine.pause(TIMEOUT_SECONDS)
            self.updating.set()
            assert self.may_finish.wait(TIMEOUT_SECONDS)
            load_in_place(self._model, source)
            self.engine.set_version(weight_version or handle, f"digest of {handle}")
            self.engine.resume(flush_cache=flush_cache)
        finally:
            self._lock.release()

    def pause(self) -> None:
        self.engine.pause(TIMEOUT_SECONDS)
        self.state = "paused"

    def resume(self) -> None:
        self.engine.resume(flush_cache=False)
        self.state = "serving"
