"""The demo, whole: real training, real replicas, real updates."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.mark.timeout(170)
def test_the_demo_ends_with_replicas_that_say_what_the_trainer_says(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    report_file, trace_file = tmp_path / "report.json", tmp_path / "trace.json"
    done = run(
        "demo", "--steps", "3", "--replicas", "2",
        "--report", str(report_file), "--trace", str(trace_file), timeout=160,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("published") == 3
    report = json.loads(report_file.read_text())
    assert [u["version"] for u in report["updates"]] == ["step-1", "step-2", "step-3"]
    for update in report["updates"]:
        assert update["outcome"] == "published"
        assert update["verified"] is True
        assert update["mode"] == "staged"
        assert {"verify", "apply", "check", "resume"} <= set(update["seconds"])
    last = report["updates"][-1]
    assert [r["name"] for r in report["replicas"]] == ["replica-0", "replica-1"]
    for replica in report["replicas"]:
        assert (replica["version"], replica["digest"]) == ("step-3", last["digest"])
        assert replica["outputs_match"] is True
    assert report["num_requests"] > 0
    assert (report["num_requests_failed"], report["num_requests_cut_off"]) == (0, 0)
    events = json.loads(trace_file.read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"trainer", "rank 0", "replica-0", "replica-1"} <= lanes


@pytest.mark.timeout(170)
def test_chaos_ends_with_everyone_on_one_version(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    report_file = tmp_path / "report.json"
    done = run("demo", "--chaos", "--steps", "4", "--report", str(report_file), timeout=160)
    assert done.returncode == 0, done.stderr
    assert "replica-0 refused" in done.stdout
    assert "replica-1 was killed, and is back" in done.stdout
    report = json.loads(report_file.read_text())
    first, refused, deadly, last = (update["outcome"] for update in report["updates"])
    assert (first, refused, last) == ("published", "aborted", "published")
    assert deadly in ("aborted", "rolled_back", "published"), "it depends on when it died"
    for replica in report["replicas"]:
        assert (replica["version"], replica["digest"]) == (
            "step-4",
            report["updates"][-1]["digest"],
        )
        assert replica["outputs_match"] is True
    assert report["num_requests_failed"] == 0


def test_chaos_needs_somebody_to_kill(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    done = run("demo", "--chaos", "--steps", "2")
    assert done.returncode == 2
    assert "chaos needs 4 steps and 2 replicas" in done.stderr
