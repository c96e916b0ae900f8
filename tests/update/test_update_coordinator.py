"""What the coordinator decides, event by event."""

from __future__ import annotations

import msgspec
import pytest
from coordinator_play import (
    EPOCH,
    NEW,
    OLD,
    PAUSE_SECONDS,
    READY_SECONDS,
    SETTLED_SECONDS,
    STOPPED_SECONDS,
    Play,
    no,
    steps,
)

from checkpoint_engine.errors import RemoteError, UsageError
from checkpoint_engine.update.coordinator import Policy
from checkpoint_engine.update.protocol import PROTOCOL, Deadlines, Hello, Joined, Report

# When all goes well


def test_two_engines_are_brought_forward_together() -> None:
    play = Play()
    assert steps(play.staged(num_requests=2)) == ["enter"]
    assert play.join("a") == play.join("b") == play.ready("a") == []
    (apply,) = play.ready("b")
    assert (apply.step, apply.proceed, apply.quarantine) == ("apply", ("a", "b"), ())
    assert play.applied("b") == []
    (publish,) = play.applied("a")
    assert (publish.step, publish.proceed, publish.quarantine) == ("publish", ("a", "b"), ())
    assert play.confirmed("a") == play.confirmed("b") == play.returned(request=0) == []
    assert steps(play.returned(request=1)) == ["end"]
    assert play.coordinator.done
    assert play.outcomes == {"a": "published", "b": "published"}


def test_the_report_says_what_happened() -> None:
    play = Play().applying("a", "b")
    play.applied("a")
    play.applied("b")
    play.confirmed("a", pause_seconds=0.25)
    play.confirmed("b", pause_seconds=0.75)
    play.return_all(2)
    report = play.report
    assert (report.update, report.epoch, report.mode) == (f"{EPOCH}-1", EPOCH, "staged")
    assert (report.version, report.digest, report.base) == ("step-1", NEW, OLD)
    assert (report.outcome, report.bytes, report.bytes_sent) == ("published", 4096, 100)
    assert (report.pause_seconds, report.verified) == (0.75, True)
    assert (report.reason, report.degraded) == (None, ())
    assert report.seconds == {"stage": 2.0}
    assert [replica.pause_seconds for replica in report.replicas] == [0.25, 0.75]
    assert {replica.way_back for replica in report.replicas} == {"staged"}
    assert {replica.digest for replica in report.replicas} == {NEW}
    assert msgspec.json.decode(msgspec.json.encode(report), type=Report) == report


@pytest.mark.parametrize("digest", [None, OLD])
def test_verified_means_that_every_replica_recomputed_the_versions_digest(
    digest: str | None,
) -> None:
    play = Play().applying("a", "b")
    play.applied("a")
    play.applied("b", digest)
    play.confirmed("a")
    play.confirmed("b")
    play.return_all(2)
    assert (play.report.outcome, play.report.verified) == ("published", False)


def test_engines_are_called_only_when_every_rank_has_staged() -> None:
    play = Play(num_ranks=3)
    assert play.staged(2) == play.staged(0) == []
    assert steps(play.staged(1)) == ["enter"]


def test_a_rank_that_leads_no_engine_returns_at_once() -> None:
    play = Play(num_ranks=4)
    for rank in range(4):
        play.staged(rank)
    for rank, worker in enumerate((0, 1, 0, 1)):
        engine = f"engine {rank // 2}"
        play.join(f"{rank}", rank=rank, engine=engine, worker=worker, world_size=2)
    assert play.returned(1) == play.returned(3) == []
    for rank in range(4):
        decided = play.ready(f"{rank}")
    assert steps(decided) == ["apply"]


def test_requests_that_return_before_their_engine_said_hello_are_not_waited_for() -> None:
    play = Play(num_ranks=2)
    play.staged(0)
    play.staged(1, num_requests=0)
    play.join("a")
    play.wait(SETTLED_SECONDS)
    assert steps(play.ready("a")) == ["apply"]


def test_one_request_may_call_several_engines_if_they_come_at_once() -> None:
    play = Play()
    play.staged(num_requests=1)
    play.join("a")
    play.ready("a")
    play.wait(0.01)
    play.join("b")
    assert play.ready("b") == []
    (apply,) = play.wait(SETTLED_SECONDS)
    assert (apply.step, apply.proceed) == ("apply", ("a", "b"))


