"""Faults in the middle of a stream: what holds for staged versions holds for those in files.

Every file is deleted as soon as it is registered, so each way back is by an open descriptor.
"""

from __future__ import annotations

import pytest
import test_faults_coordinator as coordinator
import test_faults_replica as replica
from fleet import Fleet
from test_faults_replica import CHANGED_NOTHING, NOT_PUBLISHED, PUBLISHED, VICTIM, WENT_BACK


@pytest.mark.parametrize(
    ("what", "point", "ends"),
    [
        ("kill", "prepare", CHANGED_NOTHING),
        ("kill", "apply", WENT_BACK),
        ("raise", "apply", WENT_BACK),
        ("raise", "check", WENT_BACK),
        ("raise", "publish", PUBLISHED),
    ],
)
def test_a_replica_fails(streaming: Fleet, what: str, point: str, ends: set[str]) -> None:
    replica.test_a_replica_fails(streaming, what, point, ends)


@pytest.mark.parametrize("what", ["stop", "hang"])
def test_a_replica_says_nothing_while_it_reads(streaming: Fleet, what: str) -> None:
    replica.test_a_replica_says_nothing_until_the_deadline_has_passed(
        streaming, what, "apply", NOT_PUBLISHED
    )


def test_a_replica_that_cannot_go_back_is_torn(streaming: Fleet) -> None:
    replica.test_a_replica_that_cannot_go_back_is_torn_until_the_next_update(streaming)


@pytest.mark.parametrize(
    ("point", "recorded", "num_told", "num_in_doubt"),
    [
        ("applying", "rolled_back", 0, {0, 1}),
        ("deciding", "rolled_back", 0, {3}),
        ("telling", "published", 1, {2}),
    ],
)
def test_a_coordinator_is_killed(
    streaming: Fleet, point: str, recorded: str, num_told: int, num_in_doubt: set[int]
) -> None:
    coordinator.test_a_coordinator_is_killed_and_comes_back(
        streaming, point, recorded, num_told, num_in_doubt
    )


def test_one_that_was_just_started_has_no_way_back_and_says_so(streaming: Fleet) -> None:
    """It fails in the middle: torn, out of service, and mended by the next update."""
    old = replica.bring(streaming)
    streaming.replicas[VICTIM].kill()
    streaming.start_the_dead()
    outcome = streaming.update(require_rollback=True)
    assert outcome is not None
    assert (outcome["outcome"], replica.fate(outcome)) == ("aborted", "kept")
    assert "no way back" in outcome["error"]
    streaming.arm(VICTIM, "apply", "raise")
    outcome = streaming.update()
    assert outcome is not None
    assert (outcome["outcome"], replica.fate(outcome)) == ("rolled_back", "torn")
    replica.check_others(streaming, outcome, old)
    streaming.check()
