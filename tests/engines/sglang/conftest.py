"""Real SGLang servers. They take most of a minute to start, so tests share one."""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang_server import ROOT, SGLangServer, make_checkpoint

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
    """The Python of SGLang's environment, which is made if it is not there."""
    built = subprocess.run(
        [str(ROOT / "scripts/engines/sglang")],
        stdout=subprocess.PIPE,
        text=True,
        timeout=BUILD_SECONDS,
        check=False,
    )
    assert built.returncode == 0, "scripts/engines/sglang could not build the environment"
    return Path(built.stdout.strip())


@pytest.fixture(scope="session")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


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


@pytest.fixture
def ps() -> Iterator[ParameterServer]:
    server = ParameterServer()
    yield server
    server.close()
