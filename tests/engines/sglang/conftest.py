"""Real SGLang servers. They take most of a minute to start, so tests share one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_server import python_of
from sglang_server import SGLangServer, make_checkpoint


@pytest.fixture(scope="session")
def python() -> Path:
    return python_of("sglang")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three versions of one model; the last is in several files with an index."""
    root = tmp_path_factory.mktemp("checkpoints")
    return [make_checkpoint(root / f"{n}", seed=n, sharded=n == 2) for n in range(3)]


@pytest.fixture(scope="session")
def fresh(python: Path, checkpoints: list[Path], logs: Path) -> Callable[[int], list[int]]:
    """The greedy tokens of each version, from a server that was started on it."""

    @functools.cache
    def tokens(number: int) -> list[int]:
        with SGLangServer(python, checkpoints[number], logs / f"fresh-{number}") as server:
            server.wait_for("/ready", 200)
            return server.generate()

    return tokens


@pytest.fixture(scope="session")
def shared_server(python: Path, checkpoints: list[Path], logs: Path) -> Iterator[SGLangServer]:
    with SGLangServer(python, checkpoints[0], logs / "server") as server:
        server.wait_for("/ready", 200)
        yield server