def test_a_request_that_calls_one_engine_leaves_nobody_to_wait_for() -> None:
    play = Play()
    play.staged(num_requests=1, open_ended=False)
    play.join("a")
    assert steps(play.ready("a")) == ["apply"]


def test_nothing_is_decided_until_every_engine_that_is_called_said_hello() -> None:
    play = Play()
    play.staged(num_requests=2)
    play.join("a")
    assert play.ready("a") == play.wait(READY_SECONDS / 2) == play.join("b") == []
    assert steps(play.ready("b")) == ["apply"]


def test_a_wake_up_that_decides_nothing_asks_for_a_later_one() -> None:
    """Otherwise the coordinator spins for as long as an engine takes to get ready."""
    play = Play()
    play.staged(num_requests=1)
    assert play.wait(SETTLED_SECONDS) == []
    assert play.coordinator.next_deadline > play.now
    play.join("a")
    assert play.wait(SETTLED_SECONDS) == []
    assert play.coordinator.next_deadline > play.now


# Nothing staged


def test_a_rank_that_cannot_stage_aborts_before_any_engine_is_called() -> None:
    play = Play(num_ranks=2)
    assert play.staged(0, error=no("bad memory", "rank 0")) == []
    (stop,) = play.staged(1)
    assert (stop.step, stop.proceed) == ("stop", ())
    assert "bad memory" in stop.reason
    assert play.returned(0) == []
    assert steps(play.returned(1)) == ["end"]
    assert play.report.outcome == "aborted"
    assert play.report.reason == no("bad memory", "rank 0")
    assert play.report.replicas == ()


def test_a_rank_that_never_stages_is_named() -> None:
    play = Play(num_ranks=3)
    play.staged(0)
    play.staged(2)
    assert play.wait(READY_SECONDS - 1) == []
    assert steps(play.wait(1)) == ["stop"]
    play.returned(0)
    assert steps(play.returned(2)) == ["end"]
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert play.report.reason.type == "DeadlineExceeded"
    assert "staging" in play.report.reason.message
    assert "rank 1" in play.report.reason.message
    assert "rank 0" not in play.report.reason.message


def test_a_session_that_came_early_is_not_blamed_for_a_rank_that_is_missing() -> None:
    play = Play(num_ranks=2)
    play.staged(0)
    play.join("early")
    play.wait(READY_SECONDS)
    play.withdrawn("early")
    play.returned(0)
    assert play.report.reason is not None
    assert "early" not in play.report.reason.message
    assert play.outcomes == {"early": "kept"}


# A no before anything changed


def test_a_no_at_ready_aborts_everyone() -> None:
    play = Play().entering("a", "b")
    play.ready("a")
    (stop,) = play.withdrawn("b", "the checkpoint lacks 'w'")
    assert (stop.step, stop.quarantine) == ("stop", ())
    assert "the checkpoint lacks 'w'" in stop.reason
    assert play.withdrawn("a", "told to stop") == []
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "kept"}
    assert play.report.outcome == "aborted"
    assert str(play.report.reason) == "b: AdapterError: the checkpoint lacks 'w'"
    assert {replica.digest for replica in play.report.replicas} == {OLD}
    assert (play.report.verified, play.report.pause_seconds) == (False, None)


def test_a_silent_session_is_named_when_the_ready_deadline_passes() -> None:
    play = Play().entering("quick", "silent")
    play.ready("quick")
    assert play.wait(READY_SECONDS - 1) == []
    assert steps(play.wait(1)) == ["stop"]
    play.withdrawn("quick", "told to stop")
    play.return_all(2)
    assert play.outcomes == {"quick": "kept", "silent": "lost"}
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert play.report.reason.type == "DeadlineExceeded"
    assert "silent" in play.report.reason.message
    assert "quick" not in play.report.reason.message


def test_an_engine_that_never_says_hello_ends_at_the_deadline() -> None:
    play = Play()
    play.staged(num_requests=2)
    play.join("a")
    play.ready("a")
    assert steps(play.wait(READY_SECONDS)) == ["stop"]
    play.withdrawn("a")
    play.return_all(2)
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert "say hello" in play.report.reason.message


