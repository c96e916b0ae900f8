"""What tests of all engines share."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from checkpoint_engine.ps import ParameterServer


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
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logs")


@pytest.fixture
def ps() -> Iterator[ParameterServer]:
    server = ParameterServer()
    yield server
    server.close()
