"""Folders of LoRA adapters: whole, read-only, this user's, and gone when nobody needs them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from checkpoint_engine.adapters.lora_folders import LoraFolders
from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.errors import SourceError, StoreError, UsageError, VerificationError
from checkpoint_engine.sources import LoraSource
from checkpoint_engine.store import Store
from checkpoint_engine.transport.handover import Attachments, Part
from checkpoint_engine.update.sessions import Door

CONFIG = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
TENSORS = {
    "b.lora_A.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.lora_B.weight": torch.ones(5, 2, dtype=torch.bfloat16),
    "empty": torch.empty(0, 2),
    "scalar": torch.tensor(3.0),
}


@pytest.fixture
def content() -> Iterator[Staged]:
    store = Store()
    door = Door(store.segment)
    shard = store.register("v", LoraSource.of_tensors(TENSORS, CONFIG))
    part = Part(
        address=door.address,
        segment=shard.segment.name,
        start=0,
        offset=0,
        length=shard.manifest.num_bytes,
    )
    staged = Staged.attach(shard.manifest, [part], Attachments(keep_maps=False))
    yield staged
    staged.release()
    door.close()
    store.close()


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoraFolders:
    monkeypatch.setenv("CKPT_ENGINE_LORA_DIR", str(tmp_path / "loras"))
    return LoraFolders.of_engine("http://127.0.0.1:8000")


def test_what_is_written_is_what_was_staged_and_nobody_may_write_into_it(
    folders: LoraFolders, content: Staged
) -> None:
    folder = folders.write("helper", content)
    written = load_file(folder / "adapter_model.safetensors")
    assert written.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert written[name].dtype == tensor.dtype
        assert written[name].equal(tensor)
    assert LoraSource.of_folder(folder).specs()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert (stat.S_IMODE(folder.stat().st_mode), modes) == (0o500, {0o400})
    assert folders.digest_of(str(folder)) == content.manifest.digest == folder.name


def test_it_is_written_once_and_anew_if_somebody_has_touched_it(
    folders: LoraFolders, content: Staged
) -> None:
    folder = folders.write("helper", content)
    inode = folder.stat().st_ino
    assert folders.write("helper", content).stat().st_ino == inode
    folder.chmod(0o700)
    (folder / "stray").touch()
    with pytest.raises(VerificationError, match="not its two files alone"):
        folders.check(folder)
    assert folders.write("helper", content).stat().st_ino != inode
    folders.check(folder)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_only_its_own_folders_are_removed_whatever_path_it_is_given(
    folders: LoraFolders, content: Staged, tmp_path: Path
) -> None:
    folder = folders.write("helper", content)
    other = LoraFolders.of_engine("http://127.0.0.1:9000")
    elsewhere = tmp_path / "elsewhere" / "helper" / folder.name
    elsewhere.mkdir(parents=True)
    root = folder.parent.parent
    for path in (elsewhere, folder.parent, root / "helper" / "..", root / ".." / root.name, root):
        folders.remove(path)
        assert folders.digest_of(str(path)) is None
    other.remove(folder)
    folders.check(folder)
    assert elsewhere.exists()
    folders.remove(folder)
    assert not folder.exists()


def test_what_was_retired_goes_after_an_hour(folders: LoraFolders, content: Staged) -> None:
    names = ("shown", "young", "old", "in use", "back again")
    all_of_them = [folders.write(name.replace(" ", "-"), content) for name in names]
    shown, _, old, in_use, back_again = all_of_them
    for folder in all_of_them:
        os.utime(folder, (1, 1))
        if folder != in_use:
            folders.retire(str(folder))
    for folder in (shown, old, back_again):
        os.utime(folder.with_name(f".retired-{folder.name}"), (1, 1))
    folders.write("back-again", content)
    folders.sweep({str(shown)})
    assert [f for f in all_of_them if not f.exists()] == [old]
    assert [path.name for path in old.parent.iterdir()] == []


def test_what_a_killed_process_was_writing_goes(folders: LoraFolders, content: Staged) -> None:
    folder = folders.write("helper", content)
    (folder.parent / ".0123456789abcdef").mkdir(mode=0o500)
    folders.sweep(set())
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_where_it_cannot_be_written_the_error_says_so(
    folders: LoraFolders, content: Staged, tmp_path: Path
) -> None:
    folder = folders.write("helper", content)
    folders.remove(folder)
    folder.parent.rmdir()
    folder.parent.touch()  # a file where the folder should be
    with pytest.raises(StoreError, match="cannot be written"):
        folders.write("helper", content)
    with pytest.raises(SourceError, match="cannot be read"):
        folders.check(folder)
    with pytest.raises(UsageError, match="cannot be called"):
        folders.write("../helper", content)
