from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_replica import make_tokenizer

from checkpoint_engine.errors import UsageError
from checkpoint_engine.replica.sequence import (
    Detokenizer,
    GenerationFailed,
    GenerationRequest,
    StopStrings,
    WeightVersion,
    sample,
    weight_spans,
)

TOKENIZER = make_tokenizer()


def decode(token_ids: list[int]) -> str:
    return str(TOKENIZER.decode(token_ids, skip_special_tokens=True))


def detokenize(token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(decode)
    last = len(token_ids) - 1
    return [detokenizer.push(token_id, i == last) for i, token_id in enumerate(token_ids)]


# Spans


@given(st.lists(st.sampled_from([WeightVersion(v, d) for v in "ab" for d in "xy"])))
def test_spans_tile_the_tokens_and_merge_neighbours(versions: list[WeightVersion]) -> None:
    spans = weight_spans(versions)
    per_token = [WeightVersion(s.version, s.digest) for s in spans for _ in range(s.start, s.end)]
    assert per_token == versions
    assert [s.start for s in spans] == [0, *(s.end for s in spans[:-1])][: len(spans)]
    pairs = itertools.pairwise(spans)
    assert all((a.version, a.digest) != (b.version, b.digest) for a, b in pairs)


# Text


@given(st.lists(st.integers(0, 319), min_size=1))
def test_text_in_pieces_is_the_text_of_the_whole_even_for_broken_bytes(token_ids: list[int]):
    assert "".join(detokenize(token_ids)) == decode(token_ids)


@given(st.text(st.characters(exclude_characters="\ufffd", exclude_categories=["Cs"]), min_size=1))
def test_no_character_is_shown_in_part(text: str) -> None:
    pieces = detokenize(TOKENIZER.encode(text))
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def cut_char_by_char(text: str, stop: list[str]) -> tuple[str, bool]:
    for end in range(len(text) + 1):
        begins = [end - len(s) for s in stop if text[:end].endswith(s)]
        if begins:
            return text[: min(begins)], True
    return text, False


@given(
    st.lists(st.text("ab", max_size=4), max_size=8),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_strings_cut_alike_however_the_text_is_chunked(
    chunks: list[str], stop: list[str]
) -> None:
    expected, is_cut = cut_char_by_char("".join(chunks), stop)
    stop_strings = StopStrings(tuple(stop))
    shown = ""
    for chunk in chunks:
        shown += stop_strings.push(chunk)
        assert expected.startswith(shown)
        if stop_strings.found:
            break
    else:
        shown += stop_strings.push("", is_last=True)
    assert (shown, stop_strings.found) == (expected, is_cut)


def test_text_that_cannot_become_a_stop_string_is_not_held_back() -> None:
    stop_strings = StopStrings(("END",))
    assert [stop_strings.push(text) for text in ("The E", "N", "T.")] == ["The ", "", "ENT."]


# Sampling


@given(
    st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=20),
    st.floats(0.01, 1.0),
    st.integers(0, 100),
)
def test_only_tokens_of_the_nucleus_are_sampled(
    values: list[float], top_p: float, seed: int
) -> None:
    logits = torch.tensor(values)
    generator = torch.Generator().manual_seed(seed)
    token_id = sample(logits, temperature=1.0, top_p=top_p, generator=generator)
    probabilities = torch.softmax(logits, dim=-1)
    likelier = probabilities[probabilities > probabilities[token_id]].sum()
    assert likelier < top_p + 1e-5


@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-3])
def test_no_temperature_is_too_small(temperature: float) -> None:
    logits = torch.tensor([1.0, 90.0, 2.0, -float("inf")])
    generator = torch.Generator().manual_seed(0)
    assert sample(logits, temperature=temperature, top_p=1.0, generator=generator) == 1


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_broken_weights_are_refused(broken: float, temperature: float) -> None:
    logits = torch.tensor([1.0, broken, 2.0])
    with pytest.raises(GenerationFailed, match="weights"):
        sample(logits, temperature=temperature, top_p=1.0, generator=torch.Generator())


# Requests


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt_token_ids", ()),
        ("max_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("seed", 2**63),
        ("stop", ("",)),
        ("stop", ("a",) * 17),
    ],
)
def test_a_value_out_of_range_is_refused(field: str, value: object) -> None:
    with pytest.raises(UsageError):
        GenerationRequest(**{"prompt_token_ids": (1,), field: value})
