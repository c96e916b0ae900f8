"""Versions that are not staged: engines read them while requests wait.

For models that do not fit twice in host memory. A rank digests its files where they lie and keeps
them open; each session is handed the descriptors and reads for itself (`adapters.streamed`). So no
byte passes through the rank, and what was begun can be ended, or undone, without it. What is read
from peers is streamed, too, where it could not be staged: each session is told who has it.

    streams = Streams()
    streams.register("step-120", source, store, mode="auto", pooled=False)  # or into the store
    streams.get("step-120")                                 # its manifest, if it is streamed
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from checkpoint_engine.dtypes import num_bytes
from checkpoint_engine.errors import StoreError, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.sources import Source
from checkpoint_engine.sources.files import TensorFiles
from checkpoint_engine.store import Store, digest_in_place
from checkpoint_engine.transport.files import FilesAt
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["Stream", "Streams", "check_modes", "files_for", "why_streamed"]

AS_ASKED = "as asked"


@dataclass(frozen=True)
class Stream:
    """This rank's part of a version, in files.

    Attributes:
        name: under which a receiver asks for the files.
        files: open until nobody refers to them.
        why: what decided that it is streamed.
    """

    manifest: Manifest
    name: str
    files: TensorFiles
    why: str


class Streams:
    """The versions that one rank has registered to be streamed."""

    def __init__(self) -> None:
        self._streams: dict[str, Stream] = {}

    def register(
        self, label: str, source: Source, store: Store, *, mode: str, pooled: bool
    ) -> None:
        """Digest a source and keep its files open, or stage it in the store, as `mode` says.

        Args:
            label: what to call it; not in use here or in the store.
            source: closed before this returns, but for the files of a version that is streamed.
            store: where it is staged.
            mode: "staged", "streamed", or "auto": streamed if the store lacks memory for it.
            pooled: as the store's.

        Raises:
            UsageError: there is no such mode, or the source is not in files alone.
            SourceError: the source contradicts itself or cannot be read.
            StoreError: the label is taken, or memory or budget does not suffice.
        """
        is_streamed = False
        try:
            files, why = _choose(source, store, mode, pooled=pooled)
            if label in self._streams or (files and label in store.labels):
                raise StoreError(f"version {label!r} is already registered; unregister it first")
            if files is None:
                store.register(label, source, pooled=pooled)
            else:
                name = secrets.token_hex(8)
                self._streams[label] = Stream(digest_in_place(source), name, files, why)
                is_streamed = True
        finally:
            if not is_streamed:
                source.close()

    def get(self, label: str | None) -> Stream | None:
        """The version of this label, if it is streamed."""
        return self._streams.get(label) if label is not None else None

    def files(self, name: str) -> TensorFiles | None:
        """The files that are called so, if they are still registered."""
        found = (stream.files for stream in tuple(self._streams.values()) if stream.name == name)
        return next(found, None)

    def unregister(self, label: str) -> bool:
        """Forget a version; whoever was handed its files keeps them. Returns whether it was one."""
        return self._streams.pop(label, None) is not None

    def close(self) -> None:
        """Forget all."""
        self._streams.clear()


def check_modes(metas: Sequence[RankMeta]) -> None:
    """Raise UsageError if some ranks stage what others stream, or a host has none of the files."""
    streaming = [meta.rank for meta in metas if meta.files]
    staging = [meta.rank for meta in metas if meta.manifest.tensors and not meta.files]
    if streaming and staging:
        raise UsageError(
            f"ranks {streaming} stream this version and ranks {staging} stage it: give every rank "
            "the same mode"
        )
    hosts = {meta.host for meta in metas if meta.files}
    without = [meta.rank for meta in metas if meta.host not in hosts]
    if streaming and without:
        raise UsageError(
            f"a version is streamed from files on the engines' own hosts, and ranks {without} have "
            "none there: register the files on every host, or stage the version"
        )


def files_for(rank: int, metas: Sequence[RankMeta]) -> tuple[FilesAt, ...]:
    """Where a rank's sessions ask for files: there, then at the other ranks of its host."""
    host = metas[rank].host
    near = sorted((meta for meta in metas if meta.host == host), key=lambda meta: meta.rank != rank)
    return tuple(FilesAt(address=meta.address, name=meta.files) for meta in near if meta.files)


def why_streamed(version: Version, rank: int, store: Store, mode: str) -> str:
    """Why a rank does not stage what it would read from peers for its host; "" if it does.

    Raises:
        UsageError: there is no such mode.
    """
    _check_mode(mode)
    if mode != "auto":
        return AS_ASKED if mode == "streamed" else ""
    num_bytes = sum(piece.length for piece in version.share(rank))
    num_sharing = len(version.hosts.ranks(version.hosts.of_rank[rank]))
    return store.lack(num_bytes, pooled=True, num_sharing=num_sharing) if num_bytes else ""


def _choose(
    source: Source, store: Store, mode: str, *, pooled: bool
) -> tuple[TensorFiles | None, str]:
    """The files to stream from, and why; None to stage."""
    _check_mode(mode)
    files = None if source.freed_bytes else source.files
    if mode == "streamed":
        if files is None:
            raise UsageError(
                "only files can be streamed, not tensors in memory, nor files that are taken over: "
                "save them first, leave the files where they are, or stage them"
            )
        return files, AS_ASKED
    if mode == "staged" or files is None:
        return None, ""
    lacking = store.lack(sum(num_bytes(s.dtype, s.shape) for s in source.specs()), pooled=pooled)
    return (files, lacking) if lacking else (None, "")


def _check_mode(mode: str) -> None:
    if mode not in ("auto", "staged", "streamed"):
        raise UsageError(f"the mode is auto, staged or streamed, not {mode!r}")
