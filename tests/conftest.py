"""What tests of every room share: quiet machines, folders of their own, and real commands."""

from __future__ import annotations

import gc
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from e2e_server import COMMAND, Server, Servers, make_environment

from checkpoint_engine.ps import ParameterServer
from children import free_port

OF_SYSTEMS = (  # commands, hosts, clusters and faults on them, each from its start to its end
    "cli/test_bench.py",
    "e2e/*",
    "faults/*",
    "hosts/*",
    "ps/test_ps_lora_command.py",
    "soak/*",
    "streaming/test_*_ray.py",
    "streaming/test_manager_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(item.path.match(pattern) for pattern in OF_SYSTEMS):
            item.add_marker("system")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quick_collections() -> Iterator[None]:
    """What the imports left is not garbage, and need not be looked through again and again."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def no_garbage(quick_collections: None) -> Iterator[None]:
    """For tests that count what is open: none is left from before, and none hides by luck."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def socket_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sockets of this test's own."""
    folder = tmp_path / "s"
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder))
    return folder


@pytest.fixture
def lone_server(
    socket_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ParameterServer]:
    """A parameter server of one rank, with records of its own."""
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path))
    server = ParameterServer(rank=0, world_size=1)
    yield server
    server.close()


@pytest.fixture(name="free_port")
def a_free_port() -> int:
    return free_port()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one tiny model."""
    from e2e_model import make_folder  # takes seconds, which most tests need not spend

    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "old", seed=0), make_folder(root / "new", seed=1)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return make_environment(tmp_path / "state")


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Server]]:
    """Starts replicas that end with the test."""
    servers = Servers(environment)
    yield servers.start
    servers.close()


@pytest.fixture
def run(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a command of ours to its end."""

    def run_command(
        *arguments: str, launcher: tuple[str, ...] = (), timeout: float = 110, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        command = [*launcher, *(COMMAND[1:] if launcher else COMMAND), *arguments]
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**environment, **variables},
            check=False,
        )

    return run_command
