"""Checkpoints on disk, as the format's own library writes them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from core_tools import BITS, MIB, Weight, digest_by_recipe, num_fds, pattern

from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import SourceError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.plan.merge import merge
from checkpoint_engine.sources import SafetensorsSource, Share, safetensors_files
from checkpoint_engine.store import Store

INDEX = "model.safetensors.index.json"

pytestmark = pytest.mark.usefixtures("no_garbage")


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def registered(store: Store, files: list[Path]) -> Manifest:
    source = SafetensorsSource(files)
    try:
        manifest = store.register("version", source).manifest
        store.unregister("version")
    finally:
        source.close()
    return manifest


def what_the_library_reads(*files: Path) -> str:
    """The digest of what the format's own library finds in files."""
    return digest_by_recipe(
        {
            name: Weight(found["dtype"], tuple(found["shape"]), bytes(found["data"]))
            for file in files
            for name, found in safetensors.deserialize(file.read_bytes())
        }
    )


@pytest.mark.parametrize("dtype", [dtype for dtype in BITS if not dtype.startswith("F6")])
def test_every_dtype_that_the_library_writes(store: Store, tmp_path: Path, dtype: str) -> None:
    shapes = [(4, 6), (0, 2), (2,) if dtype == "F4" else ()]
    tensors = {}
    for number, shape in enumerate(shapes):
        data = pattern(BITS[dtype] * torch.Size(shape).numel() // 8, number)
        flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)
        tensor = flat.to(torch.uint8).view(torch_dtype(dtype))
        tensors[f"w{number}"] = tensor.reshape(torch_shape(dtype, shape))
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    manifest = registered(store, [path])
    assert manifest.digest == what_the_library_reads(path)
    assert [(meta.dtype, meta.shape) for meta in manifest.tensors] == [
        (dtype, shape) for shape in shapes
    ]


def test_a_large_file_read_on_many_threads(store: Store, tmp_path: Path) -> None:
    sizes = [9 * MIB + 3, 5, 4 * MIB, 0, 12 * MIB, 300]
    tensors = {
        f"w{n}": torch.randint(0, 256, (size,), dtype=torch.uint8) for n, size in enumerate(sizes)
    }
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(tensors, path)
    source = SafetensorsSource([path])
    shard = store.register("version", source)
    source.close()
    assert shard.manifest.digest == what_the_library_reads(path)
    for meta in shard.manifest.tensors:
        assert shard.memory[meta.offset : meta.end] == tensors[meta.name].numpy().tobytes()


def test_a_file_system_that_reads_less_than_it_is_asked_for(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"a": torch.arange(5000), "b": torch.ones(7)}, path)
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:1000]], at))
    assert registered(store, [path]).digest == what_the_library_reads(path)


# Hugging Face folders

TENSORS = {f"layer.{n}.weight": torch.full((2, n + 1), float(n)) for n in range(6)}


def save(folder: Path, files: dict[str, list[int]], index: dict[str, object] | None = None) -> None:
    for file, numbers in files.items():
        part = {f"layer.{n}.weight": TENSORS[f"layer.{n}.weight"] for n in numbers}
        safetensors.torch.save_file(part, folder / file)
    if index is not None:
        (folder / INDEX).write_text(json.dumps(index))


def index_of(files: dict[str, list[int]]) -> dict[str, object]:
    weight_map = {f"layer.{n}.weight": file for file, numbers in files.items() for n in numbers}
    return {"metadata": {"total_size": 12}, "weight_map": weight_map}


TWO = {"model-1.safetensors": [4, 0, 2], "model-2.safetensors": [5, 3, 1]}


@pytest.fixture
def expected(tmp_path: Path) -> str:
    whole = tmp_path / "whole"
    whole.mkdir()
    save(whole, {"whole.safetensors": [0, 1, 2, 3, 4, 5]})
    return what_the_library_reads(whole / "whole.safetensors")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    return folder


def test_a_single_file(store: Store, folder: Path, expected: str) -> None:
    save(folder, {"model.safetensors": [0, 1, 2, 3, 4, 5], "adapter.safetensors": [0]})
    for path in (folder, folder / "model.safetensors", str(folder)):
        files = safetensors_files(path)
        assert files == [folder / "model.safetensors"]
        assert registered(store, files).digest == expected


def test_with_an_index_only_what_it_names(store: Store, folder: Path, expected: str) -> None:
    save(folder, {**TWO, "consolidated.safetensors": [0, 1, 2]}, index_of(TWO))
    files = safetensors_files(folder)
    assert files == [folder / "model-1.safetensors", folder / "model-2.safetensors"]
    assert registered(store, files).digest == expected


def test_without_an_index_every_file(store: Store, folder: Path, expected: str) -> None:
    save(folder, TWO)
    assert registered(store, safetensors_files(folder)).digest == expected


