"""A version that is read from its files, or from peers, while it is written into an engine.

For models that do not fit twice in host memory. Nothing is staged: each thread that writes has a
slot of one digest chunk, the smallest piece that can be checked by itself, so the slots are a ring
and memory stays within them. A chunk is read, checked against the manifest, and only then written;
one thread reads while another writes. Only a tensor that must be cast, or that is not contiguous
in the engine, is read as a whole.

Files are open here, whatever becomes of their names and of whoever opened them. So a version that
was streamed is also the way back of the next one, with no server left; it costs descriptors, no
memory. Read from peers, it is a way back as long as those have it.

    streamed = Streamed(manifest, fetch_files(places, names))
    streamed = Streamed(manifest, RemoteTensors(manifest, remote))
    read = streamed.chunk(meta, 0, CHUNK_BYTES)
    memory = read()                                         # checked; valid until the next read
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from checkpoint_engine.codec.digest import digest_pieces
from checkpoint_engine.dtypes import torch_dtype, torch_shape
from checkpoint_engine.errors import SourceError
from checkpoint_engine.manifest import CHUNK_BYTES, DIGEST_BYTES, Manifest, TensorMeta
from checkpoint_engine.memory import Workers

__all__ = ["Streamed", "Tensors"]


class Tensors(Protocol):
    """Where bytes are read from: `sources.files.TensorFiles`, `transport.remote.RemoteTensors`.

    Attributes:
        way_back: "source", or "peer".
        piece_bytes: how much is best read at a time.
    """

    way_back: str
    piece_bytes: int

    def check(self) -> None:
        """Raise SourceError unless everything is to be had, as far as can be seen unread."""
        ...

    def check_place(self, name: str, length: int) -> None:
        """Raise SourceError unless a tensor of this length may be there."""
        ...

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with a tensor's bytes from `start` on, or raise SourceError."""
        ...

    def reject(self, name: str) -> None:
        """What this thread read last is wrong: raise unless it may be read elsewhere."""
        ...

    def rest(self) -> None:
        """Nothing is read before the next `check`."""
        ...

    def close(self) -> None:
        """Nothing is read any more."""
        ...


class Streamed:
    """A manifest and the tensors behind it, which it owns.

    Attributes:
        manifest: the version's tensors, validated.
        way_back: as that of the tensors.
    """

    def __init__(self, manifest: Manifest, tensors: Tensors) -> None:
        self.manifest, self._tensors = manifest, tensors
        self.way_back = tensors.way_back
        self._thread = threading.local()

    def verify(self, pool: Workers) -> None:
        """Look whether every byte is to be had; what it is, is checked as it is read.

        Raises:
            SourceError: a file was changed since it was registered, or lacks a tensor; or no peer
                has it.
        """
        self._tensors.check()
        for meta in self.manifest.tensors:
            if meta.length:
                self._tensors.check_place(meta.name, meta.length)

    def is_there(self) -> bool:
        """Whether files are what they were, by size and time, or peers have what they had."""
        try:
            self._tensors.check()
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

    def rest(self) -> None:
        """Let go of what peers keep for this, until it is verified or asked for again."""
        self._tensors.rest()

    def release(self) -> None:
        """Close the files."""
        self._tensors.close()

    def _read(self, meta: TensorMeta, start: int, end: int) -> memoryview:
        slot: memoryview | None = getattr(self._thread, "slot", None)
        if slot is None:  # it goes with its thread, which lives as long as one pass
            slot = self._thread.slot = memoryview(bytearray(CHUNK_BYTES))
        memory = slot[: end - start]
        self._read_into(meta, start, memory)
        return memory

    def _read_into(self, meta: TensorMeta, start: int, out: memoryview) -> None:
        at = start // CHUNK_BYTES * DIGEST_BYTES
        promised = meta.chunk_digests[at : at + DIGEST_BYTES]
        while digest_pieces(self._pieces(meta, start, out)) != promised:
            self._tensors.reject(meta.name)

    def _pieces(self, meta: TensorMeta, start: int, out: memoryview) -> Iterator[memoryview]:
        piece_bytes = self._tensors.piece_bytes
        for done in range(0, len(out), piece_bytes):
            piece = out[done : done + piece_bytes]
            self._tensors.read_into(meta.name, start + done, piece)
            yield piece
