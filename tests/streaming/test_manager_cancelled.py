"""A call that was given up has ended: nobody goes on behind the back of who was told so."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_models import Sampler, Trainer, as_text, llama, logits, with_adapter

from checkpoint_engine import CheckpointEngineManager, UpdateFailed
from checkpoint_engine.adapters.held import Held
from checkpoint_engine.errors import DeadlineExceeded, UsageError
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming import manager as manager_module
from checkpoint_engine.streaming import sampler as sampler_side
from checkpoint_engine.streaming import trainer as trainer_side
from checkpoint_engine.update.relay import Relay
from children import wait_until

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

TIMEOUT = {"bucket_size": 4 << 20, "timeout": 1000}  # longer than a test may take


class Sides:
    """A trainer and a sampler as two processes have them, each with a manager of its own."""

    def __init__(self) -> None:
        self.trainer, self.sampler = Trainer(llama(1)), Sampler(llama(2))
        for side in (self.trainer, self.sampler):
            side.checkpoint_engine_settings = TIMEOUT
        self.of_trainer = CheckpointEngineManager(model=self.trainer, rank=0, world_size=2)
        self.of_sampler = CheckpointEngineManager(
            sampler=self.sampler, rank=1, world_size=2, master_metadata=self.of_trainer.metadata
        )
        self._threads = ThreadPoolExecutor(3)

    def begin(self, manager: CheckpointEngineManager) -> Future[Any]:
        return self._threads.submit(manager.sync_weights)

    def check_next(self) -> None:
        """The next sync is of what the trainer has by then."""
        both = [self.begin(one) for one in (self.of_sampler, self.of_trainer)]
        assert [one.result(60).outcome for one in both] == ["published"] * 2
        self.check_same()

    def check_same(self) -> None:
        assert as_text(self.sampler.model.state_dict()) == as_text(self.trainer.model.state_dict())
        assert not self.sampler.held.locked()

    def close(self) -> None:
        self.of_sampler.close()
        self.of_trainer.close()
        self._threads.shutdown()


@pytest.fixture
def sides(socket_folder: Path) -> Iterator[Sides]:
    sides = Sides()
    yield sides
    sides.close()


def change(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)


def test_a_trainer_that_waited_too_long_sends_nothing_to_who_comes_then(sides: Sides) -> None:
    sides.of_trainer._timeout_seconds = 0.5
    late = r"took longer there than its timeout_seconds=0.5; rank 1 had not come"
    with pytest.raises(UpdateFailed, match=f"nothing was changed: sync_weights {late}"):
        sides.of_trainer.sync_weights()
    receiving = sides.begin(sides.of_sampler)
    time.sleep(0.5)
    assert not receiving.done()
    change(sides.trainer.model)  # which is trained on
    sides.of_trainer._timeout_seconds = 60
    assert sides.of_trainer.sync_weights() == receiving.result(60)
    sides.check_same()


def test_an_interrupted_trainer_sends_nothing_any_more(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for = manager_module.wait_for

    def interrupted(*arguments: Any) -> Any:
        monkeypatch.setattr(manager_module, "wait_for", wait_for)
        wait_for(*arguments[:1], 0.5)
        raise KeyboardInterrupt

    monkeypatch.setattr(manager_module, "wait_for", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sides.of_trainer.sync_weights()
    change(sides.trainer.model)
    sides.check_next()


def test_a_sampler_that_waited_too_long_is_not_written_to(sides: Sides) -> None:
    sides.of_trainer._meet(time.monotonic() + 60)
    sides.of_sampler._timeout_seconds = 0.5
    with pytest.raises(UpdateFailed, match=r"sync_weights took longer there than .*=0\.5"):
        sides.of_sampler.sync_weights()
    sides.of_sampler._timeout_seconds = 60
    sides.check_next()


def test_who_gathers_with_a_process_that_left_does_not_begin(sides: Sides) -> None:
    """That one trains by then."""
    other = Trainer(llama(1))
    other.checkpoint_engine_settings = TIMEOUT
    of_other = CheckpointEngineManager(
        model=other, rank=-1, world_size=2, master_metadata=sides.of_trainer.metadata
    )
    sending = sides.begin(sides.of_trainer)
    of_other._timeout_seconds = 0.5
    with pytest.raises(DeadlineExceeded, match=r"took longer there than .*=0\.5"):
        of_other.sync_weights()
    with pytest.raises(UpdateFailed, match="another of the trainer's processes has given up"):
        sides.of_sampler.sync_weights()
    with pytest.raises(UpdateFailed, match="another of the trainer's processes has given up"):
        sending.result(60)
    of_other._timeout_seconds = 60
    joining = sides.begin(of_other)
    sides.check_next()
    assert joining.result(60).outcome == "published"
    of_other.close()


def test_a_sync_that_no_sampler_has_decided_is_called_off(
    socket_folder: Path,
) -> None:
    class Slow(Sampler):
        def hold_requests(self, timeout_seconds: float) -> None:
            time.sleep(2)
            super().hold_requests(timeout_seconds)

    trainer, sampler = Trainer(llama(1)), Slow(llama(2))
    before = as_text(sampler.model.state_dict())
    manager = CheckpointEngineManager(trainer, sampler, timeout_seconds=1)
    with pytest.raises(UpdateFailed, match="took longer there than its timeout_seconds=1"):
        manager.sync_weights()
    assert as_text(sampler.model.state_dict()) == before
    assert not sampler.held.locked()
    manager._timeout_seconds = 60
    manager.sync_weights()
    assert as_text(sampler.model.state_dict()) == as_text(trainer.model.state_dict())
    manager.close()


def test_a_sampler_that_is_not_there_yet_when_a_sync_is_called_off_hears_so(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It digests what it has received, and greets somebody who has left."""
    late = threading.Event()

    class Slow(Held):
        def __init__(self, tensors: Any) -> None:
            super().__init__(tensors)
            late.wait(60)

    monkeypatch.setattr(sampler_side, "Held", Slow)
    trainer, sampler = Trainer(llama(1)), Sampler(llama(2))
    manager = CheckpointEngineManager(trainer, sampler, timeout_seconds=1)
    threading.Timer(3, late.set).start()
    with pytest.raises(UpdateFailed, match="took longer there"):
        manager.sync_weights()
    assert "took longer there" in str(sampler.failure)
    manager.close()


