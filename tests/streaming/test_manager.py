"""The whole cycle in one call, in one process: what samplers serve, and what trainers keep."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_models import (
    SETTINGS,
    Sampler,
    Trainer,
    as_text,
    greedy,
    llama,
    logits,
    lora,
    merged_by_hand,
)
from sync_models import with_adapter as peft_model

from checkpoint_engine import CheckpointEngineManager, CheckpointEngineMixin, UpdateFailed
from checkpoint_engine.adapters.attached import AttachedAdapter
from checkpoint_engine.adapters.callback import CallbackAdapter
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import (
    DeadlineExceeded,
    UsageError,
    VerificationError,
)
from checkpoint_engine.sources import TensorSource, adapter_config, adapter_weights
from checkpoint_engine.sources.lora_adapter import LoraSource
from checkpoint_engine.store import digest_in_place
from checkpoint_engine.streaming import SharedMemoryCheckpointEngine, sampled, seats
from checkpoint_engine.streaming import sampler as sampler_side
from checkpoint_engine.update.protocol import Report

# peft 0.21 asks transformers 5 by a name that it is to lose
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

Manage = Callable[..., CheckpointEngineManager]


def test_all_samplers_serve_what_was_trained(manage: Manage) -> None:
    trainer = Trainer(llama(1))
    samplers = [Sampler(llama(2)), Sampler(llama(3))]
    manager = manage(trainer, samplers)
    for number in (1, 2):
        trainer.step()
        before = trainer.state()
        report = manager.sync_weights(label=f"step-{number}")
        assert trainer.state() == before
        weights = trainer.model.state_dict()
        assert report.outcome == "published"
        assert report.verified
        assert report.digest == digest_in_place(TensorSource(weights)).digest
        for sampler in samplers:
            assert as_text(sampler.model.state_dict()) == as_text(weights)
            version = sampler.served_version()
            assert version is not None
            assert (version.label, version.digest) == (f"step-{number}", report.digest)
            assert sampler.num_holds == number
            assert not sampler.held.locked()
    assert [replica.name for replica in report.replicas] == ["sampler 0", "sampler 1"]


@pytest.mark.parametrize("tied", [False, True])
def test_merged_it_serves_as_merging_by_hand_does(manage: Manage, tied: bool) -> None:
    torch.manual_seed(4)
    trainer, sampler = Trainer(peft_model(llama(1, tied=tied))), Sampler(llama(2, tied=tied))
    trainer.step()
    before = trainer.state()
    manage(trainer, sampler).sync_weights(merge_and_sync=True)
    assert trainer.state() == before
    by_hand = merged_by_hand(trainer.model)
    assert torch.equal(logits(sampler.model), logits(by_hand))
    assert greedy(sampler.model) == greedy(by_hand)
    assert not torch.equal(logits(sampler.model), logits(llama(1, tied=tied)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_once_then_adapters(manage: Manage, dtype: torch.dtype) -> None:
    torch.manual_seed(4)
    trainer, sampler = Trainer(peft_model(llama(1, dtype=dtype))), Sampler(llama(2, dtype=dtype))
    manager = manage(trainer, sampler)
    sent = []
    for number in range(3):
        trainer.step()
        before = trainer.state()
        report = manager.sync_weights(merge_and_sync=False, label=f"step-{number}")
        sent.append(report.bytes)
        assert trainer.state() == before
        assert torch.equal(logits(sampler.model), logits(trainer.model))
        assert greedy(sampler.model) == greedy(trainer.model)
        adapter = sampler.adapters()["default"]
        base = sampler.served_version()
        assert base is not None
        assert (adapter.label, adapter.parent) == (f"step-{number}", base.digest)
        assert base.label == "step-0-base"
        assert sampler.num_holds == number + 2


def test_several_adapters_on_one_base(manage: Manage) -> None:
    torch.manual_seed(4)
    model = peft_model(llama(1), "one")
    model.add_adapter("two", lora(r=2, target_modules=["k_proj", "up_proj"], lora_dropout=0.5))
    trainer, sampler = Trainer(model), Sampler(llama(2))
    manager = manage(trainer, sampler)
    for name in ("one", "two"):
        manager.sync_weights(merge_and_sync=False, adapter_name=name, label=f"{name}-1")
    assert {name: one.label for name, one in sampler.adapters().items()} == {
        "one": "one-1",
        "two": "two-1",
    }
    for name in ("one", "two"):
        model.set_adapter(name)
        sampler.model.set_adapter(name)
        assert torch.equal(logits(sampler.model), logits(model.eval()))
    with sampler.model.disable_adapter(), model.disable_adapter():
        assert torch.equal(logits(sampler.model), logits(model))

    model.set_adapter("one")  # trains on; the other tenant's stays as it is
    trainer.step()
    digests = {name: one.digest for name, one in sampler.adapters().items()}
    report = manager.sync_weights(merge_and_sync=False, adapter_name="one")
    assert report.digest != digests["one"]
    assert sampler.adapters()["two"].digest == digests["two"]
    sampler.detach_adapter("one")
    sampler.detach_adapter("two")
    assert sampler.adapters() == {}
    with model.disable_adapter():
        assert torch.equal(logits(sampler.model), logits(model))


def test_a_sampler_may_have_adapters_from_the_start(manage: Manage) -> None:
    """They are replaced where the names are the same, and else left alone."""
    torch.manual_seed(4)
    trainer, sampler = Trainer(peft_model(llama(1), r=2)), Sampler(peft_model(llama(2)))
    sampler.model.add_adapter("own", lora())
    own = as_text(dict(adapter_weights(sampler.model, "own")))
    manager = manage(trainer, sampler)
    report = manager.sync_weights(merge_and_sync=False)
    assert torch.equal(logits(sampler.model), logits(trainer.model))
    assert as_text(dict(adapter_weights(sampler.model, "own"))) == own
    sent = dict(adapter_weights(trainer.model, "default"))
    source = LoraSource.of_tensors(sent, adapter_config(trainer.model, "default"))
    assert report.digest == digest_in_place(source).digest


def test_an_adapter_may_get_another_rank(manage: Manage) -> None:
    sampler = Sampler(llama(2))
    for rank in (4, 8):
        torch.manual_seed(rank)
        trainer = Trainer(peft_model(llama(1), r=rank))
        manager = manage(trainer, sampler)
        manager.sync_weights(merge_and_sync=False)
        assert torch.equal(logits(sampler.model), logits(trainer.model))
        manager.close()


def test_who_lacks_the_base_gets_it(manage: Manage) -> None:
    trainer, first, second = Trainer(peft_model(llama(1))), Sampler(llama(2)), Sampler(llama(3))
    manage(trainer, first).sync_weights(merge_and_sync=False)
    manager = manage(trainer, [first, second])
    manager.sync_weights(merge_and_sync=False)
    other = Trainer(llama(5))
    manager.close()
    second.detach_adapter("default")
    manage(other, second).sync_weights()  # serves another base, of which the trainer knows nothing
    manager = manage(trainer, [first, second])
    manager.sync_weights(merge_and_sync=False)
    for sampler in (first, second):
        assert torch.equal(logits(sampler.model), logits(trainer.model))


def test_a_merged_model_is_refused_where_adapters_are_attached(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync=False)
    with pytest.raises(UpdateFailed, match=r"sampler 0: .*take them off by detach_adapter"):
        manager.sync_weights()
    assert torch.equal(logits(sampler.model), logits(trainer.model))
    sampler.detach_adapter("default")
    manager.sync_weights()
    assert torch.equal(logits(sampler.model), logits(merged_by_hand(trainer.model)))


def test_a_sampler_that_cannot_take_a_tensor_keeps_all_from_it(manage: Manage) -> None:
    trainer = Trainer(llama(1))
    good, bad = Sampler(llama(2)), Sampler(torch.nn.Linear(3, 4))
    before = as_text(good.model.state_dict())
    with pytest.raises(UpdateFailed, match=r"sampler 1: AdapterError: the model has no") as failed:
        manage(trainer, [good, bad]).sync_weights()
    assert failed.value.report.outcome == "aborted"
    assert as_text(good.model.state_dict()) == before
    assert good.served_version() is None
    assert (good.num_holds, bad.num_holds) == (0, 0)


class Loading(CheckpointEngineMixin):
    """A sampler whose weights lie elsewhere."""

    checkpoint_engine_settings = Sampler.checkpoint_engine_settings

    def __init__(self) -> None:
        self.loaded: dict[str, torch.Tensor] = {}
        self.fails = False

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in named:
            if self.fails and name == "lm_head.weight":
                self.fails = False
                raise RuntimeError("no room for the last one")
            self.loaded[name] = tensor.clone()


def test_a_failure_half_way_returns_every_sampler_to_what_it_served(manage: Manage) -> None:
    trainer, good, bad = Trainer(llama(1)), Sampler(llama(2)), Loading()
    manager = manage(trainer, [good, bad])
    manager.sync_weights(label="step-1")
    served = as_text(trainer.model.state_dict())
    trainer.step()
    bad.fails = True
    with pytest.raises(UpdateFailed, match=r"sampler 1: RuntimeError: no room") as failed:
        manager.sync_weights(label="step-2")
    assert failed.value.report.outcome == "rolled_back"
    assert as_text(good.model.state_dict()) == as_text(bad.loaded) == served
    for sampler in (good, bad):
        version = sampler.served_version()
        assert version is not None
        assert version.label == "step-1"
    manager.sync_weights(label="step-3")
    assert as_text(good.model.state_dict()) == as_text(bad.loaded)
    assert as_text(bad.loaded) == as_text(trainer.model.state_dict())


def test_an_adapter_that_fails_half_way_is_taken_off_again(manage: Manage) -> None:
    trainer = Trainer(peft_model(llama(1)))
    good, bad = Sampler(llama(2)), Sampler(llama(3))
    manager = manage(trainer, [good, bad])
    manager.sync_weights(merge_and_sync=False, label="a")
    served = logits(good.model)
    trainer.step()
    trainer.model.add_adapter("new", lora())
    for name in ("default", "new"):
        bad.hold_requests = _cannot  # type: ignore[method-assign]
        with pytest.raises(UpdateFailed, match="sampler 1: RuntimeError: requests do not stop"):
            manager.sync_weights(merge_and_sync=False, adapter_name=name)
        del bad.hold_requests
        for sampler in (good, bad):
            assert torch.equal(logits(sampler.model), served)
            assert {name: one.label for name, one in sampler.adapters().items()} == {"default": "a"}
            assert list(sampler.model.peft_config) == ["default"]


def _cannot(timeout_seconds: float) -> None:
    raise RuntimeError("requests do not stop")


def test_what_is_no_sync_is_refused(manage: Manage) -> None:
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    manager = manage(trainer, sampler)
    with pytest.raises(UsageError, match="has no adapters"):
        manager.sync_weights(merge_and_sync=False)
    manager.sync_weights()  # at once: nobody waits for what never came
    with pytest.raises(UsageError, match="give model= and sampler="):
        CheckpointEngineManager()
    with pytest.raises(UsageError, match="needs world_size="):
        CheckpointEngineManager(sampler=sampler)
    with pytest.raises(UsageError, match="this side's are from 1 to 1"):
        CheckpointEngineManager(sampler=sampler, rank=0, world_size=2)
    with pytest.raises(UsageError, match="one and the number of samplers"):
        CheckpointEngineManager(model=trainer, rank=0, world_size=1)
    with pytest.raises(UsageError, match="derive its class from CheckpointEngineMixin"):
        CheckpointEngineManager(trainer, sampler.model)
    with pytest.raises(UsageError, match=r"embed_tokens\.weight' .* is on meta"):
        Sampler(llama(2).to("meta")).init_checkpoint_process_group(1, 2)
    with pytest.raises(UsageError, match="has a torch module as `model`"):
        CheckpointEngineMixin().init_checkpoint_process_group(1, 2)


def test_each_side_for_itself_and_within_an_event_loop(socket_folder: Path) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    sending = CheckpointEngineManager(trainer, rank=0, world_size=2)
    receiving = CheckpointEngineManager(
        sampler=sampler, rank=1, world_size=2, master_metadata=sending.metadata
    )

    async def train() -> Report:
        received = asyncio.get_running_loop().run_in_executor(None, receiving.sync_weights)
        sent = sending.sync_weights(merge_and_sync=False)  # blocks the loop, and works
        assert await received == sent
        return sent

    assert asyncio.run(train()).outcome == "published"
    assert torch.equal(logits(sampler.model), logits(trainer.model))
    receiving.close()
    sending.close()


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers' models are written to as on a GPU: copied into, and compared with what was sent."""

    def loaded(sampler: Any) -> CallbackAdapter:
        return sampled._LoadedAdapter(sampled._Loader(sampler))

    monkeypatch.setattr(seats, "weights_adapter", loaded)


