"""Two trainer's processes, which have a half of each tensor each, and three samplers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from children import Child, call_all, free_port

SCRIPT = "streaming/sync_member.py"


class Fleet:
    """Processes that are used again, since it takes seconds to start one."""

    def __init__(self) -> None:
        self.trainers = self._new_trainers()
        self.samplers = [Child(SCRIPT) for _ in range(3)]

    @staticmethod
    def _new_trainers() -> list[Child]:
        trainers = [Child(SCRIPT) for _ in range(2)]
        call_all(trainers, "distribute", rank=[0, 1], port=free_port())
        return trainers

    def begin(self, kind: str, engine: str = "gloo") -> None:
        """Models anew, and managers in all processes; the last sampler's engine is this one."""
        self.revive()
        self.where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        engines = ["gloo", "gloo", engine]
        call_all(self.samplers, "sample", seed=[2, 3, 4], kind=kind, engine=engines)
        self._train(kind)
        call_all(self.samplers, "manage", rank=[1, 2, 3], world_size=4, **self.where)

    def _train(self, kind: str) -> None:
        call_all(self.trainers, "train", kind=kind)
        call_all(self.trainers, "manage", rank=[0, -1], world_size=4, **self.where)

    def renew_trainers(self, kind: str) -> None:
        """Both anew at the same ports, as a launcher does when one has died."""
        for trainer in self.trainers:
            trainer.close()
        self.trainers = self._new_trainers()
        self._train(kind)

    def renew(self, index: int, kind: str) -> None:
        """This sampler anew, with the others' manager."""
        self.samplers[index].call("sample", seed=7, kind=kind)
        self.samplers[index].call("manage", rank=index + 1, world_size=4, **self.where)

    def revive(self) -> list[int]:
        """Start those samplers anew that have died; returns which."""
        dead = [index for index, one in enumerate(self.samplers) if not one.alive]
        for index in dead:
            self.samplers[index].close()
            self.samplers[index] = Child(SCRIPT)
        return dead

    def sync(self, label: str, **options: Any) -> list[Any]:
        """What each process says of it: a report, or the error."""
        members = [*self.trainers, *self.samplers]
        numbers = [member.send("sync", label=label, **options) for member in members]
        return [self._said(member, number) for member, number in zip(members, numbers, strict=True)]

    def end(self) -> None:
        members = [one for one in (*self.samplers, *self.trainers) if one.alive]
        call_all(members, "close")

    def close(self) -> None:
        for member in (*self.samplers, *self.trainers):
            member.close()

    @staticmethod
    def _said(member: Child, number: int) -> Any:
        try:
            return member.result(number)
        except RuntimeError as error:
            return str(error)


@pytest.fixture(scope="module")
def _fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture
def fleet(_fleet: Fleet) -> Iterator[Fleet]:
    yield _fleet
    _fleet.end()


def test_samplers_have_what_a_sharded_trainer_has(fleet: Fleet) -> None:
    fleet.begin("plain")
    for label in ("step-1", "step-2"):
        call_all(fleet.trainers, "step")
        weights = call_all(fleet.trainers, "weights")
        reports = fleet.sync(label)
        assert [report["outcome"] for report in reports] == ["published"] * 5
        assert len({report["digest"] for report in reports}) == 1
        assert call_all(fleet.trainers, "weights") == weights
        assert call_all(fleet.samplers, "weights") == [weights[0]] * 3
        assert call_all(fleet.samplers, "served") == [label] * 3


def test_a_sharded_trainers_adapters(fleet: Fleet) -> None:
    fleet.begin("adapter")
    for label in ("step-1", "step-2"):
        call_all(fleet.trainers, "step")
        reports = fleet.sync(label, merge_and_sync=False)
        assert [report["outcome"] for report in reports] == ["published"] * 5
        assert call_all(fleet.samplers, "adapters") == [{"default": label}] * 3
        assert call_all(fleet.samplers, "served") == ["step-1-base"] * 3
        answers = call_all(fleet.trainers, "answer")
        assert call_all(fleet.samplers, "answer") == [answers[0]] * 3

    call_all(fleet.trainers, "write_to_base")
    fleet.sync("step-3", merge_and_sync=False)
    assert call_all(fleet.samplers, "served") == ["step-3-base"] * 3
    answers = call_all(fleet.trainers, "answer")
    assert call_all(fleet.samplers, "answer") == [answers[0]] * 3


