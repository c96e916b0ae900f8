"""Safetensors files and Hugging Face folders, read in parallel straight into store memory.

The format is eight bytes of header length, a JSON header, and one block of tensor bytes. The
header is checked as strictly as the format's own library does (no hole, no overlap, lengths that
fit dtype and shape), because a file may be truncated, garbled, or lie. Reads are `preadv` into the
destination: no tensor, and no page of the file, is mapped in between.

    source = SafetensorsSource(safetensors_files(folder))
    for spec in source.specs(): ...
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from checkpoint_engine.dtypes import num_bytes
from checkpoint_engine.errors import MALFORMED, SourceError, UsageError
from checkpoint_engine.plan.layout import TensorSpec, place
from checkpoint_engine.sources.files import OpenFile, TensorFiles, close_all
from checkpoint_engine.sources.taken import TakenFiles, is_in_memory, open_to_take

__all__ = ["SafetensorsSource", "safetensors_files"]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the limit of the format's own library


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor in a file's header."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct, frozen=True):
    weight_map: dict[str, str]


class SafetensorsSource:
    """The tensors of one or more safetensors files. Owns one descriptor a file until closed.

    Args:
        files: the files.
        within: real paths of the folders that the files must lie in, wherever links lead;
            default anywhere.
        take: take over those in /dev/shm; see `sources.taken`.

    Raises:
        SourceError: a file is unreadable, truncated, garbled or lying, or two hold one name.
    """

    def __init__(
        self,
        files: Sequence[str | os.PathLike[str]],
        *,
        within: Sequence[Path] | None = None,
        take: bool = False,
    ) -> None:
        self._specs: list[TensorSpec] = []
        self._paths: dict[str, Path] = {}
        opened: list[OpenFile] = []
        descriptors: list[int] = []
        try:
            for path in map(Path, files):
                descriptors.append(_open_file(path, within))
                if take and is_in_memory(descriptors[-1]):
                    descriptors.append(open_to_take(descriptors.pop()))
                positions = self._add(path, descriptors[-1])
                opened.append(OpenFile.of(str(path), descriptors[-1], positions))
        except BaseException:
            close_all(descriptors)
            raise
        taken = take and any(map(is_in_memory, descriptors))
        self._files = (TakenFiles if taken else TensorFiles)(opened, descriptors)

    @property
    def files(self) -> TensorFiles:
        """The open files."""
        return self._files

    @property
    def on_gpu(self) -> bool:
        """False: these are files."""
        return False

    @property
    def freed_bytes(self) -> int:
        """Of files that are taken over."""
        return self._files.freed_bytes

    def specs(self) -> Sequence[TensorSpec]:
        """The tensors of all files, in the order of the files."""
        return self._specs

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of tensor `name` from byte `start` on."""
        self._files.read_into(name, start, out)

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def _add(self, path: Path, descriptor: int) -> dict[str, int]:
        """Announce the tensors of a file; returns where each begins."""
        entries, data_start = _read_header(path, descriptor)
        for name, entry in entries.items():
            if name in self._paths:
                raise SourceError(
                    f"{path}: tensor {name!r} is also in {self._paths[name]}; "
                    "give only the files of one checkpoint"
                )
            self._paths[name] = path
            spec = TensorSpec(names=(name,), dtype=entry.dtype, shape=entry.shape)
            try:
                place(spec, name, 0)
            except SourceError as error:
                raise SourceError(f"{path}: {error}") from error
            self._specs.append(spec)
        return {name: data_start + entry.data_offsets[0] for name, entry in entries.items()}


