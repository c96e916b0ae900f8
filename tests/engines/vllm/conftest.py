"""Real vLLM servers. They take most of a minute to start, so tests share them, one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_server import python_of
from vllm_server import EXTENSION, VllmServer, make_checkpoint
from vllm_tools import Fresh


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of("vllm")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of one model."""
    root = tmp_path_factory.mktemp("dense")
    return [make_checkpoint(root / f"{n}", seed=n) for n in range(3)]


@pytest.fixture(scope="session")
def expert_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two versions of one model with experts."""
    root = tmp_path_factory.mktemp("experts")
    return [make_checkpoint(root / f"{n}", seed=n, experts=True) for n in range(2)]


@pytest.fixture(scope="session")
def start(python: Path, logs: Path) -> Callable[..., VllmServer]:
    """Starts a server and waits until it serves; the caller ends it."""

    def started(folder: Path, *options: str, **variables: str) -> VllmServer:
        log = logs / f"{len(list(logs.iterdir()))}"
        server = VllmServer(python, folder, log, *options, **variables)
        try:
            server.wait_for("/health")
        except BaseException:
            server.kill()
            raise
        return server

    return started


@pytest.fixture(scope="session")
def fresh(start: Callable[..., VllmServer]) -> Fresh:
    return Fresh(start)


@pytest.fixture(scope="module")
def server(
    start: Callable[..., VllmServer], fresh: Fresh, checkpoints: list[Path]
) -> Iterator[VllmServer]:
    """One worker, started on the first checkpoint; which version it serves, tests leave open."""
    fresh(checkpoints[1])  # before: one server at a time
    with start(checkpoints[0], "--worker-extension-cls", EXTENSION) as server:
        fresh.remember(checkpoints[0], server)
        yield server
