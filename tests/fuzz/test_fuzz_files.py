"""Whatever a file holds is read as the format says, or refused, and nothing of it remains."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import safetensors
import safetensors.torch
import torch
from core_tools import BITS, BytesSource, Weight, digest_by_recipe, num_fds, pattern, placed, u8
from fuzz_tools import altered, fuzzed, mutated, values
from hypothesis import assume
from hypothesis import strategies as st

from checkpoint_engine.errors import ManifestError, SourceError, UsageError
from checkpoint_engine.manifest import decode_manifest
from checkpoint_engine.registry import Registry, UpdateRecord
from checkpoint_engine.sources import SafetensorsSource, safetensors_files
from checkpoint_engine.store import Store

HONEST, _ = placed(
    BytesSource(
        {
            "a": Weight("F32", (2, 3), pattern(24)),
            "b": Weight("BF16", (), pattern(2)),
            "c": u8(300, seed=1),
            "e": Weight("U8", (0,), b""),
        },
        {"c": ["d"]},
    )
)
FILE = safetensors.torch.save(
    {
        "w": torch.arange(11, dtype=torch.int16),
        "scalar": torch.tensor(1.5),
        "empty": torch.empty(0, 3),
        "flag": torch.tensor([True, False]),
    }
)
HEADER_END = 8 + struct.unpack_from("<Q", FILE)[0]


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        yield Path(folder)


# Manifests


@pytest.mark.parametrize("msgpack", [False, True])
@fuzzed(st.data())
def test_manifests(msgpack: bool, case: st.DataObject) -> None:
    codec = msgspec.msgpack if msgpack else msgspec.json
    valid = HONEST.to_msgpack() if msgpack else HONEST.to_json()
    try:
        data = case.draw(altered([codec.decode(valid)]).map(codec.encode) | mutated([valid]))
    except OverflowError:
        return  # msgpack has no integer as large as that
    try:
        manifest = decode_manifest(data, msgpack=msgpack)
    except ManifestError:
        assert data != valid
    else:
        assert manifest.digest == HONEST.digest, "content cannot be changed unnoticed"
        assert manifest.num_bytes == HONEST.num_bytes


# Checkpoints


def agrees_with_the_library(folder: Path, data: bytes) -> None:
    """A file is refused, or read exactly as the format's own library reads it."""
    store, fds = Store(), num_fds()
    path = folder / "model.safetensors"
    path.write_bytes(data)
    try:
        source = SafetensorsSource([path])
        try:
            digest = store.register("version", source).manifest.digest
        finally:
            source.close()
    except SourceError:
        assert (store.labels, store.allocated_bytes, num_fds()) == ([], 0, fds)
        assert data != FILE
        return
    store.close()
    assert digest == digest_by_recipe(
        {
            name: Weight(tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in safetensors.deserialize(data)
        }
    )


@fuzzed(mutated([FILE]) | mutated([FILE[:HEADER_END]]).map(lambda head: head + FILE[HEADER_END:]))
def test_checkpoint_files(folder: Path, case: bytes) -> None:
    assume(b"-0" not in case)  # to Python it is 0, to the library no natural number
    agrees_with_the_library(folder, case)


dims = st.integers(-1, 4) | st.sampled_from([1 << 31, 1 << 48, 1 << 63, 1 << 64])
names_of_dtypes = st.sampled_from([*BITS, "F5", ""])
header_values = (
    dims
    | names_of_dtypes
    | st.lists(dims, max_size=3)
    | values.filter(lambda value: not isinstance(value, bytes))
)


@fuzzed(
    st.tuples(
        altered([json.loads(FILE[8:HEADER_END])], header_values), st.binary(max_size=4) | st.none()
    )
)
def test_checkpoint_headers(folder: Path, case: tuple[Any, bytes | None]) -> None:
    header, data = case
    text = json.dumps(header).encode()
    assume(b"-0" not in text)
    content = FILE[HEADER_END:] if data is None else data
    agrees_with_the_library(folder, struct.pack("<Q", len(text)) + text + content)


INDEX = {
    "metadata": {"total_size": 1},
    "weight_map": {"w": "one.safetensors", "v": "two.safetensors"},
}
files = st.sampled_from(
    ["one.safetensors", "../one.safetensors", "/etc/passwd", ".", "..", "\0", ""]
)


@fuzzed(
    altered([INDEX], files | st.text(max_size=4) | st.integers()).map(json.dumps).map(str.encode)
    | mutated([json.dumps(INDEX).encode()])
)
def test_indices(folder: Path, case: bytes) -> None:
    index = folder / "indexed"
    index.mkdir(exist_ok=True)
    for name in ("w", "v"):
        file = INDEX["weight_map"][name]
        safetensors.torch.save_file({name: torch.zeros(1)}, index / file)
    (index / "model.safetensors.index.json").write_bytes(case)
    fds = num_fds()
    try:
        found = safetensors_files(index)
    except SourceError:
        assert json.dumps(INDEX).encode() != case
    else:
        assert {path.parent for path in found} == {index}
    assert num_fds() == fds


# The registry

TEXTS = ("version", "digest", "owner", "outcome", "lora")


@fuzzed(
    st.tuples(
        st.sampled_from((*UpdateRecord.__struct_fields__, "report")),
        st.none()
        | st.integers(-(1 << 63), (1 << 63) - 1)
        | st.floats()
        | st.text(max_size=8)
        | st.binary(max_size=8)
        | st.just("none:1:x"),
    )
)
def test_records(folder: Path, case: tuple[str, Any]) -> None:
    path = folder / "registry.sqlite"
    path.unlink(missing_ok=True)
    registry = Registry(path)
    registry.start("u", 1, "v", "d")
    registry.publish("u")
    column, value = case
    # What SQLite itself refuses is not in the file.
    with (
        sqlite3.connect(path) as forger,
        contextlib.suppress(sqlite3.IntegrityError, UnicodeEncodeError),
    ):
        if column == "lora":
            forger.execute("insert into loras values ('u', ?)", (value,))
        else:
            forger.execute(f"update updates set {column} = ?", (value,))
    forger.close()
    try:
        records = registry.history()
        registry.versions()
        registry.settle()
    except UsageError:
        assert not (column in TEXTS and isinstance(value, str)), "what may be is taken"
    else:
        assert msgspec.convert([msgspec.to_builtins(one) for one in records], list[UpdateRecord])
    finally:
        registry.close()
