"""A replica that fails in an update, in every way and at every point: the others stay true."""

from __future__ import annotations

from typing import Any

import pytest
from fleet import SHORT_SECONDS, Fleet

VICTIM = "replica 1"
CHANGED_NOTHING = {"aborted"}
WENT_BACK = {"rolled_back"}
NOT_PUBLISHED = {"aborted", "rolled_back"}  # which of them, the machine's speed decides
PUBLISHED = {"published"}
EITHER = {"published", "rolled_back"}  # decided before the death was noticed, or after


def others(outcome: dict[str, Any]) -> set[str]:
    return {one["outcome"] for one in outcome["replicas"] if one["name"] != VICTIM}


def fate(outcome: dict[str, Any], name: str = VICTIM) -> str:
    (fate,) = (one["outcome"] for one in outcome["replicas"] if one["name"] == name)
    return fate


def check_others(fleet: Fleet, outcome: dict[str, Any], old: str) -> None:
    """They have done what the report says, and serve."""
    was_published = outcome["outcome"] == "published"
    assert others(outcome) <= {"published" if was_published else "kept"}
    labels = fleet.serving()
    labels.pop(VICTIM, None)
    assert set(labels.values()) == {fleet.newest if was_published else old}
    assert len(labels) == len(fleet.replicas) - 1


def bring(fleet: Fleet) -> str:
    """An update that succeeds; returns its label."""
    outcome = fleet.update()
    assert outcome is not None
    assert outcome["outcome"] == "published"
    return fleet.newest


@pytest.mark.parametrize(
    ("what", "point", "ends"),
    [
        ("kill", "prepare", CHANGED_NOTHING),
        ("kill", "pause", WENT_BACK),
        ("kill", "apply", WENT_BACK),
        ("kill", "waiting", EITHER),
        ("kill", "publish", PUBLISHED),
        ("exit", "check", WENT_BACK),
        ("raise", "prepare", CHANGED_NOTHING),
        ("raise", "pause", WENT_BACK),
        ("raise", "apply", WENT_BACK),
        ("raise", "check", WENT_BACK),
        ("raise", "publish", PUBLISHED),
        ("refuse", "accept", CHANGED_NOTHING),
    ],
)
def test_a_replica_fails(fleet: Fleet, what: str, point: str, ends: set[str]) -> None:
    old = bring(fleet)
    fleet.arm(VICTIM, point, what)
    outcome = fleet.update()
    assert fleet.replicas[VICTIM].wait_for("fault")["what"] == what
    assert outcome is not None
    assert outcome["outcome"] in ends
    check_others(fleet, outcome, old)
    fleet.check()


@pytest.mark.parametrize(
    ("what", "point", "ends"),
    [
        ("stop", "prepare", NOT_PUBLISHED),
        ("stop", "apply", NOT_PUBLISHED),
        ("stop", "waiting", NOT_PUBLISHED | PUBLISHED),
        ("stop", "publish", NOT_PUBLISHED | PUBLISHED),
        ("hang", "pause", NOT_PUBLISHED),
        ("hang", "apply", NOT_PUBLISHED),
    ],
)
def test_a_replica_says_nothing_until_the_deadline_has_passed(
    fleet: Fleet, what: str, point: str, ends: set[str]
) -> None:
    old = bring(fleet)
    fleet.arm(VICTIM, point, what)
    outcome = fleet.update(timeout=SHORT_SECONDS)
    assert outcome is not None
    assert outcome["outcome"] in ends
    fleet.go_on()
    check_others(fleet, outcome, old)
    fleet.check()


def test_a_replica_that_cannot_go_back_is_torn_until_the_next_update(fleet: Fleet) -> None:
    old = bring(fleet)
    fleet.arm(VICTIM, "check", "raise")
    fleet.arm(VICTIM, "roll_back", "raise")
    outcome = fleet.update()
    assert outcome is not None
    assert (outcome["outcome"], fate(outcome)) == ("rolled_back", "torn")
    assert fleet.replicas[VICTIM].call("info")["state"] == "torn"
    check_others(fleet, outcome, old)
    fleet.check()


# Bits, memory, policies


def test_a_bit_that_flipped_in_staged_memory_is_found_before_anything_changes(
    fleet: Fleet,
) -> None:
    old = bring(fleet)
    seed = fleet.register()
    fleet.trainer.call("flip", seed=seed)
    outcome = fleet.finish(fleet.begin(seed))
    assert outcome is not None
    assert (outcome["outcome"], outcome["reason"]["type"]) == ("aborted", "VerificationError")
    assert set(fleet.serving().values()) == {old}
    fleet.check()


def test_a_replica_without_memory_for_its_way_back_refuses(fleet: Fleet) -> None:
    """One that was just started makes a snapshot; the others have the version before."""
    old = bring(fleet)
    fleet.replicas[VICTIM].kill()
    fleet.start_the_dead()
    fleet.arm(VICTIM, "snapshot", "no memory")
    outcome = fleet.update()
    assert outcome is not None
    assert (outcome["outcome"], fate(outcome)) == ("aborted", "kept")
    check_others(fleet, outcome, old)
    fleet.check()


@pytest.mark.parametrize(
    ("what", "point"), [("raise", "prepare"), ("raise", "check"), ("kill", "apply")]
)
def test_the_others_go_on_without_a_replica_in_quarantine(
    fleet: Fleet, what: str, point: str
) -> None:
    old = bring(fleet)
    fleet.arm(VICTIM, point, what)
    outcome = fleet.update(on_failure="quarantine", min_replicas=2)
    assert outcome is not None
    assert outcome["outcome"] == "published"
    check_others(fleet, outcome, old)
    if what == "raise":
        info = fleet.replicas[VICTIM].call("info")
        assert (info["state"], info["label"], fate(outcome)) == ("quarantined", old, "quarantined")
    fleet.check()


def test_a_quarantine_of_a_silent_replica_leaves_nobody_else_behind(fleet: Fleet) -> None:
    """Whoever was quick still waits when the slowest is given up."""
    fleet.arm(VICTIM, "apply", "stop")
    outcome = fleet.update(timeout=SHORT_SECONDS, on_failure="quarantine")
    assert outcome is not None
    if outcome["outcome"] == "published":
        assert (others(outcome), fate(outcome)) == ({"published"}, "lost")
    fleet.check()


def test_too_few_replicas_are_left_for_a_quarantine(fleet: Fleet) -> None:
    old = bring(fleet)
    fleet.arm(VICTIM, "check", "raise")
    outcome = fleet.update(on_failure="quarantine", min_replicas=3)
    assert outcome is not None
    assert (outcome["outcome"], fate(outcome)) == ("rolled_back", "kept")
    assert set(fleet.serving().values()) == {old}
    fleet.check()


def test_all_replicas_fail_and_none_is_left_for_a_quarantine(fleet: Fleet) -> None:
    old = bring(fleet)
    for name in fleet.replicas:
        fleet.arm(name, "apply", "raise")
    outcome = fleet.update(on_failure="quarantine")
    assert outcome is not None
    assert outcome["outcome"] == "rolled_back"
    assert set(fleet.serving().values()) == {old}
    fleet.check()
