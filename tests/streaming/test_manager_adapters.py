"""Whatever came before it, an adapter is served on the base that it is made for, or not at all."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from sync_models import Sampler, Trainer, as_text, llama, logits, lora, merged_by_hand
from sync_models import with_adapter as peft_model

from checkpoint_engine import CheckpointEngineManager, UpdateFailed
from checkpoint_engine.adapters.attached import AttachedAdapter, config_tensor
from checkpoint_engine.adapters.held import Held
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.manifest import Version
from checkpoint_engine.sources.lora_adapter import CONFIG_NAME
from checkpoint_engine.streaming import sampler as sampler_side
from checkpoint_engine.streaming.seats import Seats
from checkpoint_engine.transport.rendezvous import Rendezvous

# peft 0.21 asks transformers 5 by a name that it is to lose
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

Manage = Callable[..., CheckpointEngineManager]


def check_serves(sampler: Sampler, model: Any) -> None:
    assert torch.equal(logits(sampler.model), logits(model))
    assert not sampler.held.locked()


def test_merged_and_adapters_in_turns(manage: Manage) -> None:
    """What was merged is no base: to put an adapter on it would apply it twice."""
    torch.manual_seed(4)
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    for _ in range(2):
        manager.sync_weights(merge_and_sync=True)
        check_serves(sampler, merged_by_hand(trainer.model))
        manager.sync_weights(merge_and_sync=False)
        check_serves(sampler, trainer.model)
        trainer.step()
        manager.sync_weights(merge_and_sync=False)
        check_serves(sampler, trainer.model)
        sampler.detach_adapter("default")


def test_an_adapter_after_whole_weights_has_the_base_that_it_was_trained_on(manage: Manage) -> None:
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights()
    trainer.step()
    trainer.model = peft_model(trainer.model)
    manager.sync_weights(merge_and_sync=False)
    check_serves(sampler, trainer.model)


def test_a_base_that_was_written_to_is_sent_again(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync=False, label="a")
    for number in range(2):
        with torch.no_grad():
            trainer.model.get_base_model().lm_head.weight.add_(0.5)
        manager.sync_weights(merge_and_sync=False, label=f"b{number}")
        check_serves(sampler, trainer.model)
        base, adapter = sampler.served_version(), sampler.adapters()["default"]
        assert base is not None
        assert (base.label, adapter.label) == (f"b{number}-base", f"b{number}")
        assert adapter.parent == base.digest


def test_a_base_that_is_trained_is_sent_each_time(manage: Manage) -> None:
    """Torch does not count what a fused optimizer writes."""
    model = peft_model(llama(1))
    model.get_base_model().lm_head.weight.requires_grad_(True)
    trainer, sampler = Trainer(model), Sampler(llama(2))
    trained = [one for one in model.parameters() if one.requires_grad]
    trainer.optimizer = torch.optim.AdamW(trained, lr=0.01, fused=True)
    manager = manage(trainer, sampler)
    for _ in range(3):
        manager.sync_weights(merge_and_sync=False)
        check_serves(sampler, model)
        trainer.step()


def test_a_sampler_that_wrote_to_its_base_is_sent_it_again(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    for number in range(3):
        manager.sync_weights(merge_and_sync=False, label=f"{number}")
        check_serves(sampler, trainer.model)
        if number < 1:
            with torch.no_grad():
                sampler.model.get_base_model().lm_head.weight.mul_(2)
    version = sampler.served_version()
    assert version is not None
    assert version.label == "1-base"


def test_another_model_has_another_base(manage: Manage) -> None:
    """Also one that was written to as often."""
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync=False)
    trainer.model = peft_model(llama(7))
    manager.sync_weights(merge_and_sync=False)
    check_serves(sampler, trainer.model)
    layer = trainer.model.get_base_model().lm_head
    layer.weight = torch.nn.Parameter(layer.weight + 0.5, requires_grad=False)
    manager.sync_weights(merge_and_sync=False)
    check_serves(sampler, trainer.model)


def test_no_base_comes_under_an_adapter_of_somebody_else(manage: Manage) -> None:
    first, sampler = Trainer(peft_model(llama(1), "one")), Sampler(llama(2))
    manager = manage(first, sampler)
    manager.sync_weights(merge_and_sync=False, adapter_name="one")
    manager.close()
    second = Trainer(peft_model(llama(7), "two"))
    manager = manage(second, sampler)
    with pytest.raises(UpdateFailed, match=r"\(one\) that are made for another base: take them"):
        manager.sync_weights(merge_and_sync=False, adapter_name="two")
    check_serves(sampler, first.model)
    sampler.detach_adapter("one")
    manager.sync_weights(merge_and_sync=False, adapter_name="two")
    check_serves(sampler, second.model)


def test_without_peft_an_adapter_is_refused_before_requests_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = config_tensor(peft_model(llama(1)), "default")
    sampler = Sampler(llama(2))
    adapter = AttachedAdapter(sampler, "default", base=lambda: None)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(AdapterError, match=r"cannot attach adapters: .*ckpt-engine\[lora\]"):
        adapter.prepare(Held({CONFIG_NAME: config}), Version(label="a", digest="0" * 32))


def test_what_peft_cannot_read_is_refused_before_requests_wait() -> None:
    config = torch.frombuffer(bytearray(b'{"peft_type": "NOTHING"}'), dtype=torch.uint8)
    adapter = AttachedAdapter(Sampler(llama(2)), "default", base=lambda: None)
    with pytest.raises(AdapterError, match="can make nothing of adapter_config"):
        adapter.prepare(Held({CONFIG_NAME: config}), Version(label="a", digest="0" * 32))


class Odd(torch.nn.Module):
    """A layer to which peft cannot attach anything."""

    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.weight = layer.weight

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(values, self.weight)


def test_an_adapter_that_cannot_be_attached_leaves_the_model_as_it_was(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    last = sampler.model.model.layers[1].mlp
    last.down_proj = Odd(last.down_proj)
    names = [name for name, _ in sampler.model.named_modules()]
    with pytest.raises(UpdateFailed, match="sampler 0: ValueError: Target module Odd") as failed:
        manage(trainer, sampler).sync_weights(merge_and_sync=False)
    assert failed.value.report.outcome == "rolled_back"
    assert [name for name, _ in sampler.model.named_modules()] == names
    assert not any(isinstance(one, BaseTunerLayer) for one in sampler.model.modules())
    check_serves(sampler, llama(1))


@pytest.fixture
def torn(manage: Manage, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Trainer, Sampler]:
    """A sampler whose adapter is neither the new one nor the one before."""
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync=False)
    trainer.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(AttachedAdapter, "_load", fail)
        with pytest.raises(UpdateFailed) as failed:
            manager.sync_weights(merge_and_sync=False)
    assert [one.outcome for one in failed.value.report.replicas] == ["torn"]
    assert sampler.held.locked()
    assert sampler.adapters() == {}
    return manager, trainer, sampler


def test_a_torn_adapter_keeps_requests_waiting_until_it_is_mended(torn: Any) -> None:
    manager, trainer, sampler = torn
    with pytest.raises(UpdateFailed, match=r"adapters are attached here \(default\)"):
        manager.sync_weights(merge_and_sync=True)
    assert sampler.held.locked()
    trainer.model.add_adapter("other", lora())
    manager.sync_weights(merge_and_sync=False, adapter_name="other")
    assert sampler.held.locked()
    manager.sync_weights(merge_and_sync=False, adapter_name="default")
    trainer.model.set_adapter("default")
    sampler.model.set_adapter("default")
    check_serves(sampler, trainer.model.eval())


def test_a_torn_adapter_may_be_taken_off(torn: Any) -> None:
    manager, trainer, sampler = torn
    sampler.detach_adapter("default")
    check_serves(sampler, llama(1))
    manager.sync_weights(merge_and_sync=True)
    check_serves(sampler, merged_by_hand(trainer.model))


def test_requests_that_could_not_be_let_go_are_held_again(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Sampler):
        def release_requests(self) -> None:
            super().release_requests()
            if self.num_holds == 1:
                raise RuntimeError("a metric could not be written")

    trainer, sampler = Trainer(llama(1)), Failing(llama(2))
    manager = manage(trainer, sampler)
    report = manager.sync_weights()
    assert report.replicas[0].error is not None
    assert report.replicas[0].error.message == "a metric could not be written"
    write, held = TransformersAdapter.apply, []

    def apply(self: TransformersAdapter) -> None:
        held.append(sampler.held.locked())
        write(self)

    monkeypatch.setattr(TransformersAdapter, "apply", apply)
    trainer.step()
    manager.sync_weights()
    assert held == [True]
    check_serves(sampler, trainer.model)


def test_who_lacks_the_base_again_hears_that_nothing_follows(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, starts_anew = Seats._base, True
    monkeypatch.setattr(Seats, "_base", lambda self: None if starts_anew else base(self))
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    for member in (trainer, sampler):
        member.checkpoint_engine_settings = {**member.checkpoint_engine_settings, "timeout": 1000}
    manager = manage(trainer, sampler)
    for _ in range(2):
        with pytest.raises(UpdateFailed, match="is made for another base than is served here"):
            manager.sync_weights(merge_and_sync=False)
        assert "is made for another base than is served here" in str(sampler.failure)
    starts_anew = False
    manager.sync_weights(merge_and_sync=False)
    check_serves(sampler, trainer.model)


def test_every_sampler_hears_why_nothing_is_served(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that asks when it is over already, since another has refused."""
    take_part = sampler_side.take_part

    def late(keys: Rendezvous, adapter: Any) -> Any:
        time.sleep(0.5 if keys.rank == 1 else 0.0)
        return take_part(keys, adapter)

    monkeypatch.setattr(sampler_side, "take_part", late)
    trainer = Trainer(llama(1))
    samplers = [Sampler(llama(2)), Sampler(torch.nn.Linear(3, 4)), Sampler(llama(3))]
    manager = manage(trainer, samplers)
    before = as_text(samplers[0].model.state_dict())
    for _ in range(3):
        with pytest.raises(UpdateFailed, match=r"sampler 1: AdapterError: the model") as failed:
            manager.sync_weights()
        reports = [one.failure.report for one in samplers if one.failure is not None]
        assert reports == [failed.value.report] * 3
        assert as_text(samplers[0].model.state_dict()) == before
