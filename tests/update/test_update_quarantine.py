"""What the coordinator decides when one failing engine must not stop the others."""

from __future__ import annotations

from typing import Any

import pytest
from coordinator_play import (
    NEW,
    OLD,
    PAUSE_SECONDS,
    READY_SECONDS,
    Play,
    no,
    steps,
)

from checkpoint_engine.errors import RemoteError


def quarantining(**policy: Any) -> Play:
    return Play(on_failure="quarantine", **policy)


def test_a_no_at_ready_keeps_one_engine_out_and_goes_on_with_the_others() -> None:
    """The one that said no waits in its call to hear whether it is quarantined."""
    play = quarantining().entering("a", "b", "c")
    play.ready("a")
    assert play.withdrawn("b", "does not fit") == []
    (apply,) = play.ready("c")
    assert (apply.step, apply.proceed, apply.quarantine) == ("apply", ("a", "c"), ("b",))
    play.applied("a")
    (publish,) = play.applied("c")
    assert (publish.step, publish.proceed, publish.quarantine) == ("publish", ("a", "c"), ())
    play.confirmed("a")
    play.confirmed("c")
    play.return_all(3)
    assert play.outcomes == {"a": "published", "b": "quarantined", "c": "published"}
    report = play.report
    assert (report.outcome, report.reason, report.verified) == (
        "published",
        no("does not fit", "b"),
        True,
    )
    assert {replica.name: replica.digest for replica in report.replicas} == {
        "a": NEW,
        "b": OLD,
        "c": NEW,
    }


def test_a_no_at_applied_keeps_one_engine_out_and_publishes_to_the_others() -> None:
    play = quarantining().applying("a", "b")
    play.applied("a")
    (publish,) = play.withdrawn("b", "the loader raised")
    assert (publish.step, publish.proceed, publish.quarantine) == ("publish", ("a",), ("b",))
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "b": "quarantined"}
    assert play.report.reason == no("the loader raised", "b")


def test_a_torn_replica_stays_torn_in_the_report() -> None:
    play = quarantining().applying("a", "b")
    play.applied("a")
    assert steps(play.withdrawn("b", torn=True)) == ["publish"]
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "b": "torn"}


@pytest.mark.parametrize(("min_replicas", "goes_on"), [(1, True), (2, True), (3, False)])
def test_so_many_engines_must_be_left_to_apply(min_replicas: int, goes_on: bool) -> None:
    play = quarantining(min_replicas=min_replicas).entering("a", "b", "c")
    play.ready("a")
    play.withdrawn("b")
    play.returned(request=1, error=no("the call failed"))
    decided = play.ready("c")
    assert steps(decided) == (["apply"] if goes_on else ["stop"])
    if not goes_on:
        play.withdrawn("a")
        play.withdrawn("c")
        play.return_all(3)
        assert play.outcomes == {"a": "kept", "b": "kept", "c": "kept"}
        assert play.report.outcome == "aborted"


@pytest.mark.parametrize(("min_replicas", "goes_on"), [(1, True), (2, False)])
def test_so_many_engines_must_be_left_to_publish(min_replicas: int, goes_on: bool) -> None:
    play = quarantining(min_replicas=min_replicas).applying("a", "b")
    play.applied("a")
    decided = play.withdrawn("b")
    assert steps(decided) == (["publish"] if goes_on else ["stop"])
    if not goes_on:
        play.withdrawn("a")
        play.return_all(2)
        assert play.outcomes == {"a": "kept", "b": "kept"}
        assert play.report.outcome == "rolled_back"


def test_nothing_is_published_when_nobody_is_left() -> None:
    play = quarantining().applying("a")
    (stop, *_) = play.withdrawn("a")
    assert stop.step == "stop"
    play.returned()
    assert play.report.outcome == "rolled_back"
    assert play.outcomes == {"a": "kept"}


def test_a_lost_engine_is_left_behind() -> None:
    play = quarantining().applying("a", "b")
    play.applied("a")
    (publish,) = play.left("b")
    assert (publish.step, publish.proceed) == ("publish", ("a",))
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "b": "lost"}


def test_a_silent_engine_is_left_behind_at_the_pause_deadline() -> None:
    play = quarantining().applying("a", "silent")
    play.applied("a")
    (publish,) = play.wait(PAUSE_SECONDS)
    assert (publish.step, publish.proceed) == ("publish", ("a",))
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "silent": "lost"}
    assert play.report.reason is not None
    assert "silent" in play.report.reason.message


def test_a_silent_engine_is_left_behind_at_the_ready_deadline() -> None:
    play = quarantining().entering("a", "silent")
    play.ready("a")
    (apply,) = play.wait(READY_SECONDS)
    assert (apply.step, apply.proceed) == ("apply", ("a",))
    (publish,) = play.applied("a")
    assert publish.proceed == ("a",)


def test_an_engine_that_never_says_hello_is_left_behind_at_the_ready_deadline() -> None:
    play = quarantining()
    play.staged(num_requests=2)
    play.join("a")
    play.ready("a")
    (apply,) = play.wait(READY_SECONDS)
    assert (apply.step, apply.proceed) == ("apply", ("a",))


