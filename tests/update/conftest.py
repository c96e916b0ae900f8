from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_folders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Sockets and records of each test are its own; a socket's path must be short."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    monkeypatch.setenv("CKPT_ENGINE_SOCKET_DIR", str(folder / "s"))
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(folder / "state"))
    yield folder
    shutil.rmtree(folder)
