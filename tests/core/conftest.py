from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


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
