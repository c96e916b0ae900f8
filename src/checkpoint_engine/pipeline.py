"""fill ∥ move ∥ apply: buckets flow through stages that work at the same time.

Each stage has a thread and takes the buckets in order; a bucket enters the first stage when one of
`num_slots` slots is free and gives it back after the last, so the slots are a ring: stage k may
keep a buffer for each slot and never sees one in use twice. The first failure stops every stage and
is raised with its stage and bucket; what other stages then fail with is only its echo.

    run_pipeline(buckets, {"fill": fill, "move": move, "apply": apply}, timeline, num_slots=4)

where each stage is called as `stage(bucket, slot)`.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from checkpoint_engine.errors import DeadlineExceeded, TransferError
from checkpoint_engine.plan.buckets import Bucket
from checkpoint_engine.timeline import Timeline

__all__ = ["Stage", "run_pipeline"]

Stage = Callable[[Bucket, int], None]

POLL_SECONDS = 0.05


class _Stopped(Exception):
    """Another stage failed first."""


class _Flow:
    """What the stages of one run share: the first failure, and the deadline."""

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline
        self.failure: tuple[str, Bucket, BaseException] | None = None
        self._lock = threading.Lock()

    def fail(self, stage: str, bucket: Bucket, error: BaseException) -> None:
        with self._lock:
            self.failure = self.failure or (stage, bucket, error)

    def take(self, source: queue.SimpleQueue[tuple[Bucket, int]]) -> tuple[Bucket, int]:
        while True:
            if self.failure is not None:
                raise _Stopped
            if time.monotonic() > self.deadline:
                raise DeadlineExceeded("the pipeline's deadline passed")
            try:
                return source.get(timeout=POLL_SECONDS)
            except queue.Empty:
                continue


def run_pipeline(
    buckets: Sequence[Bucket],
    stages: Mapping[str, Stage],
    timeline: Timeline,
    *,
    num_slots: int = 4,
    timeout_seconds: float = 600.0,
) -> None:
    """Pass every bucket through every stage, in order; returns when the last has left the last.

    Args:
        buckets: in the order in which they flow.
        stages: by name, first to last.
        timeline: gets a span for each bucket in each stage.
        num_slots: most buckets under way at once.
        timeout_seconds: for the whole run. A stage must have deadlines of its own within.

    Raises:
        TransferError: a stage failed; the cause is its exception, the message names the bucket.
    """
    flow = _Flow(time.monotonic() + timeout_seconds)
    queues: list[queue.SimpleQueue[tuple[Bucket, int]]] = [queue.SimpleQueue() for _ in stages]
    free: queue.SimpleQueue[tuple[Bucket, int]] = queue.SimpleQueue()

    def work(number: int, name: str, stage: Stage) -> None:
        following = queues[number + 1] if number + 1 < len(queues) else free
        for expected in buckets:
            bucket = expected
            try:
                bucket, slot = flow.take(queues[number])
                with timeline.span(name, f"bucket {bucket.index}"):
                    stage(bucket, slot)
            except _Stopped:
                return
            except BaseException as error:
                flow.fail(name, bucket, error)
                return
            following.put((bucket, slot))

    threads = [
        threading.Thread(target=work, args=(number, name, stage), name=f"ckpt-{name}", daemon=True)
        for number, (name, stage) in enumerate(stages.items())
    ]
    for thread in threads:
        thread.start()
    _feed(flow, buckets, queues[0], free, num_slots)
    for thread in threads:
        thread.join(max(0.0, flow.deadline - time.monotonic()) + 1.0)
    if flow.failure is not None:
        name, bucket, error = flow.failure
        raise TransferError(f"bucket {bucket.index}, stage {name}: {error}") from error
    if any(thread.is_alive() for thread in threads):
        raise DeadlineExceeded("a stage of the pipeline outlived its deadline")


def _feed(
    flow: _Flow,
    buckets: Sequence[Bucket],
    first: queue.SimpleQueue[tuple[Bucket, int]],
    free: queue.SimpleQueue[tuple[Bucket, int]],
    num_slots: int,
) -> None:
    """Let a bucket in whenever a slot is free."""
    try:
        for number, bucket in enumerate(buckets):
            slot = number if number < num_slots else flow.take(free)[1]
            first.put((bucket, slot))
    except _Stopped:
        return
    except DeadlineExceeded as error:
        flow.fail("feed", bucket, error)
