"""A scheduler thread that generates text for many requests, and stops between any two tokens.

The weights of a model can only be changed while no forward pass reads them, and requests should
not have to end for that. The engine runs one forward pass at a time, round robin over its
sequences, so every sequence gets one token a round and the next token boundary is never further
away than one pass. `pause` waits for that boundary; requests in flight and new ones then wait.
`resume` goes on: with `flush_cache` each sequence recomputes its KV cache under the new weights,
without it the old cache is kept, as engines do that trade exactness for a shorter pause.

    engine = Engine(model, tokenizer)
    engine.set_version("step-1", digest)
    engine.start()
    generation = engine.submit(GenerationRequest(prompt_token_ids=(1, 2, 3), temperature=0.0))
    for token in generation.tokens(timeout_seconds=60): ...

    engine.pause(timeout_seconds=10)          # another thread, at any time
    ...                                       # change the weights in place
    engine.set_version("step-2", digest)
    engine.resume(flush_cache=True)
"""

from __future__ import annotations

import threading
from collections import deque

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, UsageError
from checkpoint_engine.replica.sequence import (
    Event,
    Generation,
    GenerationFailed,
    GenerationRequest,
    Sequence,
    WeightVersion,
)

__all__ = ["Engine", "NotAccepting", "QueueFull"]

# For the few architectures without position embeddings, whose configuration names no limit.
DEFAULT_MAX_MODEL_LEN = 4096


class QueueFull(CheckpointEngineError):
    """As many requests wait as the engine lets wait; try again later."""


class NotAccepting(CheckpointEngineError):
    """The replica serves nothing now, and says why."""


