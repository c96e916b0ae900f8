"""Updating a replica from a checkpoint on its own host, at the request of a client.

A client names a path, and the replica's process reads it: into a parameter server of its own, whose
only engine it is itself. So this is an update like any other. A client could name any file that
this process may read, so paths are confined to the folders that the replica was started with: the
path is resolved before it is judged, and every file is judged again by what was opened, whatever
links and indices have led there, and whatever was replaced meanwhile.

    folders = CheckpointFolders([Path("/checkpoints")])
    folders.update(replica.update, UpdateFromPathRequest("/checkpoints/step-120"))
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol

from checkpoint_engine.errors import SourceError, UpdateFailed, UpdateRefused, UsageError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.replica.api import UpdateFromPathRequest
from checkpoint_engine.sources import SafetensorsSource, safetensors_files

__all__ = ["CheckpointFolders", "PathNotAllowed"]


class PathNotAllowed(UsageError):
    """The path leads to where this replica may not load from."""


class Update(Protocol):
    """The replica's own: `Replica.update`."""

    def __call__(self, handle: str, *, weight_version: str | None, flush_cache: bool) -> None:
        """Take an update from a handle, from greeting to resume."""
        ...


class CheckpointFolders:
    """The folders whose checkpoints a replica may be updated from; none by default.

    Raises:
        UsageError: one is no folder.
    """

    def __init__(self, folders: Sequence[Path] = ()) -> None:
        for folder in folders:
            if not folder.is_dir():
                raise UsageError(f"--allow-path {folder}: there is no such folder")
        self._folders = [folder.resolve() for folder in folders]
        self._updating = threading.Lock()

    def update(self, update: Update, request: UpdateFromPathRequest) -> None:
        """Read a checkpoint, and bring the replica to it; returns when it is published.

        Raises:
            PathNotAllowed: the path is in none of the folders.
            SourceError: there is no checkpoint, or it is not what it claims.
            UpdateRefused: another one is being loaded.
            UpdateFailed: it was not published; the replica serves what it served before.
        """
        path = self.resolve(request.model_path)
        label = request.weight_version or path.name
        if not self._updating.acquire(blocking=False):
            raise UpdateRefused("another checkpoint is being loaded; try again later")
        try:
            with closing(ParameterServer(rank=0, world_size=1)) as server:
                server.register_source(label, self._source(path))
                server.gather_metas(label)

                def take(handles: Sequence[tuple[str, str]]) -> None:
                    update(handles[0][1], weight_version=label, flush_cache=request.flush_cache)

                server.update(label, [take])
        except UpdateFailed as failure:
            cause = str(failure).splitlines()[0]  # the rest is for whoever debugs this process
            raise UpdateFailed(cause, failure.report) from failure
        finally:
            self._updating.release()

    def resolve(self, path: str) -> Path:
        """Where a path really leads; whether anything is there, only who may load it learns.

        Raises:
            PathNotAllowed: not into one of the folders.
            UsageError: it is no absolute path.
        """
        if not self._folders:
            raise PathNotAllowed(
                "this replica loads from no folder; start it with --allow-path FOLDER"
            )
        if not os.path.isabs(path) or "\0" in path:
            raise UsageError(f"model_path {path[:80]!r} is no absolute path")
        real = Path(os.path.realpath(path))
        if not any(real.is_relative_to(folder) for folder in self._folders):
            raise PathNotAllowed(
                f"model_path {path[:80]!r} is in none of the folders that this replica may load "
                "from, which its --allow-path names"
            )
        return real

    def _source(self, path: Path) -> SafetensorsSource:
        try:
            files = safetensors_files(path, within=self._folders)
        except OSError as error:
            raise SourceError(f"{path}: cannot be read: {error.strerror}") from error
        return SafetensorsSource(files, within=self._folders)
