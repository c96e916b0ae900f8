"""Weights out of models that are sharded over real ranks, and the names that they have."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from train_models import Odd, as_text, llama, make

from checkpoint_engine.errors import SourceError
from checkpoint_engine.sources import (
    GatheredSource,
    TensorSource,
    gathered,
    named_weights,
    weights_of,
)
from checkpoint_engine.store import digest_in_place
from children import call_all

Ranks = list[Any]
Publish = Callable[[str], tuple[str, list[dict[str, str]]]]

# Sharded over ranks


@pytest.mark.parametrize("how", ["fsdp", "hsdp", "fsdp and tp"])
@pytest.mark.parametrize("bucket_bytes", [1, 2000, 1 << 20])
def test_one_rank_gets_the_whole_model(four: Ranks, how: str, bucket_bytes: int) -> None:
    call_all(four, "build", kind="odd", seed=1, how=how)
    call_all(four, "step")
    whole = call_all(four, "full")[0]
    first, *others = call_all(four, "weights", bucket_bytes=bucket_bytes)
    assert [len(other) for other in others] == [0, 0, 0]
    assert len(first) == len(whole) - 1, "tied weights come once"
    whole.pop("head.weight")
    assert dict(first) == whole


@pytest.mark.parametrize("how", ["fsdp", "hsdp", "fsdp and tp"])
def test_any_rank_can_get_it_or_all_of_them(four: Ranks, how: str) -> None:
    call_all(four, "build", kind="odd", seed=2, how=how)
    expected = as_text(dict(named_weights(make("odd", 2))))
    third = call_all(four, "weights", to=3)
    assert [dict(got) for got in third] == [{}, {}, {}, expected]
    everywhere = call_all(four, "weights", to=None, as_state_dict=True)
    assert [dict(got) for got in everywhere] == [expected] * 4


def test_the_model_is_never_whole_in_memory(two: Ranks) -> None:
    call_all(two, "build", kind="wide", seed=0, how="fsdp")
    bucket_bytes = 4 << 20
    call_all(two, "peak", bucket_bytes=bucket_bytes)  # what is allocated once
    (seen, first), (_, second) = call_all(two, "peak", bucket_bytes=bucket_bytes)
    assert seen == 64 << 20
    # Two of its own, the last tensor, what gloo uses, and what an allocator under load keeps.
    assert max(first, second) < 10 * bucket_bytes, "and not 64 MiB"


def test_what_a_forward_pass_has_left_gathered_is_sent_all_the_same(two: Ranks) -> None:
    call_all(two, "build", kind="odd", seed=8, how="fsdp")
    call_all(two, "look")
    expected = as_text(dict(named_weights(make("odd", 8))))
    assert dict(call_all(two, "weights")[0]) == expected


MESHES = [(2,), (4,), (2, 2), (1, 4)]


@st.composite
def cut_tensors(draw: st.DrawFn) -> dict[str, Any]:
    """A shape, and which of its dimensions each dimension of a mesh cuts; None for a replica."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3))
    sizes = draw(st.sampled_from(MESHES))
    dims = [draw(st.none() | st.integers(0, len(shape) - 1)) for _ in sizes]
    return {
        "shape": tuple(shape),
        "sizes": sizes,
        "dims": tuple(dims),
        "dtype": draw(st.sampled_from(["float32", "bfloat16", "int8", "float64"])),
        "to": draw(st.none() | st.integers(0, sizes[0] * (sizes[1] if len(sizes) > 1 else 1) - 1)),
    }


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=cut_tensors())
def test_whatever_was_cut_is_put_together(two: Ranks, four: Ranks, case: dict[str, Any]) -> None:
    ranks = two if case["sizes"] == (2,) else four
    results = call_all(ranks, "roundtrip", **case)
    receiving = [got for got, _ in results]
    assert receiving == [case["to"] in (None, rank) for rank in range(len(ranks))]
    assert all(equal for _, equal in results)


@pytest.mark.parametrize("to", [0, 1, 2, None])
def test_a_rank_that_dies_is_an_error_on_all_others(
    start_ranks: Callable[[int], Ranks], to: int | None
) -> None:
    ranks = start_ranks(3)
    call_all(ranks, "build", kind="odd", seed=1, how="fsdp")
    ranks[2].call("die", at_message=3)
    numbers = [rank.send("weights", to=to, bucket_bytes=1, timeout_seconds=3) for rank in ranks]
    for rank, number in zip(ranks[:2], numbers, strict=False):
        with pytest.raises(RuntimeError, match="TransferError: the weights could not be gathered"):
            rank.result(number)


