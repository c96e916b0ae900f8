"""Cases for decoders: valid encodings with some of their bytes, or some of their fields, changed.

How many cases a run has in all is $FUZZ_CASES, shared out among `NUM_FUZZED` tests; `make fuzz`
sets it, and `make test` runs a few through each.
"""

from __future__ import annotations

import copy
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

NUM_FUZZED = 25
NUM_CASES = int(os.environ.get("FUZZ_CASES", "0"))
PER_TEST = -(-NUM_CASES // NUM_FUZZED) or 60

num_run: Counter[str] = Counter()  # by test


def fuzzed(cases: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Calls a test with each `case`, and counts."""

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @settings(max_examples=PER_TEST, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=cases)
        @functools.wraps(test)
        def run(*arguments: Any, **named: Any) -> None:
            num_run[test.__qualname__] += 1
            test(*arguments, **named)

        return run

    return decorate


numbers = st.integers(-2, 2) | st.sampled_from(
    [
        sign * (1 << bits) + more
        for bits in (8, 31, 48, 63, 64, 100)
        for sign in (1, -1)
        for more in (0, 1)
    ]
)
values = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=32)
    | st.lists(numbers, max_size=4)
    | st.dictionaries(st.text(max_size=4), numbers, max_size=2)
)


@st.composite
def mutated(draw: st.DrawFn, valid: Sequence[bytes]) -> bytes:
    """One of the encodings with pieces of it replaced, cut out, put in or repeated."""
    data = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.sampled_from([0, 1, 1, 1, 2, 4, 8, 1 << 20])))
        piece = draw(st.binary(max_size=8) | st.just(data[start:end] * 2))
        data = data[:start] + piece + data[end:]
    return data


@st.composite
def altered(draw: st.DrawFn, valid: Sequence[Any], other: st.SearchStrategy[Any] = values) -> Any:
    """One of the trees of plain data with fields of it replaced, left out, repeated or added."""
    tree = draw(st.sampled_from(valid))
    for _ in range(draw(st.integers(0, 3))):
        *parents, last = draw(st.sampled_from([path for path in _paths(tree) if path] or [("",)]))
        tree = copy.deepcopy(tree)
        place = tree
        for key in parents:
            place = place[key]
        change = draw(st.sampled_from(["replace", "replace", "leave out", "repeat", "add"]))
        if change == "leave out" and last in (
            place if isinstance(place, dict) else range(len(place))
        ):
            del place[last]
        elif change == "repeat" and isinstance(place, list):
            place.append(copy.deepcopy(place[last]))
        elif change == "add" and isinstance(place, dict):
            place[draw(st.text(max_size=4))] = draw(other)
        else:
            place[last] = draw(other)
    return tree


def _paths(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    for key, item in _items(tree):
        yield from _paths(item, (*path, key))


def _items(tree: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(tree, dict):
        yield from tree.items()
    elif isinstance(tree, list):
        yield from enumerate(tree)
