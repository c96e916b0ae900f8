from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fleet import Fleet


@pytest.fixture(scope="session", autouse=True)
def one_thread_for_truth() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """For sockets, whose paths are short."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")  # they never rest
def toy_fleet() -> Iterator[Fleet]:
    """Three replicas and one trainer, for the tests of a file."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    toys = Fleet(folder, num_replicas=3)
    yield toys
    toys.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")  # they never rest
def toy_hosts() -> Iterator[Fleet]:
    """Two replicas on two hosts, whose ranks share no memory, for the tests of a file."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    toys = Fleet(folder, num_replicas=2, hosts=("a", "b"))
    yield toys
    toys.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")  # they never rest
def toy_streaming() -> Iterator[Fleet]:
    """Three replicas that read versions from files while requests wait, for the tests of a file."""
    folder = Path(tempfile.mkdtemp(prefix="ckpt-"))
    toys = Fleet(folder, num_replicas=3, streamed=True)
    yield toys
    toys.close()
    shutil.rmtree(folder)


@pytest.fixture
def streaming(toy_streaming: Fleet) -> Fleet:
    """Mended, whatever the test before has left."""
    return mended(toy_streaming)


@pytest.fixture
def hosts(toy_hosts: Fleet) -> Fleet:
    """Mended, whatever the test before has left."""
    return mended(toy_hosts)


@pytest.fixture
def fleet(toy_fleet: Fleet) -> Fleet:
    """Mended, whatever the test before has left."""
    return mended(toy_fleet)


def mended(fleet: Fleet) -> Fleet:
    fleet.go_on()
    fleet.start_the_dead()
    fleet.recover()
    return fleet