def test_a_rank_that_does_not_come_is_an_error(start_ranks: Callable[[int], Ranks]) -> None:
    ranks = start_ranks(2)
    call_all(ranks, "build", kind="odd", seed=1, how="fsdp")
    with pytest.raises(RuntimeError, match=r"did not ask for them within 0\.2 s"):
        ranks[0].call("weights", timeout_seconds=0.2)


def test_ranks_that_ask_for_different_weights_are_told(two: Ranks) -> None:
    call_all(two, "build", kind="odd", seed=1, how="fsdp")
    numbers = [
        rank.send("weights_without", name=name)
        for rank, name in zip(two, ("one.bias", "low.weight"), strict=True)
    ]
    for rank, number in zip(two, numbers, strict=True):
        with pytest.raises(RuntimeError, match=r"SourceError: rank . does not give the same"):
            rank.result(number)


def test_ranks_of_a_mesh_that_say_different_things_are_told_at_once(four: Ranks) -> None:
    """Also those that share no row or column with the one that differs."""
    said = ["same", "same", "else", "same"]
    numbers = [
        rank.send("agree", mesh=(2, 2), said=one) for rank, one in zip(four, said, strict=True)
    ]
    for rank, number in zip(four, numbers, strict=True):
        with pytest.raises(RuntimeError, match=r"SourceError: rank . does not give the same"):
            rank.result(number)
    call_all(four, "agree", mesh=(2, 2), said="same")


# The trainer's ranks are the parameter server's


@pytest.mark.parametrize("how", ["fsdp", "hsdp", "fsdp and tp"])
@pytest.mark.parametrize("source", ["state dict", "model"])
def test_every_engine_ends_with_the_full_model(
    serving: Ranks, publish: Publish, how: str, source: str
) -> None:
    call_all(serving, "build", kind="odd", seed=3, how=how)
    call_all(serving, "step")
    whole = call_all(serving, "full")[0]
    if source == "model":
        whole.pop("head.weight")
    shares = call_all(serving, "register", name=how, how=source)
    _, given = publish(how)
    assert given == [whole] * 4
    if source == "model":  # in many small buckets
        assert all(shares), "every rank has a share"
        assert max(map(len, shares)) < len(whole), "and none has all"


def test_a_version_is_called_as_if_it_had_never_been_sharded(
    serving: Ranks, publish: Publish
) -> None:
    call_all(serving, "build", kind="odd", seed=4, how="fsdp")
    call_all(serving, "register", name="sharded", how="state dict")
    digest, _ = publish("sharded")
    assert digest == digest_in_place(TensorSource(make("odd", 4).state_dict())).digest


def test_a_share_is_gathered_while_it_is_registered(serving: Ranks) -> None:
    call_all(serving, "build", kind="wide", seed=0, how="fsdp")
    bucket_bytes = 4 << 20
    call_all(serving, "peak_registering", bucket_bytes=bucket_bytes)
    results = call_all(serving, "peak_registering", bucket_bytes=bucket_bytes)
    assert [share for share, _ in results] == [16 << 20] * 4
    assert max(beside for _, beside in results) < 10 * bucket_bytes, "and not 64 MiB"


def test_a_rank_that_cannot_register_does_not_stop_the_others(serving: Ranks) -> None:
    call_all(serving, "build", kind="odd", seed=5, how="whole")
    serving[1].call("register", name="taken", how="model")
    call_all(serving, "build", kind="odd", seed=5, how="fsdp")
    numbers = [rank.send("register", name="taken", how="model") for rank in serving]
    with pytest.raises(RuntimeError, match="StoreError: version 'taken' is already registered"):
        serving[1].result(numbers[1])
    for rank, number in zip(serving, numbers, strict=True):
        assert rank is serving[1] or rank.result(number)
    call_all(serving, "unregister", name="taken")


def test_a_rank_that_registers_something_else_is_an_error_on_all(serving: Ranks) -> None:
    call_all(serving, "build", kind="odd", seed=5, how="fsdp")
    numbers = [
        rank.send("register", name="odd one out", how="model", without=without)
        for rank, without in zip(serving, ("", "", "one.bias", ""), strict=True)
    ]
    for rank, number in zip(serving, numbers, strict=True):
        with pytest.raises(RuntimeError, match=r"SourceError: rank . does not give the same"):
            rank.result(number)