def test_a_session_lost_before_it_is_ready_aborts() -> None:
    play = Play().entering("a", "b")
    assert steps(play.left("b")) == ["stop"]
    play.withdrawn("a")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "lost"}
    assert play.report.reason == no("the peer died", "b")


def test_a_session_lost_when_it_was_ready_aborts() -> None:
    play = Play().entering("a", "b")
    play.ready("b")
    assert steps(play.left("b")) == ["stop"]


@pytest.mark.parametrize("joined", [False, True])
def test_a_request_that_raises_before_apply_is_a_no(joined: bool) -> None:
    play = Play()
    play.staged(num_requests=2)
    if joined:
        play.join("a")
        play.ready("a")
    (stop, *_) = play.returned(request=1, error=no("404 from the engine", "rank 0, request 1"))
    assert stop.step == "stop"
    if joined:
        play.withdrawn("a")
    play.returned(request=0)
    assert play.report.outcome == "aborted"
    assert play.report.reason == no("404 from the engine", "rank 0, request 1")


def test_a_request_that_returns_without_calling_an_engine_is_explained() -> None:
    play = Play()
    play.staged(num_requests=1)
    assert steps(play.returned()) == ["stop", "end"]
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert "no engine said hello" in play.report.reason.message
    assert "update_weights_from_ipc" in play.report.reason.message


def test_only_the_first_cause_is_reported() -> None:
    play = Play().entering("a", "b")
    play.withdrawn("a", "first")
    play.withdrawn("b", "second")
    play.returned(request=0, error=no("third"))
    play.returned(request=1, error=no("fourth"))
    assert play.report.reason == no("first", "a")


# A no after weights changed


def test_a_no_at_applied_rolls_everyone_back() -> None:
    play = Play().applying("a", "b")
    play.applied("a")
    (stop,) = play.withdrawn("b", "the loader raised", pause_seconds=0.1)
    assert (stop.step, stop.quarantine) == ("stop", ())
    assert play.withdrawn("a", "told to stop", pause_seconds=0.2) == []
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "kept"}
    report = play.report
    assert (report.outcome, report.pause_seconds, report.verified) == ("rolled_back", 0.2, False)
    assert report.reason == no("the loader raised", "b")
    assert {(replica.digest, replica.served_digest) for replica in report.replicas} == {(OLD, None)}


def test_a_silent_session_is_named_when_the_pause_deadline_passes() -> None:
    play = Play().applying("quick", "silent")
    play.applied("quick")
    assert play.wait(PAUSE_SECONDS - 1) == []
    assert steps(play.wait(1)) == ["stop"]
    assert play.withdrawn("quick") == []
    play.return_all(2)
    assert play.outcomes == {"quick": "kept", "silent": "lost"}
    assert play.report.outcome == "rolled_back"
    assert play.report.reason is not None
    assert "applying" in play.report.reason.message
    assert "silent" in play.report.reason.message


@pytest.mark.parametrize("has_applied", [False, True])
def test_a_session_lost_while_applying_rolls_the_others_back(has_applied: bool) -> None:
    play = Play().applying("a", "b")
    if has_applied:
        play.applied("b")
    assert steps(play.left("b")) == ["stop"]
    play.withdrawn("a")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "lost"}
    assert play.report.outcome == "rolled_back"


def test_a_request_that_raises_while_applying_is_a_no() -> None:
    play = Play().applying("a", "b")
    play.applied("a")
    assert steps(play.returned(request=1, error=no("the engine timed out"))) == ["stop"]
    play.withdrawn("a")
    play.withdrawn("b")
    play.returned(request=0)
    assert play.report.outcome == "rolled_back"
    assert play.report.reason == no("the engine timed out")


def test_a_replica_that_could_not_get_back_is_torn() -> None:
    play = Play().applying("a", "b")
    play.applied("a")
    play.withdrawn("b", "the way back failed", torn=True)
    play.withdrawn("a")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "torn"}
    assert play.report.outcome == "rolled_back"
    assert play.report.reason == no("the way back failed", "b")


def test_those_that_do_not_answer_a_stop_are_not_waited_for_for_ever() -> None:
    play = Play().applying("a", "b")
    assert steps(play.withdrawn("a")) == ["stop"]
    assert play.wait(PAUSE_SECONDS) == []
    assert steps(play.wait(STOPPED_SECONDS)) == ["end"]
    assert play.outcomes == {"a": "kept", "b": "lost"}
    assert play.report.reason == no("refused", "a")


