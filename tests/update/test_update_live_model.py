"""What may be written into a live model, and what is live afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from toy_adapter import Memory, content_of
from update_models import LARGE, Odd, bytes_of, flip, fresh

from checkpoint_engine.adapters.live import LiveModel, check_written, write
from checkpoint_engine.errors import AdapterError, VerificationError
from checkpoint_engine.memory import byte_workers

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with byte_workers() as pool:
        yield pool


def bring(model: nn.Module, tensors: dict[str, torch.Tensor], pool: Executor) -> str:
    """Bind, write, check; returns the digest of the live parameters."""
    live = LiveModel(model)
    shard = Memory().register("new", tensors)
    copies = live.bind(content_of(shard))
    written = write(copies, pool)
    check_written(copies, written)
    assert live.digest_of(written, live.names) == live.digest(), "what is live was not digested"
    return live.digest()


def test_every_parameter_gets_exactly_its_new_bytes(pool: Executor) -> None:
    model, new = Odd(seed=1), Odd(seed=2)
    frequencies = model.frequencies.clone()
    assert bytes_of(model) != bytes_of(new)
    digest = bring(model, fresh(seed=2), pool)
    assert bytes_of(model) == bytes_of(new)
    assert torch.equal(model.frequencies, frequencies), "not persistent, so no part of a version"
    assert digest == Memory().register("new", fresh(seed=2)).manifest.digest


def test_the_layout_of_a_parameter_is_kept(pool: Executor) -> None:
    model = Odd(seed=1)
    bring(model, fresh(seed=2), pool)
    assert not model.transposed.is_contiguous()
    assert model.head is model.embedding


def test_a_checkpoint_of_a_live_model_is_itself(pool: Executor) -> None:
    model = Odd(seed=1)
    before = bytes_of(model)
    bring(model, dict(model.state_dict()), pool)
    assert bytes_of(model) == before


@pytest.mark.parametrize("left_out", ["head", "embedding"])
def test_a_tied_tensor_may_come_under_any_of_its_names(left_out: str, pool: Executor) -> None:
    model = Odd(seed=1)
    tensors = fresh(seed=2)
    del tensors[left_out]
    bring(model, tensors, pool)
    assert bytes_of(model) == bytes_of(Odd(seed=2))


def test_tied_parameters_are_written_once() -> None:
    model = Odd(seed=1)
    shard = Memory().register("new", fresh(seed=2))
    copies = LiveModel(model).bind(content_of(shard))
    targets = [copy.target.data_ptr() for copy in copies.copies if copy.target.numel()]
    assert len(set(targets)) == len(targets)
    assert len(LiveModel(model).snapshot().copies) == len(copies.copies)


def test_tied_names_with_different_content_are_refused() -> None:
    tensors = fresh(seed=2)
    tensors["head"] = tensors["embedding"] + 1
    shard = Memory().register("new", tensors)
    with pytest.raises(AdapterError, match="'head' and 'embedding' are one tensor"):
        LiveModel(Odd(seed=1)).bind(content_of(shard))


def test_names_that_only_differ_in_the_checkpoint_need_not_be_tied_there(pool: Executor) -> None:
    model = Odd(seed=1)
    tensors = fresh(seed=2)
    tensors["head"] = tensors["embedding"].clone()
    bring(model, tensors, pool)
    assert bytes_of(model) == bytes_of(Odd(seed=2))


def test_buffers_that_are_not_persistent_are_left_aside(pool: Executor) -> None:
    model = Odd(seed=1)
    before = model.frequencies.clone()
    bring(model, {**fresh(seed=2), "frequencies": torch.zeros(3)}, pool)
    assert torch.equal(model.frequencies, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stranger": torch.zeros(2)}, "the model has no tensor 'stranger'"),
        ({"a": torch.zeros(2), "b": torch.zeros(2)}, r"no tensor 'a' \(and 1 more\)"),
        ({"large": None}, "the checkpoint lacks 'large'"),
        ({"mean": None}, "the checkpoint lacks 'mean'"),
        ({"mean": None, "large": None}, r"lacks 'large' \(and 1 more\)"),
        ({"scale": torch.zeros(1)}, r"'scale': the checkpoint has shape \[1\], the model \[\]"),
        ({"transposed": torch.zeros(3, 5)}, r"shape \[3, 5\], the model \[5, 3\]"),
        ({"num_steps": torch.tensor(1.0)}, "'num_steps': torch.float32 is not cast to torch.int64"),
        ({"mean": torch.zeros(7, dtype=torch.int64)}, "torch.int64 is not cast to torch.float32"),
        ({"mean": torch.zeros(7).double()}, "torch.float64 is not cast to torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(
    change: dict[str, torch.Tensor | None], message: str
) -> None:
    model = Odd(seed=1)
    before = bytes_of(model)
    merged = {**fresh(seed=2), **change}
    tensors = {name: tensor for name, tensor in merged.items() if tensor is not None}
    shard = Memory().register("new", tensors)
    with pytest.raises(AdapterError, match=message):
        LiveModel(model).bind(content_of(shard))
    assert bytes_of(model) == before


@pytest.mark.parametrize("target", FLOATS, ids=str)
@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_casts_are_those_of_torch_bit_for_bit(
    source: torch.dtype, target: torch.dtype, pool: Executor
) -> None:
    model = Odd(seed=1, dtype=target)
    tensors = fresh(seed=2, dtype=source)
    extremes = [float("inf"), float("-inf"), float("nan"), -0.0, 1e-45, 65520.0, 3e38]
    tensors["mean"] = torch.tensor(extremes).to(source)
    bring(model, tensors, pool)
    expected = {
        name: tensor.to(target) if tensor.is_floating_point() else tensor
        for name, tensor in tensors.items()
    }
    for name, live in model.state_dict().items():
        assert live.dtype == expected[name].dtype
        same = live.contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, expected[name].contiguous().reshape(-1).view(torch.uint8)), name


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_any_bits_survive_or_are_cast_as_torch_casts_them(
    seed: int, source: torch.dtype, target: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(0, 256, (64,), dtype=torch.uint8, generator=generator)
    new = bits.view(source)
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros_like(new, dtype=target))})
    with byte_workers() as pool:
        bring(model, {"w": new}, pool)
    assert torch.equal(model["w"].detach().view(torch.uint8), new.to(target).view(torch.uint8))


# Digests


def test_the_digest_of_a_model_is_that_of_its_checkpoint() -> None:
    assert LiveModel(Odd(seed=1)).digest() == Memory().register("v", fresh(1)).manifest.digest


@pytest.mark.parametrize("name", ["embedding", "scale", "mean", "num_steps", "large"])
def test_one_bit_of_a_live_tensor_changes_the_digest(name: str) -> None:
    model = Odd(seed=1)
    live = LiveModel(model)
    before = live.digest()
    assert live.digest() == before
    flip(model.state_dict()[name], index=-1)
    assert live.digest() != before
    flip(model.state_dict()[name], index=-1)
    assert live.digest() == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["embedding", "large", "transposed", "num_steps"])
def test_what_does_not_land_as_it_was_sent_is_caught_by_name(
    name: str, dtype: torch.dtype, pool: Executor
) -> None:
    model = Odd(seed=1, dtype=dtype)
    shard = Memory().register("new", fresh(seed=2))
    copies = LiveModel(model).bind(content_of(shard))
    check_written(copies, write(copies, pool))
    copies = LiveModel(model).bind(content_of(shard))
    (meta,) = (meta for meta in shard.manifest.tensors if meta.name == name)
    shard.memory[meta.end - 1] ^= 1
    with pytest.raises(VerificationError, match=f"'{name}' is live with other bytes"):
        check_written(copies, write(copies, pool))


def test_parameters_that_overlap_are_checked_after_both_were_written(pool: Executor) -> None:
    """Tied by a slice: whatever is written last is what both of them serve."""
    whole = torch.zeros(8, 4)
    model = nn.ParameterDict({"head": nn.Parameter(whole[:6]), "whole": nn.Parameter(whole)})
    agreeing = torch.arange(32.0).view(8, 4)
    bring(model, {"head": agreeing[:6].clone(), "whole": agreeing}, pool)
    assert torch.equal(model["head"], agreeing[:6])
    with pytest.raises((AdapterError, VerificationError)):
        bring(model, {"head": torch.ones(6, 4), "whole": agreeing}, pool)


# The way back


def test_a_snapshot_leads_back_byte_for_byte(pool: Executor) -> None:
    model = Odd(seed=1)
    live = LiveModel(model)
    before, digest = bytes_of(model), live.digest()
    snapshot = live.snapshot()
    bring(model, fresh(seed=2), pool)
    assert bytes_of(model) != before
    check_written(snapshot, write(snapshot, pool))
    assert (bytes_of(model), live.digest()) == (before, digest)


def test_a_snapshot_is_not_changed_by_what_follows(pool: Executor) -> None:
    model = Odd(seed=1)
    snapshot = LiveModel(model).snapshot()
    copies = {copy.name: copy.whole().clone() for copy in snapshot.copies}
    bring(model, fresh(seed=2), pool)
    assert all(torch.equal(copy.whole(), copies[copy.name]) for copy in snapshot.copies)


# Step by step, while requests go on


def test_a_step_is_a_chunk_and_every_bit_is_looked_at() -> None:
    model = Odd(seed=1)
    live = LiveModel(model)
    recorded = live.digests()
    assert list(live.differing(recorded.__getitem__)) == [None] * (live.num_chunks - 1)
    assert sum(1 for _ in live.digesting(live.names)) == live.num_chunks - 1, "empty has none"
    for name, index in [("embedding", 0), ("large", 7), ("large", 4 * LARGE - 1), ("mean", 27)]:
        flip(live_tensor := model.state_dict()[name], index)
        found = [name for name in live.differing(recorded.__getitem__) if name]
        assert found == (["head"] if name == "embedding" else [name]), "tied ones once"
        flip(live_tensor, index)
    with torch.no_grad():
        model.transposed[4, 2] += 1
    assert "transposed" in live.differing(recorded.__getitem__)


def test_tied_names_know_each_other() -> None:
    tied = LiveModel(Odd(seed=1)).tied()
    assert (tied["embedding"], tied["head"], tied["large"]) == (("head",), ("embedding",), ())
