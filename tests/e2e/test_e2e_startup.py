"""Replicas that start without weights, by the commands of docs/startup.md, and one that is told."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest
from e2e_server import COMMAND, Server
from safetensors.torch import load_file, save_file

from checkpoint_engine import ParameterServer, engine_requests
from checkpoint_engine.sources import SafetensorsSource, safetensors_files
from checkpoint_engine.store import Store
from children import free_port, wait_until

Start = Callable[..., Server]
Folders = tuple[Path, Path]
Background = Callable[[str], "subprocess.Popen[bytes]"]
DOCUMENT = Path(__file__).parents[2] / "docs/startup.md"
ROUTE = "/update_weights_from_ckpt_engine"


@pytest.fixture
def background(environment: dict[str, str], tmp_path: Path) -> Iterator[Background]:
    """Runs a command line of ours in a folder of this test, until the end of it."""
    running: list[subprocess.Popen[bytes]] = []

    def run_line(line: str) -> subprocess.Popen[bytes]:
        name, *arguments = shlex.split(line.replace("$PWD", str(tmp_path)))
        assert name == "ckpt-engine"
        running.append(subprocess.Popen([*COMMAND, *arguments], cwd=tmp_path, env=environment))
        return running[-1]

    yield run_line
    for process in running:
        process.kill()
        process.wait(30)


def digest_of(folder: Path) -> str:
    store = Store()
    try:
        return store.register("v", SafetensorsSource(safetensors_files(folder))).manifest.digest
    finally:
        store.close()


def status(url: str) -> int:
    """Of its health; 0 as long as nobody listens."""
    time.sleep(0.1)  # what starts needs the processors more than who asks
    try:
        return httpx.get(f"{url}/health", timeout=30, verify=False).status_code
    except httpx.ConnectError:
        return 0


def test_the_commands_of_the_document(
    background: Background, folders: Folders, tmp_path: Path
) -> None:
    lines = re.findall(r"^ckpt-engine .*$", DOCUMENT.read_text(), re.MULTILINE)
    engine, update, another = lines
    (tmp_path / "model").symlink_to(folders[0])
    (tmp_path / "new").symlink_to(folders[1])
    ports = {"8000": str(free_port()), "8001": str(free_port())}
    first, second = (f"http://127.0.0.1:{port}" for port in ports.values())
    engine, update, another = (
        re.sub("800[01]", lambda found: ports[found.group()], line)
        for line in (engine, update, another)
    )

    background(engine)
    wait_until(lambda: status(first) == 503)
    assert httpx.get(f"{first}/weight_info", timeout=30).json()["weight_version"] is None
    background(update)
    wait_until(lambda: status(first) == 200)
    wait_until((tmp_path / "metas.json").exists)
    background(another)
    wait_until(lambda: status(second) == 200)

    names = [info(url) for url in (first, second)]
    assert names == [("step-120", digest_of(folders[1]), "serving")] * 2
    said = [
        httpx.post(
            f"{url}/v1/completions",
            json={"prompt": "hello", "max_tokens": 8, "temperature": 0},
            timeout=30,
        ).json()["choices"]
        for url in (first, second)
    ]
    assert said[0] == said[1]


def info(url: str) -> tuple[Any, ...]:
    answer = httpx.get(f"{url}/weight_info", timeout=30).json()
    return answer["weight_version"], answer["digest"], answer["state"]


def test_a_replica_is_updated_from_a_path_on_its_host(
    start: Start,
    folders: Folders,
    tmp_path: Path,
    environment: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old, new = folders
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (tmp_path / "link").symlink_to(checkpoints)
    for name, content in (("step-1", new), ("step-2", old), ("cut", old), ("unfit", new)):
        tensors = load_file(content / "model.safetensors")
        if name == "unfit":
            tensors["model.norm.weight"] = tensors["model.norm.weight"][:-1].clone()
        (checkpoints / name).mkdir()
        save_file(tensors, checkpoints / name / "model.safetensors")
    os.truncate(checkpoints / "cut" / "model.safetensors", 1000)
    server = start(old, "--allow-path", str(tmp_path / "link"))

    def ask(name: str, **fields: Any) -> httpx.Response:
        body = {"model_path": str(checkpoints / name), "load_format": "ckpt_engine", **fields}
        return httpx.post(server.endpoint + ROUTE, json=body, timeout=60)

    done = ask("step-1")
    assert done.status_code == 200, done.text
    assert done.json()["weight_version"] == "step-1"
    served = ("step-1", digest_of(new), "serving")
    assert info(server.endpoint) == served
    for name, message in (
        ("unfit", "'model.norm.weight'"),
        ("cut", "truncated"),
        ("step-3", "no such file or folder"),
    ):
        failed = ask(name)
        assert failed.status_code == 400
        assert message in failed.json()["message"]
        assert "\n" not in failed.json()["message"]
        assert info(server.endpoint) == served
    assert ask("step-2/model.safetensors", weight_version="two").status_code == 200
    assert info(server.endpoint) == ("two", digest_of(old), "serving")
    for name in ("CKPT_ENGINE_SOCKET_DIR", "CKPT_ENGINE_STATE_DIR"):
        monkeypatch.setenv(name, environment[name])
    with closing(ParameterServer(rank=0, world_size=1)) as other:
        other.rollback(engine_requests([server.endpoint], rank=0, world_size=1))
    assert info(server.endpoint) == served, "whose memory the replica still had"
