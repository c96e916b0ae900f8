from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from tiny_replica import EOS, TIMEOUT_SECONDS, Gate, greedy, load_in_place, wait_until
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, UsageError
from checkpoint_engine.replica.engine import Engine, NotAccepting, QueueFull
from checkpoint_engine.replica.sequence import (
    Generation,
    GenerationFailed,
    GenerationRequest,
    Token,
    WeightSpan,
    cache_name,
    weight_spans,
)

PROMPT = [5, 17, 250, 3]


def request(max_tokens: int, prompt: list[int] = PROMPT, **sampling: Any) -> GenerationRequest:
    fields = {"temperature": 0.0, **sampling}
    return GenerationRequest(prompt_token_ids=tuple(prompt), max_tokens=max_tokens, **fields)


def finish(generation: Generation) -> list[Token]:
    return list(generation.tokens(TIMEOUT_SECONDS))


def token_ids(tokens: list[Token]) -> list[int]:
    return [token.token_id for token in tokens]


def spans(tokens: list[Token]) -> tuple[WeightSpan, ...]:
    return weight_spans(token.version for token in tokens)


def pause_after(engine: Engine, gate: Gate, generation: Generation, num_tokens: int) -> None:
    """Pause at the boundary after `num_tokens` tokens or the one after it. The gate has as many
    permits, so the engine cannot be past them however late the pause comes."""
    stream = generation.tokens(TIMEOUT_SECONDS)
    for _ in range(num_tokens):
        next(stream)
    pausing = threading.Thread(target=engine.pause, args=(TIMEOUT_SECONDS,))
    pausing.start()
    wait_until(lambda: engine.paused)
    gate.open()
    pausing.join(TIMEOUT_SECONDS)


# Generation


def test_greedy_tokens_are_those_of_transformers(engine: Engine, old: PreTrainedModel) -> None:
    tokens = finish(engine.submit(request(60)))
    assert token_ids(tokens) == greedy(old, PROMPT, 60)
    assert len(set(token_ids(tokens))) > 10, "the text is too dull to show anything"
    assert [token.finish_reason for token in tokens] == [None] * 59 + ["length"]