class Engine:
    """Generates from one causal LM in one thread; every method may be called from any thread.

    The model's parameters belong to the engine's thread, except between `pause` and `resume`,
    when they belong to whoever paused.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_num_seqs: int = 16,
        max_num_waiting: int = 256,
    ) -> None:
        self._model = model.train(False)
        self._tokenizer = tokenizer
        self._tokenizer_lock = threading.Lock()
        self._eos_token_ids = _eos_token_ids(model, tokenizer)
        config = model.config.get_text_config()
        self._vocab_size: int = config.vocab_size
        self._max_model_len: int = (
            getattr(config, "max_position_embeddings", None) or DEFAULT_MAX_MODEL_LEN
        )
        self._max_num_seqs = max_num_seqs
        self._max_num_waiting = max_num_waiting
        self._version = WeightVersion("", "")
        # Guarded by the condition, which is notified whenever any of it changes.
        self._condition = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: deque[Sequence] = deque()
        self._current: Sequence | None = None  # the one in a forward pass, in no queue meanwhile
        self._refusal: str | None = None
        self._paused = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the scheduler thread, once."""
        self._thread.start()

    def stop(self, timeout_seconds: float) -> None:
        """Fail every request and end the thread; the engine cannot be started again.

        Raises:
            DeadlineExceeded: a forward pass is still running.
        """
        with self._condition:
            self._stopping = True
            self._condition.notify_all()
        self.fail_all("the engine has stopped")
        if self._thread.ident is not None:
            self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise DeadlineExceeded(f"a forward pass is still running after {timeout_seconds} s")

    # Requests

    def encode(self, text: str) -> tuple[int, ...]:
        """The token ids of a prompt, with the special tokens that the tokenizer adds."""
        # An encode call may first reset the tokenizer's truncation, which no other may overlap.
        with self._tokenizer_lock:
            return tuple(self._tokenizer.encode(text))

    def submit(self, request: GenerationRequest) -> Generation:
        """Queue `request`; it begins when a place is free and the engine is not paused.

        Raises:
            UsageError: the prompt is not for this model.
            QueueFull: too many requests wait.
            NotAccepting: the replica serves nothing now.
        """
        self._check(request)
        sequence = Sequence(request, self._tokenizer, self._eos_token_ids)
        with self._condition:
            refusal = "the engine has stopped" if self._stopping else self._refusal
            if refusal is not None:
                raise NotAccepting(refusal)
            if len(self._waiting) >= self._max_num_waiting:
                raise QueueFull(f"{len(self._waiting)} requests wait already; try again later")
            self._waiting.append(sequence)
            self._condition.notify_all()
        return sequence.generation

    def cancel(self, generation: Generation) -> None:
        """Free what `generation` holds, because nobody listens any more; harmless after its end."""
        generation.emit(GenerationFailed("the request was cancelled"))
        with self._condition:
            self._waiting = deque(s for s in self._waiting if not s.generation.closed)
            self._running = deque(s for s in self._running if not s.generation.closed)

    def fail_all(self, reason: str) -> None:
        """End every request, waiting or in flight, with `NotAccepting(reason)`."""
        with self._condition:
            sequences = [*self._running, *self._waiting]
            if self._current is not None:
                sequences.append(self._current)
            self._running.clear()
            self._waiting.clear()
            for sequence in sequences:
                sequence.generation.emit(NotAccepting(reason))

    def set_accepting(self, reason: str | None) -> None:
        """Refuse new requests for `reason`, or accept them again with None."""
        with self._condition:
            self._refusal = reason

    @property
    def num_waiting(self) -> int:
        """Requests that have not begun."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests in flight; each holds a KV cache."""
        with self._condition:
            return len(self._running) + (self._current is not None)

    # Weights

    def pause(self, timeout_seconds: float) -> None:
        """Return once no forward pass runs; none will until `resume`. Never from a listener.

        Raises:
            DeadlineExceeded: the pass that runs did not end; the engine goes on as before.
        """
        with self._condition:
            was_paused, self._paused = self._paused, True
            if not self._condition.wait_for(lambda: self._current is None, timeout_seconds):
                self._paused = was_paused
                self._condition.notify_all()
                raise DeadlineExceeded(
                    f"no token boundary within {timeout_seconds} s; a longer deadline may help"
                )

    def resume(self, *, flush_cache: bool) -> None:
        """Go on after a pause; does nothing when not paused.

        Args:
            flush_cache: recompute the KV cache of every sequence in flight, because the weights
                changed. Without it the keys and values of the old weights are kept.
        """
        with self._condition:
            if not self._paused:
                return
            if flush_cache:
                for sequence in self._running:
                    sequence.drop_cache()
            self._paused = False
            self._condition.notify_all()

    @property
    def paused(self) -> bool:
        """Whether the engine waits for `resume`."""
        return self._paused

    @property
    def weight_version(self) -> WeightVersion:
        """The weights that produce tokens now; empty strings until they were named."""
        return self._version

    def set_version(self, label: str, digest: str) -> None:
        """Name the weights that produce the tokens from here on.

        Raises:
            UsageError: forward passes may be running.
        """
        with self._condition:
            if self._current is not None or (self._thread.is_alive() and not self._paused):
                raise UsageError("pause the engine before naming its weights")
            self._version = WeightVersion(label, digest)

    # The scheduler thread

    def _run(self) -> None:
        with torch.inference_mode():
            while self._step():
                pass

    def _step(self) -> bool:
        """Produce one token of one sequence; False when the engine stops."""
        sequence = self._begin_pass()
        if sequence is None:
            return False
        event: Event
        try:
            event = sequence.next_token(self._model, self._version)
        except GenerationFailed as error:
            event = error
        except Exception as error:  # whatever a model raises is its request's failure alone
            event = GenerationFailed(f"{type(error).__name__} in the forward pass: {error}")
        sequence.generation.emit(event)
        self._end_pass(sequence)
        return True

    def _begin_pass(self) -> Sequence | None:
        with self._condition:
            # No deadline: without work there is nothing to wait for, and `stop` notifies.
            self._condition.wait_for(lambda: self._stopping or self._is_runnable())
            if self._stopping:
                return None
            while self._waiting and len(self._running) < self._max_num_seqs:
                self._running.append(self._waiting.popleft())
            self._current = self._running.popleft()
            return self._current

    def _end_pass(self, sequence: Sequence) -> None:
        with self._condition:
            self._current = None
            if not sequence.generation.closed:
                self._running.append(sequence)
            self._condition.notify_all()

    def _is_runnable(self) -> bool:
        return not self._paused and bool(self._running or self._waiting)

    def _check(self, request: GenerationRequest) -> None:
        num_tokens = len(request.prompt_token_ids) + request.max_tokens
        if num_tokens > self._max_model_len:
            raise UsageError(
                f"{len(request.prompt_token_ids)} prompt tokens and max_tokens "
                f"{request.max_tokens} exceed the model's {self._max_model_len} positions"
            )
        for token_id in (min(request.prompt_token_ids), max(request.prompt_token_ids)):
            if not 0 <= token_id < self._vocab_size:
                raise UsageError(f"token id {token_id} is not in the vocabulary of this model")


def _eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token that ends a text, by the model's generation config or by the tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config else None
    token_ids = configured if isinstance(configured, list) else [configured]
    return frozenset(
        token_id for token_id in (*token_ids, tokenizer.eos_token_id) if token_id is not None
    )
