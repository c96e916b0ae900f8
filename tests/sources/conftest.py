from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from children import Child, call_all, free_port

Ranks = list[Child]


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Child]]:
    """Starts processes that share a folder for their sockets: see `train_rank.py`."""
    folder, started = Path(tempfile.mkdtemp(prefix="ckpt-")), []

    def start(role: str, **environment: str) -> Child:
        folders = {
            "CKPT_ENGINE_SOCKET_DIR": str(folder / "s"),
            "CKPT_ENGINE_STATE_DIR": str(folder / "state"),
        }
        started.append(Child("sources/train_rank.py", role, **environment, **folders))
        return started[-1]

    yield start
    for process in started:
        process.hang_up()
    for process in started:
        process.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def start_ranks(start: Callable[..., Child]) -> Callable[[int], Ranks]:
    """Starts the ranks of one trainer, which have met."""

    def start_ranks(world_size: int) -> Ranks:
        port, server_port = free_port(), free_port()
        ranks = [
            start(
                "rank",
                RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(server_port - 1),
            )
            for rank in range(world_size)
        ]
        numbers = list(range(world_size))
        call_all(ranks, "meet", rank=numbers, world_size=world_size, port=port)
        return ranks

    return start_ranks


@pytest.fixture(scope="session")
def two(start_ranks: Callable[[int], Ranks]) -> Ranks:
    return start_ranks(2)


@pytest.fixture(scope="session")
def four(start_ranks: Callable[[int], Ranks]) -> Ranks:
    return start_ranks(4)


@pytest.fixture(scope="session")
def serving(four: Ranks) -> Ranks:
    """Ranks that are those of a parameter server, too."""
    call_all(four, "serve_weights")
    return four


@pytest.fixture(scope="session")
def publish(
    serving: Ranks, start: Callable[..., Child]
) -> Callable[[str], tuple[str, list[dict[str, str]]]]:
    """Brings a version to four engines; returns its digest, and what each was given."""
    engines = [start("engine") for _ in serving]

    def publish(name: str) -> tuple[str, list[dict[str, str]]]:
        call_all(serving, "gather", name=name)
        numbers = [rank.send("update", name=name) for rank in serving]
        handles = [rank.wait_for("called")["handle"] for rank in serving]
        given = call_all(engines, "update", handle=handles)
        for rank in serving:
            rank.send("go")
        digests = {rank.result(number) for rank, number in zip(serving, numbers, strict=True)}
        assert len(digests) == 1
        return digests.pop(), given

    return publish
