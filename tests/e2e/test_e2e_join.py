"""`ckpt-engine join`: new and quarantined replicas are brought to what another server published."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_server import COMMAND, Server, Servers, make_environment
from test_e2e_update import TORCHRUN, Folders, Run

from children import wait_until


@dataclass
class World:
    """A server that published v1 and stays, and the replicas around it.

    Attributes:
        published: serves v1.
        left_out: refused v1, since it did not serve the base that v1 is made for.
        elsewhere: waits for its first weights, on a host of its own.
        variables: with which a command runs on that host.
    """

    source: subprocess.Popen[str]
    metas: Path
    published: Server
    left_out: Server
    elsewhere: Server
    variables: dict[str, str]


@pytest.fixture(scope="module")
def world(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    old, new = folders
    folder = tmp_path_factory.mktemp("join")
    here = make_environment(folder / "state")
    variables = {
        "CKPT_ENGINE_HOST": "elsewhere",
        "CKPT_ENGINE_SOCKET_DIR": here["CKPT_ENGINE_SOCKET_DIR"] + "-b",
        "CKPT_ENGINE_STATE_DIR": str(folder / "elsewhere"),
    }
    servers, others = Servers(here), Servers({**here, **variables})
    published, left_out = servers.start(old), servers.start(old, "--load-format", "dummy")
    waiting = others.start(old, "--load-format", "dummy", "--wait-for-initial-weights")
    metas = folder / "metas.json"
    source = subprocess.Popen(
        [
            *COMMAND, "update", "--checkpoint-path", str(new), "--weight-version", "v1",
            "--endpoint", published.endpoint, "--endpoint", left_out.endpoint,
            "--base", published.info()["digest"], "--on-failure", "quarantine",
            "--save-metas-file", str(metas), "--sleep-time", "600",
        ],
        env=here,
        text=True,
    )  # fmt: skip
    wait_until(lambda: source.poll() is not None or is_at_v1(published), "v1")
    yield World(source, metas, published, left_out, waiting, variables)
    source.kill()
    source.wait(30)
    servers.close()
    others.close()


def is_at_v1(server: Server) -> bool:
    info = server.info()
    return (info["weight_version"], info["state"]) == ("v1", "serving")


def answer(server: Server) -> dict[str, Any]:
    """Its greedy text, with the version of every token."""
    (choice,) = server.complete(prompt="hello", max_tokens=8, temperature=0).json()["choices"]
    return dict(choice)


def check_joined(world: World, server: Server) -> None:
    assert is_at_v1(server)
    assert server.info()["digest"] == world.published.info()["digest"]
    assert answer(server) == answer(world.published)
    assert httpx.get(f"{server.endpoint}/health").status_code == 200


def test_a_new_replica_on_another_host_is_brought_to_what_is_published(
    world: World, run: Run
) -> None:
    assert stat.S_IMODE(world.metas.stat().st_mode) == 0o600, "it holds what lets peers read"
    joiner = world.elsewhere
    assert joiner.complete(prompt="hello", max_tokens=2).status_code == 503
    done = run(
        "join", "--load-metas-file", str(world.metas), "--endpoint", joiner.endpoint, "--json",
        **world.variables,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["version"], report["outcome"], report["verified"]) == ("v1", "published", True)
    assert report["bytes_sent"] > 0
    check_joined(world, joiner)


def test_a_quarantined_replica_serves_again_once_it_has_joined(world: World, run: Run) -> None:
    """Through the other command, on the source's own host, where nothing needs to be sent."""
    joiner = world.left_out
    assert joiner.info()["state"] == "quarantined"
    assert joiner.complete(prompt="hello", max_tokens=2).status_code == 503
    arguments = ("--load-metas-file", str(world.metas), "--endpoint", joiner.endpoint)
    done = run("update", *arguments, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bytes_sent"] == 0
    check_joined(world, joiner)


@pytest.mark.parametrize(("method", "num_updates"), [("p2p", 1), ("all", 2)])
def test_ranks_on_two_hosts_read_from_each_other(
    world: World, run: Run, folders: Folders, method: str, num_updates: int, tmp_path: Path
) -> None:
    servers, (old, _) = (world.published, world.left_out), folders
    report_file = tmp_path / "report.json"
    search = [
        str(Path(__file__).parent / "two_hosts"),
        *os.environ.get("PYTHONPATH", "").split(os.pathsep),
    ]
    done = run(
        "update", "--checkpoint-path", str(old), "--weight-version", method,
        "--endpoint", servers[0].endpoint, "--endpoint", servers[1].endpoint,
        "--update-method", method, "--report", str(report_file),
        launcher=TORCHRUN, PYTHONPATH=os.pathsep.join(search),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("published:") == num_updates
    report = json.loads(report_file.read_text())
    read_by = {span["lane"] for span in report["spans"] if span["stage"] == "fetch"}
    assert read_by == {"rank 0", "rank 1"}
    for server in servers:
        info = server.info()
        assert (info["weight_version"], info["digest"]) == (method, report["digest"])


def test_nobody_is_there_to_be_joined(world: World, run: Run) -> None:
    """The replica goes on with what it serves."""
    world.source.kill()
    world.source.wait(30)
    joiner, before = world.elsewhere, world.elsewhere.info()
    arguments = ("--load-metas-file", str(world.metas), "--endpoint", joiner.endpoint)
    done = run("join", *arguments, **world.variables)
    assert done.returncode == 1
    assert "error: no source answers: rank 0: the source at" in done.stderr
    assert "is gone" in done.stderr
    assert done.stderr.count("\n") == 1
    after = joiner.info()
    assert (after["digest"], after["weight_version"]) == (before["digest"], "v1")
    assert joiner.complete(prompt="hello", max_tokens=2).status_code == 200


def test_a_file_that_is_none(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "metas.json"
    join = ("join", "--load-metas-file", str(file), "--endpoint", "http://127.0.0.1:9")
    absent = run(*join)
    file.write_text("{")
    malformed = run(*join)
    assert "cannot be read" in absent.stderr
    assert "not a metas file" in malformed.stderr
    assert (absent.returncode, malformed.returncode) == (2, 1)
