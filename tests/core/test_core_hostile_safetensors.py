"""A file that is truncated, garbled or lying is refused by name, and nothing of it remains."""

from __future__ import annotations

import json
import os
import random
import re
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from core_tools import BITS, MIB, PROPERTY, Weight, digest_by_recipe, num_fds
from hypothesis import assume, given
from hypothesis import strategies as st

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


# Fuzz: a file is refused, or read exactly as the format's own library reads it.


def agrees_with_the_library(data: bytes) -> bool:
    """Whether the file was taken; if it was, the library finds the same tensors and bytes."""
    store, fds = Store(), num_fds()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        path.write_bytes(data)
        try:
            digest = register(store, path)
        except SourceError:
            assert (store.labels, store.allocated_bytes, num_fds()) == ([], 0, fds)
            return False
    store.close()
    found = safetensors.deserialize(data)
    assert digest == digest_by_recipe(
        {
            name: Weight(tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
            for name, tensor in found
        }
    )
    return True


@PROPERTY
@given(st.randoms(use_true_random=False), st.integers(0, 3), st.booleans())
def test_mutated_files(rng: random.Random, num_mutations: int, in_header: bool) -> None:
    data = bytearray(safetensors.torch.save(TENSORS))
    end = 8 + struct.unpack_from("<Q", data)[0] if in_header else len(data)
    for _ in range(num_mutations):
        start = rng.randrange(end)
        num_bytes = rng.choice([0, 1, 1, 1, 5])
        if rng.random() < 0.5:
            piece = rng.randbytes(num_bytes)
        else:
            piece = bytes(rng.choices(b'{}[]",: 0123456789-.eFUINB\\', k=num_bytes))
        replaced = num_bytes if rng.random() < 0.8 else rng.randrange(3)
        data[start : start + replaced] = piece
    assume(b"-0" not in data)  # to Python it is 0, to the library no natural number
    taken = agrees_with_the_library(bytes(data))
    assert taken or num_mutations


dims = st.integers(-1, 4) | st.sampled_from([1 << 31, 1 << 48, 1 << 63, 1 << 64])
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([*BITS, "F5", ""]),
        "shape": st.lists(dims, max_size=3),
        "data_offsets": st.lists(st.integers(-1, 16), min_size=2, max_size=2),
    }
)


@PROPERTY
@given(st.dictionaries(st.text(max_size=3), entries, max_size=3), st.binary(max_size=16))
def test_random_headers(header: dict[str, Any], data: bytes) -> None:
    agrees_with_the_library(file_of(header, data))


@PROPERTY
@given(
    st.lists(st.tuples(st.sampled_from(["U8", "BF16", "F64", "F8_E4M3"]), st.integers(0, 3))),
    st.data(),
)
def test_well_formed_headers_are_taken(sizes: list[tuple[str, int]], draw: st.DataObject) -> None:
    header, end = {}, 0
    for number, (dtype, size) in enumerate(sizes):
        begin, end = end, end + size * BITS[dtype] // 8
        header[f"w{number}"] = entry(dtype, [size], begin, end)
    shuffled = dict(draw.draw(st.permutations(list(header.items()))))
    data = draw.draw(st.binary(min_size=end, max_size=end))
    assert agrees_with_the_library(file_of(shuffled, data))