def test_text_is_that_of_the_tokens(engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = finish(engine.submit(request(40)))
    text = "".join(token.text for token in tokens)
    assert text == tokenizer.decode(token_ids(tokens), skip_special_tokens=True)


def test_requests_that_run_together_do_not_disturb_each_other(
    engine: Engine, gate: Gate, old: PreTrainedModel
) -> None:
    prompts = [[1 + i, 2 * i, 300 - i] for i in range(24)]
    engine.pause(TIMEOUT_SECONDS)
    generations = [engine.submit(request(6, prompt)) for prompt in prompts]
    gate.close(num_permits=1)
    engine.resume(flush_cache=False)
    wait_until(lambda: engine.num_running == 16)
    assert engine.num_waiting == 8
    gate.open()
    for prompt, generation in zip(prompts, generations, strict=True):
        assert token_ids(finish(generation)) == greedy(old, prompt, 6)


def test_every_sequence_gets_one_token_a_round(engine: Engine, gate: Gate) -> None:
    order: list[int] = []
    engine.pause(TIMEOUT_SECONDS)
    for index in range(3):
        generation = engine.submit(request(4))
        generation.subscribe(lambda _, index=index: order.append(index))
    engine.resume(flush_cache=False)
    wait_until(lambda: len(order) == 12)
    assert order == [0, 1, 2] * 4


def test_a_prompt_is_computed_once_and_then_one_token_a_pass(engine: Engine, gate: Gate) -> None:
    finish(engine.submit(request(5)))
    assert gate.num_inputs == [len(PROMPT), 1, 1, 1, 1]


def test_equal_seeds_give_equal_tokens(engine: Engine) -> None:
    def tokens_with(seed: int | None) -> list[int]:
        return token_ids(finish(engine.submit(request(30, temperature=1.0, seed=seed))))

    assert tokens_with(7) == tokens_with(7)
    assert tokens_with(7) != tokens_with(8)
    assert tokens_with(None) != tokens_with(None)


def test_a_tiny_nucleus_is_greedy(engine: Engine, old: PreTrainedModel) -> None:
    tokens = finish(engine.submit(request(20, temperature=1.0, top_p=1e-6)))
    assert token_ids(tokens) == greedy(old, PROMPT, 20)


@pytest.mark.parametrize("declared_by", ["model", "tokenizer"])
def test_generation_ends_at_the_end_of_sequence_token(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    old: PreTrainedModel,
    declared_by: str,
) -> None:
    expected = greedy(old, PROMPT, 30)
    eos = expected[20]
    if declared_by == "model":
        model.generation_config.eos_token_id = [eos, 0]
    else:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(eos)
    engine = Engine(model, tokenizer)
    engine.start()
    tokens = finish(engine.submit(request(30)))
    engine.stop(TIMEOUT_SECONDS)
    assert token_ids(tokens) == expected[: expected.index(eos) + 1]
    assert tokens[-1].finish_reason == "stop"


def test_special_tokens_are_not_shown(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.decode([tokenizer.convert_tokens_to_ids(EOS)], skip_special_tokens=True) == ""


def test_a_stop_string_that_crosses_tokens_cuts_the_text(
    engine: Engine, tokenizer: PreTrainedTokenizerBase
) -> None:
    whole = "".join(token.text for token in finish(engine.submit(request(60))))
    end = next(i for i in range(20, 60) if whole[i].isascii()) + 1
    stop = whole[end - 6 : end]
    tokens = finish(engine.submit(request(60, stop=(stop, "never to be seen"))))
    text = "".join(token.text for token in tokens)
    assert text == whole[: whole.index(stop)]
    assert tokens[-1].finish_reason == "stop"
    # Every token counts, also those whose text was cut; the last one completed the stop string.
    assert stop in tokenizer.decode(token_ids(tokens))
    assert stop not in tokenizer.decode(token_ids(tokens)[:-1])
    assert stop not in tokenizer.decode(token_ids(tokens)[-1:])


@pytest.mark.parametrize(
    ("prompt", "max_tokens", "message"),
    [([320], 1, "token id 320"), ([-1], 1, "token id -1"), ([1] * 1000, 25, "1024 positions")],
)
def test_a_prompt_that_is_not_for_this_model_is_refused(
    engine: Engine, prompt: list[int], max_tokens: int, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        engine.submit(request(max_tokens, prompt))


def test_a_failing_pass_fails_its_own_request_alone(
    engine: Engine, model: PreTrainedModel, old: PreTrainedModel
) -> None:
    def fail_on_13(_model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        if 13 in kwargs["input_ids"]:
            raise RuntimeError("thirteen")

    model.register_forward_pre_hook(fail_on_13, with_kwargs=True)
    sound, failing = engine.submit(request(10)), engine.submit(request(10, [1, 13]))
    with pytest.raises(GenerationFailed, match="RuntimeError in the forward pass: thirteen"):
        finish(failing)
    assert token_ids(finish(sound)) == greedy(old, PROMPT, 10)
    assert engine.num_running == 0


# Queue, cancellation, refusal


def test_too_many_waiting_requests_are_refused(engine: Engine) -> None:
    engine.pause(TIMEOUT_SECONDS)
    generations = [engine.submit(request(1)) for _ in range(32)]
    with pytest.raises(QueueFull, match="32 requests wait"):
        engine.submit(request(1))
    engine.resume(flush_cache=False)
    assert all(finish(generation) for generation in generations)


def test_cancellation_frees_the_place_at_once_even_while_paused(engine: Engine) -> None:
    generations = [engine.submit(request(1000)) for _ in range(20)]
    wait_until(lambda: engine.num_running == 16)
    engine.pause(TIMEOUT_SECONDS)
    for generation in generations:
        engine.cancel(generation)
    assert (engine.num_running, engine.num_waiting) == (0, 0)
    with pytest.raises(GenerationFailed, match="cancelled"):
        finish(generations[0])


def test_a_request_cancelled_within_its_pass_ends_there(engine: Engine, gate: Gate) -> None:
    gate.close(num_permits=3)
    generation = engine.submit(request(1000))
    stream = generation.tokens(TIMEOUT_SECONDS)
    for _ in range(3):
        next(stream)
    engine.cancel(generation)
    gate.open()
    wait_until(lambda: engine.num_running == 0)
    assert len(gate.num_inputs) <= 4


def test_a_replica_that_accepts_nothing_says_why_and_finishes_what_it_has(
    engine: Engine, old: PreTrainedModel
) -> None:
    generation = engine.submit(request(10))
    engine.set_accepting("waiting for the first weights")
    with pytest.raises(NotAccepting, match="waiting for the first weights"):
        engine.submit(request(1))
    assert token_ids(finish(generation)) == greedy(old, PROMPT, 10)
    engine.set_accepting(None)
    assert token_ids(finish(engine.submit(request(1)))) == greedy(old, PROMPT, 1)


def test_a_torn_replica_fails_what_is_in_flight(engine: Engine) -> None:
    generations = [engine.submit(request(1000)) for _ in range(20)]
    wait_until(lambda: engine.num_running == 16)
    engine.pause(TIMEOUT_SECONDS)
    engine.fail_all("torn: restart this replica")
    for generation in generations:
        with pytest.raises(NotAccepting, match="torn: restart this replica"):
            finish(generation)
    assert (engine.num_running, engine.num_waiting) == (0, 0)


def test_stop_ends_everything(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    engine = Engine(model, tokenizer)
    engine.start()
    generation = engine.submit(request(1000))
    engine.stop(TIMEOUT_SECONDS)
    with pytest.raises(NotAccepting, match="stopped"):
        finish(generation)
    with pytest.raises(NotAccepting, match="stopped"):
        engine.submit(request(1))


def test_a_reader_does_not_wait_for_ever(engine: Engine) -> None:
    engine.pause(TIMEOUT_SECONDS)
    with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
        list(engine.submit(request(1)).tokens(timeout_seconds=0.01))


def test_a_late_listener_hears_everything(engine: Engine) -> None:
    generation = engine.submit(request(5))
    tokens = finish(generation)
    heard: list[Token | CheckpointEngineError] = []
    generation.subscribe(heard.append)
    assert heard == tokens


# Pause and swap


def test_no_pass_runs_while_paused_and_all_goes_on_after(
    engine: Engine, gate: Gate, old: PreTrainedModel
) -> None:
    gate.close(num_permits=5)
    generation = engine.submit(request(30))
    pause_after(engine, gate, generation, num_tokens=5)
    num_passes = len(gate.num_inputs)
    waiting = engine.submit(request(30, [9]))
    engine.pause(TIMEOUT_SECONDS)  # again: harmless
    with pytest.raises(DeadlineExceeded):
        list(waiting.tokens(timeout_seconds=0.1))
    assert len(gate.num_inputs) == num_passes
    engine.resume(flush_cache=False)
    engine.resume(flush_cache=True)  # again: harmless
    assert token_ids(finish(generation)) == greedy(old, PROMPT, 30)
    assert token_ids(finish(waiting)) == greedy(old, [9], 30)


def test_a_pause_that_reaches_no_boundary_changes_nothing(
    engine: Engine, gate: Gate, old: PreTrainedModel
) -> None:
    gate.close(num_permits=2)
    generation = engine.submit(request(20))
    wait_until(lambda: len(gate.num_inputs) == 2 and engine.num_running == 1)
    stream = generation.tokens(TIMEOUT_SECONDS)
    assert [next(stream).token_id for _ in range(2)] == greedy(old, PROMPT, 2)
    wait_until(lambda: engine._current is not None)
    with pytest.raises(DeadlineExceeded, match="token boundary"):
        engine.pause(timeout_seconds=0.01)
    assert not engine.paused
    gate.open()
    assert token_ids(finish(generation)) == greedy(old, PROMPT, 20)


def swap(engine: Engine, model: PreTrainedModel, new: PreTrainedModel, *, flush: bool) -> None:
    """What an update does, once the engine is paused."""
    load_in_place(model, new)
    engine.set_version("new", "digest of new")
    engine.resume(flush_cache=flush)


@pytest.mark.parametrize("num_tokens", [1, 15, 30])
def test_with_a_flush_a_request_goes_on_exactly_as_the_new_weights_would(
    engine: Engine,
    model: PreTrainedModel,
    gate: Gate,
    old: PreTrainedModel,
    new: PreTrainedModel,
    num_tokens: int,
) -> None:
    gate.close(num_permits=num_tokens)
    generation = engine.submit(request(40))
    pause_after(engine, gate, generation, num_tokens)
    swap(engine, model, new, flush=True)
    tokens = finish(generation)

    before, after = spans(tokens)
    assert before == WeightSpan("old", "digest of old", 0, before.end)
    assert after == WeightSpan("new", "digest of new", before.end, 40)
    assert before.end in (num_tokens, num_tokens + 1)
    made_before, made_after = token_ids(tokens)[: before.end], token_ids(tokens)[before.end :]
    assert made_before == greedy(old, PROMPT, before.end)
    assert made_after == greedy(new, PROMPT + made_before, 40 - before.end)
    assert made_after != greedy(old, PROMPT + made_before, 40 - before.end)
    recomputed = len(PROMPT) + before.end
    assert [n for n in gate.num_inputs if n > 1] == [len(PROMPT), recomputed]


def test_without_a_flush_the_keys_and_values_of_the_old_weights_stay(
    engine: Engine, model: PreTrainedModel, gate: Gate, old: PreTrainedModel, new: PreTrainedModel
) -> None:
    gate.close(num_permits=20)
    generation = engine.submit(request(40))
    pause_after(engine, gate, generation, num_tokens=20)
    swap(engine, model, new, flush=False)
    tokens = finish(generation)

    before, after = spans(tokens)
    assert (before.version, after.version, after.end) == ("old", "new", 40)
    assert [n for n in gate.num_inputs if n > 1] == [len(PROMPT)]
    assert token_ids(tokens) == greedy_with_kept_cache(old, new, before.end, 40)


@torch.inference_mode()
def greedy_with_kept_cache(
    old: PreTrainedModel, new: PreTrainedModel, boundary: int, num_tokens: int
) -> list[int]:
    inputs, cache, tokens = PROMPT, None, []
    for index in range(num_tokens):
        model = old if index < boundary else new
        argument = cache_name(model)
        output = model(input_ids=torch.tensor([inputs]), use_cache=True, **{argument: cache})
        cache = output[argument]
        tokens.append(int(output.logits[0, -1].argmax()))
        inputs = tokens[-1:]
    return tokens


def test_a_request_across_many_swaps_names_each_one(
    engine: Engine, model: PreTrainedModel, old: PreTrainedModel, new: PreTrainedModel, gate: Gate
) -> None:
    gate.close(num_permits=1)
    generation = engine.submit(request(80))
    pause_after(engine, gate, generation, num_tokens=1)
    for index, source in enumerate([new, old, old, new]):
        load_in_place(model, source)
        engine.set_version(f"step-{index}", f"digest {index}")
        gate.close(num_permits=10)
        num_passes = len(gate.num_inputs)
        engine.resume(flush_cache=True)
        wait_until(lambda least=num_passes + 10: len(gate.num_inputs) >= least)
        pausing = threading.Thread(target=engine.pause, args=(TIMEOUT_SECONDS,))
        pausing.start()
        wait_until(lambda: engine.paused)
        gate.open()
        pausing.join(TIMEOUT_SECONDS)
    engine.resume(flush_cache=False)
    tokens = finish(generation)
    found = spans(tokens)
    assert [span.version for span in found] == ["old", "step-0", "step-1", "step-2", "step-3"]
    assert [span.start for span in found] == [0, *(span.end for span in found[:-1])]
    assert found[-1].end == len(tokens) == 80
    sources = {"old": old, "step-0": new, "step-1": old, "step-2": old, "step-3": new}
    made = token_ids(tokens)
    for span in found:
        continuation = greedy(
            sources[span.version], PROMPT + made[: span.start], span.end - span.start
        )
        assert made[span.start : span.end] == continuation


def test_an_equal_version_makes_one_span(engine: Engine, gate: Gate) -> None:
    gate.close(num_permits=5)
    generation = engine.submit(request(20))
    pause_after(engine, gate, generation, num_tokens=5)
    engine.set_version("old", "digest of old")
    engine.resume(flush_cache=True)
    assert spans(finish(generation)) == (WeightSpan("old", "digest of old", 0, 20),)


def test_weights_are_named_only_while_no_pass_can_run(engine: Engine) -> None:
    with pytest.raises(UsageError, match="pause"):
        engine.set_version("new", "digest of new")
    assert engine.weight_version.version == "old"
