"""`ckpt-engine versions` and `rollback`, with no process left of those that updated."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from e2e_server import Server

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def test_back_to_the_version_before_by_hand_and_by_a_probe(
    start: Callable[..., Server], run: Run, folders: tuple[Path, Path]
) -> None:
    server = start(folders[0])
    at = ("--endpoint", server.endpoint)

    def update(number: int, *options: str) -> subprocess.CompletedProcess[str]:
        path = str(folders[number % 2])
        return run(
            "update", "--checkpoint-path", path, "--weight-version", f"v{number}", *at, *options
        )

    assert update(1).returncode == update(2).returncode == 0
    listed = json.loads(run("versions", "--json").stdout)
    assert [one["version"] for one in listed] == ["v2", "v1"]
    assert "→" in run("versions").stdout

    done = run("rollback", *at, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["version"] == "v1"
    info = server.info()
    assert (info["weight_version"], info["digest"]) == ("v1", listed[1]["digest"])

    probe = ("--probe-url", f"{server.endpoint}/no-such-page", "--probe-seconds", "0")
    done = update(4, *probe)
    assert done.returncode == 3
    assert "answered 404" in done.stderr
    info = server.info()
    assert (info["weight_version"], info["digest"]) == ("v1", listed[1]["digest"])

    done = run("rollback", *at, "--to", "v2", "--json")
    assert json.loads(done.stdout)["version"] == "v2", "v4 had its content, and is still kept"
    assert server.info()["digest"] == listed[0]["digest"]