def test_a_trainer_may_have_any_rank_in_torch(fleet: Fleet) -> None:
    """As where one launcher starts its samplers too."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    sampler, trainer = fleet.trainers
    sampler.call("sample", seed=2)
    trainer.call("train_alone")
    call_all([trainer, sampler], "manage", rank=[0, 1], world_size=2, **where)
    assert trainer.call("weights") != sampler.call("weights")
    reports = call_all([trainer, sampler], "sync", label="step-1")
    assert [report["outcome"] for report in reports] == ["published"] * 2
    assert trainer.call("weights") == sampler.call("weights")


def test_a_sampler_that_dies_while_it_writes_leaves_the_others_on_one_version(fleet: Fleet) -> None:
    fleet.begin("plain")
    fleet.sync("step-1")
    before = call_all(fleet.trainers, "weights")[0]
    call_all(fleet.trainers, "step")
    fleet.samplers[1].call("die_when_written")
    said = fleet.sync("step-2")
    for one in (said[0], said[1], said[2], said[4]):
        assert one.startswith("UpdateFailed: update to 'step-2' rolled back: sampler 1: PeerLost")
        assert "sampler 0: kept" in one
        assert "sampler 1: lost" in one
    living = [fleet.samplers[0], fleet.samplers[2]]
    assert call_all(living, "weights") == [before] * 2
    assert call_all(living, "served") == ["step-1"] * 2

    assert fleet.revive() == [1]
    fleet.renew(1, "plain")
    assert [report["outcome"] for report in fleet.sync("step-3")] == ["published"] * 5
    weights = call_all(fleet.trainers, "weights")[0]
    assert call_all(fleet.samplers, "weights") == [weights] * 3


def test_a_sampler_that_dies_while_it_receives_does_not_stop_the_training(fleet: Fleet) -> None:
    fleet.begin("large")
    before = call_all(fleet.samplers, "weights")
    fleet.samplers[1].call("die_when_received")
    said = fleet.sync("step-1")
    for one in (said[0], said[1], said[2], said[4]):
        assert one.startswith("UpdateFailed: nothing was changed: ")
        assert "rank 2 died" in one
    assert [fleet.samplers[i].call("weights") for i in (0, 2)] == [before[0], before[2]]
    call_all(fleet.trainers, "step")
    assert fleet.revive() == [1]
    fleet.renew(1, "large")
    assert [report["outcome"] for report in fleet.sync("step-2")] == ["published"] * 5


def test_any_error_of_the_first_process_ends_the_others_collectives(fleet: Fleet) -> None:
    fleet.begin("large")
    before = call_all(fleet.samplers, "weights")
    fleet.trainers[0].call("fail_packing")
    said = fleet.sync("step-1")
    assert said[0] == "MemoryError: no memory for a copy"
    assert said[1] == "UpdateFailed: no memory for a copy"
    for one in said[2:]:
        assert one.startswith("UpdateFailed: nothing was changed: the sender gave up: ")
    assert call_all(fleet.samplers, "weights") == before
    assert [report["outcome"] for report in fleet.sync("step-2")] == ["published"] * 5


def test_a_sampler_that_cannot_meet_does_not_stop_the_training(fleet: Fleet) -> None:
    fleet.begin("plain", engine="shm")
    for one in fleet.sync("step-1"):
        assert one.startswith("UpdateFailed: nothing was changed: ")
        assert "rank 3 receives with another engine" in one
    call_all(fleet.trainers, "step")
    fleet.samplers[2].call("close")
    fleet.renew(2, "plain")
    assert [report["outcome"] for report in fleet.sync("step-2")] == ["published"] * 5


def test_a_trainer_that_dies_before_it_says_so_leaves_nothing_changed(fleet: Fleet) -> None:
    fleet.begin("plain")
    fleet.sync("step-1")
    before = call_all(fleet.trainers, "weights")[0]
    call_all(fleet.trainers, "step")
    fleet.trainers[0].call("die_when_decided")
    said = fleet.sync("step-2")
    assert said[0] == "the process died"
    assert said[1].startswith("PeerLost: the sender is gone")
    for one in said[2:]:
        assert one.startswith("UpdateFailed: kept here, and no more is known")
    assert call_all(fleet.samplers, "weights") == [before] * 3
    assert call_all(fleet.samplers, "served") == ["step-1"] * 3

    fleet.renew_trainers("plain")  # which have no secret of before
    call_all(fleet.trainers, "step")
    assert [report["outcome"] for report in fleet.sync("step-3")] == ["published"] * 5
    weights = call_all(fleet.trainers, "weights")[0]
    assert call_all(fleet.samplers, "weights") == [weights] * 3
