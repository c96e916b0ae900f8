"""Real commands: replicas, updates and the demo, started as a user starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from e2e_model import make_folder
from e2e_server import Server

COMMAND = [sys.executable, "-m", "checkpoint_engine"]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """An environment whose sockets and registry are the test's own."""
    sockets = Path("/tmp") / f"ce-{os.getpid()}"  # short: a socket's path has 107 bytes
    sockets.mkdir(mode=0o700, exist_ok=True)
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("CKPT_ENGINE", "RANK"))},
        "CKPT_ENGINE_SOCKET_DIR": str(sockets),
        "CKPT_ENGINE_STATE_DIR": str(tmp_path / "state"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one tiny model."""
    root = tmp_path_factory.mktemp("models")
    return make_folder(root / "old", seed=0), make_folder(root / "new", seed=1)


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Callable[..., Server]]:
    """Starts replicas that end with the test."""
    servers: list[Server] = []

    def start_replica(folder: Path, *options: str) -> Server:
        process = subprocess.Popen(
            [*COMMAND, "replica", "--model", str(folder), "--port", "0", *options],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdout is not None
        words = process.stdout.readline().split()
        assert words, "the replica ended before it served"
        servers.append(Server(process, words[-1]))
        return servers[-1]

    yield start_replica
    for server in servers:
        server.process.kill()
        server.process.wait(30)
        assert server.process.stdout is not None
        server.process.stdout.close()


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


@pytest.fixture(autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)
