from __future__ import annotations

import json
import threading

import pytest

from checkpoint_engine.timeline import Span, Timeline, stage_seconds, to_perfetto

SPANS = [
    Span("apply", "replica 1", 13.0, 2.0),
    Span("stage", "rank 0", 10.0, 1.0, "bucket 0"),
    Span("stage", "rank 0", 12.0, 2.5, "bucket 1"),
    Span("stage", "rank 1", 11.0, 0.5),
]


def test_a_stage_lasts_from_its_first_start_to_its_last_end() -> None:
    assert stage_seconds(SPANS) == {"stage": 4.5, "apply": 2.0}
    assert list(stage_seconds(SPANS)) == ["stage", "apply"], "in the order in which they began"
    assert stage_seconds([]) == {}


def test_an_early_span_may_end_last() -> None:
    spans = [Span("stage", "a", 1.0, 9.0), Span("stage", "b", 2.0, 1.0)]
    assert stage_seconds(spans) == {"stage": 9.0}


def test_a_span_is_recorded_even_if_its_body_raises() -> None:
    timeline = Timeline("rank 0")
    with timeline.span("fill", "bucket 0"):
        pass
    with pytest.raises(KeyError), timeline.span("move", "bucket 1"):
        raise KeyError
    found = [(span.stage, span.lane, span.detail) for span in timeline.spans]
    assert found == [("fill", "rank 0", "bucket 0"), ("move", "rank 0", "bucket 1")]
    fill, move = timeline.spans
    assert 0 <= fill.start <= fill.end <= move.start <= move.end


def test_several_threads_record_on_one_lane() -> None:
    timeline = Timeline("rank 0")

    def record() -> None:
        for _ in range(200):
            with timeline.span("fill"):
                pass

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(timeline.spans) == 800


def test_perfetto_opens_it() -> None:
    """The Trace Event Format: metadata names the rows, complete events lie on them, in µs."""
    trace = json.loads(to_perfetto(SPANS))
    assert trace == {
        "displayTimeUnit": "ms",
        "traceEvents": [
            {"ph": "M", "name": "process_name", "pid": 1, "tid": 1, "args": {"name": "rank 0"}},
            {"ph": "M", "name": "process_name", "pid": 2, "tid": 2, "args": {"name": "rank 1"}},
            {"ph": "M", "name": "process_name", "pid": 3, "tid": 3, "args": {"name": "replica 1"}},
            {"ph": "X", "name": "stage", "pid": 1, "tid": 1, "ts": 0.0, "dur": 1e6}
            | {"args": {"detail": "bucket 0"}},
            {"ph": "X", "name": "stage", "pid": 2, "tid": 2, "ts": 1e6, "dur": 5e5, "args": {}},
            {"ph": "X", "name": "stage", "pid": 1, "tid": 1, "ts": 2e6, "dur": 2.5e6}
            | {"args": {"detail": "bucket 1"}},
            {"ph": "X", "name": "apply", "pid": 3, "tid": 3, "ts": 3e6, "dur": 2e6, "args": {}},
        ],
    }
    assert json.loads(to_perfetto([]))["traceEvents"] == []
