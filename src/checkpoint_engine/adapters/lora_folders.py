"""LoRA adapters on their way into an engine: folders in memory, which the engine reads by path.

    <root>/<engine>/<LoRA's name>/<digest>/adapter_config.json, adapter_model.safetensors

Engines take adapters as PEFT's folders, and show the path of each; so the path says which version
it is. They read it again at will, when an adapter had to make room or the base was updated, and
need not show it meanwhile. So a folder stays until another takes its place, and then for an hour,
which a file beside it counts: `.retired-<digest>`. Each engine has its own.

    folders = LoraFolders.of_engine("http://127.0.0.1:8000")
    folder = folders.write("helper", content)                # verified, read-only, whole
    folders.check(folder)                                    # still what it was
    folders.remove(folder)
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from checkpoint_engine.adapters.base import Content
from checkpoint_engine.errors import (
    SourceError,
    StoreError,
    UpdateRefused,
    UsageError,
    VerificationError,
)
from checkpoint_engine.manifest import CHUNK_BYTES, TensorMeta
from checkpoint_engine.sources.lora_adapter import CONFIG_NAME, TENSORS_NAME, LoraSource
from checkpoint_engine.store import digest_in_place
from checkpoint_engine.transport.sockets import private_folder

__all__ = ["LoraFolders", "check_name"]

VARIABLE = "CKPT_ENGINE_LORA_DIR"
FILES = {CONFIG_NAME, TENSORS_NAME}
KEPT_SECONDS = 3600.0  # what requests in flight may still need after an unload
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DIGEST = re.compile(r"[0-9a-f]{64}")
FOLDER = re.compile(r"\.?[0-9a-f]+")
RETIRED = ".retired-"


def check_name(name: str) -> None:
    """Raise UsageError if a LoRA's name could be taken for a path, or for several."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"a LoRA adapter cannot be called {name[:120]!r}: a name has up to 100 letters, digits "
            "and ._- and begins with a letter or digit"
        )