def test_late_votes_of_a_session_that_was_given_up_count_for_nothing() -> None:
    play = Play().applying("a", "late")
    play.applied("a")
    play.wait(PAUSE_SECONDS)
    assert play.applied("late") == play.confirmed("late") == play.ready("late") == []
    play.withdrawn("a")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "late": "lost"}
    assert play.report.outcome == "rolled_back"


def test_votes_of_sessions_that_never_said_hello_count_for_nothing() -> None:
    play = Play().entering("a", "b")
    play.ready("a")
    assert play.ready("stranger") == play.applied("stranger") == play.left("stranger") == []
    assert steps(play.ready("b")) == ["apply"]


@pytest.mark.parametrize("skipped", ["applied", "confirmed"])
def test_a_vote_before_its_turn_publishes_nothing(skipped: str) -> None:
    """A session that says `Confirmed` to an apply has not said that it applied."""
    play = Play().entering("a", "b")
    play.ready("a")
    play.applied("a") if skipped == "applied" else play.confirmed("a")
    play.ready("b")
    play.applied("b")
    assert "publish" not in steps(play.decisions)


# After the decision to publish


def test_silence_after_publish_is_reported_and_undone_by_nobody() -> None:
    play = Play().publishing("a", "silent")
    play.confirmed("a")
    play.return_all(2)
    assert steps(play.wait(PAUSE_SECONDS)) == ["end"]
    assert play.outcomes == {"a": "published", "silent": "lost"}
    assert (play.report.outcome, play.report.reason) == ("published", None)


def test_a_loss_after_publish_is_reported_and_undone_by_nobody() -> None:
    play = Play().publishing("a", "b")
    assert play.left("b") == []
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "b": "lost"}
    assert play.report.outcome == "published"


def test_a_replica_that_returned_to_its_base_in_doubt_says_so_after_publish() -> None:
    play = Play().publishing("a", "doubtful")
    play.withdrawn("doubtful", "no decision came")
    play.confirmed("a")
    play.return_all(2)
    assert play.outcomes == {"a": "published", "doubtful": "kept"}
    assert play.report.outcome == "published"
    assert {replica.name: replica.digest for replica in play.report.replicas} == {
        "a": NEW,
        "doubtful": OLD,
    }


def test_what_fails_after_the_label_changed_is_published_but_unconfirmed() -> None:
    play = Play().publishing("a", "b")
    play.confirmed("a", error=no("the cache flush failed", "a"))
    play.confirmed("b")
    play.return_all(2)
    assert play.outcomes == {"a": "published_unconfirmed", "b": "published"}
    assert (play.report.outcome, play.report.reason) == ("published", None)
    assert play.report.replicas[0].error == no("the cache flush failed", "a")


def test_a_request_that_raises_after_publish_leaves_its_engine_unconfirmed() -> None:
    play = Play(num_ranks=2)
    for rank in range(2):
        play.staged(rank)
    for rank in range(2):
        play.join(f"{rank}", rank=rank)
    for rank in range(2):
        play.ready(f"{rank}")
    for rank in range(2):
        play.applied(f"{rank}")
    for rank in range(2):
        play.confirmed(f"{rank}")
    play.returned(0)
    play.returned(1, error=no("500 from the engine"))
    assert play.outcomes == {"0": "published", "1": "published_unconfirmed"}
    assert play.report.replicas[1].error == no("500 from the engine")
    assert (play.report.outcome, play.report.reason) == ("published", None)


def test_a_request_that_hangs_after_publish_does_not_hold_the_end_up_for_ever() -> None:
    play = Play().publishing("a")
    assert play.confirmed("a") == []
    assert steps(play.wait(PAUSE_SECONDS)) == ["end"]
    assert play.report.outcome == "published"


def test_nothing_follows_the_end() -> None:
    play = Play().publishing("a")
    play.confirmed("a")
    play.returned()
    ended = list(play.decisions)
    play.withdrawn("a")
    play.left("a")
    play.returned(error=no("late"))
    play.staged()
    play.wait(STOPPED_SECONDS)
    assert play.decisions == ended


