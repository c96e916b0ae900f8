"""The receiving side, played by hand: every point at which it can fail."""

from __future__ import annotations

import gc
import weakref

import msgspec
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from toy_adapter import DEADLINES, EPOCH, Scene, stop

from checkpoint_engine.errors import (
    AdapterError,
    DeadlineExceeded,
    PeerLost,
    ProtocolError,
    UpdateRefused,
)
from checkpoint_engine.update.protocol import (
    PROTOCOL,
    Applied,
    Confirmed,
    FromRank,
    Hello,
    Proceed,
    Ready,
    Stop,
    Withdrawn,
)

APPLY, PUBLISH = Proceed(step="apply"), Proceed(step="publish")


def test_an_update_from_hello_to_confirmed() -> None:
    scene = Scene.make()
    outcome = scene.play(scene.offer, APPLY, PUBLISH)
    scene.check(outcome)
    assert (outcome.state, outcome.error, scene.unheard) == ("published", None, [])
    hello, ready, applied, confirmed = scene.sent
    assert isinstance(hello, Hello)
    assert (hello.protocol, hello.replica, hello.engine) == (PROTOCOL, "toy", "toy engine")
    assert (hello.base, hello.epoch, hello.undecided) == ("old", 0, None)
    assert isinstance(ready, Ready)
    assert ready.way_back == "snapshot"
    assert isinstance(applied, Applied)
    assert (applied.digest, applied.served_digest) == (scene.offer.version.digest, "served")
    assert isinstance(confirmed, Confirmed)
    assert confirmed.error is None
    assert confirmed.pause_seconds >= 0
    assert scene.adapter.calls == ["prepare", "pause", "apply", "check", "publish", "resume"]


def test_every_wait_has_a_deadline() -> None:
    scene = Scene.make()
    scene.play(scene.offer, APPLY, PUBLISH)
    greeting, for_apply, for_publish = scene.waited
    assert 0 < greeting <= DEADLINES.ready_seconds
    assert (for_apply, for_publish) == (DEADLINES.ready_seconds, DEADLINES.decision_seconds)
    assert scene.adapter.paused_for == DEADLINES.pause_seconds


def test_each_stage_is_timed_once() -> None:
    scene = Scene.make()
    scene.play(scene.offer, APPLY, PUBLISH)
    stages = [span.stage for message in scene.sent[1:] for span in message.spans]  # type: ignore[union-attr]
    assert stages == ["attach", "verify", "enter", "apply", "check", "publish", "resume", "publish"]


# Nothing offered


def test_a_rank_with_no_update_under_way_refuses() -> None:
    scene = Scene.make()
    with pytest.raises(UpdateRefused, match="no update is under way"):
        scene.play(stop("no update is under way"))
    assert scene.adapter.calls == []


@pytest.mark.parametrize("failure", [PeerLost("gone"), DeadlineExceeded("silent")])
def test_a_rank_that_never_offers_is_an_error(failure: Exception) -> None:
    scene = Scene.make()
    with pytest.raises(type(failure)):
        scene.play(failure)
    assert (scene.adapter.calls, scene.adapter.epoch) == ([], 0)


def test_a_proceed_in_place_of_an_offer_is_an_error() -> None:
    scene = Scene.make()
    with pytest.raises(ProtocolError, match="an offer was due"):
        scene.play(APPLY)
    assert scene.adapter.calls == []


# Up to apply: nothing has changed


def test_memory_that_cannot_be_attached_is_a_no() -> None:
    scene = Scene.make()
    (part,) = scene.offer.parts
    longer = msgspec.structs.replace(part, length=part.length + 4096)
    offer = msgspec.structs.replace(scene.offer, parts=(longer,))
    outcome = scene.play(offer, stop())
    scene.check(outcome)
    assert scene.said == ["Hello", "Withdrawn"]
    assert "prepare" not in scene.adapter.calls


