"""One request on its way through the engine: its tokens, its KV cache, its text, its listeners.

Weights may change between any two tokens of a request, and whoever trains on those tokens must
know which weights made each of them. So every token carries its weight version, and a sequence
can drop its KV cache at any token boundary: the next pass then recomputes the cache over the
prompt and the tokens so far, exactly as a new request with that prompt would.

A pass feeds the tokens that the cache lacks and samples one more. That is prefill when the cache
is empty, decode when it lacks one token, and recomputation after a drop: one code path.

    sequence = Sequence(request, tokenizer, eos_token_ids)
    token = sequence.next_token(model, WeightVersion("step-1", digest))
    sequence.drop_cache()                                # the weights changed
    sequence.generation.emit(token)                      # Generation.tokens() yields it
"""

from __future__ import annotations

import inspect
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any, Literal

import msgspec
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, UsageError

__all__ = [
    "Detokenizer",
    "Event",
    "Generation",
    "GenerationFailed",
    "GenerationRequest",
    "Sequence",
    "StopStrings",
    "Token",
    "WeightSpan",
    "WeightVersion",
    "cache_name",
    "sample",
    "weight_spans",
]

MAX_NUM_STOP_STRINGS = 16
FinishReason = Literal["stop", "length"]


class GenerationFailed(CheckpointEngineError):
    """A forward pass raised, its logits were not numbers, or the request was cancelled."""


class WeightVersion(msgspec.Struct, frozen=True):
    """The label and the digest of the weights being served."""

    version: str
    digest: str


class WeightSpan(msgspec.Struct, frozen=True):
    """Generated tokens [start, end) were all produced under one weight version."""

    version: str
    digest: str
    start: int
    end: int


