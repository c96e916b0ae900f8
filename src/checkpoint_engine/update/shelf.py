"""What a rank lets its peers read: the version that was published last, kept for them.

New instances come at any time and ask what they should serve. The answer is the version last
published, or, where nothing was yet, the one gathered. Its memory stays leased until the next one
is published or its user unregisters it, whatever is registered meanwhile. A host that received
bytes in an update is a source of them, too.

    shelf = Shelf(store)
    meta = RankMeta(..., peer=shelf.peer)                       # listening from here on
    shelf.offer("step-120", version)                            # gathered
    with shelf.updating():
        ...
    shelf.keep("step-120", version, rank, received)             # published
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import msgspec

from checkpoint_engine.errors import CheckpointEngineError, StoreError, TransferError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.plan.routes import Holding
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.peers import Peer, PeerClient, PeerServer
from checkpoint_engine.update.protocol import decode
from checkpoint_engine.update.versions import RankMeta, Version

__all__ = ["Description", "Shelf", "Survey", "ask", "survey"]

WHOLE, COPIES = "whole", "copies"
ASK_SECONDS = 10.0
NUM_ASKED_AT_ONCE = 32


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What a source has for its peers.

    Attributes:
        label: of the version; "" if there is none.
        published: whether engines serve it, or it was merely gathered.
        updating: whether an update is under way, so that this may change in a moment.
        metas: of the version's sources; empty if only copies were asked for.
        copies: what this source received in updates.
    """

    label: str
    digest: str
    published: bool
    updating: bool
    metas: tuple[RankMeta, ...]
    copies: tuple[Holding, ...]

    @property
    def name(self) -> tuple[str, str]:
        """Label and digest: what changes when another version is published."""
        return self.label, self.digest


class Survey(msgspec.Struct, frozen=True, kw_only=True):
    """What the sources of a version have besides their shards, and which of them are gone."""

    copies: tuple[Holding, ...] = ()
    lost: tuple[int, ...] = ()


class Shelf:
    """One rank's; its methods belong to the rank's thread, its answers are given by another."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._server: PeerServer | None = None
        self._lock = threading.Lock()
        self._kept: list[Segment] = []
        self._name: str | None = None
        self._updating = False
        self._description = Description(
            label="", digest="", published=False, updating=False, metas=(), copies=()
        )

    @property
    def peer(self) -> Peer:
        """Where this rank is asked; it listens from the first time on."""
        if self._server is None:
            self._server = PeerServer(own_address(), self._store.segment, self._describe)
        return self._server.peer

    def offer(self, label: str, version: Version) -> None:
        """A version was gathered: there is nothing better yet if nothing was published."""
        if not self._description.published:
            self._show(label, version, (), published=False)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Say that an update is under way."""
        self._updating = True
        try:
            yield
        finally:
            self._updating = False

    def keep(self, label: str, version: Version, rank: int, received: Segment | None) -> None:
        """A version was published: lease what this rank has of it.

        Args:
            label: its label.
            version: the version.
            rank: this rank among those who took part.
            received: what this rank received into, if anything.
        """
        if version.manifest is None:  # the engines went back to what they kept, not to what is here
            self.forget()
            return
        own = version.metas[rank].segment
        segments = [found for found in (self._store.segment(own), received) if found is not None]
        segments = [found for found in segments if _leased(found)]
        self.forget()
        self._kept, self._name = segments, label
        copies: list[Holding] = []
        if received is not None and received in segments:
            source = len(version.sources) + rank if version.by_peers else rank
            host = version.hosts.of_rank[rank]
            copies = [
                Holding(
                    source=source,
                    segment=received.name,
                    start=piece.place,
                    offset=piece.offset,
                    length=piece.length,
                )
                for by, piece in version.received(host)
                if by == rank
            ]
        self._show(label, version, tuple(copies), published=True)

    def forget(self, segment: str | None = None) -> None:
        """Let go of the version that was published; or only if it has that segment."""
        if segment is not None and segment not in [kept.name for kept in self._kept]:
            return
        while self._kept:
            self._kept.pop().release()
        with self._lock:
            self._description = Description(
                label="", digest="", published=False, updating=False, metas=(), copies=()
            )

    def close(self) -> None:
        """Stop listening, and let go of everything."""
        if self._server is not None:
            self._server.close()
        self.forget()

    def _show(
        self, label: str, version: Version, copies: tuple[Holding, ...], *, published: bool
    ) -> None:
        metas = version.sources
        if version.by_peers:  # who took part holds copies only, and is a source besides the others
            metas += tuple(
                msgspec.structs.replace(meta, segment="", manifest=Manifest.of(()))
                for meta in version.metas
            )
        with self._lock:
            self._description = Description(
                label=label,
                digest=version.digest,
                published=published,
                updating=False,
                metas=metas,
                copies=copies,
            )

    def _describe(self, topic: str) -> bytes:
        with self._lock:
            description = self._description
        metas = description.metas if topic == WHOLE else ()
        return msgspec.msgpack.encode(
            msgspec.structs.replace(description, metas=metas, updating=self._updating)
        )


def _leased(segment: Segment) -> bool:
    try:
        segment.acquire()
    except StoreError:
        return False  # unregistered in the middle of its update
    return True


def ask(metas: Sequence[RankMeta]) -> Description:
    """What a server has published, from the first of its ranks that answers.

    Raises:
        TransferError: none does, or it has nothing.
    """
    failures = []
    for meta in metas:
        try:
            found = _ask(meta, WHOLE)
        except CheckpointEngineError as error:
            failures.append(f"rank {meta.rank}: {error}")
        else:
            if not found.metas:
                raise TransferError(
                    "the source has no version that its peers could read: it was unregistered, or "
                    "rolled back; update from a checkpoint"
                )
            return found
    raise TransferError(f"no source answers: {'; '.join(failures)}")


def survey(version: Version) -> Survey:
    """Ask all sources of a version, at once, what else they have."""

    def ask_one(source: int) -> Description | None:
        try:
            return _ask(version.sources[source], COPIES)
        except CheckpointEngineError:
            return None

    sources = range(len(version.sources))
    with ThreadPoolExecutor(min(NUM_ASKED_AT_ONCE, len(sources))) as pool:
        answers = list(pool.map(ask_one, sources))
    return Survey(
        copies=tuple(
            copy
            for answer in answers
            if answer is not None and answer.digest == version.digest
            for copy in answer.copies
            if 0 <= copy.source < len(version.sources)
        ),
        lost=tuple(source for source, answer in enumerate(answers) if answer is None),
    )


def _ask(meta: RankMeta, topic: str) -> Description:
    if meta.peer is None:
        raise TransferError("it does not let peers read")
    with PeerClient(meta.peer, ASK_SECONDS) as client:
        description: Description = decode(client.describe(topic), Description)
    return description
