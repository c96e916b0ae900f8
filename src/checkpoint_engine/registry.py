"""What happened, when: updates and their decisions, in SQLite.

A coordinator writes `started` before anything is staged, `published` after every replica has
applied and before the first of them is told to publish, and `finished` with the report. So the
record, not the memory of a process, says what was decided: no `published` means rolled back.

    registry = Registry(state_dir() / "registry.sqlite")
    epoch = registry.next_epoch()
"""

from __future__ import annotations

import os
import sqlite3
import stat
import threading
import time
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from checkpoint_engine.errors import UsageError

__all__ = ["PublishedVersion", "Registry", "UpdateRecord", "state_dir"]

BUSY_SECONDS = 30.0
PRAGMAS = ("pragma journal_mode = wal", "pragma synchronous = full")
SCHEMA = """
create table if not exists updates (
    id text primary key,
    epoch integer not null unique,
    version text not null,
    digest text not null,
    owner text not null,
    started_at real not null,
    published_at real,
    finished_at real,
    outcome text,
    report blob
)
"""
LORAS = """
create table if not exists loras (id text primary key, lora text not null)
"""
UNFINISHED = """
create index if not exists unfinished on updates (epoch) where finished_at is null
"""


Struct = TypeVar("Struct", bound=msgspec.Struct)


class UpdateRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One update as recorded; `outcome` is None while, or because, nobody finished it.

    `owner` names the coordinator's process. `lora` is what the adapter is called that it was about;
    None for weights.
    """

    id: str
    epoch: int
    version: str
    digest: str
    owner: str
    started_at: float
    published_at: float | None
    finished_at: float | None
    outcome: str | None
    lora: str | None


class PublishedVersion(msgspec.Struct, frozen=True, kw_only=True):
    """A version that the fleet was brought to, as it was last published.

    `num_bytes` is None if nobody lived to write the report. `lora` is what the adapter is called;
    None for weights. One that was unloaded has no digest.
    """

    version: str
    digest: str
    epoch: int
    published_at: float
    num_bytes: int | None
    lora: str | None = None


def state_dir() -> Path:
    """`$CKPT_ENGINE_STATE_DIR`, else ckpt-engine in the user's state folder; made on first use.

    Raises:
        UsageError: it cannot be made, or other users may write there.
    """
    configured = os.environ.get("CKPT_ENGINE_STATE_DIR")
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")
    folder = Path(configured) if configured else Path(home) / "ckpt-engine"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; set CKPT_ENGINE_STATE_DIR") from error
    status = folder.stat()
    if status.st_uid not in (os.getuid(), 0) or status.st_mode & stat.S_IWOTH:
        raise UsageError(
            f"{folder}: belongs to uid {status.st_uid} with mode {stat.S_IMODE(status.st_mode):o}, "
            "so others could forge the record; set CKPT_ENGINE_STATE_DIR"
        )
    return folder


def _process(pid: str) -> str:
    """A name that no other process has, on this boot of this host; pids are used again."""
    try:
        started_at = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return "none"
    return f"{pid}:{started_at}:{Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


class Registry:
    """The record of one coordinator, or of several that share a file. Safe from many threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            # SQLite would make a file that everybody may read.
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._connection = sqlite3.connect(
                path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise UsageError(f"{path}: not usable as a registry: {error}") from error
        try:
            for statement in (
                "pragma journal_mode = wal",
                "pragma synchronous = full",
                SCHEMA,
                LORAS,
                UNFINISHED,
            ):
                self._rows(statement)
        except UsageError:
            self._connection.close()
            raise

    def next_epoch(self) -> int:
        """A number above every epoch recorded here, and above those of lost registries.

        Milliseconds since 1970, so that a registry that starts anew is not fenced off by
        replicas that remember the old one.
        """
        ((last,),) = self._rows("select coalesce(max(epoch), 0) from updates")
        return max(int(last) + 1, int(time.time() * 1000))

    def start(
        self, update: str, epoch: int, version: str, digest: str, *, lora: str | None = None
    ) -> None:
        """Record that an update is about to begin: of weights, or of the LoRA of that name."""
        if lora is not None:
            self._change(update, "insert into loras (id, lora) values (?, ?)", update, lora)
        self._change(
            update,
            "insert into updates (id, epoch, version, digest, owner, started_at) "
            "values (?, ?, ?, ?, ?, ?)",
            update, epoch, version, digest, _process(str(os.getpid())), time.time(),
        )  # fmt: skip

    def publish(self, update: str) -> None:
        """Record the decision; from here on the update is published, whatever happens."""
        self._change(
            update, "update updates set published_at = ? where id = ?", time.time(), update
        )

    def finish(self, update: str, outcome: str, report: bytes) -> None:
        """Record how it ended, with the report as JSON.

        A decision to publish that was vetoed may have been recorded all the same: it is undone.
        """
        self._change(
            update,
            "update updates set finished_at = ?, outcome = ?, report = ?, "
            "published_at = case ? when 'published' then published_at end where id = ?",
            time.time(), outcome, report, outcome, update,
        )  # fmt: skip

    def settle(self) -> list[UpdateRecord]:
        """Close the updates that their coordinator did not live to finish; returns them.

        Those without a decision are rolled back, as their replicas did by themselves.
        """
        unfinished = [
            record
            for record in self._records("where finished_at is null")
            if _process(record.owner.split(":")[0]) != record.owner
        ]
        for record in unfinished:
            outcome = "published" if record.published_at is not None else "rolled_back"
            self._change(
                record.id,
                "update updates set finished_at = ?, outcome = ? where id = ?",
                time.time(), outcome, record.id,
            )  # fmt: skip
        return unfinished

    def history(self, limit: int = 100) -> list[UpdateRecord]:
        """The latest updates, newest first."""
        return self._records("order by epoch desc limit ?", limit)

    def last_published(self) -> UpdateRecord | None:
        """The version that the fleet was last brought to, LoRA adapters aside."""
        found = self._records(
            "where published_at is not null and lora is null order by epoch desc limit ?", 1
        )
        return found[0] if found else None

    def versions(self, limit: int = 100) -> list[PublishedVersion]:
        """The versions published last, each once.

        The first of weights, and the first of each LoRA, is what the fleet serves.
        """
        rows = self._rows(
            "select version, digest, epoch, published_at, json_extract(report, '$.bytes'), lora "
            "from updates left join loras using (id) where epoch in (select max(epoch) from "
            "updates left join loras using (id) where published_at is not null "
            "group by version, digest, lora "
            "order by max(epoch) desc limit ?) order by epoch desc",
            limit,
        )
        return self._structs(PublishedVersion, rows)

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    def _records(self, where: str, *parameters: object) -> list[UpdateRecord]:
        fields = UpdateRecord.__struct_fields__
        query = (
            f"select {', '.join(fields)} from updates "  # noqa: S608 - no input in it
            f"left join loras using (id) {where}"
        )
        return self._structs(UpdateRecord, self._rows(query, *parameters))

    def _structs(self, kind: type[Struct], rows: list[tuple[Any, ...]]) -> list[Struct]:
        """SQLite's columns hold values of any type, whatever was declared."""
        named = [dict(zip(kind.__struct_fields__, row, strict=True)) for row in rows]
        try:
            return msgspec.convert(named, list[kind])  # type: ignore[valid-type]
        except msgspec.ValidationError as error:
            raise UsageError(f"{self._path}: not usable as a registry: {error}") from error

    def _change(self, update: str, statement: str, *parameters: object) -> None:
        if not self._rows(f"{statement} returning id", *parameters):
            raise UsageError(f"{self._path}: holds no update {update!r}; was the file replaced?")

    def _rows(self, statement: str, *parameters: object) -> list[tuple[Any, ...]]:
        with self._lock:
            try:
                return self._connection.execute(statement, parameters).fetchall()
            except sqlite3.Error as error:
                raise UsageError(f"{self._path}: not usable as a registry: {error}") from error
