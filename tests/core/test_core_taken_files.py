"""Files in /dev/shm that are taken over: their memory becomes the store's, and nobody else's."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import safetensors.torch
import torch
from core_tools import MIB, num_fds, wait_until

from checkpoint_engine.errors import SourceError, StoreError, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources import JoinedSource, SafetensorsSource, TensorSource
from checkpoint_engine.sources import taken as taken_files
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.store import Store, digest_in_place
from checkpoint_engine.update.streaming import Streams

pytestmark = pytest.mark.usefixtures("no_garbage")

BLOCK_BYTES = 512
TENSORS = {
    "large": torch.arange(3 * MIB, dtype=torch.int32),  # 12 MiB
    "odd": torch.arange(5 * MIB + 3, dtype=torch.int64).to(torch.uint8),
    "small": torch.ones(7, dtype=torch.bfloat16),
    "empty": torch.empty(0, 4),
}


@pytest.fixture
def folder() -> Iterator[Path]:
    with TemporaryDirectory(prefix="ckpt-engine-test-", dir="/dev/shm") as folder:
        yield Path(folder)


@pytest.fixture
def files(folder: Path) -> list[Path]:
    """A checkpoint in two files."""
    paths = [folder / "model-1.safetensors", folder / "model-2.safetensors"]
    for path, names in zip(paths, (("large", "empty"), ("odd", "small")), strict=True):
        safetensors.torch.save_file({name: TENSORS[name] for name in names}, path)
    return paths


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def taken(store: Store, files: list[Path]) -> Manifest:
    with closing(SafetensorsSource(files, take=True)) as source:
        return store.register("version", source).manifest


def expected() -> str:
    return digest_in_place(TensorSource(TENSORS)).digest


def in_memory_bytes(descriptor: int) -> int:
    return os.fstat(descriptor).st_blocks * BLOCK_BYTES


def test_they_are_gone_and_the_store_has_them(store: Store, files: list[Path]) -> None:
    before = num_fds()
    assert taken(store, files).digest == expected()
    assert not any(path.exists() for path in files)
    store.unregister("version")
    assert num_fds() == before


@pytest.mark.parametrize("pooled", [False, True])
def test_no_byte_is_in_memory_twice(
    store: Store, files: list[Path], monkeypatch: pytest.MonkeyPatch, pooled: bool
) -> None:
    used: list[int] = []
    read_into = TensorFiles.read_into

    def watched(self: TensorFiles, name: str, start: int, out: memoryview) -> None:
        read_into(self, name, start, out)
        # The store before the files: what another thread moves meanwhile is then not counted twice.
        owned = [one.descriptor for one in store._segments] + [one for _, one in self.opened]
        used.append(sum(map(in_memory_bytes, owned)))

    monkeypatch.setattr(TensorFiles, "read_into", watched)
    num_bytes = sum(path.stat().st_size for path in files)
    with closing(SafetensorsSource(files, take=True)) as source:
        store.register("version", source, pooled=pooled)
        left = sum(in_memory_bytes(one) for _, one in source.files.opened)
    assert max(used) < num_bytes + 2 * MIB, "a piece for each thread, and edges of pieces"
    assert left < num_bytes / 10


def test_beside_tensors_no_byte_is_in_memory_twice_either(files: list[Path]) -> None:
    with closing(JoinedSource(files, {"more": torch.ones(3)}, take=True)) as source:
        assert source.freed_bytes == sum(path.stat().st_size for path in files)


def test_what_lies_elsewhere_is_read_and_left(
    store: Store, files: list[Path], tmp_path: Path
) -> None:
    elsewhere = tmp_path / "model-2.safetensors"
    elsewhere.write_bytes(files[1].read_bytes())
    elsewhere.chmod(0o400)
    assert taken(store, [files[0], elsewhere]).digest == expected()
    assert elsewhere.exists()
    assert not files[0].exists()


def test_beside_tensors_they_are_taken_too(store: Store, files: list[Path]) -> None:
    with closing(
        JoinedSource(files[:1], {n: TENSORS[n] for n in ("odd", "small")}, take=True)
    ) as s:
        assert store.register("version", s).manifest.digest == expected()
    assert not files[0].exists()


def test_a_link_from_elsewhere_leads_to_them(
    store: Store, files: list[Path], tmp_path: Path
) -> None:
    link = tmp_path / "link.safetensors"
    link.symlink_to(files[0])
    assert taken(store, [link, files[1]]).digest == expected()
    assert not files[0].exists()


@contextmanager
def opened(path: Path) -> Iterator[None]:
    with path.open("rb"):
        yield


@contextmanager
def mapped(path: Path) -> Iterator[None]:
    with path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    with memory:
        yield


@contextmanager
def opened_by_another_process(path: Path) -> Iterator[None]:
    command = [sys.executable, "-c", "import sys; f = open(sys.argv[1]); print(); input()", path]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as other:  # type: ignore[call-overload]
        other.stdout.readline()
        yield
        other.communicate(b"\n")


@contextmanager
def linked(path: Path) -> Iterator[None]:
    os.link(path, path.with_suffix(".other"))
    yield


@contextmanager
def of_another_user(path: Path) -> Iterator[None]:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(path, 65534, 65534)
    yield


HOLDER = """
import subprocess, sys
from checkpoint_engine.sources import SafetensorsSource
from pathlib import Path
from checkpoint_engine.sources.taken import _leased
source = SafetensorsSource(sys.argv[1:], take=True)
with _leased(Path(sys.argv[1]), source.files.opened[0][1]):
    other = subprocess.Popen(["cat", *sys.argv[1:]], stdout=subprocess.DEVNULL)
    try:
        other.wait(1)
    except subprocess.TimeoutExpired:
        print("it waits")
