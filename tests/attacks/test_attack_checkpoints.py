"""A file that is truncated, garbled or lying is refused by name, and nothing of it remains."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from core_tools import MIB, num_fds

from checkpoint_engine.errors import SourceError
from checkpoint_engine.sources import SafetensorsSource
from checkpoint_engine.store import Store

pytestmark = pytest.mark.usefixtures("no_garbage")


def file_of(header: object, data: bytes = b"") -> bytes:
    """A file with this header, given as JSON text or as what to make it of."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def refuse(store: Store, message: str, call: Callable[[], object]) -> None:
    """The call raises SourceError, and then the store and this process are as before it.

    Not `pytest.raises`: it keeps the exception, and so the frames and what they hold.
    """
    before = store.labels, store.allocated_bytes, num_fds()
    try:
        call()
    except SourceError as error:
        said = str(error)
    else:
        pytest.fail("it was not refused")
    assert re.search(message, said), said
    assert (store.labels, store.allocated_bytes, num_fds()) == before


def register(store: Store, path: Path) -> str:
    source = SafetensorsSource([path])
    try:
        return store.register("version", source).manifest.digest
    finally:
        source.close()


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lie.safetensors"


LIES: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "truncated in its header"),
    "no header": (file_of(b""), "truncated in its header"),
    "huge header": (struct.pack("<Q", 1 << 63) + b"{}", "truncated in its header"),
    "header beyond the end": (struct.pack("<Q", 3) + b"{}", "truncated in its header"),
    "header of 100 MB": (struct.pack("<Q", 100_000_001) + b"{}", "truncated in its header"),
    "no JSON": (file_of(b"not json"), "the header is garbled"),
    "no object": (file_of([entry("U8", [1], 0, 1)], b"a"), "the header is garbled"),
    "half a header": (file_of(b'{"a":{"dtype":"U8","shape":[1],'), "the header is garbled"),
    "trailing text": (file_of(b"{}{}"), "the header is garbled"),
    "deeply nested": (file_of(b'{"a":' + b"[" * 100_000), "the header is garbled"),
    "no utf-8": (
        file_of(b'{"\xff":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"),
        "garbled",
    ),
    "a tensor twice": (
        file_of(
            b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
            b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
            b"ab",
        ),
        "a key occurs twice",
    ),
    "a field twice": (
        file_of(b'{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}', b"a"),
        "a key occurs twice",
    ),
    "unknown field": (
        file_of({"a": {**entry("U8", [1], 0, 1), "more": 1}}, b"a"),
        "unknown field `more`",
    ),
    "missing field": (file_of({"a": {"dtype": "U8", "shape": [1]}}), "missing required field"),
    "shape of a wrong type": (file_of({"a": entry("U8", ["1"], 0, 1)}, b"a"), "garbled"),
    "fractional dim": (file_of({"a": entry("U8", [1.0], 0, 1)}, b"a"), "garbled"),
    "dim of 5000 digits": (
        file_of(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,1]}}', b"a"),
        "garbled",
    ),
    "one offset": (
        file_of({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0]}}, b"a"),
        "garbled",
    ),
    "unknown dtype": (file_of({"a": entry("U9", [1], 0, 1)}, b"a"), "'a': unknown dtype 'U9'"),
    "half a byte": (file_of({"a": entry("F4", [3], 0, 1)}, b"a"), "'a': F4 of shape"),
    "negative dims": (file_of({"a": entry("U8", [-1, -1], 0, 1)}, b"a"), "'a'.*-1"),
    "negative offset": (file_of({"a": entry("U8", [2], -1, 1)}, b"a"), "'a' starts at byte -1"),
    "end before begin": (file_of({"a": entry("U8", [1], 1, 0)}, b"a"), "'a': -1 bytes for U8"),
    "too few bytes": (file_of({"a": entry("F32", [2], 0, 4)}, b"abcd"), "'a': 4 bytes for F32"),
    "too many bytes": (file_of({"a": entry("U8", [2], 0, 4)}, b"abcd"), "'a': 4 bytes for U8"),
    "overlap": (
        file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 1, 3)}, b"abc"),
        "'b' starts at byte 1, not where",
    ),
    "the same bytes twice": (
        file_of({"a": entry("U8", [2], 0, 2), "b": entry("U8", [2], 0, 2)}, b"ab"),
        "'b' starts at byte 0, not where",
    ),
    "a hole": (
        file_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [1], 2, 3)}, b"abc"),
        "'b' starts at byte 2, not where",
    ),
    "a hole at the start": (file_of({"a": entry("U8", [1], 1, 2)}, b"ab"), "'a' starts at byte 1"),
    "beyond the end": (
        file_of({"a": entry("U8", [1], 0, 1), "b": entry("U8", [9], 1, 10)}, b"abc"),
        "'b' ends at byte 10 of 3: the file is truncated",
    ),
    "trailing bytes": (file_of({"a": entry("U8", [1], 0, 1)}, b"abc"), "2 bytes after the last"),
    "only trailing bytes": (file_of({}, b"abc"), "3 bytes after the last"),
    # What no manifest may hold, and so no source may bring.
    "no name": (file_of({"": entry("U8", [1], 0, 1)}, b"a"), "name"),
    "a name too long": (file_of({"n" * 1025: entry("U8", [1], 0, 1)}, b"a"), "name"),
    "a name that is no text": (
        file_of(b'{"\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', b"a"),
        "",
    ),
    "65 dims": (file_of({"a": entry("U8", [1] * 65, 0, 1)}, b"a"), "'a'"),
    "a huge dim without bytes": (file_of({"a": entry("U8", [1 << 60, 0], 0, 0)}), "'a'"),
    "a dim that no integer holds": (file_of({"a": entry("U8", [1 << 70, 0], 0, 0)}), "'a'"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(store: Store, path: Path, lie: str) -> None:
    data, message = LIES[lie]
    path.write_bytes(data)
    refuse(store, message, lambda: register(store, path))


@pytest.mark.parametrize("lie", [lie for lie in LIES if "'a'" in LIES[lie][1]])
def test_the_refusal_names_the_file(store: Store, path: Path, lie: str) -> None:
    path.write_bytes(LIES[lie][0])
    refuse(store, str(path), lambda: register(store, path))


ONE = entry("U8", [1], 0, 1)
TEXT = json.dumps({"a": ONE})


@pytest.mark.parametrize(
    "header",
    [
        TEXT.encode("utf-16"),
        TEXT.encode("utf-32"),
        TEXT.encode("utf-8-sig"),
        b'{"\xed\xa0\x80":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        json.dumps({"__metadata__": 5, "a": ONE}).encode(),
        json.dumps({"__metadata__": {"format": 5}, "a": ONE}).encode(),
        json.dumps({"__metadata__": {"format": float("nan")}, "a": ONE}).encode(),
        json.dumps({"__metadata__": [[]], "a": ONE}).encode(),
    ],
    ids=lambda header: repr(header[:40]),
)
def test_what_the_formats_library_refuses_is_refused(
    store: Store, path: Path, header: bytes
) -> None:
    path.write_bytes(file_of(header, b"a"))
    with pytest.raises(safetensors.SafetensorError):
        safetensors.deserialize(path.read_bytes())
    refuse(store, str(path), lambda: register(store, path))


def test_a_pipe_is_refused_and_not_waited_for(store: Store, path: Path) -> None:
    os.mkfifo(path)
    refuse(store, str(path), lambda: register(store, path))


# Truncation

TENSORS = {
    "w": torch.arange(11, dtype=torch.int16),
    "scalar": torch.tensor(1.5),
    "empty": torch.empty(0, 3),
    "fp8": torch.ones(3).to(torch.float8_e4m3fn),
    "flag": torch.tensor([True, False]),
}


def test_a_file_cut_off_anywhere(store: Store, path: Path) -> None:
    whole = safetensors.torch.save(TENSORS)
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refuse(store, str(path), lambda: register(store, path))
    path.write_bytes(whole)
    register(store, path)


@pytest.mark.parametrize("left", [0, 1000, 9 * MIB])
def test_a_file_cut_off_between_opening_and_reading(store: Store, path: Path, left: int) -> None:
    tensors = {name: torch.zeros(6 * MIB, dtype=torch.uint8) for name in ("a", "b")}
    safetensors.torch.save_file(tensors, path)
    source = SafetensorsSource([path])
    os.truncate(path, left)
    name = "[ab]" if left < 6 * MIB else "b"
    message = f"{path}: tensor '{name}': the file ends in the middle of it"
    refuse(store, message, lambda: store.register("version", source))
    source.close()


def test_a_failure_leaves_the_versions_of_before(store: Store, path: Path) -> None:
    safetensors.torch.save_file(TENSORS, path)
    digest = register(store, path)
    kept = bytes(store["version"].memory)
    source = SafetensorsSource([path])
    os.truncate(path, 100)
    refuse(store, "truncated while being read", lambda: store.register("next", source))
    source.close()
    assert (store.labels, store["version"].manifest.digest) == (["version"], digest)
    assert bytes(store["version"].memory) == kept