def test_a_model_that_is_not_in_host_memory_has_an_adapter_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    assert isinstance(sampled.weights_adapter(Sampler(llama(2))), sampled._LoadedAdapter)


@pytest.mark.usefixtures("on_device")
def test_a_base_is_replaced_under_an_adapter_on_a_device(manage: Manage) -> None:
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    for _ in range(2):
        manager.sync_weights(merge_and_sync=False)
        assert torch.equal(logits(sampler.model), logits(trainer.model))
        with torch.no_grad():
            trainer.model.get_base_model().lm_head.weight.add_(0.5)
    sampler.detach_adapter("default")
    manager.sync_weights()
    assert torch.equal(logits(sampler.model), logits(merged_by_hand(trainer.model)))


@pytest.mark.usefixtures("on_device")
def test_weights_of_another_dtype_are_cast_on_a_device(manage: Manage) -> None:
    model = llama(1, dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan  # which equals nothing, not even itself
    trainer, sampler = Trainer(model), Sampler(llama(2))
    manage(trainer, sampler).sync_weights()
    cast = {name: tensor.bfloat16() for name, tensor in model.state_dict().items()}
    assert as_text(sampler.model.state_dict()) == as_text(cast)


@pytest.mark.usefixtures("on_device")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (llama(1, vocab_size=34), "has shape .34, 16., the model .33, 16."),
        (torch.nn.Linear(3, 4), "the model has no tensor 'bias'"),
        (llama(1).to(torch.float8_e5m2), "float8_e5m2 is not cast to torch.bfloat16"),
    ],
)
def test_what_does_not_fit_a_device_is_refused_while_it_serves(
    manage: Manage, model: Any, words: str
) -> None:
    sampler = Sampler(llama(2))
    before = as_text(sampler.model.state_dict())
    with pytest.raises(UpdateFailed, match=words):
        manage(Trainer(model), sampler).sync_weights()
    assert sampler.num_holds == 0
    assert as_text(sampler.model.state_dict()) == before


