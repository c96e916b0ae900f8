"""Open files in other processes' hands: readable whatever becomes of their owner and their name."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from core_tools import Background, num_fds, pattern, wait_until

from checkpoint_engine.errors import HandoverError, PeerLost, ProtocolError, SourceError
from checkpoint_engine.sources.files import OpenFile, TensorFiles
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.files import FilesAt, Handed, Open, fetch_files
from checkpoint_engine.update.sessions import Door

pytestmark = pytest.mark.usefixtures("no_garbage", "socket_folder")

OWNER = """
import os, sys
from pathlib import Path
from checkpoint_engine.sources.files import OpenFile, TensorFiles
from checkpoint_engine.update.sessions import Door
descriptors = [os.open(path, os.O_RDONLY) for path in sys.argv[1:]]
pairs = zip(sys.argv[1:], descriptors)
files = TensorFiles([OpenFile.of(p, d, {Path(p).stem: 2}) for p, d in pairs], descriptors)
print(Door(lambda name: None, lambda name: files).address, flush=True)
sys.stdin.read()
"""


def write(path: Path, seed: int) -> Path:
    path.write_bytes(b"--" + pattern(1000, seed))
    return path


def opened(*paths: Path) -> TensorFiles:
    """Each holds a tensor of its own name, from its third byte on."""
    descriptors = [os.open(path, os.O_RDONLY | os.O_CLOEXEC) for path in paths]
    pairs = zip(paths, descriptors, strict=True)
    return TensorFiles([OpenFile.of(str(p), d, {p.stem: 2}) for p, d in pairs], descriptors)


def read(files: TensorFiles, name: str, length: int = 1000) -> bytes:
    memory = bytearray(length)
    files.read_into(name, 0, memoryview(memory))
    return bytes(memory)


@pytest.fixture
def doors() -> Iterator[list[Door]]:
    """Where files are asked for; closed at the end."""
    doors: list[Door] = []
    yield doors
    for door in doors:
        door.close()


def serve(doors: list[Door], files: TensorFiles | None) -> FilesAt:
    doors.append(Door(lambda name: None, lambda name: files if name == "v" else None))
    return FilesAt(address=doors[-1].address, name="v")


def test_files_outlive_their_owner_and_their_names(tmp_path: Path) -> None:
    paths = [write(tmp_path / name, seed) for seed, name in enumerate("ab")]
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *map(str, paths)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with owner:
        assert owner.stdout is not None
        place = FilesAt(address=owner.stdout.readline().strip(), name="v")
        files = fetch_files([place], ["a", "b"])
        owner.kill()
    for path in paths:
        path.unlink()
    assert [read(files, name) for name in "ab"] == [pattern(1000, seed) for seed in (0, 1)]
    files.close()


def test_another_rank_is_asked_only_for_what_is_missing(tmp_path: Path, doors: list[Door]) -> None:
    a, b = write(tmp_path / "a", 0), write(tmp_path / "b", 1)
    places = [serve(doors, opened(a)), serve(doors, opened(a, b)), serve(doors, None)]
    files = fetch_files(places[:1], ["a"])
    with pytest.raises(SourceError, match="no file of this host holds tensor 'b'"):
        read(files, "b")
    files = fetch_files(places, ["a", "b"])
    assert len(files.opened) == 3, "both of the second, none of the third"
    assert read(files, "b") == pattern(1000, 1)


def test_what_is_not_registered_is_refused(doors: list[Door]) -> None:
    place = serve(doors, opened())
    for name in ("v", "w"):
        with pytest.raises(HandoverError, match="unregistered"):
            fetch_files([FilesAt(address=place.address, name=name)], ["a"])


@pytest.mark.parametrize("change", ["write", "grow", "shrink"])
def test_a_file_that_has_changed_is_refused(tmp_path: Path, doors: list[Door], change: str) -> None:
    path = write(tmp_path / "a", 0)
    files = opened(path)
    place = serve(doors, files)
    if change == "write":
        os.utime(path, (1, 1))
    else:
        os.truncate(path, 2000 if change == "grow" else 500)
    before = num_fds()
    with pytest.raises(SourceError, match=f"{path}: the file was changed"):
        fetch_files([place], ["a"])
    wait_until(lambda: num_fds() <= before)
    if change == "shrink":
        with pytest.raises(SourceError, match="truncated"):
            read(files, "a")


def test_nothing_but_a_file_is_taken_for_one() -> None:
    """A reader would wait for a pipe for ever."""
    reading, writing = os.pipe()
    file = OpenFile.of("pipe", reading, {"a": 0})
    listener, address = sockets.listen()

    def offer() -> None:
        connection, _ = listener.accept()
        channel: Channel[Open] = Channel(connection, Open)
        with closing(channel):
            channel.receive(10)
            channel.send(Handed(file=file, num_left=0), (reading,))

    with closing(listener):
        owner = Background(offer)
        with pytest.raises(SourceError, match="is not a file"):
            fetch_files([FilesAt(address=address, name="v")], ["a"])
        owner.result()
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize("num_left", [0, 1])
def test_an_owner_that_breaks_off_leaves_no_descriptor(tmp_path: Path, num_left: int) -> None:
    file = opened(write(tmp_path / "a", 0))
    listener, address = sockets.listen()

    def offer() -> None:
        connection, _ = listener.accept()
        channel: Channel[Open] = Channel(connection, Open)
        with closing(channel):
            channel.receive(10)
            descriptors = (file.opened[0][1],) if num_left else ()
            channel.send(Handed(file=file.opened[0][0], num_left=num_left), descriptors)

    with closing(listener):
        before = num_fds()
        owner = Background(offer)
        with pytest.raises((PeerLost, ProtocolError)):
            fetch_files([FilesAt(address=address, name="v")], ["a"])
        owner.result()
        wait_until(lambda: num_fds() <= before)


def test_files_are_closed_with_the_last_reference(tmp_path: Path) -> None:
    before = num_fds()
    files = opened(write(tmp_path / "a", 0))
    assert num_fds() == before + 1
    del files
    assert num_fds() == before
    files = opened(tmp_path / "a")
    files.close()
    files.close()
    assert num_fds() == before