def test_the_order_of_files_and_the_split_change_nothing(
    store: Store, folder: Path, expected: str
) -> None:
    for split in ([[0, 1, 2, 3, 4, 5]], [[5], [3, 1], [4, 2, 0]], [[n] for n in range(6)]):
        files = {f"part-{n}.safetensors": numbers for n, numbers in enumerate(split)}
        save(folder, files)
        paths = [folder / file for file in files]
        assert registered(store, paths).digest == expected
        assert registered(store, paths[::-1]).digest == expected


def test_links_into_a_cache_are_followed(store: Store, folder: Path, expected: str) -> None:
    """Folders of the Hugging Face cache hold nothing but links to blobs elsewhere."""
    save(folder, {"blob": [0, 1, 2, 3, 4, 5]})
    snapshot = folder / "snapshot"
    snapshot.mkdir()
    (snapshot / "model.safetensors").symlink_to("../blob")
    assert registered(store, safetensors_files(snapshot)).digest == expected


@pytest.mark.parametrize("num_shares", [1, 2, 5, 9])
def test_ranks_that_read_a_share_each_make_the_whole(
    store: Store, folder: Path, expected: str, num_shares: int
) -> None:
    save(folder, TWO)
    manifests = []
    for index in range(num_shares):
        part = Share(SafetensorsSource(safetensors_files(folder)), index, num_shares)
        manifests.append(store.register(f"share {index}", part).manifest)
        part.close()
    assert merge(manifests)[0].digest == expected


def test_nothing_there(folder: Path) -> None:
    with pytest.raises(SourceError, match=r"holds no \.safetensors file"):
        safetensors_files(folder)
    with pytest.raises(SourceError, match="no such file or folder"):
        safetensors_files(folder / "elsewhere")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            "model-3.safetensors",
            r"index names.*model-3|model-3\.safetensors: the index",
        ),
        ("../model-1.safetensors", "leads out of the folder"),
        ("sub/model-1.safetensors", "leads out of the folder"),
        ("/etc/hostname", "leads out of the folder"),
        ("..", INDEX),
        (".", INDEX),
        ("", INDEX),
        ("model-1.safetensors\0", INDEX),
        ("n" * 300, "the index names"),
    ],
)
def test_an_index_that_names_no_file_of_the_folder(folder: Path, file: str, message: str) -> None:
    save(folder, TWO)
    save(folder.parent, {"model-1.safetensors": [0]})
    fds = num_fds()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"layer.0.weight": file}}))
    with pytest.raises(SourceError, match=message):
        safetensors_files(folder)
    assert num_fds() == fds


def test_an_index_that_names_a_tensor_that_is_elsewhere(folder: Path) -> None:
    save(folder, TWO, {"weight_map": {"layer.5.weight": "model-1.safetensors"}})
    with pytest.raises(SourceError, match=r"model-1\.safetensors: lacks 'layer\.5\.weight'"):
        safetensors_files(folder)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"{}",
        b'{"weight_map":[]}',
        b'{"weight_map":{"a":1}}',
        b'{"weight_map":{"a":"\xff"}}',
        b'{"metadata":' + b"[" * 100_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_garbled_index(folder: Path, data: bytes) -> None:
    save(folder, TWO)
    (folder / INDEX).write_bytes(data)
    with pytest.raises(SourceError, match=f"{INDEX}: not an index"):
        safetensors_files(folder)


def test_an_index_of_nothing(folder: Path) -> None:
    save(folder, TWO, {"weight_map": {}})
    with pytest.raises(SourceError, match=INDEX):
        safetensors_files(folder)


def test_a_folder_in_place_of_a_file(folder: Path) -> None:
    (folder / "model.safetensors").mkdir()
    fds = num_fds()
    with pytest.raises(SourceError, match=r"model\.safetensors"):
        SafetensorsSource(safetensors_files(folder))
    with pytest.raises(SourceError, match="cannot be opened"):
        SafetensorsSource([folder / "none.safetensors"])
    assert num_fds() == fds


def test_two_files_with_one_name(folder: Path) -> None:
    save(folder, {"a.safetensors": [0, 1], "b.safetensors": [2, 1]})
    fds = num_fds()
    with pytest.raises(SourceError, match=r"b\.safetensors: tensor 'layer\.1\.weight' is also in"):
        SafetensorsSource(safetensors_files(folder))
    assert num_fds() == fds


def test_a_source_may_be_closed_twice(folder: Path) -> None:
    save(folder, TWO)
    fds = num_fds()
    source = SafetensorsSource(safetensors_files(folder))
    assert num_fds() == fds + 2
    source.close()
    source.close()
    assert num_fds() == fds
