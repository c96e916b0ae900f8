"""The processes that tests of streams share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from stream_crew import Crew
from stream_pair import KINDS, Pair, connected

from checkpoint_engine import CheckpointEngineManager
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


@pytest.fixture
def manage(socket_folder: Path) -> Iterator[Callable[..., CheckpointEngineManager]]:
    managers: list[CheckpointEngineManager] = []

    def make(model: Any, sampler: Any) -> CheckpointEngineManager:
        managers.append(CheckpointEngineManager(model, sampler, timeout_seconds=100))
        return managers[-1]

    yield make
    for manager in reversed(managers):
        manager.close()


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[Pair]:
    """A trainer's engine and a sampler's that have met."""
    trainer, sampler = connected(request.param)
    yield trainer, sampler
    sampler.finalize()
    trainer.finalize()