def test_a_request_that_fails_before_hello_is_left_behind() -> None:
    play = quarantining()
    play.staged(num_requests=2)
    play.returned(request=1, error=no("connection refused"))
    play.join("a")
    (apply,) = play.ready("a")
    assert (apply.step, apply.proceed) == ("apply", ("a",))
    play.applied("a")
    play.confirmed("a")
    play.returned(request=0)
    assert (play.report.outcome, play.report.reason) == ("published", no("connection refused"))


def test_who_has_no_way_back_is_kept_out_before_it_changes() -> None:
    play = quarantining(require_rollback=True).entering("a", "b")
    play.ready("b", "none")
    (apply,) = play.ready("a")
    assert (apply.proceed, apply.quarantine) == (("a",), ("b",))


def test_an_engine_that_is_still_to_come_is_waited_for_although_another_failed() -> None:
    play = quarantining()
    play.staged(num_requests=3)
    play.join("a")
    play.join("b")
    play.ready("a")
    assert play.withdrawn("b") == play.wait(1.0) == []
    assert play.join("c") == []
    (apply,) = play.ready("c")
    assert (apply.proceed, apply.quarantine) == (("a", "c"), ("b",))


def test_a_publish_that_could_not_be_recorded_quarantined_nobody() -> None:
    play = quarantining().applying("a", "b")
    play.applied("a")
    play.withdrawn("b")
    error = RemoteError(type="UsageError", message="the disk is full", where="registry")
    (stop,) = play.coordinator.veto(error, play.now)
    assert (stop.step, stop.quarantine) == ("stop", ())
    play.withdrawn("a")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "kept"}


# Tensor parallel engines: all workers of an engine, or none


def tensor_parallel(play: Play, *engines: str) -> Play:
    play.staged(num_requests=len(engines))
    for engine in engines:
        for worker in range(2):
            play.join(f"{engine}{worker}", engine=engine, worker=worker, world_size=2)
    return play


def test_one_worker_that_fails_to_get_ready_quarantines_its_whole_engine() -> None:
    play = tensor_parallel(quarantining(), "a", "b")
    play.ready("a0")
    play.withdrawn("a1")
    play.ready("b0")
    (apply,) = play.ready("b1")
    assert (apply.proceed, apply.quarantine) == (("b0", "b1"), ("a0", "a1"))
    play.withdrawn("a0", "told to stop")
    play.applied("b0")
    (publish,) = play.applied("b1")
    assert (publish.proceed, publish.quarantine) == (("b0", "b1"), ())
    play.confirmed("b0")
    play.confirmed("b1")
    play.return_all(2)
    assert play.outcomes == {
        "a0": "quarantined",
        "a1": "quarantined",
        "b0": "published",
        "b1": "published",
    }


def test_one_worker_that_fails_to_apply_quarantines_its_whole_engine() -> None:
    play = tensor_parallel(quarantining(), "a", "b")
    for name in ("a0", "a1", "b0", "b1"):
        play.ready(name)
    for name in ("a0", "b0", "b1"):
        play.applied(name)
    (publish,) = play.withdrawn("a1")
    assert (publish.proceed, publish.quarantine) == (("b0", "b1"), ("a0", "a1"))
    play.withdrawn("a0", "told to stop")
    play.confirmed("b0")
    play.confirmed("b1")
    play.return_all(2)
    assert set(play.outcomes.values()) == {"quarantined", "published"}


def test_an_engine_that_lost_a_worker_is_none_of_those_that_are_left() -> None:
    play = tensor_parallel(quarantining(min_replicas=2), "a", "b")
    for name in ("a0", "a1", "b0", "b1"):
        play.ready(name)
    for name in ("a0", "b0", "b1"):
        play.applied(name)
    assert steps(play.withdrawn("a1")) == ["stop"]


def test_an_engine_that_is_incomplete_at_the_ready_deadline_is_left_behind() -> None:
    play = quarantining()
    play.staged(num_requests=2)
    play.join("a0", engine="a", worker=0, world_size=2)
    play.join("b0", engine="b", worker=0, world_size=2)
    play.join("b1", engine="b", worker=1, world_size=2)
    for name in ("a0", "b0", "b1"):
        play.ready(name)
    (apply,) = play.wait(READY_SECONDS)
    assert (apply.proceed, apply.quarantine) == (("b0", "b1"), ("a0",))


@pytest.mark.parametrize("failing", ["a0", "a1"])
def test_nothing_is_published_to_half_an_engine(failing: str) -> None:
    play = tensor_parallel(quarantining(), "a")
    play.ready("a0")
    play.ready("a1")
    play.wait(1.0)
    other = {"a0": "a1", "a1": "a0"}[failing]
    play.applied(other)
    (stop,) = play.withdrawn(failing)
    assert stop.step == "stop"
    play.withdrawn(other)
    play.returned()
    assert play.report.outcome == "rolled_back"