def test_a_decision_that_could_not_be_recorded_is_a_rollback() -> None:
    play = Play().publishing("a", "b")
    error = RemoteError(type="UsageError", message="the disk is full", where="registry")
    (stop,) = play.coordinator.veto(error, play.now)
    assert stop.step == "stop"
    play.withdrawn("a")
    play.withdrawn("b")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "kept"}
    assert (play.report.outcome, play.report.reason) == ("rolled_back", error)


@pytest.mark.parametrize(
    ("phase", "expected", "outcome"),
    [
        ("entering", ["stop", "end"], "aborted"),
        ("applying", ["stop", "end"], "rolled_back"),
        ("publishing", ["end"], "published"),
    ],
)
def test_a_coordinator_that_fails_ends_at_once(
    phase: str, expected: list[str], outcome: str
) -> None:
    play = getattr(Play(), phase)("a", "b")
    decided = play.coordinator.abandon(no("a bug"))
    assert steps(decided) == expected
    assert play.coordinator.done
    assert decided[-1].report.outcome == outcome


# Tensor parallel engines


def tensor_parallel(play: Play, *engines: str) -> Play:
    """Engines of two workers, each of which has said hello."""
    play.staged(num_requests=len(engines))
    for engine in engines:
        for worker in range(2):
            play.join(f"{engine}{worker}", engine=engine, worker=worker, world_size=2)
    return play


def test_an_engine_waits_for_all_its_workers() -> None:
    play = Play()
    play.staged(num_requests=1)
    play.join("a0", engine="a", worker=0, world_size=2)
    play.ready("a0")
    assert play.wait(SETTLED_SECONDS) == []
    play.join("a1", engine="a", worker=1, world_size=2)
    assert play.wait(SETTLED_SECONDS) == []
    (apply,) = play.ready("a1")
    assert (apply.step, apply.proceed) == ("apply", ("a0", "a1"))
    assert play.applied("a0") == []
    assert steps(play.applied("a1")) == ["publish"]


def test_a_worker_that_never_comes_ends_at_the_deadline() -> None:
    play = Play()
    play.staged(num_requests=1)
    play.join("a0", engine="a", worker=0, world_size=2)
    play.ready("a0")
    assert steps(play.wait(READY_SECONDS)) == ["stop"]
    play.withdrawn("a0")
    play.returned()
    assert play.report.outcome == "aborted"


def test_one_worker_that_fails_rolls_the_engine_back() -> None:
    play = tensor_parallel(Play(), "a")
    play.ready("a0")
    play.ready("a1")
    play.wait(SETTLED_SECONDS)
    play.applied("a0")
    assert steps(play.withdrawn("a1")) == ["stop"]
    play.withdrawn("a0")
    play.returned()
    assert play.outcomes == {"a0": "kept", "a1": "kept"}


# Followers


def test_a_draft_model_that_follows_does_not_vote() -> None:
    play = Play().publishing("a")
    play.join("draft", engine="a", follower=True)
    play.ready("draft")
    play.applied("draft")
    play.confirmed("draft")
    play.confirmed("a")
    assert steps(play.returned()) == ["end"]
    assert play.outcomes == {"a": "published", "draft": "published"}
    assert [replica.follower for replica in play.report.replicas] == [False, True]
    assert play.report.degraded == ()


@pytest.mark.parametrize("how", ["withdrawn", "left"])
def test_a_follower_that_fails_degrades_the_update_and_no_more(how: str) -> None:
    play = Play().publishing("a")
    play.join("draft", engine="a", follower=True)
    play.ready("draft")
    getattr(play, how)("draft")
    play.confirmed("a")
    assert steps(play.returned()) == ["end"]
    assert (play.report.outcome, play.report.reason) == ("published", None)
    assert play.report.degraded == ("draft",)
    assert play.outcomes["a"] == "published"


def test_a_follower_that_is_not_done_at_the_end_degrades_the_update() -> None:
    play = Play().publishing("a")
    play.join("draft", engine="a", follower=True)
    play.ready("draft")
    play.confirmed("a")
    play.returned()
    assert play.report.degraded == ("draft",)


def test_who_says_hello_after_the_vote_does_not_vote() -> None:
    play = Play().applying("a", "b")
    play.join("late")
    play.applied("a")
    (publish,) = play.applied("b")
    assert (publish.step, publish.proceed) == ("publish", ("a", "b"))


# Who is refused