def test_a_rank_that_dies_while_it_registers_is_an_error_on_all_others(
    start_ranks: Callable[[int], Ranks],
) -> None:
    ranks = start_ranks(2)
    call_all(ranks, "serve_weights")
    call_all(ranks, "build", kind="odd", seed=5, how="fsdp")
    ranks[1].call("die", at_message=3)
    number = ranks[0].send("register", name="dying", how="model")
    ranks[1].send("register", name="dying", how="model")
    with pytest.raises(RuntimeError, match="TransferError: the weights could not be gathered"):
        ranks[0].result(number)


# Names


@pytest.mark.parametrize("kind", ["tied llama", "llama", "experts"])
def test_names_are_those_of_the_saved_checkpoint(two: Ranks, tmp_path: Path, kind: str) -> None:
    make(kind, 6).save_pretrained(tmp_path)  # type: ignore[operator]
    saved = as_text(load_file(tmp_path / "model.safetensors"))
    assert as_text(dict(named_weights(make(kind, 6)))) == saved
    call_all(two, "build", kind=kind, seed=6, how="fsdp")
    assert dict(call_all(two, "weights")[0]) == saved


def test_experts_that_are_saved_one_by_one_are_served_so(
    serving: Ranks, publish: Publish, tmp_path: Path
) -> None:
    make("experts", 6).save_pretrained(tmp_path)  # type: ignore[operator]
    saved = as_text(load_file(tmp_path / "model.safetensors"))
    call_all(serving, "build", kind="experts", seed=6, how="fsdp")
    call_all(serving, "register", name="experts", how="model")
    _, given = publish("experts")
    assert given == [saved] * 4


def test_wrappers_leave_no_trace(two: Ranks) -> None:
    expected = as_text(dict(named_weights(make("odd", 7))))
    model = make("odd", 7)
    assert isinstance(model, Odd)
    model.blocks[0] = checkpoint_wrapper(model.blocks[0])
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")  # type: ignore[assignment]
    assert as_text(dict(named_weights(torch.compile(model, backend="eager")))) == expected  # type: ignore[arg-type]
    assert as_text(dict(named_weights(model.state_dict()))) == expected
    call_all(two, "build", kind="odd", seed=7, how="ddp")
    assert [dict(got) for got in call_all(two, "weights")] == [expected, {}]


def test_buffers_are_sent_if_they_are_persistent() -> None:
    names = [name for name, _ in named_weights(Odd())]
    assert "steps" in names
    assert "cache" not in names


class WithLoss(torch.nn.Module):
    """What a training loop wraps its model in: all tensors are in one part, `module`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.module, self.loss = model, torch.nn.CrossEntropyLoss()


@pytest.mark.parametrize("wrapped", [lambda model: model, WithLoss, torch.nn.DataParallel])
def test_weights_that_should_be_tied_and_are_not_are_refused(
    wrapped: Callable[[torch.nn.Module], torch.nn.Module],
) -> None:
    model = llama(tied=True)
    names = [name for name, _ in named_weights(model)]
    assert [name for name, _ in named_weights(wrapped(model))] == names
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    with pytest.raises(SourceError, match=r"'lm_head.weight' should be tied"):
        list(named_weights(wrapped(model)))


def test_live_tensors_are_given_as_they_lie() -> None:
    model = Odd()
    given = dict(named_weights(model))
    assert given["one.bias"].data_ptr() == model.one.bias.data_ptr()
    assert not given["one.bias"].requires_grad


def test_what_is_gathered_is_made_before_other_threads_read_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their streams would not wait for the one on which it is made."""
    made: set[int] = set()

    def note(tensors: Iterable[torch.Tensor]) -> None:
        made.update(tensor.data_ptr() for tensor in tensors)

    monkeypatch.setattr(gathered, "wait_until_made", note)
    source = GatheredSource(weights_of(Odd()))
    source.read_into("blocks.0.down.bias", 0, memoryview(bytearray(4)))
    assert source._ready["blocks.0.down.bias"].data_ptr() in made
    source.close()


def test_what_has_no_bytes_is_refused_by_name() -> None:
    with pytest.raises(SourceError, match="'w' has no dense bytes"):
        list(named_weights({"w": torch.eye(3).to_sparse()}))
    with torch.device("meta"), pytest.raises(SourceError, match=r"'steps' has no dense"):
        list(named_weights(Odd()))
