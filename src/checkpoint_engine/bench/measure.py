"""Ratios of times, so that a slow or busy machine spoils them least.

A time alone says more about the machine than about the code, so every row is a ratio: the median
time of what is measured over the median time of what it is compared with. Both come from the same
rounds. A round runs every operation once, in an order of its own, so that whatever slows the
machine for a while slows both, and none always comes after the one that warms its way. Ranks that
measure together draw the same orders.

    samples = run_rounds([copy, update], rounds=15, warmups=4, tell=print)
    row = Ratio("update", ours="update", base="copy", limit=2.3).row(samples, num_bytes)

An operation prepares, times what it measures with a stopwatch of its own, and returns seconds by
name.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import Any

import msgspec

from checkpoint_engine.errors import UsageError

__all__ = [
    "Operation",
    "Ratio",
    "Row",
    "Samples",
    "Stopwatch",
    "Tell",
    "Unavailable",
    "against",
    "needed",
    "run_rounds",
]

Samples = dict[str, list[float]]
"""The seconds of every round under each name."""

Tell = Callable[[str, int, int], None]
"""Called with what is done now, how many rounds are over, and how many there are."""


class Unavailable(UsageError):
    """A row needs what this machine lacks; says what, and is left out."""


class Stopwatch:
    """Seconds by name; a name that is timed twice adds up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, *names: str) -> Iterator[None]:
        """Count the body's time towards every name."""
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        for name in names:
            self.seconds[name] = self.seconds.get(name, 0.0) + elapsed


@dataclass(frozen=True)
class Operation:
    """What is run once a round.

    Attributes:
        measures: names that rows need and `run` gives; it may give more.
        run: does the work and returns seconds by name.
    """

    measures: frozenset[str]
    run: Callable[[], Mapping[str, float]]


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One ratio as measured.

    Attributes:
        ours, base: names of what is compared.
        ratio: of the medians.
        lowest, highest: of the ratios of single rounds.
        limit: what `ratio` should reach; None for a control, which should be 1.
        at_least: whether that is a lower limit.
        seconds, base_seconds: the medians.
        num_bytes: of the weights that each of them handles.
    """

    name: str
    ours: str
    base: str
    ratio: float
    lowest: float
    highest: float
    limit: float | None
    at_least: bool
    seconds: float
    base_seconds: float
    num_bytes: int

    @property
    def reached(self) -> bool:
        """Whether the limit is kept; True for a control."""
        if self.limit is None:
            return True
        return self.ratio >= self.limit if self.at_least else self.ratio <= self.limit


@dataclass(frozen=True)
class Ratio:
    """What a row compares: the seconds under `ours` over those under `base`."""

    name: str
    ours: str
    base: str
    limit: float | None = None
    at_least: bool = False

    def row(self, samples: Samples, num_bytes: int) -> Row:
        """The ratio of what was measured."""
        ours, base = samples[self.ours], samples[self.base]
        pairs = [one / other for one, other in zip(ours, base, strict=True)]
        return Row(
            name=self.name,
            ours=self.ours,
            base=self.base,
            ratio=median(ours) / median(base),
            lowest=min(pairs),
            highest=max(pairs),
            limit=self.limit,
            at_least=self.at_least,
            seconds=median(ours),
            base_seconds=median(base),
            num_bytes=num_bytes,
        )


def against(
    name: str, ours: str, base: str, seconds: Sequence[float], base_seconds: float, **row: Any
) -> Row:
    """A row that compares with a given time; with `at_least`, rates are compared."""
    ratios = [one / base_seconds for one in seconds]
    ratio = median(ratios)
    if row.get("at_least"):
        ratio, ratios = 1 / ratio, [1 / one for one in ratios]
    defaults: dict[str, Any] = {"limit": None, "at_least": False, "num_bytes": 0}
    return Row(
        name=name,
        ours=ours,
        base=base,
        ratio=ratio,
        lowest=min(ratios),
        highest=max(ratios),
        seconds=median(seconds),
        base_seconds=base_seconds,
        **{**defaults, **row},
    )


def needed(operations: Sequence[Operation], ratios: Collection[Ratio]) -> list[Operation]:
    """The operations without which one of `ratios` could not be had."""
    names = {name for ratio in ratios for name in (ratio.ours, ratio.base)}
    return [operation for operation in operations if operation.measures & names]


def run_rounds(
    operations: Sequence[Operation], *, rounds: int, warmups: int, tell: Tell
) -> Samples:
    """Run every operation once a round. The garbage collector runs between them, not within.

    Args:
        operations: in an order that is drawn for each round, always the same.
        rounds: how many are counted.
        warmups: rounds before those, enough to fault in all memory that is used again.
        tell: called before every round.
    """
    samples: Samples = {}
    order = Random(0)  # noqa: S311 - no secret
    gc.disable()
    try:
        for number in range(-warmups, rounds):
            tell("measuring", number + warmups, rounds + warmups)
            for operation in order.sample(operations, len(operations)):
                gc.collect()
                seconds = operation.run()
                if number >= 0:
                    for name, value in seconds.items():
                        samples.setdefault(name, []).append(value)
    finally:
        gc.enable()
    return samples