def test_another_protocol_is_refused() -> None:
    play = Play()
    play.staged(num_requests=2)
    (stop,) = play.join("future", protocol=PROTOCOL + 1)
    assert stop.step == "stop"
    play.return_all(2)
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert play.report.reason.type == "ProtocolError"
    assert f"protocol {PROTOCOL + 1}" in play.report.reason.message
    assert play.report.reason.where == "future"


@pytest.mark.parametrize(("epoch", "is_refused"), [(EPOCH - 1, False), (EPOCH, True), (9999, True)])
def test_a_replica_that_knows_a_newer_coordinator_is_left_to_it(
    epoch: int, is_refused: bool
) -> None:
    play = Play()
    play.staged(num_requests=2)
    decided = play.join("a", epoch=epoch)
    assert steps(decided) == (["stop"] if is_refused else [])
    if is_refused:
        play.return_all(2)
        assert play.outcomes == {"a": "kept"}
        assert play.report.reason is not None
        assert f"epoch {epoch}" in play.report.reason.message


def test_require_rollback_refuses_who_has_no_way_back() -> None:
    play = Play(require_rollback=True).entering("a", "b")
    play.ready("a", "snapshot")
    (stop,) = play.ready("b", "none")
    assert stop.step == "stop"
    play.withdrawn("a")
    play.withdrawn("b")
    play.return_all(2)
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert "no way back" in play.report.reason.message
    assert [replica.way_back for replica in play.report.replicas] == ["snapshot", "none"]


def test_without_require_rollback_no_way_back_is_told_and_allowed() -> None:
    play = Play().entering("a", "b")
    play.ready("a", "snapshot")
    assert steps(play.ready("b", "none")) == ["apply"]


def test_a_replica_too_few_is_an_abort() -> None:
    play = Play(min_replicas=3).entering("a", "b")
    play.ready("a")
    (stop,) = play.ready("b")
    assert stop.step == "stop"
    play.withdrawn("a")
    play.withdrawn("b")
    play.return_all(2)
    assert play.report.outcome == "aborted"
    assert play.report.reason is not None
    assert "--min-replicas" in play.report.reason.message


@pytest.mark.parametrize(
    ("on_failure", "min_replicas"), [("ignore", 1), ("quarantine", 0), ("rollback", -1)]
)
def test_a_policy_says_what_is_wrong_with_it(on_failure: str, min_replicas: int) -> None:
    with pytest.raises(UsageError):
        Policy(on_failure, min_replicas)


def test_whoever_says_hello_to_an_update_that_has_stopped_keeps_its_base() -> None:
    play = Play()
    play.staged(num_requests=2)
    play.join("a")
    play.join("b")
    play.withdrawn("a")
    play.withdrawn("b")
    play.join("late")
    play.return_all(2)
    assert play.outcomes == {"a": "kept", "b": "kept", "late": "kept"}


def test_an_update_that_a_replica_had_to_leave_in_doubt_is_reported() -> None:
    play = Play()
    play.staged(open_ended=False)
    hello = Hello(
        protocol=PROTOCOL, replica="a", engine="a", rank=0, world_size=1, undecided="999-4"
    )
    play.on(Joined(session="a", rank=0, hello=hello))
    play.ready("a")
    play.applied("a")
    play.confirmed("a")
    play.returned()
    assert [replica.undecided for replica in play.report.replicas] == ["999-4"]


# How long


@pytest.mark.parametrize(
    ("timeout_seconds", "num_bytes", "pause_seconds", "return_seconds"),
    [(600.0, 0, 10.0, 40.0), (600.0, 10_000_000_000, 30.0, 60.0), (5.0, 0, 5.0, 10.0)],
)
def test_no_pause_is_longer_than_the_bytes_excuse(
    timeout_seconds: float, num_bytes: int, pause_seconds: float, return_seconds: float
) -> None:
    deadlines = Deadlines.of(timeout_seconds, num_bytes)
    assert deadlines == Deadlines(
        ready_seconds=timeout_seconds, pause_seconds=pause_seconds, return_seconds=return_seconds
    )


@pytest.mark.parametrize(("mode", "seconds"), [("staged", 30), ("streamed", 110), ("kept", 110)])
def test_a_pause_may_last_longer_where_files_are_read_in_it(mode: str, seconds: float) -> None:
    assert Deadlines.of(600, 10**10, mode=mode).pause_seconds == seconds