print(other.wait(60))
"""


Hindrance = Callable[[Path], AbstractContextManager[None]]


@pytest.mark.parametrize(
    ("hindrance", "message"),
    [
        (opened, "open or mapped elsewhere"),
        (mapped, "open or mapped elsewhere"),
        (opened_by_another_process, "open or mapped elsewhere"),
        (linked, "another name"),
        (of_another_user, "another user"),
    ],
)
def test_one_that_somebody_else_has_is_refused_and_all_stay_as_they_were(
    store: Store, files: list[Path], hindrance: Hindrance, message: str
) -> None:
    before = [path.read_bytes() for path in files]
    with (
        hindrance(files[1]),
        pytest.raises(SourceError, match=f"cannot be taken over: .*{message}"),
    ):
        taken(store, files)
    assert [path.read_bytes() for path in files] == before
    assert store.labels == []
    assert store.allocated_bytes == 0


def test_one_that_may_not_be_written_is_refused(
    store: Store, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    opens = os.open

    def refused(path: str, flags: int, *more: int) -> int:
        if flags & os.O_RDWR and path.startswith("/proc/self/fd"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opens(path, flags, *more)

    before = num_fds()
    monkeypatch.setattr(os, "open", refused)
    with pytest.raises(SourceError, match="taken over: Permission denied"):
        taken(store, files)
    assert num_fds() == before


def test_it_is_tried_once_however_many_threads_read(
    files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever had it open may have let go of it meanwhile, but the version has failed."""
    tries: list[object] = []

    def refuse(opened: object) -> object:
        tries.append(opened)
        raise SourceError("refused")

    monkeypatch.setattr(taken_files, "_take", refuse)
    with closing(SafetensorsSource(files, take=True)) as source:
        with pytest.raises(SourceError, match="refused"):
            source.read_into("large", 0, memoryview(bytearray(8)))
        source.read_into("large", 0, memoryview(bytearray(8)))  # as a second thread, which waited
    assert len(tries) == 1


def test_whoever_opens_one_in_this_moment_reads_all_of_it(
    store: Store, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    content, others = files[1].read_bytes(), []
    rename = Path.rename

    def opened_just_before(self: Path, target: Path) -> Path:
        if self == files[1]:
            others.append(subprocess.Popen(["cat", self], stdout=subprocess.PIPE))
            wait_until(lambda: "BREAKING" in Path("/proc/locks").read_text())
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", opened_just_before)
    with pytest.raises(SourceError, match="open or mapped elsewhere"):
        taken(store, files)
    assert others[0].communicate(timeout=60)[0] == content
    assert sorted(files[0].parent.iterdir()) == files
    monkeypatch.undo()
    assert taken(store, files).digest == expected()


def test_a_newer_one_stays(
    store: Store, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def replaced_just_before(self: Path, target: Path) -> Path:
        if self == files[1]:
            newer = self.with_suffix(".coming")
            newer.write_bytes(b"newer")
            os.replace(newer, self)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", replaced_just_before)
    with pytest.raises(SourceError, match="another file was put in its place"):
        taken(store, files)
    assert files[1].read_bytes() == b"newer"
    assert sorted(files[0].parent.iterdir()) == files


def test_one_that_was_replaced_is_refused(store: Store, files: list[Path]) -> None:
    with closing(SafetensorsSource(files, take=True)) as source:
        content = files[0].read_bytes()
        files[0].unlink()
        files[0].write_bytes(content)
        with pytest.raises(SourceError, match="lost this one"):
            store.register("version", source)
    assert files[0].read_bytes() == content


def test_what_cannot_be_registered_is_not_touched(files: list[Path]) -> None:
    with closing(Store(budget_bytes=MIB)) as store, pytest.raises(StoreError, match="budget"):
        taken(store, files)
    assert all(path.exists() for path in files)


def test_they_are_not_streamed(store: Store, files: list[Path]) -> None:
    with (
        closing(SafetensorsSource(files, take=True)) as source,
        pytest.raises(UsageError, match="taken over"),
    ):
        Streams().register("version", source, store, mode="streamed", pooled=False)
    assert all(path.exists() for path in files)


def test_whoever_opens_one_meanwhile_ends_nobody(files: list[Path]) -> None:
    """A lease is broken by a signal, whose default is to end the process that holds it."""
    ended = subprocess.run(
        [sys.executable, "-c", HOLDER, str(files[0])], capture_output=True, text=True, timeout=120
    )
    assert (ended.returncode, ended.stdout) == (0, "it waits\n0\n"), ended.stderr