def test_a_manifest_of_another_version_is_a_no() -> None:
    scene = Scene.make()
    version = msgspec.structs.replace(scene.offer.version, digest="f" * 64)
    outcome = scene.play(msgspec.structs.replace(scene.offer, version=version), stop())
    scene.check(outcome)
    assert outcome.error is not None
    assert outcome.error.type == "ProtocolError"


def test_garbage_for_a_manifest_is_a_no() -> None:
    scene = Scene.make()
    outcome = scene.play(msgspec.structs.replace(scene.offer, manifest=b"\x80garbage"), stop())
    scene.check(outcome)
    assert outcome.error is not None
    assert outcome.error.type == "ManifestError"


@pytest.mark.parametrize("failure", [AdapterError, RuntimeError, MemoryError])
def test_a_version_that_cannot_be_prepared_is_a_no(failure: type[Exception]) -> None:
    scene = Scene.make(["prepare"], failure=failure)
    outcome = scene.play(scene.offer, stop())
    scene.check(outcome)
    assert outcome.state == "kept"
    *_, withdrawn = scene.sent
    assert isinstance(withdrawn, Withdrawn)
    assert not withdrawn.torn
    assert withdrawn.error.where == "toy"
    assert withdrawn.error.type == failure.__name__
    assert "prepare failed" in withdrawn.error.message
    assert "in prepare" in withdrawn.error.traceback
    assert withdrawn.pause_seconds == 0
    assert scene.adapter.calls == ["prepare", "abort"]


@pytest.mark.parametrize(
    "instead",
    [stop(), DeadlineExceeded("silent"), PeerLost("gone"), PUBLISH, ProtocolError("malformed")],
    ids=["stop", "silence", "loss", "publish", "garbage"],
)
def test_whatever_comes_instead_of_apply_changes_nothing(instead: FromRank | Exception) -> None:
    scene = Scene.make()
    outcome = scene.play(scene.offer, instead)
    scene.check(outcome)
    assert outcome.state == "kept"
    assert outcome.error is not None
    assert scene.adapter.calls == ["prepare", "abort"]
    assert scene.adapter.undecided is None, "nothing had changed, so nothing is in doubt"


def test_requests_that_cannot_be_held_abort_and_cost_nothing() -> None:
    """No weight has changed yet: an engine that does not reach a token boundary serves on."""
    scene = Scene.make(["pause"], failure=DeadlineExceeded)
    outcome = scene.play(scene.offer, APPLY, stop())
    scene.check(outcome)
    assert outcome.state == "kept"
    assert scene.adapter.calls == ["prepare", "pause", "abort"]


# From apply on: everything is undone


@pytest.mark.parametrize("failing", ["apply", "check"])
@pytest.mark.parametrize("failure", [AdapterError, RuntimeError])
def test_a_failure_with_weights_changed_is_rolled_back(
    failing: str, failure: type[Exception]
) -> None:
    scene = Scene.make([failing], failure=failure)
    outcome = scene.play(scene.offer, APPLY, stop())
    scene.check(outcome)
    assert outcome.state == "kept"
    *_, withdrawn = scene.sent
    assert isinstance(withdrawn, Withdrawn)
    assert (withdrawn.torn, withdrawn.error.type) == (False, failure.__name__)
    assert scene.adapter.calls[-2:] == ["roll_back", "resume"]


@pytest.mark.parametrize(
    "instead",
    [stop(), DeadlineExceeded("silent"), PeerLost("gone"), APPLY, ProtocolError("malformed")],
    ids=["stop", "silence", "loss", "apply", "garbage"],
)
def test_whatever_comes_instead_of_publish_is_rolled_back(instead: FromRank | Exception) -> None:
    scene = Scene.make()
    outcome = scene.play(scene.offer, APPLY, instead)
    scene.check(outcome)
    assert outcome.state == "kept"
    in_doubt = isinstance(instead, (PeerLost, DeadlineExceeded))
    assert scene.adapter.undecided == (f"{EPOCH}-1" if in_doubt else None)
    assert scene.adapter.calls[-2:] == ["roll_back", "resume"]


