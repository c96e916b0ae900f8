"""Files in /dev/shm that are taken over: what has been read of them is free again.

Such a file is memory, and to copy it would need as much once more. Nor can engines map it as it
lies: it cannot be sealed, so whoever truncated it would kill them. So its bytes are moved: the file
loses its name, and its pages go as they are read. MoonshotAI's engine pins the file instead, and
removes it, too.

    files = TakenFiles(opened, descriptors)         # as `TensorFiles`, open for reading and writing
    files.read_into("w", 0, memory)                 # from the first read on, no file has a name
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from checkpoint_engine.errors import SourceError
from checkpoint_engine.sources.files import OpenFile, TensorFiles

__all__ = ["TakenFiles", "is_in_memory", "open_to_take"]

FOLDER = "/dev/shm"  # noqa: S108 - files that are there already
PAGE_BYTES = mmap.PAGESIZE
OPEN_ELSEWHERE = "it is open or mapped elsewhere: close it there"


class TakenFiles(TensorFiles):
    """Open files, of which those in memory are gone once they have been read.

    Until the first read nothing is changed; then they lose their names. Each byte of them may be
    read once.

    Raises:
        SourceError: at the first read, and with all files as they were: one is not this user's, has
            another name, or is open elsewhere.
    """

    def __init__(self, files: Sequence[OpenFile], descriptors: list[int]) -> None:
        super().__init__(files, descriptors)
        taken = [(file, one) for file, one in self.opened if is_in_memory(one)]
        self.freed_bytes = sum(file.num_bytes for file, _ in taken)
        self._to_take, self._maps = taken, dict[int, mmap.mmap]()
        self._lock = threading.Lock()

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out` with the bytes of a tensor from byte `start` on, and remove them."""
        with self._lock:
            to_take, self._to_take = self._to_take, []  # once: whoever fails has changed nothing
            if to_take:
                self._maps = _take(to_take)
        super().read_into(name, start, out)
        _, descriptor, position = self._place(name)
        if descriptor in self._maps:
            first = -(-(position + start) // PAGE_BYTES) * PAGE_BYTES
            last = (position + start + len(out)) // PAGE_BYTES * PAGE_BYTES
            if first < last:  # what shares its page with another piece goes with the file
                self._maps[descriptor].madvise(mmap.MADV_REMOVE, first, last - first)

    def close(self) -> None:
        """Close the files; may be called twice."""
        self._maps.clear()
        super().close()


def is_in_memory(descriptor: int) -> bool:
    """Whether an open file lies in /dev/shm."""
    return _path(descriptor).is_relative_to(FOLDER)


def open_to_take(descriptor: int) -> int:
    """The same file, open for writing; raises SourceError, and closes the descriptor either way."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise SourceError(_refusal(_path(descriptor), str(error.strerror))) from error
    finally:
        os.close(descriptor)


def _take(files: Sequence[tuple[OpenFile, int]]) -> dict[int, mmap.mmap]:
    """Remove the names of all files, or of none; their maps, by descriptor."""
    with contextlib.ExitStack() as leases:
        hidden = [leases.enter_context(_hidden(descriptor)) for _, descriptor in files]
        maps = {descriptor: mmap.mmap(descriptor, 0) for _, descriptor in files}
        for path in hidden:
            path.unlink()
    return maps


@contextlib.contextmanager
def _hidden(descriptor: int) -> Iterator[Path]:
    """The secret path of a file that nobody else has open; it gets its own back in case of failure.

    Meanwhile whoever opens it waits, and has only done so by its own path.
    """
    path, found = _path(descriptor), os.fstat(descriptor)
    if found.st_uid != os.geteuid():
        raise SourceError(_refusal(path, "it belongs to another user"))
    if found.st_nlink != 1:
        raise SourceError(_refusal(path, "it has another name, or lost this one"))
    hidden = path.with_name(f".{secrets.token_hex(8)}.taken")
    with _leased(path, descriptor):
        try:
            path.rename(hidden)
        except OSError as error:
            raise SourceError(_refusal(path, str(error.strerror))) from error
        try:
            if not os.path.samestat(found, hidden.lstat()):
                raise SourceError(_refusal(path, "another file was put in its place"))
            if fcntl.fcntl(descriptor, fcntl.F_GETLEASE) != fcntl.F_WRLCK:
                raise SourceError(_refusal(path, OPEN_ELSEWHERE))
            yield hidden
        except BaseException:
            with contextlib.suppress(FileExistsError):  # a newer one, which replaces it
                os.link(hidden, path)
            hidden.unlink()
            raise


@contextlib.contextmanager
def _leased(path: Path, descriptor: int) -> Iterator[None]:
    """While nobody else has the file open; whoever opens it waits for the end."""
    # Told of somebody who waits, a process would end but for this signal.
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError as error:
        is_open = error.errno == errno.EAGAIN
        reason = OPEN_ELSEWHERE if is_open else f"there is no lease on it: {error.strerror}"
        raise SourceError(_refusal(path, reason)) from error
    try:
        yield
    finally:
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)


def _path(descriptor: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{descriptor}"))


def _refusal(path: Path, reason: str) -> str:
    return (
        f"{path}: cannot be taken over: {reason}; register it with "
        "use_inplace_pin_memory=False, which copies it"
    )
