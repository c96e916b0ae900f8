"""`ckpt-engine update --mode streamed`, on a replica that serves meanwhile."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from e2e_server import Server

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.mark.timeout(170)
def test_a_streamed_update_says_what_a_fresh_start_says_and_goes_back(
    start: Callable[..., Server], run: Run, folders: tuple[Path, Path]
) -> None:
    old, new = folders
    server, fresh = start(old), start(new)
    expected = fresh.info()["served_digest"]
    assert server.info()["served_digest"] != expected
    at = ("--endpoint", server.endpoint, "--json")

    done = run(
        "update", "--checkpoint-path", str(new), "--weight-version", "v1", "--mode", "streamed",
        "--require-rollback", *at,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["mode"], report["why"], report["verified"]) == ("streamed", "as asked", True)
    assert [replica["way_back"] for replica in report["replicas"]] == ["source"]
    assert server.info()["digest"] == report["digest"]
    assert server.info()["served_digest"] == expected
    asked = {"prompt": "hello", "max_tokens": 12, "temperature": 0, "return_token_ids": True}
    answers = [one.complete(**asked).json()["choices"][0] for one in (server, fresh)]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]

    done = run("update", "--checkpoint-path", str(old), "--weight-version", "v2", *at)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["mode"], report["why"]) == ("staged", "")
    assert [replica["way_back"] for replica in report["replicas"]] == ["source"]
    done = run("rollback", *at)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["mode"] == "kept"
    assert server.info()["served_digest"] == expected, "read from the files of a dead server"


def test_an_unknown_mode_is_refused(run: Run, folders: tuple[Path, Path]) -> None:
    done = run("update", "--checkpoint-path", str(folders[0]), "--mode", "steamed")
    assert done.returncode == 2
    assert "auto, staged or streamed" in done.stderr
