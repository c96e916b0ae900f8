"""Attacks by way of the file system: names that lead elsewhere, and folders that others write."""

from __future__ import annotations

import os
import sqlite3
import stat
from pathlib import Path

import pytest
import torch
from core_tools import Background
from e2e_server import Server
from safetensors.torch import save_file

from checkpoint_engine import ParameterServer, UpdateFailed, engine_requests
from checkpoint_engine.errors import SourceError, UsageError
from checkpoint_engine.registry import Registry, state_dir
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