def weight_spans(versions: Iterable[WeightVersion], start: int = 0) -> tuple[WeightSpan, ...]:
    """The spans of consecutive tokens, given each one's version; the first token is `start`."""
    spans = []
    for version, run in groupby(versions):
        end = start + sum(1 for _ in run)
        spans.append(WeightSpan(version.version, version.digest, start, end))
        start = end
    return tuple(spans)


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What to generate from a prompt of token ids.

    Attributes:
        prompt_token_ids: at least one.
        max_tokens: at least 1.
        temperature: 0 is greedy.
        top_p: sample among the likeliest tokens whose probabilities add up to this, in (0, 1].
        seed: equal seeds under equal weights give equal tokens; None draws one.
        stop: generation ends, and the text is cut, where the first of these strings begins.

    Raises:
        UsageError: a value is out of range.
    """

    prompt_token_ids: tuple[int, ...]
    max_tokens: int = 16
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not self.prompt_token_ids:
            raise UsageError("the prompt has no tokens")
        if self.max_tokens < 1:
            raise UsageError(f"max_tokens is at least 1, not {self.max_tokens}")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"temperature is 0 or more, not {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is more than 0 and at most 1, not {self.top_p}")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise UsageError(f"seed is a 64-bit integer, not {self.seed}")
        if len(self.stop) > MAX_NUM_STOP_STRINGS or "" in self.stop:
            raise UsageError(f"stop is at most {MAX_NUM_STOP_STRINGS} strings, none of them empty")


class Token(msgspec.Struct, frozen=True):
    """One generated token.

    Attributes:
        token_id: what the model chose, the end-of-sequence token included.
        text: what can be shown now that it is known. Often not this token's own text: the bytes
            of an unfinished character and what may become a stop string are held back.
        version: the weights that produced it.
        finish_reason: set on the last token alone.
    """

    token_id: int
    text: str
    version: WeightVersion
    finish_reason: FinishReason | None = None


Event = Token | CheckpointEngineError


class Generation:
    """The events of one request, passed from the engine's thread to whoever listens.

    The last event is a token with a finish reason, or the error that ended the request.
    """

    def __init__(self, request: GenerationRequest) -> None:
        self.request = request
        self.closed = False
        self._events: list[Event] = []
        self._listeners: list[Callable[[Event], None]] = []
        self._lock = threading.Lock()

    def subscribe(self, listener: Callable[[Event], None]) -> None:
        """Call `listener` with every event so far, then with each new one.

        It is called under a lock, mostly in the engine's thread: it must neither block nor raise.
        An asyncio listener is `lambda event: loop.call_soon_threadsafe(queue.put_nowait, event)`.
        """
        with self._lock:
            for event in self._events:
                listener(event)
            self._listeners.append(listener)

    def emit(self, event: Event) -> None:
        """Deliver `event`, unless the generation has ended. Only the engine calls this."""
        with self._lock:
            if self.closed:
                return
            self.closed = not isinstance(event, Token) or event.finish_reason is not None
            self._events.append(event)
            for listener in self._listeners:
                listener(event)

    def tokens(self, timeout_seconds: float) -> Iterator[Token]:
        """Yield every token, from the first on, until the generation ends.

        Raises:
            DeadlineExceeded: it has not ended `timeout_seconds` after the first was asked for.
            CheckpointEngineError: the generation failed.
        """
        deadline = time.monotonic() + timeout_seconds
        events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.subscribe(events.put)
        finish_reason = None
        while finish_reason is None:
            try:
                event = events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise DeadlineExceeded(f"no end of text after {timeout_seconds} s") from None
            if not isinstance(event, Token):
                raise event
            yield event
            finish_reason = event.finish_reason


class Sequence:
    """A request in the engine: tokens so far, and the KV cache over all of them but the last."""

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.generation = Generation(request)
        self._request = request
        self._eos_token_ids = eos_token_ids
        self._token_ids = list(request.prompt_token_ids)
        self._cache: Any = None  # whatever cache the model makes for itself
        self._num_cached = 0
        self._generator = torch.Generator()
        if request.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(request.seed)
        self._detokenizer = Detokenizer(lambda token_ids: _decode(tokenizer, token_ids))
        self._stop = StopStrings(request.stop)

    def drop_cache(self) -> None:
        """Forget the KV cache, so that the next pass recomputes it under the weights of then."""
        self._cache, self._num_cached = None, 0

    def next_token(self, model: PreTrainedModel, version: WeightVersion) -> Token:
        """Run one forward pass and sample; the caller holds `torch.inference_mode`.

        Raises:
            GenerationFailed: the logits are not numbers.
        """
        token_id = sample(
            self._next_logits(model),
            temperature=self._request.temperature,
            top_p=self._request.top_p,
            generator=self._generator,
        )
        self._token_ids.append(token_id)
        num_tokens = len(self._token_ids) - len(self._request.prompt_token_ids)
        is_eos = token_id in self._eos_token_ids
        is_last = is_eos or num_tokens == self._request.max_tokens
        text = self._stop.push(self._detokenizer.push(token_id, is_last), is_last)
        reason: FinishReason | None = "length" if is_last else None
        if is_eos or self._stop.found:
            reason = "stop"
        return Token(token_id, text, version, reason)

    def _next_logits(self, model: PreTrainedModel) -> torch.Tensor:
        """Logits [vocab], float32 on the CPU."""
        input_ids = torch.tensor([self._token_ids[self._num_cached :]], device=model.device)
        argument = cache_name(model)
        output = model(
            input_ids=input_ids, use_cache=True, logits_to_keep=1, **{argument: self._cache}
        )
        self._cache, self._num_cached = output[argument], len(self._token_ids)
        logits: torch.Tensor = output.logits[0, -1]
        return logits.float().cpu()


def sample(
    logits: torch.Tensor, *, temperature: float, top_p: float, generator: torch.Generator
) -> int:
    """Choose a token id from logits [vocab].

    Raises:
        GenerationFailed: a logit is NaN or +inf, as broken weights make them.
    """
    if not bool((logits < math.inf).all()):
        raise GenerationFailed("the model's logits are not numbers; are its weights sound?")
    if temperature == 0:
        return int(logits.argmax())
    # The largest logit becomes 0, so that no temperature, however small, overflows.
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    if top_p < 1:
        descending, order = probabilities.sort(descending=True)
        likelier = descending.cumsum(dim=-1) - descending
        probabilities[order[likelier >= top_p]] = 0
    return int(torch.multinomial(probabilities, 1, generator=generator))


class Detokenizer:
    """Turns token ids into text as they come; no character is ever shown in part.

    Decoding a window that begins at the last complete character costs the same for every token,
    and gives byte-level and space-prefixing tokenizers the context that they need.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._num_shown = 0  # tokens at the front of the window whose text has been shown

    def push(self, token_id: int, is_last: bool = False) -> str:
        """The text that `token_id` completes, which may be empty; the last completes all."""
        self._window.append(token_id)
        shown = self._decode(self._window[: self._num_shown])
        text = self._decode(self._window)
        is_complete = len(text) > len(shown) and not text.endswith("\N{REPLACEMENT CHARACTER}")
        if not is_complete and not is_last:
            return ""
        del self._window[: self._num_shown]
        self._num_shown = len(self._window)
        return text[len(shown) :]


class StopStrings:
    """Cuts text where the first stop string begins, and holds back what may become one."""

    def __init__(self, stop: tuple[str, ...]) -> None:
        self.found = False
        self._stop = stop
        self._held = ""

    def push(self, text: str, is_last: bool = False) -> str:
        """What of the text so far can be shown; after the last text nothing is held back."""
        text = self._held + text
        # The match that ends first, so that the cut does not depend on how text is chunked.
        matches = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if matches:
            self.found = True
            return text[: min(matches)[1]]
        num_held = 0 if is_last else self._num_partial(text)
        num_shown = len(text) - num_held
        self._held = text[num_shown:]
        return text[:num_shown]

    def _num_partial(self, text: str) -> int:
        """The length of the longest end of `text` with which a stop string begins."""
        return max(
            (
                length
                for stop in self._stop
                for length in range(1, min(len(stop), len(text) + 1))
                if text.endswith(stop[:length])
            ),
            default=0,
        )


def cache_name(model: PreTrainedModel) -> str:
    """What a model calls its KV cache: transformers renames it, family by family."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    # Clean-up rewrites spaces before punctuation: text that has been shown would change.
    return str(
        tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    )
