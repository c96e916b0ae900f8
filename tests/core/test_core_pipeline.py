"""Buckets flow through stages that work at the same time, and stop together."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable

import pytest
from core_tools import PROPERTY, TIMEOUT_SECONDS, Background, wait_until
from hypothesis import given
from hypothesis import strategies as st

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, TransferError
from checkpoint_engine.pipeline import Stage, run_pipeline
from checkpoint_engine.plan.buckets import Bucket
from checkpoint_engine.timeline import Timeline


def buckets(num_buckets: int) -> list[Bucket]:
    return [Bucket(number, 256 * number, 256, ()) for number in range(num_buckets)]


def nothing(bucket: Bucket, slot: int) -> None:
    pass


def test_stages_work_at_the_same_time() -> None:
    """Each stage waits until the others are within theirs: one after the other would hang."""
    meeting = threading.Barrier(3)

    def meet_first_at(number: int) -> Stage:
        """Bucket 2 in the first stage, 1 in the second and 0 in the third, all at once."""

        def stage(bucket: Bucket, slot: int) -> None:
            if bucket.index == number:
                meeting.wait(TIMEOUT_SECONDS)

        return stage

    timeline = Timeline("rank 0")
    stages = {"fill": meet_first_at(2), "move": meet_first_at(1), "apply": meet_first_at(0)}
    run_pipeline(buckets(5), stages, timeline, timeout_seconds=TIMEOUT_SECONDS)
    met = {
        ("fill", "bucket 2"): None,
        ("move", "bucket 1"): None,
        ("apply", "bucket 0"): None,
    }
    spans = [span for span in timeline.spans if (span.stage, span.detail) in met]
    assert len(spans) == 3
    assert max(span.start for span in spans) < min(span.end for span in spans), "they overlap"


@PROPERTY
@given(st.integers(0, 20), st.integers(1, 4), st.integers(1, 5))
def test_every_bucket_passes_every_stage_once_in_order(
    num_buckets: int, num_stages: int, num_slots: int
) -> None:
    lock = threading.Lock()
    passed: list[tuple[str, int]] = []
    slots: dict[int, int] = {}
    most_under_way = 0

    def stage_called(name: str) -> Stage:
        def stage(bucket: Bucket, slot: int) -> None:
            nonlocal most_under_way
            with lock:
                passed.append((name, bucket.index))
                if name == "s0":
                    assert slot not in slots, "the slot is in use"
                    slots[slot] = bucket.index
                    most_under_way = max(most_under_way, len(slots))
                assert slots[slot] == bucket.index, "a bucket keeps its slot"
                if name == f"s{num_stages - 1}":
                    del slots[slot]

        return stage

    names = [f"s{number}" for number in range(num_stages)]
    timeline = Timeline("rank 0")
    run_pipeline(
        buckets(num_buckets),
        {name: stage_called(name) for name in names},
        timeline,
        num_slots=num_slots,
        timeout_seconds=TIMEOUT_SECONDS,
    )
    for name in names:
        assert [index for stage, index in passed if stage == name] == list(range(num_buckets))
    for index in range(num_buckets):
        assert [stage for stage, passing in passed if passing == index] == names
    assert most_under_way <= num_slots
    assert slots == {}
    spans = Counter((span.stage, span.detail) for span in timeline.spans)
    assert spans == Counter((name, f"bucket {n}") for name in names for n in range(num_buckets))


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_a_slow_last_stage_holds_the_others_back(num_slots: int) -> None:
    """While nothing leaves, exactly `num_slots` buckets are let in, each with a slot of its own."""
    entered: dict[int, int] = {}
    full, go_on = threading.Event(), threading.Event()

    def fill(bucket: Bucket, slot: int) -> None:
        entered[bucket.index] = slot
        if len(entered) == num_slots:
            full.set()

    def apply(bucket: Bucket, slot: int) -> None:
        assert go_on.wait(TIMEOUT_SECONDS)

    running = Background(
        lambda: run_pipeline(
            buckets(8), {"fill": fill, "apply": apply}, Timeline("rank 0"), num_slots=num_slots
        )
    )
    assert full.wait(TIMEOUT_SECONDS)
    assert not running.is_done(within_seconds=0.1)
    assert sorted(entered) == list(range(num_slots))
    assert sorted(entered.values()) == list(range(num_slots))
    go_on.set()
    running.result()
    assert sorted(entered) == list(range(8))


def failing_at(number: int, failure: BaseException) -> Stage:
    def stage(bucket: Bucket, slot: int) -> None:
        if bucket.index == number:
            raise failure

    return stage


@pytest.mark.parametrize("name", ["fill", "move", "apply"])
@pytest.mark.parametrize("number", [0, 3, 9])
@pytest.mark.parametrize("kind", [OSError, KeyboardInterrupt])
def test_a_failure_stops_every_stage_and_is_named(
    name: str, number: int, kind: type[BaseException]
) -> None:
    failure = kind("the disk is gone")
    passed: dict[str, list[int]] = {"fill": [], "move": [], "apply": []}

    def recording(stage: str) -> Stage:
        def record(bucket: Bucket, slot: int) -> None:
            if stage == name:
                failing_at(number, failure)(bucket, slot)
            passed[stage].append(bucket.index)

        return record

    with pytest.raises(TransferError, match=f"bucket {number}, stage {name}: {failure}") as raised:
        run_pipeline(buckets(10), {stage: recording(stage) for stage in passed}, Timeline("r"))
    assert raised.value.__cause__ is failure
    assert passed[name] == list(range(number))
    after = list(passed)[list(passed).index(name) + 1 :]
    assert all(number not in passed[stage] for stage in after)
    assert not [one for one in threading.enumerate() if one.name in {f"ckpt-{s}" for s in passed}]


def test_the_first_cause_is_raised_not_its_echo() -> None:
    """A broken transfer makes its neighbours fail too; what broke first is what is told."""
    broken, echoed = threading.Event(), threading.Event()
    cause = ConnectionResetError("the link is gone")

    def move_has_ended() -> bool:
        return all(thread.name != "ckpt-move" for thread in threading.enumerate())

    def fill(bucket: Bucket, slot: int) -> None:
        if bucket.index == 1:
            assert broken.wait(TIMEOUT_SECONDS)
            wait_until(move_has_ended)
            echoed.set()
            raise RuntimeError("an echo")

    def move(bucket: Bucket, slot: int) -> None:
        broken.set()
        raise cause

    with pytest.raises(TransferError, match="bucket 0, stage move: the link is gone") as raised:
        run_pipeline(buckets(4), {"fill": fill, "move": move}, Timeline("rank 0"))
    assert raised.value.__cause__ is cause
    assert echoed.is_set()


def test_a_failure_does_not_wait_for_buckets_that_were_not_let_in() -> None:
    entered: list[int] = []

    def fill(bucket: Bucket, slot: int) -> None:
        entered.append(bucket.index)

    with pytest.raises(TransferError, match="bucket 0, stage move"):
        run_pipeline(
            buckets(1000),
            {"fill": fill, "move": failing_at(0, OSError())},
            Timeline("rank 0"),
            num_slots=4,
        )
    assert len(entered) <= 4


def outlive(event: threading.Event) -> Stage:
    """A stage that ignores its deadline until it is let go."""

    def stage(bucket: Bucket, slot: int) -> None:
        event.wait(TIMEOUT_SECONDS)

    return stage


@pytest.mark.parametrize("num_buckets", [1, 20])
@pytest.mark.parametrize(
    "order",
    [
        lambda stuck: {"fill": stuck, "move": nothing},
        lambda stuck: {"fill": nothing, "move": stuck},
    ],
    ids=["first", "last"],
)
def test_a_stage_that_hangs_ends_with_the_deadline(
    num_buckets: int, order: Callable[[Stage], dict[str, Stage]]
) -> None:
    let_go = threading.Event()
    with pytest.raises(CheckpointEngineError, match="deadline") as raised:
        run_pipeline(
            buckets(num_buckets), order(outlive(let_go)), Timeline("r"), timeout_seconds=0.1
        )
    assert isinstance(raised.value, (DeadlineExceeded, TransferError))
    cause = raised.value.__cause__ or raised.value
    assert isinstance(cause, DeadlineExceeded)
    assert not let_go.is_set(), "it did not wait for the stage"
    let_go.set()


def test_no_bucket_needs_no_time() -> None:
    timeline = Timeline("rank 0")
    run_pipeline([], {"fill": nothing}, timeline, timeout_seconds=0.0)
    assert timeline.spans == []
