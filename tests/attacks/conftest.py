"""Victims: real replicas and a real parameter server."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from attack_tools import TOKEN
from e2e_server import Server, Servers, make_environment

from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.sources import safetensors_files

HASTY = (sys.executable, str(Path(__file__).with_name("hasty_replica.py")))


@pytest.fixture(scope="session")
def allowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose checkpoints the replicas may be updated from."""
    return tmp_path_factory.mktemp("allowed")


@pytest.fixture(scope="session")
def replicas(
    folders: tuple[Path, Path], allowed: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """Processes of `ckpt-engine replica`: one that asks for a token, and one that does not."""
    state = tmp_path_factory.mktemp("state")
    environment = make_environment(state)
    with (
        closing(Servers({**environment, "CKPT_ENGINE_TOKEN": TOKEN})) as guarded,
        closing(Servers(environment)) as unguarded,
        ThreadPoolExecutor() as pool,
    ):
        options = ("--allow-path", str(allowed))
        first = pool.submit(guarded.start, folders[0], *options, command=HASTY)
        second = pool.submit(unguarded.start, folders[0], *options)
        yield first.result(), second.result()


@pytest.fixture
def guarded(replicas: tuple[Server, Server]) -> Server:
    return replicas[0]


@pytest.fixture
def unguarded(replicas: tuple[Server, Server]) -> Server:
    return replicas[1]


@pytest.fixture
def server(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ParameterServer]:
    """A parameter server that holds the new weights as "v1"."""
    for name, value in make_environment(tmp_path / "state").items():
        monkeypatch.setenv(name, value)
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("v1", files=safetensors_files(folders[1]))
    server.gather_metas("v1")
    yield server
    server.close()