class LoraFolders:
    """The folders of one engine's LoRA adapters.

    Args:
        root: of this engine; made on first use.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    @classmethod
    def of_engine(cls, engine: str) -> LoraFolders:
        """Those of the engine at a URL: in `$CKPT_ENGINE_LORA_DIR`, else in this host's memory.

        Raises:
            HandoverError: the folder is a symlink, another user's, or open to others.
        """
        configured = os.environ.get(VARIABLE)
        shared_memory = Path("/dev/shm") / f"ckpt-engine-{os.getuid()}"  # noqa: S108 - checked
        top = Path(configured).absolute() if configured else shared_memory
        private_folder(top, VARIABLE)
        return cls(top / hashlib.sha256(engine.encode()).hexdigest()[:12])

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other updates of this engine's adapters away, until this process ends at most.

        Raises:
            UpdateRefused: one is under way.
        """
        self._root.mkdir(mode=0o700, exist_ok=True)
        with (self._root / ".lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UpdateRefused(
                    "another update of this engine's LoRA adapters is under way; try again later"
                ) from error
            yield

    def digest_of(self, path: str | None) -> str | None:
        """Which version a path that an engine shows is; None if it is none of these folders."""
        if path is None:
            return None
        folder = Path(path)
        ours = folder.parent.parent == self._root and DIGEST.fullmatch(folder.name)
        return folder.name if ours else None

    def has(self, name: str, digest: str) -> bool:
        """Whether a version is there under a LoRA's name, as it should be or not."""
        return (self._root / name / digest).exists()

    def write(self, name: str, content: Content) -> Path:
        """The folder of a version under a LoRA's name, written unless it is there as it should be.

        Raises:
            StoreError: it cannot be written, for lack of memory, say.
            UsageError: the name is a path.
        """
        check_name(name)
        folder = self._root / name / content.manifest.digest
        with contextlib.suppress(VerificationError, SourceError):
            self.check(folder)
            _mark_of(folder).unlink(missing_ok=True)
            return folder
        coming = folder.with_name(f".{secrets.token_hex(8)}")
        try:
            coming.mkdir(mode=0o700, parents=True)
            _write_files(coming, content)
            coming.chmod(0o500)
            self.remove(folder)
            coming.rename(folder)
            _mark_of(folder).unlink(missing_ok=True)
        except OSError as error:
            self.remove(coming)
            raise StoreError(
                f"{folder}: cannot be written: {error.strerror}; free memory there, or set "
                f"{VARIABLE}"
            ) from error
        return folder

    def check(self, folder: Path) -> None:
        """Read a folder again.

        Raises:
            VerificationError: it is not, byte for byte, what it is called by, or holds more.
            SourceError: it cannot be read.
        """
        try:
            found = {entry.name: entry for entry in os.scandir(folder)}
        except OSError as error:
            raise SourceError(f"{folder}: cannot be read: {error.strerror}") from error
        strays = [n for n, entry in found.items() if n not in FILES or entry.is_symlink()]
        if strays or len(found) != len(FILES):
            raise VerificationError(f"{folder}: holds {sorted(found)}, not its two files alone")
        source = LoraSource.of_folder(folder)
        try:
            digest = digest_in_place(source).digest
        finally:
            source.close()
        if digest != folder.name:
            raise VerificationError(f"{folder}: its files have changed; they are of {digest}")

    def remove(self, folder: Path) -> None:
        """Remove one folder, if it is there and one of these, whatever an engine says it is."""
        named = NAME.fullmatch(folder.parent.name) and FOLDER.fullmatch(folder.name)
        if folder.parent.parent != self._root or not named or not folder.exists():
            return
        folder.chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)  # what is left, another load removes
        _mark_of(folder).unlink(missing_ok=True)

    def keep_only(self, name: str, needed: set[str]) -> None:
        """Remove the folders of a LoRA's other versions."""
        for folder in (self._root / name).glob("*"):
            if str(folder) not in needed:
                self.remove(folder)

    def retire(self, path: str) -> None:
        """Leave a folder, if it is one of these, for an hour to requests that may need it."""
        if self.digest_of(path) and Path(path).exists():
            _mark_of(Path(path)).touch(mode=0o600)

    def sweep(self, shown: set[str]) -> None:
        """Remove what was retired an hour ago, unless the engine shows it all the same.

        And what whoever wrote it, and was killed, has left.
        """
        for left in self._root.glob("*/.*"):
            self.remove(left)
        for mark in self._root.glob(f"*/{RETIRED}*"):
            folder = mark.with_name(mark.name.removeprefix(RETIRED))
            if str(folder) not in shown and time.time() - mark.stat().st_mtime > KEPT_SECONDS:
                self.remove(folder)


def _mark_of(folder: Path) -> Path:
    """The file whose age says how long a folder has been retired."""
    return folder.with_name(RETIRED + folder.name)


def _write_files(folder: Path, content: Content) -> None:
    tensors = [meta for meta in content.manifest.tensors if meta.name != CONFIG_NAME]
    config = [meta for meta in content.manifest.tensors if meta.name == CONFIG_NAME]
    _write(folder / CONFIG_NAME, b"", config, content)
    _write(folder / TENSORS_NAME, _header(tensors), tensors, content)


def _write(path: Path, head: bytes, tensors: list[TensorMeta], content: Content) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o400), "wb") as file:
        file.write(head)
        for meta in tensors:
            for start in range(0, meta.length, CHUNK_BYTES):
                file.write(content.chunk(meta, start, min(start + CHUNK_BYTES, meta.length))())


def _header(tensors: list[TensorMeta]) -> bytes:
    """Of a safetensors file with these tensors, one after the other."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for meta in tensors:
        offsets = [end, end + meta.length]
        entries[meta.name] = {"dtype": meta.dtype, "shape": meta.shape, "data_offsets": offsets}
        end += meta.length
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header
