"""Real vLLM servers. They take most of a minute to start, so tests share them, one at a time."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from vllm_server import EXTENSION, ROOT, VllmServer, make_checkpoint
from vllm_tools import Fresh

from checkpoint_engine.ps import ParameterServer

BUILD_SECONDS = 1800.0


@pytest.fixture(scope="session", autouse=True)
def short_sockets() -> Iterator[Path]:
    """One folder for all, since servers outlive tests; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder / "s"))
        yield folder
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test has a registry of its own, and no launcher's variables."""
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path / "state"))
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def python() -> Path:
    """The Python of vLLM's environment, which is made if it is not there."""
    if given := os.environ.get("CKPT_ENGINE_VLLM_PYTHON"):
        return Path(given)
    built = subprocess.run(
        [str(ROOT / "scripts/engines/vllm")],
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert built.returncode == 0, "scripts/engines/vllm could not build the environment"
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


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
            server.wait()
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


@pytest.fixture
def ps() -> Iterator[ParameterServer]:
    server = ParameterServer()
    yield server
    server.close()
