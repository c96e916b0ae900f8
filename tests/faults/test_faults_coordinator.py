"""A coordinator that fails: what its registry says is what came true, or comes true next."""

from __future__ import annotations

from pathlib import Path

import pytest
from fleet import SHORT_SECONDS, Fleet
from test_faults_replica import bring

from children import wait_until


def in_doubt_now(fleet: Fleet) -> set[str]:
    """Replicas that will report an update whose end they did not learn."""
    return {name for name, one in fleet.replicas.items() if one.call("info")["undecided"]}


@pytest.mark.parametrize(
    ("point", "recorded", "num_told", "num_in_doubt"),
    [
        ("opening", None, 0, {0}),
        ("started", "rolled_back", 0, {0}),
        ("staging", "rolled_back", 0, {0}),
        ("applying", "rolled_back", 0, {0, 1}),
        ("deciding", "rolled_back", 0, {3}),
        ("decided", "published", 0, {3}),
        ("telling", "published", 1, {2}),
    ],
)
def test_a_coordinator_is_killed_and_comes_back(
    fleet: Fleet, point: str, recorded: str | None, num_told: int, num_in_doubt: set[int]
) -> None:
    old = bring(fleet)
    fleet.arm("rank 0", point, "kill")
    assert fleet.update() is None
    labels = fleet.serving()
    assert sorted(labels.values()) == sorted([fleet.newest] * num_told + [old] * (3 - num_told))
    assert len(in_doubt_now(fleet)) in num_in_doubt
    assert {labels[name] for name in in_doubt_now(fleet)} <= {old}
    doomed = fleet.newest
    fleet.start_the_dead()
    assert fleet.trainer.call("settle") == ([[doomed, recorded]] if recorded else [])
    assert set(fleet.serving().values()) <= {old, doomed}, "settling changes no replica"
    fleet.check()
    assert in_doubt_now(fleet) == set()


@pytest.mark.parametrize(
    ("point", "ends"),
    [
        ("started", {"published", "aborted"}),  # nothing had begun, and no deadline either
        ("applying", {"rolled_back", "aborted"}),
        ("deciding", {"rolled_back", "aborted"}),
        ("decided", {"published", "rolled_back", "aborted"}),
        ("telling", {"published", "rolled_back", "aborted"}),
    ],
)
def test_a_coordinator_stands_still_until_the_deadlines_have_passed(
    fleet: Fleet, point: str, ends: set[str]
) -> None:
    """The replicas do not wait for it; when it goes on, it finds them where they are."""
    bring(fleet)
    fleet.arm("rank 0", point, "stop")
    outcome = fleet.update(timeout=SHORT_SECONDS)
    assert outcome is not None
    assert outcome["outcome"] in ends
    (newest, *_) = fleet.trainer.call("history")
    assert newest["outcome"] == outcome["outcome"]
    labels = set(fleet.serving().values())
    assert (fleet.newest in labels) <= (outcome["outcome"] == "published")
    fleet.check()


@pytest.mark.parametrize(
    ("point", "ends"),
    [("staging", "aborted"), ("deciding", "rolled_back"), ("decided", "rolled_back")],
)
def test_a_coordinator_fails_and_lives(fleet: Fleet, point: str, ends: str) -> None:
    old = bring(fleet)
    fleet.arm("rank 0", point, "raise")
    outcome = fleet.update()
    assert outcome is not None
    assert outcome["outcome"] == ends
    assert "something broke" in outcome["error"]
    assert set(fleet.serving().values()) == {old}
    (newest, *_) = fleet.trainer.call("history")
    assert (newest["outcome"], newest["published_at"]) == (ends, None)
    fleet.check()


# The registry's disk, and memory


def test_no_update_begins_that_cannot_be_recorded(fleet: Fleet) -> None:
    old = bring(fleet)
    fleet.arm("rank 0", "opening", "full disk")
    outcome = fleet.update()
    assert outcome is not None
    assert "UsageError" in outcome["error"]
    assert "not usable as a registry" in outcome["error"]
    assert set(fleet.serving().values()) == {old}
    fleet.check()


def test_a_decision_that_cannot_be_recorded_is_not_made(fleet: Fleet) -> None:
    old = bring(fleet)
    fleet.arm("rank 0", "deciding", "full disk")
    outcome = fleet.update()
    assert outcome is not None
    assert outcome["outcome"] == "rolled_back"
    assert "not usable as a registry" in outcome["error"]
    assert set(fleet.serving().values()) == {old}
    fleet.check()


def test_a_version_for_which_there_is_no_memory_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    """By the trainer's own budget, before anybody hears of it."""
    old = bring(fleet)
    fleet.trainer.kill()
    fleet.start_the_dead(CKPT_ENGINE_MEMORY_BYTES="100000")
    with pytest.raises(
        RuntimeError, match=r"StoreError: a version of .* exceeds the store's budget"
    ):
        fleet.update()
    assert set(fleet.serving().values()) == {old}
    fleet.trainer.kill()
    fleet.check()


# Rivals


def test_a_second_trainer_is_refused_while_an_update_is_under_way(
    fleet: Fleet, tmp_path: Path
) -> None:
    bring(fleet)
    rival = fleet.make_trainer(tmp_path)
    try:
        fleet.arm("replica 0", "pause", "stop")
        numbers = fleet.begin(fleet.register())
        wait_until(lambda: fleet.replicas["replica 0"].stopped, "the stop")
        refused = fleet.update_by(rival, replicas=["replica 1", "replica 2"])
        assert refused["outcome"] == "aborted"
        assert "another update of this replica is under way" in refused["error"]
        fleet.go_on()
        outcome = fleet.finish(numbers)
        assert outcome is not None
        assert outcome["outcome"] == "published"
    finally:
        rival.close()
    fleet.check()


def test_two_trainers_at_once_leave_every_replica_on_a_version_of_one(
    fleet: Fleet, tmp_path: Path
) -> None:
    bring(fleet)
    rival = fleet.make_trainer(tmp_path)
    try:
        for _ in range(3):
            number = fleet.begin_by(rival)
            fleet.update()
            rival.result(number)
            assert len(fleet.serving()) == 3
    finally:
        rival.close()
    fleet.check()


def test_a_late_update_of_an_older_epoch_is_refused(fleet: Fleet, tmp_path: Path) -> None:
    """Its coordinator stood still while another brought the replicas further."""
    bring(fleet)
    fleet.arm("rank 0", "staging", "stop")
    numbers = fleet.begin(fleet.register())
    wait_until(lambda: fleet.trainer.stopped, "the stop")
    rival = fleet.make_trainer(tmp_path)
    try:
        assert fleet.update_by(rival)["outcome"] == "published"
        newer = fleet.newest
        fleet.go_on()
        late = fleet.finish(numbers)
        assert late is not None
        assert late["outcome"] == "aborted"
        assert "a newer coordinator's" in late["error"]
        assert set(fleet.serving().values()) == {newer}
    finally:
        rival.close()
    fleet.check()