def test_engines_by_name(manage: Manage) -> None:
    class OverMemory(Trainer):
        checkpoint_engine_name = "shm"

    class FromMemory(Sampler):
        checkpoint_engine_name = "shm"

    trainer, sampler = OverMemory(llama(1)), FromMemory(llama(2))
    manage(trainer, sampler).sync_weights()
    assert isinstance(trainer._checkpoint_engine, SharedMemoryCheckpointEngine)
    assert as_text(sampler.model.state_dict()) == as_text(trainer.model.state_dict())


class Stubborn(CheckpointEngineMixin):
    """Loads by itself, but not the next `num_failures` times."""

    checkpoint_engine_name = "gloo"
    checkpoint_engine_settings = SETTINGS
    num_failures = 0

    def __init__(self) -> None:
        self.requests = threading.Lock()

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        if self.num_failures:
            self.num_failures -= 1
            raise RuntimeError("cannot load now")

    def hold_requests(self, timeout_seconds: float) -> None:
        if not self.requests.acquire(timeout=0.1):
            raise DeadlineExceeded("requests do not end")

    def release_requests(self) -> None:
        self.requests.release()


def test_a_torn_sampler_is_mended_by_the_next_sync(manage: Manage) -> None:
    trainer, sampler = Trainer(llama(1)), Stubborn()
    manager = manage(trainer, sampler)
    manager.sync_weights()
    sampler.num_failures = 2  # the load, and the way back
    with pytest.raises(UpdateFailed, match="go back after RuntimeError: cannot load now") as failed:
        manager.sync_weights()
    assert failed.value.report is not None
    assert [one.outcome for one in failed.value.report.replicas] == ["torn"]
    assert sampler.requests.locked()
    assert manager.sync_weights(label="well").outcome == "published"
    assert not sampler.requests.locked()


