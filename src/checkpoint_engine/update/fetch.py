"""Getting every byte of a version to a host by reading it from peers.

Each rank of the host reads its share into memory of its own, from all sources at once. A bucket is
checked as it arrives. A source that dies, stalls or sends wrong bytes is given up, and what is
missing is read from the others; what has arrived is not read again. Sources take no part beyond
keeping a lease.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

from checkpoint_engine.codec.digest import check_bucket
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    TransferError,
)
from checkpoint_engine.memory import Pace, byte_workers
from checkpoint_engine.plan.buckets import Bucket
from checkpoint_engine.plan.routes import Holding, Piece, Route, plan_routes
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport.address import own_address
from checkpoint_engine.transport.peer import Range, Reader, Way
from checkpoint_engine.transport.peers import PeerClient
from checkpoint_engine.transport.transports import passable, reader
from checkpoint_engine.update.versions import Version

__all__ = ["fetch"]

NUM_SOURCES_AT_ONCE = 8
STALL_SECONDS = 15.0  # without a bucket: whoever is that slow is given up


def fetch(
    version: Version, rank: int, store: Store, timeline: Timeline, *, timeout_seconds: float
) -> tuple[Segment | None, int]:
    """Read this rank's share of what its host lacks.

    Returns:
        The segment read into, leased once to the caller (None if nothing was), and the number of
        bytes read.

    Raises:
        TransferError: no source is left for some bucket; says what became of each.
        StoreError: no memory for what is to be read.
    """
    mine = version.share(rank)
    if not mine:
        return None, 0
    received = store.allocate(mine[-1].place + mine[-1].length, pooled=True)
    reading = _Reading(version, received, timeline, time.monotonic() + timeout_seconds)
    try:
        num_read = reading.run(mine, first=rank)
    except BaseException:
        received.release()
        raise
    finally:
        reading.close()
    return received, num_read


@dataclass
class _Reading:
    """One rank's reading of its share."""

    version: Version
    received: Segment
    timeline: Timeline
    deadline: float
    _places: dict[int, int] = field(default_factory=dict)
    _arrived: set[int] = field(default_factory=set)
    _failures: dict[int, Exception] = field(default_factory=dict)
    _readers: dict[str, Reader] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _pace: Pace = field(default_factory=Pace.of_environment)

    def run(self, mine: Sequence[Piece], *, first: int) -> int:
        """Read until everything has arrived, without those that fail on the way."""
        buckets = []
        for piece, bucket in self.version.buckets(mine):
            buckets.append(bucket)
            self._places[bucket.offset] = piece.place + bucket.offset - piece.offset
        held = self.version.held()
        while missing := [one for one in buckets if one.offset not in self._arrived]:
            if time.monotonic() > self.deadline:
                raise DeadlineExceeded(f"{len(missing)} buckets were not read in time")
            routes = self._plan(missing, held, first)
            # Not idle: a source that waits for a starved reader looks like one that has stalled.
            with byte_workers(min(NUM_SOURCES_AT_ONCE, len(routes))) as pool:
                list(pool.map(self._read, routes, routes.values()))
        return sum(bucket.length for bucket in buckets)

    def close(self) -> None:
        for found in self._readers.values():
            found.close()

    def _plan(
        self, missing: Sequence[Bucket], held: Sequence[Holding], first: int
    ) -> dict[int, list[Route]]:
        hosts = {source: meta.host for source, meta in enumerate(self.version.sources)}
        try:
            return plan_routes(missing, held, hosts=hosts, first=first, lost=self._failures)
        except TransferError as error:
            why = [
                f"  rank {self.version.sources[source].rank}: {type(failure).__name__}: {failure}"
                for source, failure in sorted(self._failures.items())
            ]
            raise TransferError("\n".join([str(error), *why])) from error

    def _read(self, source: int, routes: Sequence[Route]) -> None:
        """Read from one source; if it fails, that is the next plan's concern."""
        meta = self.version.sources[source]
        try:
            if meta.peer is None:
                raise TransferError("it does not let peers read")
            with (
                self.timeline.span("fetch", f"from rank {meta.rank}"),
                PeerClient(meta.peer) as client,
            ):
                for segment, group in groupby(routes, lambda route: route.segment):
                    self._read_segment(client.lease(segment).ways, list(group))
        except (CheckpointEngineError, OSError) as failure:
            with self._lock:
                self._failures[source] = failure

    def _read_segment(self, ways: Sequence[Way], routes: Sequence[Route]) -> None:
        way, chosen = self._reader(ways)
        buckets = {self._places[route.bucket.offset]: route.bucket for route in routes}
        ranges = [
            Range(route.start, self._places[route.bucket.offset], route.bucket.length)
            for route in routes
        ]
        for arrived in chosen.read(way, ranges, STALL_SECONDS):
            memory = self.received.memory[arrived.place : arrived.place + arrived.length]
            check_bucket(buckets[arrived.place], memory, "on arrival")
            self._arrived.add(buckets[arrived.place].offset)
            self._pace.take(arrived.length)
            if time.monotonic() > self.deadline:
                raise DeadlineExceeded("the deadline passed while it was read")

    def _reader(self, ways: Sequence[Way]) -> tuple[Way, Reader]:
        """The first way that this host can take, and what takes it."""
        way = passable(ways)
        with self._lock:
            if way.transport not in self._readers:
                self._readers[way.transport] = reader(way.transport, self.received, own_address())
            return way, self._readers[way.transport]
