"""What is attached changes what it is to change: no base, no other adapter, and none is twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import IA3Config, PeftModel, get_peft_model
from sync_models import Sampler, Trainer, llama, logits, merged_by_hand
from sync_models import with_adapter as peft_model

from checkpoint_engine import CheckpointEngineManager, UpdateFailed
from checkpoint_engine.adapters.attached import AttachedAdapter

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

Manage = Callable[..., CheckpointEngineManager]


def send(manager: CheckpointEngineManager, adapter: str = "default") -> None:
    manager.sync_weights(merge_and_sync=False, adapter_name=adapter)


def check_serves(sampler: Sampler, model: Any) -> None:
    assert torch.equal(logits(sampler.model), logits(model))
    assert not sampler.held.locked()


def with_trained_head(rank: int = 4) -> Any:
    model = peft_model(llama(1), r=rank, modules_to_save=["lm_head"])
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.add_(1)
    return model


@pytest.mark.parametrize("begins", ["pissa", "olora"])
def test_what_begins_by_writing_to_the_base_does_not_write_to_a_samplers(
    manage: Manage, begins: str
) -> None:
    base = llama(1, dtype=torch.float32)
    trainer = Trainer(peft_model(base, init_lora_weights=begins))
    sampler = Sampler(llama(2, dtype=torch.float32))
    manager = manage(trainer, sampler)
    send(manager)
    check_serves(sampler, trainer.model)
    sampler.detach_adapter("default")
    manager.sync_weights()
    check_serves(sampler, merged_by_hand(trainer.model))


@pytest.mark.parametrize("rank", [4, 8])  # the same configuration, or another
def test_a_trained_module_is_taken_off_with_its_adapter(manage: Manage, rank: int) -> None:
    trainer, sampler = Trainer(with_trained_head()), Sampler(llama(2))
    manager = manage(trainer, sampler)
    send(manager)
    trainer.model = with_trained_head(rank)
    send(manager)
    check_serves(sampler, trainer.model)
    with sampler.model.disable_adapter():
        check_serves(sampler, llama(1))
    sampler.detach_adapter("default")
    check_serves(sampler, llama(1))
    manager.sync_weights()
    check_serves(sampler, merged_by_hand(trainer.model))


def test_trained_biases_are_refused_which_are_the_bases(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1), bias="lora_only")), Sampler(llama(2))
    manager = manage(trainer, sampler)
    with pytest.raises(UpdateFailed, match="bias='lora_only': biases are the base's"):
        send(manager)
    check_serves(sampler, llama(1))
    manager.sync_weights()
    check_serves(sampler, merged_by_hand(trainer.model))


@pytest.mark.parametrize(
    ("owner", "name"), [(PeftModel, "add_adapter"), (AttachedAdapter, "_load")]
)
def test_a_failure_leaves_the_adapter_that_samples(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    """Although it was taken off already, for another configuration."""
    trainer, sampler = Trainer(peft_model(llama(1), "one")), Sampler(llama(2))
    manager = manage(trainer, sampler)
    send(manager, "one")
    trainer.model.add_adapter("two", trainer.model.peft_config["one"])
    send(manager, "two")
    before = logits(sampler.model)
    trainer.model = peft_model(trainer.model.unload(), "one", r=8)
    done, num_calls = getattr(owner, name), 0

    def fail_first(*arguments: Any, **options: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 1:
            raise RuntimeError("no memory for it")
        return done(*arguments, **options)

    monkeypatch.setattr(owner, name, fail_first)
    with pytest.raises(UpdateFailed, match="no memory for it") as failed:
        send(manager, "one")
    assert failed.value.report.outcome == "rolled_back"
    assert sampler.model.active_adapters == ["one"]
    assert torch.equal(logits(sampler.model), before)
    send(manager, "one")
    check_serves(sampler, trainer.model)


def test_a_disabled_adapter_stays_disabled(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    send(manager)
    sampler.model.base_model.disable_adapter_layers()
    trainer.model = peft_model(llama(1), r=8)
    send(manager)
    check_serves(sampler, llama(1))
    sampler.model.base_model.enable_adapter_layers()
    check_serves(sampler, trainer.model)


def test_what_is_merged_is_refused_under_an_adapter_of_the_samplers_own(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(peft_model(llama(1)))
    before = logits(sampler.model)
    manager = manage(trainer, sampler)
    with pytest.raises(UpdateFailed, match=r"attached here \(default\), and would be applied"):
        manager.sync_weights()
    assert torch.equal(logits(sampler.model), before)
    sampler.detach_adapter("default")
    manager.sync_weights()
    check_serves(sampler, merged_by_hand(trainer.model))


def test_an_adapter_of_the_samplers_own_is_for_its_first_base(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(peft_model(llama(2), "own"))
    manager = manage(trainer, sampler)
    send(manager)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.add_(0.5)
    with pytest.raises(UpdateFailed, match=r"\(own\) that are made for another base"):
        send(manager)
    sampler.detach_adapter("own")
    send(manager)
    sampler.model.set_adapter("default")
    check_serves(sampler, trainer.model)


def test_an_adapter_of_the_samplers_own_stays_for_that_base(manage: Manage) -> None:
    """Also when the model was moved meanwhile, or what is served was torn."""
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(peft_model(llama(2), "own"))
    manager = manage(trainer, sampler)
    send(manager)
    for one in sampler.model.parameters():
        one.data = one.data.clone()
    send(manager)
    with torch.no_grad():
        trainer.model.get_base_model().lm_head.weight.add_(0.5)
    for one in sampler.model.parameters():
        one.data = one.data.clone()
    with pytest.raises(UpdateFailed, match=r"\(own\) that are made for another base"):
        send(manager)


def test_without_a_way_back_an_adapter_is_refused_before_requests_wait(manage: Manage) -> None:
    own = peft_model(llama(2), bias="lora_only")
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(own)
    with pytest.raises(UpdateFailed, match="bias='lora_only'") as failed:
        send(manage(trainer, sampler))
    assert failed.value.report.outcome == "aborted"
    assert sampler.num_holds == 1, "for the base"


def test_another_model_has_no_adapters_of_the_one_before(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    send(manager)
    sampler.model = llama(3)
    manager.sync_weights()
    assert sampler.adapters() == {}
    check_serves(sampler, merged_by_hand(trainer.model))


@pytest.mark.parametrize("becomes", ["another", "narrower"])
def test_weights_go_to_the_model_that_the_sampler_has_now(manage: Manage, becomes: str) -> None:
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2, dtype=torch.float32))
    manager = manage(trainer, sampler)
    manager.sync_weights()
    if becomes == "narrower":
        sampler.model.to(torch.bfloat16)
    else:
        sampler.model = llama(3)
    trainer.step()
    manager.sync_weights()
    check_serves(sampler, trainer.model)


def test_samplers_hear_at_once_why_a_base_cannot_be_sent(manage: Manage) -> None:
    kind = IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    trainer, sampler = Trainer(get_peft_model(llama(1), kind)), Sampler(llama(2))
    for member in (trainer, sampler):
        member.checkpoint_engine_settings = {**member.checkpoint_engine_settings, "timeout": 1000}
    with pytest.raises(UpdateFailed, match="IA3"):
        manage(trainer, sampler).sync_weights(merge_and_sync=False)
    assert "IA3" in str(sampler.failure)
