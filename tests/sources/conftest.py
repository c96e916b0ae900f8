from __future__ import annotations

import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from children import TIMEOUT_SECONDS, Child, Talker, call_all, free_port


class Forked(Talker):
    """A rank of a trainer, or an engine: see `train_rank.py`."""

    def __init__(self, nursery: Child, role: str, environment: Mapping[str, str]) -> None:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(folder) / "rank")
            listener.bind(address)
            listener.listen()
            listener.settimeout(TIMEOUT_SECONDS)
            nursery.call("fork", role=role, address=address, environment=dict(environment))
            self._connection = listener.accept()[0]
        super().__init__(self._connection.makefile("w"), self._connection.makefile("r"))

    def close(self) -> None:
        self._connection.shutdown(socket.SHUT_RDWR)
        self._reader.join(TIMEOUT_SECONDS)
        self.hang_up()
        self._answers.close()
        self._connection.close()


Ranks = list[Forked]


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Forked]]:
    """Starts processes that share a folder for their sockets."""
    folder, started = Path(tempfile.mkdtemp(prefix="ckpt-")), []
    with Child("sources/train_rank.py") as nursery:

        def start(role: str, **environment: str) -> Forked:
            folders = {
                "CKPT_ENGINE_SOCKET_DIR": str(folder / "s"),
                "CKPT_ENGINE_STATE_DIR": str(folder / "state"),
            }
            started.append(Forked(nursery, role, {**environment, **folders}))
            return started[-1]

        yield start
        for process in started:
            process.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def start_ranks(start: Callable[..., Forked]) -> Callable[[int], Ranks]:
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
    serving: Ranks, start: Callable[..., Forked]
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