def safetensors_files(
    path: str | os.PathLike[str], *, within: Sequence[Path] | None = None
) -> list[Path]:
    """The safetensors files of a checkpoint: one file, or those of a Hugging Face folder.

    With an index, exactly the files that it names; every one must exist in the folder, and every
    tensor must be where the index says. `within` is as for `SafetensorsSource`.

    Raises:
        SourceError: there are none, or the index is wrong.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise SourceError(f"{path}: there is no such file or folder")
    index = path / INDEX_NAME
    if index.exists():
        return _indexed_files(index, within)
    if (path / SINGLE_NAME).exists():
        return [path / SINGLE_NAME]
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise SourceError(f"{path}: the folder holds no .safetensors file")
    return files


def _indexed_files(index: Path, within: Sequence[Path] | None) -> list[Path]:
    try:
        weight_map = msgspec.json.decode(_read_small(index, within), type=_Index).weight_map
    except MALFORMED as error:
        raise SourceError(f"{index}: not an index of safetensors files: {error}") from error
    if not weight_map:
        raise SourceError(f"{index}: names no tensor")
    files: dict[str, set[str]] = {}
    for tensor, file in weight_map.items():
        if Path(file).name != file or file in ("", "..") or "\0" in file:
            raise SourceError(f"{index}: {file[:80]!r} leads out of the folder, or nowhere")
        files.setdefault(file, set()).add(tensor)
    for file, tensors in sorted(files.items()):
        try:
            held = _names_in(index.parent / file, within)
        except SourceError as error:
            raise SourceError(f"{index}: the index names {file[:80]!r}, but: {error}") from error
        missing = sorted(tensors - held)
        if missing:
            raise SourceError(f"{index.parent / file}: lacks {missing[0]!r}, which the index names")
    return [index.parent / file for file in sorted(files)]


def _read_small(path: Path, within: Sequence[Path] | None) -> bytes:
    """A file that is read whole, which must not be larger than any header is."""
    with os.fdopen(_open_file(path, within), "rb") as file:
        data = file.read(MAX_HEADER_BYTES + 1)
    if len(data) > MAX_HEADER_BYTES:
        raise SourceError(f"{path}: has more than the {MAX_HEADER_BYTES} bytes allowed")
    return data


def _names_in(path: Path, within: Sequence[Path] | None) -> set[str]:
    descriptor = _open_file(path, within)
    try:
        return set(_read_header(path, descriptor)[0])
    finally:
        os.close(descriptor)


def _open_file(path: Path, within: Sequence[Path] | None) -> int:
    try:
        # A pipe would be waited for; not to block has no effect on a file.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise SourceError(f"{path}: cannot be opened: {error}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise SourceError(f"{path}: is not a file")
    # What was opened is judged, not the path: that may lead elsewhere a moment later.
    opened = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    if within is not None and not any(opened.is_relative_to(folder) for folder in within):
        os.close(descriptor)
        raise SourceError(f"{path}: leads out of the folders that may be read")
    return descriptor


def _read_header(path: Path, descriptor: int) -> tuple[dict[str, _Entry], int]:
    """The header's entries and the position of the first data byte."""
    file_bytes = os.fstat(descriptor).st_size
    prefix = os.pread(descriptor, 8, 0)
    header_bytes = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise SourceError(f"{path}: not a safetensors file, or truncated in its header")
    header = os.pread(descriptor, header_bytes, 8)
    try:
        decoded = json.loads(
            header.decode(), object_pairs_hook=_without_duplicates, parse_constant=_no_constant
        )
        if isinstance(decoded, dict):
            msgspec.convert(decoded.pop("__metadata__", {}), dict[str, str])
        entries = msgspec.convert(decoded, dict[str, _Entry])
    except (ValueError, RecursionError) as error:
        raise SourceError(f"{path}: the header is garbled: {error}") from error
    _check_entries(path, entries, file_bytes - 8 - header_bytes)
    return entries, 8 + header_bytes


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """JSON decoders keep the last of two equal keys; a header with both is lying."""
    decoded = dict(pairs)
    if len(decoded) != len(pairs):
        raise ValueError("a key occurs twice")
    return decoded


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _check_entries(path: Path, entries: dict[str, _Entry], data_bytes: int) -> None:
    expected = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        try:
            length = num_bytes(entry.dtype, entry.shape)
        except UsageError as error:
            raise SourceError(f"{path}: tensor {name!r}: {error}") from error
        if any(dim < 0 for dim in entry.shape) or end - begin != length:
            raise SourceError(
                f"{path}: tensor {name!r}: {end - begin} bytes for {entry.dtype} "
                f"{list(entry.shape)}, which needs {length}"
            )
        if begin != expected:
            raise SourceError(
                f"{path}: tensor {name!r} starts at byte {begin}, not where the one before it "
                f"ends, {expected}"
            )
        if end > data_bytes:
            raise SourceError(
                f"{path}: tensor {name!r} ends at byte {end} of {data_bytes}: the file is truncated"
            )
        expected = end
    if expected != data_bytes:
        raise SourceError(f"{path}: {data_bytes - expected} bytes after the last tensor")
