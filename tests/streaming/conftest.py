"""The processes that tests of streams share."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from stream_crew import Crew

from children import Child


@pytest.fixture(scope="session")
def _crew() -> Iterator[Crew]:
    crew = Crew()
    yield crew
    crew.close()


@pytest.fixture
def crew(_crew: Crew) -> Iterator[Crew]:
    yield _crew
    _crew.leave()


@pytest.fixture
def meet(crew: Crew) -> Callable[..., list[Child]]:
    return crew.meet
