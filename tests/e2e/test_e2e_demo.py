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
    assert report["num_requests_failed"] == 0
    events = json.loads(trace_file.read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["ph"] == "M"}
    assert {"trainer", "rank 0", "replica-0", "replica-1"} <= lanes
