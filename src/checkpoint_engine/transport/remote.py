"""Tensors of a version that lie in the memory of peers, read piece by piece.

For a host that has no room to stage what it joins. An engine's worker reads each digest chunk when
it writes it, from one of the peers that have it; chunks take turns among those. A peer that dies,
or whose bytes are wrong, is given up, and the others are asked.

What is read is leased at the peers from `check` to `rest`: in between nothing is held, so that an
engine that keeps a version to return to holds no memory of those who once sent it. Whether they
still have it is then found out by the next `check`.

    tensors = RemoteTensors(manifest, remote)
    tensors.check()
    tensors.read_into("w", 0, memory)
    tensors.rest()
"""

from __future__ import annotations

import contextlib
import queue
import threading
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

import msgspec

from checkpoint_engine.errors import CheckpointEngineError, DeadlineExceeded, SourceError
from checkpoint_engine.manifest import CHUNK_BYTES, Manifest, cut_chunks
from checkpoint_engine.plan.routes import Holding
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.peer import Range, Reader, Way
from checkpoint_engine.transport.peers import Peer, PeerClient
from checkpoint_engine.transport.transports import passable, reader

__all__ = ["Remote", "RemoteTensors"]

NUM_SLOTS = 4
NUM_CONNECTED_AT_ONCE = 32
STALL_SECONDS = 5.0  # requests wait meanwhile


class Remote(msgspec.Struct, frozen=True, kw_only=True):
    """Where a version lies: plain data, and as secret as the peers' tickets in it.

    Attributes:
        peers: by source.
        held: which bytes of the version each source has.
    """

    peers: dict[int, Peer]
    held: tuple[Holding, ...]


class RemoteTensors:
    """Tensors in the memory of peers; a way back as long as those have them.

    Its methods may be called from several threads, but for `check`, `rest` and `close`.
    """

    way_back = "peer"
    piece_bytes = CHUNK_BYTES

    def __init__(self, manifest: Manifest, remote: Remote) -> None:
        self._manifest = manifest
        self._places = {meta.name: meta.offset for meta in manifest.tensors}
        self._peers = remote.peers
        self._held: dict[int, list[Holding]] = defaultdict(list)
        for holding in sorted(remote.held, key=lambda one: one.offset):
            self._held[holding.source].append(holding)
        self._sources = sorted(self._held)
        self._links: dict[int, _Link] = {}
        self._slots: _Slots | None = None
        self._lost: dict[int, str] = {}
        self._thread = threading.local()

    def check(self) -> None:
        """Connect to the peers, lease what they have, and look whether that is everything.

        Raises:
            SourceError: some bytes are nowhere to be had; says what became of each peer.
            StoreError: no memory for the few chunks that are under way at a time.
        """
        self._lost.clear()
        if self._slots is None:
            self._slots = _Slots()
        unconnected = [source for source in self._sources if source not in self._links]
        if unconnected:
            with ThreadPoolExecutor(min(NUM_CONNECTED_AT_ONCE, len(unconnected))) as pool:
                list(pool.map(self._connect, unconnected))
        for chunk in cut_chunks(self._manifest.tensors):
            self._choose(chunk.tensor, chunk.offset, chunk.length)

    def check_place(self, name: str, length: int) -> None:
        """Nothing more than `check` has found."""

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        """Fill `out`, of one digest chunk at most, with the bytes of a tensor from `start` on.

        Raises:
            SourceError: no peer that has them is left.
        """
        assert self._slots is not None, "check comes before reading"
        offset = self._places[name] + start
        while True:
            source, holding = self._choose(name, offset, len(out))
            at = holding.start + offset - holding.offset
            try:
                self._links[source].read(holding.segment, at, out)
            except (CheckpointEngineError, OSError) as failure:
                self._lost[source] = str(failure)
            else:
                self._thread.source = source
                return

    def reject(self, name: str) -> None:
        """What this thread read last is wrong: ask others from now on.

        Raises:
            SourceError: as `read_into`, when that is called next.
        """
        self._lost[self._thread.source] = f"its bytes of tensor {name!r} are wrong"

    def rest(self) -> None:
        """Return the leases; `check` takes them again, if it can."""
        while self._links:
            self._links.popitem()[1].close()
        if self._slots is not None:
            self._slots.close()
            self._slots = None

    close = rest

    def _connect(self, source: int) -> None:
        assert self._slots is not None, "there is memory to read into"
        segments = {holding.segment for holding in self._held[source]}
        try:
            self._links[source] = _Link(self._peers[source], segments, self._slots)
        except (CheckpointEngineError, OSError) as failure:
            self._lost[source] = str(failure)

    def _choose(self, name: str, offset: int, length: int) -> tuple[int, Holding]:
        """A source that has these bytes, and in which of its holdings; chunks take turns."""
        turn = offset // CHUNK_BYTES
        for number in range(len(self._sources)):
            source = self._sources[(turn + number) % len(self._sources)]
            if source in self._lost:
                continue
            held = self._held[source]
            at = bisect_right(held, offset, key=lambda one: one.offset) - 1
            if at >= 0 and offset + length <= held[at].end:
                return source, held[at]
        lost = tuple(self._lost.items())
        reasons = "; ".join(f"{self._peers[source].address}: {why}" for source, why in lost)
        raise SourceError(f"tensor {name!r}: no peer that has it is left ({reasons or 'none had'})")


class _Slots:
    """Memory that transports read into: a few chunks, one for each read that is under way."""

    def __init__(self) -> None:
        self._store = Store()
        self.segment: Segment = self._store.allocate(NUM_SLOTS * CHUNK_BYTES, pooled=False)
        self._free: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(NUM_SLOTS):
            self._free.put(number * CHUNK_BYTES)

    @contextlib.contextmanager
    def take(self) -> Iterator[int]:
        """The place of one chunk; there is one for every thread that writes."""
        try:
            place = self._free.get(timeout=STALL_SECONDS)
        except queue.Empty as error:
            raise DeadlineExceeded("no memory to read into became free") from error
        try:
            yield place
        finally:
            self._free.put(place)

    def close(self) -> None:
        self.segment.release()
        self._store.close()


class _Link:
    """One peer: its leases, and how its bytes are reached."""

    def __init__(self, peer: Peer, segments: set[str], slots: _Slots) -> None:
        self._slots = slots
        self._readers: dict[str, Reader] = {}
        self._client = PeerClient(peer)
        try:
            leased = {segment: self._client.lease(segment).ways for segment in segments}
            self._ways: Mapping[str, Way] = {name: passable(ways) for name, ways in leased.items()}
            for transport in {way.transport for way in self._ways.values()}:
                self._readers[transport] = reader(transport, slots.segment, own_address())
        except BaseException:
            self.close()
            raise

    def read(self, segment: str, start: int, out: memoryview) -> None:
        way = self._ways[segment]
        with self._slots.take() as place:
            wanted = [Range(start, place, len(out))]
            for _ in self._readers[way.transport].read(way, wanted, STALL_SECONDS):
                out[:] = self._slots.segment.memory[place : place + len(out)]

    def close(self) -> None:
        for found in self._readers.values():
            found.close()
        self._client.close()