def test_what_a_base_is_served_without_is_told(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, sampler = Trainer(with_adapter(llama(1))), Sampler(llama(2))
    manager = CheckpointEngineManager(trainer, sampler, timeout_seconds=60)
    conduct = trainer_side.conduct

    def cancelled(*arguments: Any) -> Any:
        report = conduct(*arguments)
        trainer.cancel_checkpoint_engine(DeadlineExceeded("too late"))
        return report

    told = "the base is served, its adapter is not: nothing was changed: .*too late"
    with monkeypatch.context() as patch:
        patch.setattr(trainer_side, "conduct", cancelled)
        with pytest.raises(UpdateFailed, match=told):
            manager.sync_weights(merge_and_sync=False, label="one")
    assert "the base is served, its adapter is not" in str(sampler.failure)
    assert (sampler.served_version() or Version(label="", digest="")).label == "one-base"
    assert manager.sync_weights(merge_and_sync=False).outcome == "published"
    assert torch.equal(logits(sampler.model), logits(trainer.model))
    manager.close()


def test_a_sampler_does_not_wait_for_a_decision_that_fails(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no memory for it")

    before = as_text(sides.sampler.model.state_dict())
    receiving = sides.begin(sides.of_sampler)
    with monkeypatch.context() as patch:
        patch.setattr(Relay, "joined", fail)
        with pytest.raises(RuntimeError, match="no memory for it"):
            sides.of_trainer.sync_weights()
        with pytest.raises(UpdateFailed, match="no memory for it"):
            receiving.result(60)
    assert as_text(sides.sampler.model.state_dict()) == before
    sides.check_next()


def test_a_sampler_that_is_told_to_leave_in_its_pause_hears_the_decision_first(
    socket_folder: Path,
) -> None:
    class Slow(Sampler):
        def hold_requests(self, timeout_seconds: float) -> None:
            super().hold_requests(timeout_seconds)
            released.wait(60)

    released = threading.Event()
    trainer, leaving, other = Trainer(llama(1)), Sampler(llama(2)), Slow(llama(3))
    manager = CheckpointEngineManager(trainer, [leaving, other], timeout_seconds=60)
    with ThreadPoolExecutor(2) as threads:
        call = threads.submit(manager.sync_weights, label="one")
        wait_until(leaving.held.locked)
        leave = threads.submit(leaving.finalize_checkpoint_engine)
        assert wait([leave], 0.5).not_done
        released.set()
        assert call.result(60).outcome == "published"
        leave.result(60)
    assert as_text(leaving.model.state_dict()) == as_text(trainer.model.state_dict())
    assert (leaving.served_version() or Version(label="", digest="")).label == "one"
    assert not leaving.held.locked()
    manager.close()


def test_a_sampler_that_is_told_to_leave_before_anything_is_sent_goes_at_once(
    sides: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampler_side, "LEAVE_SECONDS", 1000)  # longer than a test
    sides.of_trainer._meet(time.monotonic() + 60)
    receiving = sides.begin(sides.of_sampler)
    wait_until(lambda: sides.sampler._checkpoint_side is not None)
    wait_until(lambda: sides.sampler._checkpoint_side._turn.locked())  # type: ignore[union-attr]
    sides.sampler.finalize_checkpoint_engine()
    with pytest.raises(UpdateFailed, match="the engine was finalized meanwhile"):
        receiving.result(60)


def test_who_does_not_leave_is_told(sides: Sides, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("it is held")

    with monkeypatch.context() as patch:
        patch.setattr(sides.sampler, "finalize_checkpoint_engine", fail)
        with pytest.raises(RuntimeError, match="it is held"):
            sides.of_sampler.close()


def test_a_second_call_does_not_come_between(sides: Sides) -> None:
    sides.of_trainer._meet(time.monotonic() + 60)
    sides.of_sampler._meet(time.monotonic() + 60)
    receiving = sides.begin(sides.of_sampler)
    wait_until(lambda: sides.sampler._checkpoint_side._turn.locked())  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="under way in this process already"):
        sides.of_sampler.sync_weights()
    assert sides.of_trainer.sync_weights() == receiving.result(60)


def test_nobody_is_waited_for_longer_than_a_call_may_take(
    socket_folder: Path, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    monkeypatch.setenv("CKPT_ENGINE_SECRET", "s" * 40)
    sampler = Sampler(llama(2))
    sampler.checkpoint_engine_settings = TIMEOUT
    manager = CheckpointEngineManager(sampler=sampler, rank=1, world_size=2, timeout_seconds=0.5)
    with pytest.raises(DeadlineExceeded):
        manager.sync_weights()
    manager.close()
