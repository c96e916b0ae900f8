from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ps_replicas import ReplicaProcess, save_model
from ps_tools import EngineProcess

from checkpoint_engine.ps import ParameterServer


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def socket_folder() -> Iterator[Path]:
    """One for all, since processes outlive tests; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder / "s"))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_records(socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has a registry of its own, and no launcher's variables."""
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path / "state"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def lora_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "loras"
    monkeypatch.setenv("CKPT_ENGINE_LORA_DIR", str(root))
    return root


@pytest.fixture(scope="session")
def engine_pool(socket_folder: Path) -> Iterator[list[EngineProcess]]:
    """Starting an engine costs seconds, so those that are well are used again."""
    pool: list[EngineProcess] = []
    yield pool
    for engine in pool:
        engine.hang_up()
    for engine in pool:
        engine.close()


@pytest.fixture
def engines(engine_pool: list[EngineProcess]) -> tuple[EngineProcess, EngineProcess]:
    """Two engines that have never had an update."""
    for engine in engine_pool:
        if not engine.alive:
            engine.close()
    engine_pool[:] = [engine for engine in engine_pool if engine.alive]
    while len(engine_pool) < 2:
        engine_pool.append(EngineProcess())
    for engine in engine_pool:
        engine.call("reset")
        engine.forget()
    return engine_pool[0], engine_pool[1]


@pytest.fixture
def make_server() -> Iterator[Callable[..., ParameterServer]]:
    """Parameter servers of one rank, closed at the end."""
    servers: list[ParameterServer] = []

    def make(**arguments: Any) -> ParameterServer:
        servers.append(ParameterServer(**arguments))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(make_server: Callable[..., ParameterServer]) -> ParameterServer:
    return make_server()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with the weights of seed 0."""
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, seed=0)
    return folder


@pytest.fixture(scope="session")
def replica_pool(socket_folder: Path) -> Iterator[list[ReplicaProcess]]:
    pool: list[ReplicaProcess] = []
    yield pool
    for replica in pool:
        replica.close()


@pytest.fixture
def replicas(
    replica_pool: list[ReplicaProcess],
    model_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> tuple[ReplicaProcess, ReplicaProcess]:
    """Two that serve; which version, the test before has left open."""
    monkeypatch.delenv("CKPT_ENGINE_TOKEN", raising=False)
    for replica in replica_pool:
        if not replica.alive:
            replica.close()
    replica_pool[:] = [replica for replica in replica_pool if replica.alive]
    while len(replica_pool) < 2:
        name = f"replica {time.monotonic_ns()}"
        replica_pool.append(ReplicaProcess(model_folder, name))
    assert all(replica.url for replica in replica_pool)
    return replica_pool[0], replica_pool[1]
