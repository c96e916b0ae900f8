"""An engine is killed in the middle of its load: the others serve one version, and say which."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from mixed_servers import Ended, Fleet, Server, ready, update

from children import wait_until

pytestmark = pytest.mark.timeout(900)  # servers start


@dataclass(frozen=True)
class Victim:
    """A server beside the fleet, and the folder in which it is told to hold its load."""

    server: Server
    folder: Path

    def kill_in_the_middle(self, fleet: Fleet, folder: Path, *options: str) -> Ended:
        """Update all, and SIGKILL its worker when that has loaded a part of the version."""
        (self.folder / "hold").touch()
        pid = self.folder / "pid"
        with ThreadPoolExecutor(1) as pool:
            servers = [*fleet.servers, self.server]
            updating = pool.submit(update, servers, folder, "step-1", *options)
            wait_until(pid.exists, "half a load")
            os.kill(int(pid.read_text()), signal.SIGKILL)
            return updating.result()


@pytest.fixture(params=["vllm", "sglang"])
def victim(
    request: pytest.FixtureRequest,
    launched: Callable[..., Server],
    fleet: Fleet,
    checkpoints: dict[str, Path],
    tmp_path: Path,
) -> Iterator[Victim]:
    """On the version that the fleet serves."""
    with launched(request.param, checkpoints["old"], tmp_path) as server:
        ready(server)
        yield Victim(server, tmp_path)


def test_the_others_return_to_the_version_before(
    victim: Victim, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    ended = victim.kill_in_the_middle(fleet, checkpoints["new"])
    assert (ended.code != 0, ended.outcomes) == (True, ["kept"] * 3 + ["lost"]), ended.said
    assert fleet.shows("old", "old")


def test_the_others_go_on_to_the_new_one_if_they_are_enough(
    victim: Victim, fleet: Fleet, checkpoints: dict[str, Path]
) -> None:
    options = ("--on-failure", "quarantine", "--min-replicas", "3")
    ended = victim.kill_in_the_middle(fleet, checkpoints["new"], *options)
    assert ended.outcomes == ["lost"] + ["published"] * 3, ended.said
    assert fleet.shows("new", "step-1")