@pytest.mark.parametrize("merge_and_sync", [True, False])
def test_a_sampler_that_is_told_to_exit_while_it_writes_is_mended_by_the_next_sync(
    manage: Manage, monkeypatch: pytest.MonkeyPatch, merge_and_sync: bool
) -> None:
    """Its process may catch that, and live on; of what it serves nobody knows how much is new."""
    trainer, sampler = Trainer(peft_model(llama(1))), Sampler(llama(2))
    manager = manage(trainer, sampler)
    manager.sync_weights(merge_and_sync)
    trainer.step()

    def leave(*_: Any) -> None:
        raise SystemExit("told to")

    with monkeypatch.context() as patch:
        patch.setattr(TransformersAdapter, "check", leave)
        patch.setattr(AttachedAdapter, "check", leave)
        with pytest.raises(SystemExit, match="told to"):
            manager.sync_weights(merge_and_sync)
    assert sampler.held.locked()
    assert (sampler.served_version() is None) == merge_and_sync
    assert sampler.adapters() == {}
    assert manager.sync_weights(merge_and_sync, label="well").outcome == "published"
    assert not sampler.held.locked()


def test_requests_that_do_not_end_are_not_let_go(manage: Manage) -> None:
    sampler = Stubborn()
    with sampler.requests:
        with pytest.raises(UpdateFailed, match="requests do not end"):
            manage(Trainer(llama(1)), sampler).sync_weights()
        assert sampler.requests.locked()


