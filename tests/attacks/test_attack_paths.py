"""Attacks by way of the file system: names that lead elsewhere, and folders that others write."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from attack_tools import nothing_changes
from core_tools import Background
from e2e_server import Server
from safetensors.torch import load_file, save_file

from checkpoint_engine import ParameterServer, UpdateFailed, engine_requests
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.registry import Registry, state_dir
from checkpoint_engine.replica.disk import CheckpointFolders
from checkpoint_engine.sources import SafetensorsSource, safetensors_files

INDEX = "model.safetensors.index.json"


def everything_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


# Checkpoint folders


@pytest.mark.parametrize(
    "file",
    ["../outside.safetensors", "/etc/passwd", "sub/../../outside.safetensors", "..", "", "."],
)
def test_an_index_that_leads_out_of_its_folder(tmp_path: Path, file: str) -> None:
    save_file({"w": torch.zeros(1)}, tmp_path / "outside.safetensors")
    folder = tmp_path / "checkpoint"
    (folder / "sub").mkdir(parents=True)
    (folder / INDEX).write_text(f'{{"weight_map": {{"w": "{file}"}}}}')
    with pytest.raises(SourceError, match=r"leads out of the folder, or nowhere|is not a file"):
        safetensors_files(folder)


@pytest.mark.parametrize("name", [INDEX, "model.safetensors"])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str, server: ParameterServer) -> None:
    os.mkfifo(tmp_path / name)

    def register() -> None:
        server.register_checkpoint("pipe", files=safetensors_files(tmp_path))

    with pytest.raises(SourceError, match="is not a file"):
        Background(register).result()
    server.register_checkpoint("pipe", named_tensors={"w": torch.zeros(1)})  # the name is free


@pytest.mark.parametrize("name", [INDEX, "model.safetensors"])
def test_a_device_without_end_is_not_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(SourceError, match="is not a file"):
        SafetensorsSource(safetensors_files(tmp_path))


def test_an_index_without_end_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / INDEX).open("wb") as file:
        file.truncate(1 << 40)  # a hole takes no space
    with pytest.raises(SourceError, match="more than the 100000000 bytes allowed"):
        safetensors_files(tmp_path)


def test_names_of_tensors_and_versions_are_never_paths(
    server: ParameterServer, unguarded: Server, tmp_path: Path
) -> None:
    before = everything_under(tmp_path)
    name = "../../" * 8 + str(tmp_path / "written")[1:]
    server.register_checkpoint(name, named_tensors={name: torch.zeros(3)})
    server.gather_metas(name)
    with pytest.raises(UpdateFailed, match="the model has no tensor"):
        server.update(name, engine_requests([unguarded.endpoint], rank=0, world_size=1))
    written = everything_under(tmp_path) - before
    assert {path.relative_to(tmp_path).parts[0] for path in written} == {"state"}


# Checkpoints on a replica's host, named by a client


@pytest.fixture
def inside(allowed: Path, folders: tuple[Path, Path]) -> Iterator[Path]:
    """A checkpoint that the replicas may be updated from."""
    folder = allowed / "step-1"
    shutil.copytree(folders[1], folder)
    yield folder
    shutil.rmtree(folder)


def ask(server: Server, path: object, **fields: Any) -> httpx.Response:
    body = {"model_path": str(path), "load_format": "ckpt_engine", **fields}
    return httpx.post(f"{server.endpoint}/update_weights_from_ckpt_engine", json=body, timeout=60)


def test_a_checkpoint_outside_is_not_read_whatever_names_it(
    unguarded: Server, allowed: Path, inside: Path, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    beside = allowed.parent / f"{allowed.name}-and-more"
    shutil.copytree(folders[1], beside)
    (inside / "link").symlink_to(folders[1])
    (inside / "root").symlink_to("/")
    models = folders[1].parent.name
    outside = [
        *(folders[1], beside, "/", "/etc/passwd", "/proc/self/root", tmp_path / "is not there"),
        f"{allowed}/../{models}/{folders[1].name}",
        f"{inside}/../../{models}",
        inside / "link",
        inside / "link" / "model.safetensors",
        f"{inside}/root{folders[1]}",
        f"{inside}/link/../../{models}/new",
    ]
    with nothing_changes(unguarded):
        answers = [ask(unguarded, path) for path in outside]
    shutil.rmtree(beside)
    assert {answer.status_code for answer in answers} == {403}
    reasons = {answer.json()["message"].split("' ")[-1] for answer in answers}
    assert len(reasons) == 1, "whether anything is there is not told"


@pytest.mark.parametrize("path", ["step-1", "./step-1", "~/x", "file:///etc", "/x\0y"])
def test_a_path_that_is_not_absolute(unguarded: Server, inside: Path, path: str) -> None:
    with nothing_changes(unguarded):
        response = ask(unguarded, path)
    assert response.status_code == 400
    assert "is no absolute path" in response.json()["message"]


def test_a_path_that_is_too_long(unguarded: Server, allowed: Path) -> None:
    with nothing_changes(unguarded):
        for path in (f"{allowed}/{'x' * 5000}", f"{allowed}{'/x' * 5000}"):
            assert ask(unguarded, path).status_code == 400


def link(inside: Path, target: Path) -> None:
    (inside / "model.safetensors").unlink()
    (inside / "model.safetensors").symlink_to(target / "model.safetensors")


def index(inside: Path, target: Path) -> None:
    names = load_file(target / "model.safetensors")
    link(inside, target)
    (inside / "model.safetensors").rename(inside / "a.safetensors")
    (inside / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "a.safetensors")}))


def index_elsewhere(inside: Path, target: Path) -> None:
    (inside / INDEX).symlink_to(target / "config.json")


@pytest.mark.parametrize("lead_out", [link, index, index_elsewhere])
def test_a_checkpoint_inside_whose_files_are_outside(
    unguarded: Server,
    inside: Path,
    folders: tuple[Path, Path],
    lead_out: Callable[[Path, Path], None],
) -> None:
    lead_out(inside, folders[1])
    with nothing_changes(unguarded):
        response = ask(unguarded, inside)
    assert response.status_code == 400
    assert "leads out of the folders that may be read" in response.json()["message"]


def test_links_that_stay_inside_are_followed(allowed: Path, inside: Path) -> None:
    """As those of a Hugging Face cache do, from a snapshot to its blobs."""
    (inside / "model.safetensors").rename(allowed / "blob")
    (inside / "model.safetensors").symlink_to("../blob")
    within = [allowed.resolve()]
    SafetensorsSource(safetensors_files(inside, within=within), within=within).close()


@pytest.mark.parametrize("when", ["before it is listed", "before its files are opened"])
def test_a_folder_that_is_replaced_after_it_was_judged(
    allowed: Path, inside: Path, folders: tuple[Path, Path], when: str
) -> None:
    within = [allowed.resolve()]
    judged = CheckpointFolders([allowed]).resolve(str(inside))
    files = safetensors_files(judged, within=within) if "opened" in when else None
    moved = inside.rename(inside.with_name("moved"))
    inside.symlink_to(folders[1])
    try:
        with pytest.raises(SourceError, match="leads out of the folders that may be read"):
            SafetensorsSource(files or safetensors_files(judged, within=within), within=within)
    finally:
        inside.unlink()
        moved.rename(inside)


# The registry of updates


@pytest.fixture
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(folder))
    return folder


def test_others_read_nothing_of_the_registry(state_folder: Path) -> None:
    before = os.umask(0)
    try:
        registry = Registry(state_dir() / "registry.sqlite")
        registry.start("u", 1, "v", "d")
        modes = {stat.S_IMODE(path.stat().st_mode) for path in state_folder.iterdir()}
    finally:
        os.umask(before)
    registry.close()
    assert stat.S_IMODE(state_folder.stat().st_mode) == 0o700
    assert modes == {0o600}


def test_a_folder_that_everybody_writes_is_refused(state_folder: Path) -> None:
    state_folder.mkdir()
    state_folder.chmod(0o1777)
    with pytest.raises(UsageError, match="with mode 1777, so others could forge the record"):
        state_dir()


def test_another_users_folder_is_refused(
    state_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state_folder.mkdir(mode=0o700)
    if os.getuid() == 0:
        os.chown(state_folder, 65534, 65534)
    else:
        monkeypatch.setattr(os, "getuid", lambda: 65534)
    with pytest.raises(UsageError, match="others could forge the record"):
        state_dir()


@pytest.mark.parametrize(
    ("column", "value"),
    [("version", b"\xff"), ("published_at", "yesterday"), ("owner", 5), ("epoch", 1.5)],
)
def test_a_forged_record_is_named(state_folder: Path, column: str, value: object) -> None:
    path = state_dir() / "registry.sqlite"
    registry = Registry(path)
    registry.start("u", 1, "v", "d")
    with sqlite3.connect(path) as forger:
        forger.execute("pragma ignore_check_constraints = on")
        forger.execute(f"update updates set {column} = ?", (value,))
    forger.close()
    if column == "owner":  # text, whatever was put in; no process has that name
        assert [record.id for record in registry.settle()] == ["u"]
    else:
        with pytest.raises(UsageError, match="not usable as a registry"):
            registry.history()
    registry.close()
