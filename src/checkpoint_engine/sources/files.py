"""Open files in which tensors lie at known places.

What is open stays readable when it is renamed or deleted, and can be handed to another process by
its descriptor. That it still holds what it held is cheap to guess, by size and time, and certain
only by digest: whoever reads checks what was read.

    files = TensorFiles([OpenFile.of(path, descriptor, {"w": 128})], [descriptor])
    files.read_into("w", 0, memory)
"""

from __future__ import annotations

import os
import stat
import weakref
from collections.abc import Sequence

import msgspec

from checkpoint_engine.codec.digest import PIECE_BYTES
from checkpoint_engine.errors import SourceError, VerificationError

__all__ = ["OpenFile", "TensorFiles", "close_all"]


class OpenFile(msgspec.Struct, frozen=True, kw_only=True):
    """What an open file was when its tensors were found in it: plain data.

    Attributes:
        path: for messages alone; it may mean another file by now, or none.
        num_bytes: its size.
        modified_ns: when it was last written.
        positions: the first byte of each tensor.
    """

    path: str
    num_bytes: int
    modified_ns: int
    positions: dict[str, int]

    @classmethod
    def of(cls, path: str, descriptor: int, positions: dict[str, int]) -> OpenFile:
        """Describe a file as it is now."""
        found = os.fstat(descriptor)
        return cls(
            path=path,
            num_bytes=found.st_size,
            modified_ns=found.st_mtime_ns,
            positions=positions,
        )


class TensorFiles:
    """Files, and the list of their descriptors, which is taken over.

    They are closed by `close`, or when nobody refers to this any more.

    Attributes:
        opened: each file with its descriptor, valid until closed.
        freed_bytes: memory that is free again once all has been read.
    """

    way_back = "source"
    freed_bytes = 0
    piece_bytes = PIECE_BYTES

    def __init__(self, files: Sequence[OpenFile], descriptors: list[int]) -> None:
        self.opened = tuple(zip(files, descriptors, strict=True))
        self._places = {
            name: (file, descriptor, position)
            for file, descriptor in reversed(self.opened)
            for name, position in file.positions.items()
        }
        self._close = weakref.finalize(self, close_all, descriptors)

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from byte `start` on.

        Raises:
            SourceError: no file has it, or the file ends before it does.
        """
        file, descriptor, position = self._place(name)
        done = 0
        while done < len(out):
            try:
                num_read = os.preadv(descriptor, [out[done:]], position + start + done)
            except (OSError, OverflowError) as error:
                raise SourceError(f"{file.path}: tensor {name!r}: {error}") from error
            if num_read == 0:
                raise SourceError(
                    f"{file.path}: tensor {name!r}: the file ends in the middle of it; it was "
                    "truncated while being read"
                )
            done += num_read

    def check(self) -> None:
        """Look whether the files are what they were, without reading them.

        Raises:
            SourceError: one has another size or was written since.
        """
        for file, descriptor in self.opened:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise SourceError(f"{file.path}: is not a file")
            if (found.st_size, found.st_mtime_ns) != (file.num_bytes, file.modified_ns):
                raise SourceError(
                    f"{file.path}: the file was changed after its version was registered; register "
                    "it again, and write new versions into new files"
                )

    def check_place(self, name: str, length: int) -> None:
        """Raise SourceError unless `length` bytes of this tensor lie within a file."""
        file, _, position = self._place(name)
        if not 0 <= position <= file.num_bytes - length:
            raise SourceError(f"{file.path}: tensor {name!r} lies beyond the end of the file")

    def reject(self, name: str) -> None:
        """What was read of a tensor is wrong, and there is no other place to read it from.

        Raises:
            VerificationError: says so, and names the file.
        """
        raise VerificationError(
            f"tensor {name!r}: {self._place(name)[0].path} no longer holds the bytes that were "
            "registered; nothing of them was written"
        )

    def rest(self) -> None:
        """Nothing: open files cost nobody anything."""

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._close()

    def _place(self, name: str) -> tuple[OpenFile, int, int]:
        if name not in self._places:
            raise SourceError(
                f"no file of this host holds tensor {name!r}: to be streamed, a version must be "
                "readable as a whole on every host"
            )
        return self._places[name]


def close_all(descriptors: list[int]) -> None:
    """Close descriptors that are owned, and forget them."""
    while descriptors:
        os.close(descriptors.pop())
