"""A trainer's processes make the same weights in the same call, or say why not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from sync_models import Sampler, Trainer, as_text, llama

from checkpoint_engine import CheckpointEngineManager, UpdateFailed
from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded
from checkpoint_engine.streaming import trainer as trainer_side
from checkpoint_engine.streaming.orders import Ending
from checkpoint_engine.streaming.steps import Step, Steps, Wanted
from checkpoint_engine.streaming.threads import UnderWay
from checkpoint_engine.streaming.trainer import FollowingSide
from checkpoint_engine.transport.keystore import LocalKeyStore
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import Report

Manage = Callable[..., CheckpointEngineManager]


class Crew:
    """Two processes of a trainer and a sampler, each with a manager of its own, as threads."""

    def __init__(self, timeout: float) -> None:
        settings = {"bucket_size": 4 << 20, "timeout": timeout}
        self.trainer, self.other, self.sampler = (
            Trainer(llama(1)),
            Trainer(llama(1)),
            Sampler(llama(2)),
        )
        for one in (self.trainer, self.other, self.sampler):
            one.checkpoint_engine_settings = settings
        self.first = CheckpointEngineManager(model=self.trainer, rank=0, world_size=2)
        self._threads = ThreadPoolExecutor(3)

    def others(self) -> list[CheckpointEngineManager]:
        """Anew, as often as one likes."""
        where: Any = {"world_size": 2, "master_metadata": self.first.metadata}
        return [
            CheckpointEngineManager(sampler=self.sampler, rank=1, **where),
            CheckpointEngineManager(model=self.other, rank=-1, **where),
        ]

    def sync(self, label: str, *managers: CheckpointEngineManager) -> list[Any]:
        """What each says of it: the version, or the error."""
        begun = [self._threads.submit(one.sync_weights, label=label) for one in managers]
        return [self._said(one) for one in begun]

    @staticmethod
    def _said(call: Future[Report]) -> Any:
        try:
            return call.result(60).version
        except CheckpointEngineError as error:
            return error

    def close(self, *managers: CheckpointEngineManager) -> None:
        for one in managers:
            one.close()
        self._threads.shutdown()


@pytest.fixture
def crew(socket_folder: Path) -> Iterator[Crew]:
    crew = Crew(timeout=5)
    yield crew
    crew.close(*crew.others(), crew.first)


def test_a_process_that_missed_a_call_is_in_step_again_in_the_next(
    crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling, following = crew.others()

    def unreachable(*_: Any) -> None:
        raise DeadlineExceeded("cannot reach rank 0")

    with monkeypatch.context() as patch:
        patch.setattr(crew.other, "init_checkpoint_process_group", unreachable)
        said = crew.sync("one", crew.first, sampling, following)
    assert said[:2] == ["one", "one"]
    assert isinstance(said[2], DeadlineExceeded)
    for label in ("two", "three"):
        assert crew.sync(label, crew.first, sampling, following) == [label] * 3


def test_managers_that_are_made_for_each_call_are_in_step(crew: Crew) -> None:
    for label in ("one", "two", "three"):
        assert crew.sync(label, crew.first, *crew.others()) == [label] * 3


def test_managers_that_drive_the_same_members_by_turns(manage: Manage) -> None:
    trainers, sampler = [Trainer(llama(1)), Trainer(llama(1))], Sampler(llama(2))
    managers = [manage(trainers, sampler) for _ in range(2)]
    for turn in range(5):
        report = managers[turn % 2].sync_weights(label=f"step-{turn}")
        assert (report.outcome, report.version) == ("published", f"step-{turn}")


def test_a_call_that_the_first_process_refuses_is_refused_in_all(crew: Crew) -> None:
    """As while one that was given up still drains what it began."""
    sampling, following = crew.others()
    assert crew.sync("one", crew.first, sampling, following) == ["one"] * 3
    with crew.trainer._checkpoint_side._turn:  # type: ignore[union-attr]
        first, second = crew.sync("two", crew.first, following)
    assert isinstance(first, UnderWay)
    assert isinstance(second, UpdateFailed)
    assert str(second) == str(first)
    assert crew.sync("three", crew.first, sampling, following) == ["three"] * 3


def test_a_call_that_another_process_refuses_is_made_by_nobody(crew: Crew) -> None:
    sampling, following = crew.others()
    assert crew.sync("one", crew.first, sampling, following) == ["one"] * 3
    served = as_text(crew.sampler.model.state_dict())
    crew.trainer.step()
    with crew.other._checkpoint_side._turn:  # type: ignore[union-attr]
        (refused,) = crew.sync("two", following)
        assert isinstance(refused, UnderWay)
        for one in crew.sync("two", crew.first, sampling):
            assert "another of the trainer's processes has given up its call" in str(one)
    assert as_text(crew.sampler.model.state_dict()) == served
    assert crew.sync("three", crew.first, sampling, following) == ["three"] * 3


def test_nobody_leaves_a_step_that_the_first_process_has_begun(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It would be waited for while weights are gathered, for as long as that may take."""
    monkeypatch.setattr(trainer_side, "PATIENCE", 0)
    made: list[str] = []
    monkeypatch.setattr(
        trainer_side, "made", lambda _, step, __: iter(made.append(step.kind) or ())
    )
    store = LocalKeyStore()
    first = Steps(Rendezvous(store, 0, 1), number=1)
    following = FollowingSide(Rendezvous(store, 0, 1), timeout_seconds=60)
    assert first.claim()

    def say() -> None:
        time.sleep(0.5)  # after the deadline of who waits
        first.tell(Step(kind="weights"))
        first.tell(Step(ending=Ending(error=None)))

    saying = threading.Thread(target=say)
    saying.start()
    with pytest.raises(UpdateFailed, match="it ended without a report"):
        following.sync(torch.nn.Linear(1, 1), Wanted(True, None, "one", 1))
    saying.join()
    assert made == ["weights"]


def test_all_may_leave_a_call_that_has_not_begun() -> None:
    store = LocalKeyStore()
    for number, first_has_claimed in ((1, False), (2, True)):
        first, *others = [Steps(Rendezvous(store, 0, 1), number) for _ in range(4)]
        assert not first_has_claimed or first.claim()
        assert [one.leave() for one in others] == [not first_has_claimed] * 3
        assert not first.claim()


def test_who_is_late_for_a_call_that_has_not_begun_keeps_it_from_beginning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_side, "PATIENCE", 0)
    store = LocalKeyStore()
    following = FollowingSide(Rendezvous(store, 0, 1), timeout_seconds=60)
    with pytest.raises(DeadlineExceeded, match="does not say what to send"):
        following.sync(torch.nn.Linear(1, 1), Wanted(True, None, "one", 1))
    assert not Steps(Rendezvous(store, 0, 1), number=1).claim()


def test_other_processes_of_a_trainer_hear_of_any_error(
    manage: Manage, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainers = [Trainer(llama(1)), Trainer(llama(1))]
    heard: list[str] = []

    def fail(model: torch.nn.Module, *_: Any) -> Any:
        if model is trainers[0].model:
            raise RuntimeError("no memory for it")
        return iter(())

    class Follower(Trainer):
        def send_weights(self, *arguments: Any) -> Report:
            try:
                return super().send_weights(*arguments)
            except UpdateFailed as error:
                heard.append(str(error))
                raise

    trainers[1] = Follower(trainers[1].model)
    monkeypatch.setattr(trainer_side, "made", fail)
    with pytest.raises(RuntimeError, match="no memory for it"):
        manage(trainers, Sampler(llama(2))).sync_weights()
    assert heard == ["no memory for it"]
