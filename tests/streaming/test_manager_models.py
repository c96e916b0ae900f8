"""Models that torch or their owner has made something of: what is sent, and what is seen."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sync_models import Sampler, Trainer, as_text, llama, logits, with_adapter

from checkpoint_engine import CheckpointEngineManager, UpdateFailed
from checkpoint_engine.adapters.module import Snapshot
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import VerificationError

# peft 0.21 asks transformers 5 by a name that it is to lose
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

Manage = Callable[..., CheckpointEngineManager]


def test_a_compiled_sampler(manage: Manage) -> None:
    trainer, sampler = Trainer(llama(1)), Sampler(torch.compile(llama(2), backend="eager"))
    manage(trainer, sampler).sync_weights()
    assert torch.equal(logits(sampler.model), logits(trainer.model))


def test_a_tensor_that_shares_memory_with_itself_is_refused_while_it_serves(
    manage: Manage,
) -> None:
    trainer, sampler = Trainer(torch.nn.Linear(4, 4)), Sampler(torch.nn.Linear(4, 4))
    sampler.model.weight = torch.nn.Parameter(torch.ones(1, 4).expand(4, 4), requires_grad=False)
    bias = sampler.model.bias.clone()
    with pytest.raises(UpdateFailed, match="elements of the model's share memory"):
        manage(trainer, sampler).sync_weights()
    assert sampler.num_holds == 0
    assert torch.equal(sampler.model.bias, bias)


def test_adapters_of_a_compiled_sampler(manage: Manage) -> None:
    trainer = Trainer(with_adapter(llama(1)))
    sampler = Sampler(torch.compile(llama(2), backend="eager"))
    manager = manage(trainer, sampler)
    for label, base in (("one", "one-base"), ("two", "one-base"), ("three", "three-base")):
        trainer.step()
        if label == "three":
            with torch.no_grad():
                sampler.model.get_base_model().lm_head.weight.add_(0.5)
        manager.sync_weights(merge_and_sync=False, label=label)
        assert torch.equal(logits(sampler.model), logits(trainer.model))
        version = sampler.served_version()
        assert version is not None
        assert version.label == base


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_is_written_to_a_samplers_base_is_seen(manage: Manage, mode: Any) -> None:
    """Of tensors that were made in inference mode torch does not count writes."""
    with mode():
        base = llama(2)
    trainer, sampler = Trainer(with_adapter(llama(1))), Sampler(base)
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync=False, label="one")
    trainer.step()
    manager.sync_weights(merge_and_sync=False, label="two")
    assert sampler.adapters()["default"].label == "two"
    version = sampler.served_version()
    assert version is not None
    assert version.label == "one-base"
    with mode():
        sampler.model.get_base_model().lm_head.weight.mul_(0)
    manager.sync_weights(merge_and_sync=False, label="three")
    assert torch.equal(logits(sampler.model), logits(trainer.model))


class Policy(torch.nn.Module):
    """One that has its model as `module`, as DistributedDataParallel has."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = torch.nn.Linear(4, 4)


@pytest.mark.parametrize("wrapped", [Policy, lambda seed: Policy(seed).module])
def test_a_single_module_of_that_name_leaves_no_trace(manage: Manage, wrapped: Any) -> None:
    trainer, sampler = Policy(1), wrapped(2)
    for one in (trainer, sampler):
        one.requires_grad_(False)
    manage(Sampler(trainer), Sampler(sampler)).sync_weights()
    assert list(as_text(trainer.state_dict()).values()) == list(
        as_text(sampler.state_dict()).values()
    )


class Scaled(torch.nn.Linear):
    """With a state that is no tensor of the model, as of TransformerEngine's layers."""

    def __init__(self, extra: Any) -> None:
        super().__init__(4, 4)
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


@pytest.mark.parametrize("extra", [{"scale": 1}, torch.zeros(3, dtype=torch.uint8)])
def test_what_is_no_weight_stays_where_it_is(manage: Manage, extra: Any) -> None:
    trainer, sampler = Trainer(Scaled(extra)), Sampler(Scaled(None))
    manage(trainer, sampler).sync_weights()
    assert torch.equal(sampler.model.weight, trainer.model.weight)
    assert sampler.model.extra is None


def fail(*_: Any) -> None:
    raise VerificationError("a bit has flipped")


def test_a_torn_sampler_that_comes_back_serves_on(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later sync, which fails elsewhere, has rolled it back as it could not the first time."""
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(label="one")
    served = as_text(sampler.model.state_dict())

    with monkeypatch.context() as patch:
        patch.setattr(TransformersAdapter, "check", fail)
        trainer.step()
        with monkeypatch.context() as tearing:
            tearing.setattr(TransformersAdapter, "roll_back", fail)
            with pytest.raises(UpdateFailed, match="torn"):
                manager.sync_weights(label="two")
        assert sampler.held.locked()
        assert sampler.served_version() is None
        with pytest.raises(UpdateFailed, match="a bit has flipped"):
            manager.sync_weights(label="three")
    assert as_text(sampler.model.state_dict()) == served
    version = sampler.served_version()
    assert version is not None
    assert version.label == "one"
    assert not sampler.held.locked()


@pytest.mark.parametrize("error", [VerificationError, SystemExit])
def test_a_torn_sampler_that_is_not_written_to_stays_torn(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(label="one")

    def tear(*_: Any) -> None:
        raise error("told to")

    trainer.step()
    with monkeypatch.context() as patch:
        patch.setattr(TransformersAdapter, "check", tear)
        patch.setattr(TransformersAdapter, "roll_back", fail)
        with pytest.raises((UpdateFailed, SystemExit)):
            manager.sync_weights(label="two")
    with monkeypatch.context() as patch:
        patch.setattr(TransformersAdapter, "prepare", fail)
        with pytest.raises(UpdateFailed, match="a bit has flipped"):
            manager.sync_weights(label="three")
    assert sampler.held.locked()
    assert sampler.served_version() is None


class Loading(Sampler, torch.nn.Module):
    """Loads by itself, into itself; of which a copy is taken before its first version."""

    def __init__(self, failing: str) -> None:
        torch.nn.Module.__init__(self)
        Sampler.__init__(self, torch.nn.Linear(4, 4))
        self._failing = failing

    def hold_requests(self, timeout_seconds: float) -> None:
        if self._failing == "hold":
            raise RuntimeError("not now")
        super().hold_requests(timeout_seconds)

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        with torch.no_grad():
            for name, tensor in named:
                self.model.get_parameter(name).copy_(tensor)
        raise RuntimeError("not now")


@pytest.mark.parametrize("failing", ["hold", "load"])
def test_a_copy_of_a_model_goes_with_the_sync_for_which_it_was_made(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    sampler = Loading(failing)
    before = as_text(sampler.model.state_dict())
    copies: list[weakref.ref[Snapshot]] = []
    take = Snapshot.take

    def taken(model: torch.nn.Module) -> Snapshot | None:
        copy = take(model)
        assert copy is not None
        copies.append(weakref.ref(copy))
        return copy

    monkeypatch.setattr(Snapshot, "take", taken)
    with pytest.raises(UpdateFailed, match="not now"):
        manage(Trainer(torch.nn.Linear(4, 4)), sampler).sync_weights()
    gc.collect()
    assert [copy() for copy in copies] == [None]
    assert as_text(sampler.model.state_dict()) == before