def test_an_undecided_update_is_told_at_the_next_greeting_and_then_settled() -> None:
    scene = Scene.make()
    scene.play(scene.offer, APPLY, PeerLost("gone"))
    scene.sent.clear()
    scene.check(scene.play(scene.offer, APPLY, PUBLISH))
    (hello, *_) = scene.sent
    assert isinstance(hello, Hello)
    assert (hello.undecided, hello.epoch) == (f"{EPOCH}-1", EPOCH)
    assert scene.adapter.undecided is None


@pytest.mark.parametrize("failing", ["apply", "check"])
def test_an_engine_that_times_out_by_itself_is_in_no_doubt(failing: str) -> None:
    scene = Scene.make([failing], failure=DeadlineExceeded)
    scene.check(scene.play(scene.offer, APPLY, stop()))
    assert scene.adapter.undecided is None


class View:
    """Something that keeps the staged memory mapped."""


def test_a_failure_keeps_no_view_of_what_was_staged() -> None:
    """Its frames are in a cycle, as a pool's are, which lives until a collection."""
    scene = Scene.make()
    views: list[weakref.ref[View]] = []

    def apply() -> None:
        view = View()
        views.append(weakref.ref(view))
        cycle = AdapterError("half of it was written")
        raise cycle

    scene.adapter.apply = apply  # type: ignore[method-assign]
    gc.disable()
    try:
        assert scene.play(scene.offer, APPLY, stop()).state == "kept"
        assert [view() for view in views] == [None]
    finally:
        gc.enable()


def test_a_replica_that_cannot_get_back_is_torn_and_stays_paused() -> None:
    scene = Scene.make(["apply", "roll_back"])
    outcome = scene.play(scene.offer, APPLY, stop())
    scene.check(outcome)
    assert outcome.state == "torn"
    assert scene.adapter.paused
    assert scene.adapter.torn == "AdapterError: roll_back failed"
    *_, withdrawn = scene.sent
    assert isinstance(withdrawn, Withdrawn)
    assert withdrawn.torn
    assert "roll_back failed" in withdrawn.error.message
    assert "apply failed" in withdrawn.error.traceback, "the first cause is lost"


def test_a_replica_that_cannot_release_its_memory_is_torn_and_says_so() -> None:
    scene = Scene.make(["abort"])
    outcome = scene.play(scene.offer, stop())
    assert outcome.state == "torn"
    assert scene.adapter.torn is not None


# From publish on: nothing is undone


def test_a_failure_to_publish_is_reported_and_the_version_stays() -> None:
    scene = Scene.make(["publish"])
    outcome = scene.play(scene.offer, APPLY, PUBLISH)
    scene.check(outcome)
    assert outcome.state == "published"
    *_, confirmed = scene.sent
    assert isinstance(confirmed, Confirmed)
    assert confirmed.error is not None
    assert confirmed.error == outcome.error
    assert "publish failed" in confirmed.error.message
    assert "roll_back" not in scene.adapter.calls


def test_a_failure_to_resume_is_reported_and_the_version_stays() -> None:
    scene = Scene.make(["resume"])
    outcome = scene.play(scene.offer, APPLY, PUBLISH)
    assert outcome.state == "published"
    assert outcome.error is not None
    assert "resume failed" in outcome.error.message
    assert (scene.adapter.weights, scene.adapter.label) == (scene.new, "new")


def test_the_decision_stands_although_the_rank_is_gone_when_it_is_confirmed() -> None:
    scene = Scene.make()
    outcome = scene.play(scene.offer, APPLY, PUBLISH, lost_at="Confirmed")
    scene.check(outcome)
    assert outcome.state == "published"


# Losing the rank while speaking


@pytest.mark.parametrize("message", ["Ready", "Applied"])
def test_a_rank_that_is_gone_when_it_is_told_a_vote_changes_nothing(message: str) -> None:
    scene = Scene.make()
    replies = [scene.offer] if message == "Ready" else [scene.offer, APPLY]
    outcome = scene.play(*replies, lost_at=message)
    scene.check(outcome)
    assert outcome.state == "kept"


