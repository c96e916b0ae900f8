"""A version that is read from its files while it is written into an engine.

For models that do not fit twice in host memory. Nothing is staged: each thread that writes has a
slot of one digest chunk, the smallest piece that can be checked by itself, so the slots are a ring
and memory stays within them. A chunk is read, checked against the manifest, and only then written;
one thread reads while another writes. Only a tensor that must be cast, or that is not contiguous
in the engine, is read as a whole.

The files are open here, whatever becomes of their names and of whoever opened them. So a version
that was streamed is also the way back of the next one, with no server left; it costs descriptors,
no memory.

    streamed = Streamed(manifest, fetch_files(places, names))
    read = streamed.chunk(meta, 0, CHUNK_BYTES)
    memory = read()                                         # checked; valid until the next read
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import torch

from checkpoint_engine.codec.digest import PIECE_BYTES, digest_pieces
from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import SourceError, VerificationError
from checkpoint_engine.manifest import CHUNK_BYTES, DIGEST_BYTES, Manifest, TensorMeta
from checkpoint_engine.sources.files import TensorFiles

__all__ = ["Streamed"]


class Streamed:
    """A manifest and the open files behind it, which it owns.

    Attributes:
        manifest: the version's tensors, validated.
    """

    way_back = "source"

    def __init__(self, manifest: Manifest, files: TensorFiles) -> None:
        self.manifest, self._files = manifest, files
        self._thread = threading.local()

    def verify(self, pool: Executor) -> None:
        """Look whether every byte is to be had; what it is, is checked as it is read.

        Raises:
            SourceError: a file was changed since it was registered, or lacks a tensor.
        """
        self._files.check()
        for meta in self.manifest.tensors:
            if meta.length:
                self._files.check_place(meta.name, meta.length)

    def is_there(self) -> bool:
        """Whether the files are what they were, by size and time."""
        try:
            self._files.check()
        except SourceError:
            return False
        return True

    def tensor(self, meta: TensorMeta) -> torch.Tensor:
        """One tensor, read into memory of its own.

        Raises:
            SourceError, VerificationError: as `chunk`.
        """
        memory = torch.empty(meta.length, dtype=torch.uint8)
        view = memory.numpy().data
        for start in range(0, meta.length, CHUNK_BYTES):
            self._read_into(meta, start, view[start : start + CHUNK_BYTES])
        return memory.view(torch_dtype(meta.dtype)).view(torch_shape(meta.dtype, meta.shape))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name with its tensor, each read when it is asked for."""
        return ((meta.name, self.tensor(meta)) for meta in self.manifest.tensors)

    def chunk(self, meta: TensorMeta, start: int, end: int) -> Callable[[], memoryview]:
        """Reads one digest chunk into the calling thread's slot, and checks it.

        What it gives is valid until the thread reads another. Raises:
            SourceError: the bytes are not there.
            VerificationError: they are not those of the manifest; names tensor and file.
        """
        return functools.partial(self._read, meta, start, end)

    def discard_writes(self) -> None:
        """Nothing: whoever writes into a tensor of this writes into memory of his own."""

    def release(self) -> None:
        """Close the files."""
        self._files.close()

    def _read(self, meta: TensorMeta, start: int, end: int) -> memoryview:
        slot: memoryview | None = getattr(self._thread, "slot", None)
        if slot is None:  # it goes with its thread, which lives as long as one pass
            slot = self._thread.slot = memoryview(bytearray(CHUNK_BYTES))
        memory = slot[: end - start]
        self._read_into(meta, start, memory)
        return memory

    def _read_into(self, meta: TensorMeta, start: int, out: memoryview) -> None:
        at = start // CHUNK_BYTES * DIGEST_BYTES
        if digest_pieces(self._pieces(meta, start, out)) != meta.chunk_digests[at:][:DIGEST_BYTES]:
            raise VerificationError(
                f"tensor {meta.name!r}: {self._files.path_of(meta.name)} no longer holds the bytes "
                "that were registered; nothing of them was written"
            )

    def _pieces(self, meta: TensorMeta, start: int, out: memoryview) -> Iterator[memoryview]:
        for done in range(0, len(out), PIECE_BYTES):
            piece = out[done : done + PIECE_BYTES]
            self._files.read_into(meta.name, start + done, piece)
            yield piece
