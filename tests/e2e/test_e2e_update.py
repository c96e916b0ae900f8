"""`ckpt-engine update` alone and under torchrun, on replicas that serve meanwhile."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from e2e_server import Server
from safetensors.torch import load_file, save_file

from checkpoint_engine import ParameterServer, UpdateFailed, engine_requests
from checkpoint_engine.sources import safetensors_files

Start = Callable[..., Server]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Folders = tuple[Path, Path]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")


def test_one_rank_updates_two_replicas_and_reports(
    start: Start, run: Run, folders: Folders, tmp_path: Path
) -> None:
    old, new = folders
    servers = [start(old), start(old)]
    before = [server.info()["digest"] for server in servers]
    report_file = tmp_path / "report.json"
    done = run(
        "update", "--checkpoint-path", str(new), "--weight-version", "v1",
        "--endpoint", servers[0].endpoint, "--endpoint", servers[1].endpoint,
        "--report", str(report_file),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(report_file.read_text())
    assert report["outcome"] == "published"
    assert report["verified"] is True
    for server in servers:
        info = server.info()
        assert (info["weight_version"], info["state"]) == ("v1", "serving")
        assert info["digest"] == report["digest"] != before[0]
    (choice,) = servers[0].complete(prompt="hello", max_tokens=4, temperature=0).json()["choices"]
    assert choice["weight_versions"] == [
        {"version": "v1", "digest": report["digest"], "start": 0, "end": 4}
    ]


@pytest.mark.parametrize("num_hosts", [1, 2])
def test_torchrun_updates_two_replicas(
    start: Start, run: Run, folders: Folders, num_hosts: int
) -> None:
    """Two ranks on one host map each other's shard; as two hosts they send it over gloo."""
    old, new = folders
    servers = [start(old), start(old)]
    variables = {} if num_hosts == 1 else {"PYTHONPATH": str(Path(__file__).parent / "two_hosts")}
    done = run(
        "update", "--checkpoint-path", str(new), "--weight-version", "v2", "--json",
        "--endpoint", servers[0].endpoint, "--endpoint", servers[1].endpoint,
        launcher=TORCHRUN, **variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["bytes_sent"] > 0) == (num_hosts == 2)
    for server in servers:
        info = server.info()
        assert info["weight_version"] == "v2"
        assert info["digest"] == report["digest"]


def test_a_checkpoint_that_does_not_fit_changes_nothing(
    start: Start, run: Run, folders: Folders, tmp_path: Path
) -> None:
    old, new = folders
    server = start(old)
    before = server.info()
    tensors = load_file(new / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    done = run("update", "--checkpoint-path", str(tmp_path), "--endpoint", server.endpoint)
    assert done.returncode == 3
    assert "model.norm.weight" in done.stderr
    assert done.stderr.count("\n") == 1, "one line, and the traceback only with --debug"
    after = server.info()
    assert (after["digest"], after["weight_version"]) == (before["digest"], "initial")
    assert server.complete(prompt="hello", max_tokens=2).status_code == 200


def test_a_replica_killed_in_the_middle_leaves_the_other_on_one_version(
    start: Start, folders: Folders, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One replica is frozen, then killed, while the other is ready and waits for the vote."""
    for name in ("CKPT_ENGINE_SOCKET_DIR", "CKPT_ENGINE_STATE_DIR"):
        monkeypatch.setenv(name, environment[name])
    old, new = folders
    survivor, victim = start(old), start(old)
    (before,) = {one.info()["digest"] for one in (survivor, victim)}
    server = ParameterServer(rank=0, world_size=1)
    server.register_checkpoint("v3", files=safetensors_files(new))
    server.gather_metas("v3")
    victim.process.send_signal(signal.SIGSTOP)
    killer = threading.Timer(1.0, victim.process.kill)
    killer.start()
    with pytest.raises(UpdateFailed, match="aborted"):
        server.update("v3", calls(survivor, victim))
    killer.join(10)
    after = survivor.info()
    assert (after["digest"], after["weight_version"]) == (before, "initial")
    assert survivor.complete(prompt="hello", max_tokens=2).status_code == 200
    replacement = start(old)
    report = server.update("v3", calls(survivor, replacement))
    assert report.verified
    assert survivor.info()["digest"] == replacement.info()["digest"] == report.digest != before
    server.close()


def calls(*servers: Server) -> list[Callable[[Any], None]]:
    endpoints = [server.endpoint for server in servers]
    return engine_requests(endpoints, rank=0, world_size=1, timeout_seconds=60)


def test_a_replica_that_waits_serves_nothing_before_its_first_weights(
    start: Start, run: Run, folders: Folders
) -> None:
    old, new = folders
    server = start(old, "--load-format", "dummy", "--wait-for-initial-weights")
    assert server.info()["state"] == "waiting"
    assert server.complete(prompt="hello", max_tokens=2).status_code == 503
    done = run("update", "--checkpoint-path", str(new), "--endpoint", server.endpoint)
    assert done.returncode == 0, done.stderr
    assert server.complete(prompt="hello", max_tokens=2).status_code == 200
    assert server.info()["weight_version"] == "my-checkpoint-iter-0"


def test_a_token_is_asked_for_and_sent(
    start: Start, run: Run, folders: Folders, environment: dict[str, str]
) -> None:
    old, new = folders
    environment["CKPT_ENGINE_TOKEN"] = "open sesame"
    server = start(old)
    arguments = ("update", "--checkpoint-path", str(new), "--endpoint", server.endpoint)
    refused = run(*arguments, CKPT_ENGINE_TOKEN="wrong")
    assert refused.returncode == 3
    assert "401" in refused.stderr
    assert run(*arguments).returncode == 0


def test_wrong_usage_exits_with_two(run: Run, tmp_path: Path) -> None:
    for arguments in (
        ("--checkpoint-path", str(tmp_path), "--update-method", "p2p"),
        ("--checkpoint-path", str(tmp_path), "--report", str(tmp_path / "no" / "report.json")),
        ("--checkpoint-path", str(tmp_path), "--on-failure", "shrug"),
    ):
        done = run("update", *arguments, "--endpoint", "http://127.0.0.1:9")
        assert done.returncode in (1, 2), done.stderr
        assert done.stderr.startswith("error: ")