def test_what_a_sampler_failed_for_is_told(manage: Manage) -> None:
    class Failing(Sampler):
        def receive_weights(self) -> Report:
            raise RuntimeError("no memory for it")

    trainer = Trainer(llama(1))
    trainer.checkpoint_engine_settings = {**SETTINGS, "timeout": 1000}  # longer than a test
    told = r"sampler 0: RuntimeError: no memory for it; so trainer 0: .*; rank 1 had not come"
    with pytest.raises(UpdateFailed, match=told):
        manage(trainer, Failing(llama(2))).sync_weights()


def test_nobody_waits_for_the_vote_of_a_sampler_that_failed_before_it(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, good, bad = Trainer(llama(1)), Sampler(llama(2)), Sampler(llama(3))
    for member in (trainer, good, bad):
        member.checkpoint_engine_settings = {**SETTINGS, "timeout": 1000}  # longer than a test
    manager = manage(trainer, [good, bad])
    manager.sync_weights(label="step-1")
    served = as_text(good.model.state_dict())
    trainer.step()

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for it")

    with monkeypatch.context() as patch:
        patch.setattr(bad._checkpoint_side, "_take", fail)
        with pytest.raises(UpdateFailed, match="sampler 1: RuntimeError: no memory for it"):
            manager.sync_weights(label="step-2")
    for sampler in (good, bad):
        assert as_text(sampler.model.state_dict()) == served
    assert manager.sync_weights(label="step-3").outcome == "published"
    assert as_text(bad.model.state_dict()) == as_text(trainer.model.state_dict()) != served


def test_a_sampler_that_does_not_hold_what_arrived_changes_nothing(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise VerificationError("memory has changed it")

    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    served = as_text(sampler.model.state_dict())
    manager = manage(trainer, [sampler])
    with monkeypatch.context() as patch:
        patch.setattr(sampler_side.SamplerSide, "_take", fail)
        with pytest.raises(UpdateFailed, match="memory has changed it"):
            manager.sync_weights(label="step-1")
    assert "aborted: sampler 0: VerificationError: memory has changed it" in str(sampler.failure)
    assert as_text(sampler.model.state_dict()) == served
