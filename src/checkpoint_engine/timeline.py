"""What happened when: spans of one update, from every process that took part.

Spans are stamped with CLOCK_MONOTONIC, which all processes of a host share, so the spans of a
trainer and its replicas lie on one axis. Across hosts only durations mean anything.

    timeline = Timeline("rank 0")
    with timeline.span("stage"):
        ...
    seconds = stage_seconds(timeline.spans)
    Path("trace.json").write_bytes(to_perfetto(timeline.spans))   # ui.perfetto.dev opens it
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import msgspec

__all__ = ["Span", "Timeline", "stage_seconds", "to_perfetto"]


class Span(msgspec.Struct, frozen=True):
    """One stage, on one lane, from `start` for `seconds` on the host's monotonic clock."""

    stage: str
    lane: str
    start: float
    seconds: float
    detail: str = ""

    @property
    def end(self) -> float:
        """When it ended, on the same clock."""
        return self.start + self.seconds


class Timeline:
    """Records the spans of one lane; appending is safe from several threads."""

    def __init__(self, lane: str) -> None:
        self.lane = lane
        self.spans: list[Span] = []

    @contextmanager
    def span(self, stage: str, detail: str = "") -> Iterator[None]:
        """Record the body, whether it succeeds or raises."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.spans.append(Span(stage, self.lane, start, time.monotonic() - start, detail))


def stage_seconds(spans: Iterable[Span]) -> dict[str, float]:
    """For each stage the seconds from its first start to its last end, in order of start."""
    bounds: dict[str, tuple[float, float]] = {}
    for span in sorted(spans, key=lambda span: span.start):
        start, end = bounds.get(span.stage, (span.start, span.end))
        bounds[span.stage] = (start, max(end, span.end))
    return {stage: end - start for stage, (start, end) in bounds.items()}


def to_perfetto(spans: Iterable[Span]) -> bytes:
    """The spans as Chrome trace JSON, one row a lane; Perfetto and chrome://tracing open it."""
    spans = sorted(spans, key=lambda span: span.start)
    lanes = {lane: row for row, lane in enumerate(dict.fromkeys(span.lane for span in spans), 1)}
    events: list[dict[str, object]] = [
        {"ph": "M", "name": "process_name", "pid": row, "tid": row, "args": {"name": lane}}
        for lane, row in lanes.items()
    ]
    origin = spans[0].start if spans else 0.0
    events += [
        {
            "ph": "X",
            "name": span.stage,
            "pid": lanes[span.lane],
            "tid": lanes[span.lane],
            "ts": (span.start - origin) * 1e6,
            "dur": span.seconds * 1e6,
            "args": {"detail": span.detail} if span.detail else {},
        }
        for span in spans
    ]
    return msgspec.json.encode({"displayTimeUnit": "ms", "traceEvents": events})