def test_a_rank_that_is_gone_when_it_is_told_no_changes_nothing() -> None:
    scene = Scene.make(["apply"])
    outcome = scene.play(scene.offer, APPLY, lost_at="Withdrawn")
    scene.check(outcome)
    assert outcome.state == "kept"


# The verdict on who said no


@pytest.mark.parametrize("failing", ["prepare", "pause", "apply"])
def test_who_says_no_hears_that_it_is_quarantined(failing: str) -> None:
    scene = Scene.make([failing])
    replies = [scene.offer] if failing == "prepare" else [scene.offer, APPLY]
    outcome = scene.play(*replies, stop("the others went on", quarantine=True))
    scene.check(outcome)
    assert outcome.state == "kept"
    assert scene.adapter.quarantined is not None
    assert f"{failing} failed" in scene.adapter.quarantined


@pytest.mark.parametrize("verdict", [stop(), PeerLost("gone"), DeadlineExceeded("silent"), PUBLISH])
def test_who_says_no_serves_on_unless_it_is_told_otherwise(verdict: FromRank | Exception) -> None:
    scene = Scene.make(["apply"])
    scene.check(scene.play(scene.offer, APPLY, verdict))
    assert scene.adapter.quarantined is None


@pytest.mark.parametrize("failing", ["prepare", "apply"])
def test_who_says_no_waits_as_long_as_the_others_may_take(failing: str) -> None:
    """The verdict comes with the next decision, for which the slowest engine is waited for."""
    scene = Scene.make([failing])
    replies = [scene.offer] if failing == "prepare" else [scene.offer, APPLY]
    scene.play(*replies, stop())
    longest = {"prepare": DEADLINES.ready_seconds, "apply": DEADLINES.pause_seconds}[failing]
    assert scene.waited[-1] >= longest


@pytest.mark.parametrize("replies", [[], [APPLY]], ids=["before apply", "before publish"])
def test_the_worker_of_an_engine_that_failed_elsewhere_is_quarantined(
    replies: list[FromRank],
) -> None:
    scene = Scene.make()
    verdict = Stop(reason="another worker of its engine failed", quarantine=True)
    scene.check(scene.play(scene.offer, *replies, verdict))
    assert scene.adapter.quarantined == "another worker of its engine failed"


def test_a_torn_replica_is_torn_although_it_is_told_to_be_quarantined() -> None:
    scene = Scene.make(["apply", "roll_back"])
    outcome = scene.play(scene.offer, APPLY, stop(quarantine=True))
    assert (outcome.state, scene.adapter.quarantined) == ("torn", None)


# Everything at once

anything = st.sampled_from(
    [
        APPLY,
        PUBLISH,
        stop(),
        stop(quarantine=True),
        PeerLost("gone"),
        DeadlineExceeded("silent"),
        ProtocolError("malformed"),
    ]
)
heard = st.one_of(
    st.tuples(anything, anything, anything),
    st.tuples(st.just(APPLY), anything, anything),
    st.tuples(st.just(APPLY), st.just(PUBLISH), anything),
)
failing_methods = st.sets(
    st.sampled_from(["prepare", "pause", "apply", "check", "roll_back", "publish"]), max_size=2
)
lost = st.sampled_from([None, "Ready", "Applied", "Confirmed", "Withdrawn"])


@settings(max_examples=300, deadline=None)
@given(heard, failing_methods, lost)
def test_whatever_happens_one_true_version_is_served_under_its_own_label(
    replies: tuple[FromRank | Exception, ...], failing: set[str], lost_at: str | None
) -> None:
    scene = Scene.make(sorted(failing))
    outcome = scene.play(scene.offer, *replies, lost_at=lost_at)
    scene.check(outcome)
    event(outcome.state)
    if outcome.state == "published":
        assert replies[:2] == (APPLY, PUBLISH)
    if outcome.state == "torn":
        assert "roll_back" in failing
