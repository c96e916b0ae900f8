"""What was decided is what is recorded, whoever lives to tell."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from checkpoint_engine.errors import UsageError
from checkpoint_engine.registry import Registry, UpdateRecord, state_dir

DIGEST = "d" * 64
COORDINATOR = """
import sys
from pathlib import Path
from checkpoint_engine.registry import Registry
registry = Registry(Path(sys.argv[1]))
for update in sys.argv[2:]:
    registry.start(update, registry.next_epoch(), f"version of {update}", "d" * 64)
    if update.startswith("published"):
        registry.publish(update)
print("started", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "registry.sqlite"


@pytest.fixture
def registry(path: Path) -> Iterator[Registry]:
    registry = Registry(path)
    yield registry
    registry.close()


def coordinator(path: Path, *updates: str) -> subprocess.Popen[str]:
    """Another process that has begun updates, and lives until killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", COORDINATOR, str(path), *updates],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    with process:
        process.kill()


def record_of(registry: Registry, update: str) -> UpdateRecord:
    (found,) = [record for record in registry.history() if record.id == update]
    return found


def test_a_publish_that_was_recorded_and_vetoed_was_none(registry: Registry) -> None:
    registry.start("u1", registry.next_epoch(), "step-1", DIGEST)
    registry.publish("u1")
    registry.finish("u1", "rolled_back", b"{}")
    assert record_of(registry, "u1").published_at is None
    assert registry.last_published() is None


def test_the_life_of_an_update(registry: Registry) -> None:
    epoch = registry.next_epoch()
    registry.start("u1", epoch, "step-1", DIGEST)
    started = record_of(registry, "u1")
    assert (started.epoch, started.version, started.digest) == (epoch, "step-1", DIGEST)
    assert (started.published_at, started.finished_at, started.outcome) == (None, None, None)
    assert registry.last_published() is None
    registry.publish("u1")
    published = record_of(registry, "u1")
    assert published.published_at is not None
    assert started.started_at <= published.published_at
    assert published.outcome is None
    assert registry.last_published() == published
    registry.finish("u1", "published", b"{}")
    finished = record_of(registry, "u1")
    assert finished.outcome == "published"
    assert finished.finished_at is not None
    assert finished.finished_at >= published.published_at


def test_history_is_newest_first_and_survives(registry: Registry, path: Path) -> None:
    for number in range(5):
        registry.start(f"u{number}", registry.next_epoch(), f"step-{number}", DIGEST)
        if number in (1, 3):
            registry.publish(f"u{number}")
        registry.finish(f"u{number}", "published" if number in (1, 3) else "rolled_back", b"{}")
    assert [record.id for record in registry.history(3)] == ["u4", "u3", "u2"]
    registry.close()
    again = Registry(path)
    assert [record.id for record in again.history()] == ["u4", "u3", "u2", "u1", "u0"]
    latest = again.last_published()
    assert latest is not None
    assert latest.version == "step-3"
    again.close()


def test_an_update_that_was_never_started_is_not_recorded_silently(registry: Registry) -> None:
    """The decision exists only as a record; one that is lost must not pass for one that is kept."""
    with pytest.raises(UsageError, match="'u1'"):
        registry.publish("u1")
    with pytest.raises(UsageError, match="'u1'"):
        registry.finish("u1", "published", b"{}")
    assert registry.history() == []


# Epochs


def test_epochs_grow(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1000.0)
    epochs = []
    for number in range(4):
        epochs.append(registry.next_epoch())
        registry.start(f"u{number}", epochs[-1], "step", DIGEST)
    assert epochs == [1_000_000, 1_000_001, 1_000_002, 1_000_003]
    monkeypatch.setattr("time.time", lambda: 5.0)
    assert registry.next_epoch() == 1_000_004, "the clock was set back"


def test_epochs_grow_when_the_file_is_lost(registry: Registry, path: Path) -> None:
    """Replicas remember the last epoch, and fence off what comes with a lower one."""
    registry.start("u1", registry.next_epoch(), "step-1", DIGEST)
    last = record_of(registry, "u1").epoch
    registry.close()
    for file in path.parent.glob("registry.sqlite*"):
        file.unlink()
    anew = Registry(path)
    assert anew.history() == []
    assert anew.next_epoch() > last
    anew.close()


def test_rivals_do_not_share_an_epoch(registry: Registry, path: Path) -> None:
    rival = Registry(path)
    epoch = registry.next_epoch()
    registry.start("u1", epoch, "step-1", DIGEST)
    with pytest.raises(UsageError, match=str(path)):
        rival.start("u2", epoch, "step-2", DIGEST)
    with pytest.raises(UsageError, match=str(path)):
        rival.start("u1", rival.next_epoch(), "step-1", DIGEST)
    assert rival.next_epoch() > epoch
    rival.close()


# Coordinators that died


def test_settle_closes_what_the_dead_left(registry: Registry, path: Path) -> None:
    dead = coordinator(path, "begun", "published-1")
    living = coordinator(path, "under way")
    registry.start("mine", registry.next_epoch(), "step", DIGEST)
    assert registry.settle() == [], "all of them live"
    kill(dead)
    assert {record.id for record in registry.settle()} == {"begun", "published-1"}
    assert record_of(registry, "begun").outcome == "rolled_back"
    assert record_of(registry, "published-1").outcome == "published"
    for update in ("under way", "mine"):
        assert record_of(registry, update).outcome is None
    assert registry.settle() == [], "once"
    kill(living)
    assert [record.id for record in registry.settle()] == ["under way"]


def test_a_pid_that_was_used_again_is_not_the_coordinator(registry: Registry, path: Path) -> None:
    """The owner's record is another process than the one that now has its pid."""
    living = coordinator(path, "u1")
    owner = record_of(registry, "u1").owner
    pid, started_at, boot = owner.split(":")
    assert int(pid) == living.pid
    assert started_at == Path(f"/proc/{pid}/stat").read_text().split()[21]
    for other in (f"{pid}:{int(started_at) - 1}:{boot}", f"{pid}:{started_at}:another-boot"):
        with sqlite3.connect(path) as connection:
            connection.execute("update updates set owner = ?, finished_at = null", (other,))
        connection.close()
        assert [record.id for record in registry.settle()] == ["u1"]
    kill(living)


# Files


@pytest.mark.parametrize("data", [b"no database" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_corrupt_file_is_named(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    with pytest.raises(UsageError, match=f"{path}: not usable as a registry"):
        Registry(path)


def test_a_folder_or_nothing_in_place_of_the_file(path: Path) -> None:
    with pytest.raises(UsageError, match=f"{path}/none/r: not usable as a registry"):
        Registry(path / "none" / "r")
    path.mkdir()
    with pytest.raises(UsageError, match=f"{path}: not usable as a registry"):
        Registry(path)


def test_a_page_that_rotted(registry: Registry, path: Path) -> None:
    """Whichever it is: found on opening, at the first row or at the last."""
    for number in range(300):
        registry.start(f"update {number} " * 10, 1000 + number, "step", DIGEST)
    registry.close()
    whole = path.read_bytes()
    num_refused = 0
    for start in range(4096, len(whole), 4096):
        path.write_bytes(whole[:start] + b"\xff" * 4096 + whole[start + 4096 :])
        with closing(Registry(path)) as rotten:
            try:
                assert len(rotten.history(limit=1000)) == 300
            except UsageError as error:
                num_refused += str(path) in str(error)
    assert num_refused > 5


def test_another_programs_database(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("create table updates (id text, mine text)")
    connection.close()
    with pytest.raises(UsageError, match=str(path)), closing(Registry(path)) as registry:
        registry.history()


def test_a_closed_registry(registry: Registry, path: Path) -> None:
    registry.close()
    with pytest.raises(UsageError, match=str(path)):
        registry.publish("u1")
    with pytest.raises(UsageError, match=str(path)):
        registry.history()


def test_many_threads(registry: Registry) -> None:
    def record(number: int) -> None:
        for count in range(10):
            update = f"{number}.{count}"
            registry.start(update, 1000 + number * 10 + count, "step", DIGEST)
            registry.publish(update)
            registry.finish(update, "published", b"{}")

    threads = [threading.Thread(target=record, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(registry.history()) == 40
    assert all(record.outcome == "published" for record in registry.history())


# The folder


def test_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CKPT_ENGINE_STATE_DIR", raising=False)
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_dir() == tmp_path / "home/.local/state/ckpt-engine"
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    assert state_dir() == tmp_path / "state/ckpt-engine"
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path / "mine"))
    assert state_dir() == tmp_path / "mine"
    assert (tmp_path / "mine").stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(tmp_path / "file/folder"))
    with pytest.raises(UsageError, match=r"file/folder: .*set CKPT_ENGINE_STATE_DIR"):
        state_dir()
