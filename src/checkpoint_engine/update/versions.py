"""A gathered version: what it is, where its bytes are, and where they will be on each host.

A host needs the whole version once, whatever the number of its ranks. What its own ranks
registered is there already, in their segments, and is handed over as it lies. The rest comes in
one of two ways: broadcast, where one rank of each host, the lead, receives all of it; or read from
peers, where the ranks of a host share the work and the sources take no part. Everything here is
pure: every rank computes the same from the same metas.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from checkpoint_engine.errors import UsageError
from checkpoint_engine.manifest import Manifest, check_manifest, cut_chunks
from checkpoint_engine.plan.buckets import DEFAULT_BUCKET_BYTES, Bucket, plan_buckets
from checkpoint_engine.plan.merge import Run, merge
from checkpoint_engine.plan.routes import Holding, Piece, holdings, shares
from checkpoint_engine.transport.handover import Part
from checkpoint_engine.transport.peers import Peer
from checkpoint_engine.transport.remote import Remote

__all__ = ["Hosts", "RankMeta", "Version", "parts_on"]

Stretch = TypeVar("Stretch", Run, Piece)


class RankMeta(msgspec.Struct, frozen=True, kw_only=True):
    """What a rank tells the others about its shard of a checkpoint: plain data.

    Attributes:
        host: equal for ranks whose processes can hand each other descriptors.
        address: where the rank listens; also the handle that its engine is given.
        device_uuid: of the device whose engine looks for that handle.
        segment: name of the segment that holds the shard; "" if it registered nothing.
        peer: where other hosts read from it, and the secrets for that.
        files: name of the files that hold it instead; "" unless it is to be streamed.
        why: what decided between the two.
    """

    rank: int
    host: str
    address: str
    device_uuid: str
    segment: str
    manifest: Manifest
    peer: Peer | None = None
    files: str = ""
    why: str = ""


@dataclass(frozen=True)
class Hosts:
    """Which ranks share a host; hosts are numbered in the order of their first rank."""

    names: tuple[str, ...]
    of_rank: tuple[int, ...]

    @classmethod
    def of(cls, metas: Sequence[RankMeta]) -> Hosts:
        """The hosts of all ranks."""
        names = tuple(dict.fromkeys(meta.host for meta in metas))
        return cls(names, tuple(names.index(meta.host) for meta in metas))

    def lead(self, host: int) -> int:
        """The rank that sends and receives for a host in a broadcast."""
        return self.of_rank.index(host)

    def ranks(self, host: int) -> list[int]:
        """The ranks of a host."""
        return [rank for rank, found in enumerate(self.of_rank) if found == host]


@dataclass(frozen=True)
class Version:
    """What a version is, whose runs it is made of, and who takes part in bringing it to engines.

    Without a manifest it is one that the replicas keep themselves: nothing is staged for it.

    Attributes:
        runs: by source; see `plan.merge`.
        sources: whose shards the runs are of.
        metas: who takes part; in a broadcast the sources themselves.
        hosts: of those who take part.
        by_peers: whether the sources are read from, and take no part.
        copies: what sources hold besides their shards.
        lost: sources that are known to be gone.
        streamed: why engines read it from the sources themselves; "" if it is staged for them.
    """

    digest: str
    num_bytes: int
    manifest: Manifest | None
    runs: tuple[Run, ...]
    sources: tuple[RankMeta, ...]
    metas: tuple[RankMeta, ...]
    hosts: Hosts
    by_peers: bool = False
    copies: tuple[Holding, ...] = ()
    lost: frozenset[int] = frozenset()
    streamed: str = ""

    @classmethod
    def of(cls, metas: Sequence[RankMeta]) -> Version:
        """Put the ranks' shards together.

        Raises:
            ManifestError: a rank's manifest contradicts itself.
            UsageError: the ranks contradict each other.
        """
        for meta in metas:
            check_manifest(meta.manifest)
        manifest, runs = merge([meta.manifest for meta in metas])
        taking_part, hosts = tuple(metas), Hosts.of(metas)
        return cls(
            manifest.digest, manifest.num_bytes, manifest, runs, taking_part, taking_part, hosts
        )

    @classmethod
    def kept(cls, digest: str, num_bytes: int, metas: Sequence[RankMeta]) -> Version:
        """A version that every replica still has in memory from before."""
        return cls(digest, num_bytes, None, (), (), tuple(metas), Hosts.of(metas))

    def read_by(
        self,
        metas: Sequence[RankMeta],
        copies: Sequence[Holding] = (),
        lost: frozenset[int] = frozenset(),
    ) -> Version:
        """The same version, for ranks that read it from its sources as peers.

        Raises:
            UsageError: a source cannot be read from.
        """
        if self.mode == "streamed":
            raise UsageError(
                "a version that is streamed is in no memory that peers could read: stage it, or "
                "update from its files"
            )
        for source, meta in enumerate(self.sources):
            if meta.segment and meta.peer is None and source not in lost:
                raise UsageError(f"rank {meta.rank} does not let peers read; gather its metas anew")
        return Version(
            self.digest, self.num_bytes, self.manifest, self.runs, self.sources, tuple(metas),
            Hosts.of(metas), True, tuple(copies), lost,
        )  # fmt: skip

    @property
    def mode(self) -> str:
        """Where engines find it: "staged" in memory, "streamed" from elsewhere, "kept" by them."""
        if self.manifest is None:
            return "kept"
        in_files = any(meta.files for meta in self.sources)
        return "streamed" if in_files or self.streamed else "staged"

    @property
    def why(self) -> str:
        """What decided that."""
        return self.streamed or next((meta.why for meta in self.sources if meta.why), "")

    @property
    def remote(self) -> Remote | None:
        """Where engines read it from peers by themselves, if they do."""
        if not self.streamed:
            return None
        held = self.held()
        peers = {one.source: self.sources[one.source].peer for one in held}
        return Remote(
            peers={source: peer for source, peer in peers.items() if peer is not None},
            held=tuple(one for one in held if peers[one.source] is not None),
        )

    def is_on(self, host: int, run: Run) -> bool:
        """Whether a run's bytes are on a host already."""
        return run.rank not in self.lost and self.sources[run.rank].host == self.hosts.names[host]

    def held(self) -> list[Holding]:
        """What each source that is not lost can be asked for."""
        assert self.manifest is not None, "what replicas keep is not read from peers"
        shards = {
            source: (meta.segment, meta.manifest)
            for source, meta in enumerate(self.sources)
            if meta.segment and source not in self.lost
        }
        copies = [copy for copy in self.copies if copy.source not in self.lost]
        return [*holdings(self.manifest, shards), *copies]

    def received(self, host: int) -> list[tuple[int, Piece]]:
        """What a host must receive: by which rank, and where in the memory that it goes to."""
        foreign = [run for run in self.runs if not self.is_on(host, run)]
        if not self.by_peers:
            pieces, end = [], 0
            for run in foreign:
                pieces.append((self.hosts.lead(host), Piece(run.offset, run.length, end)))
                end += run.length
            return pieces
        return [
            (rank, piece)
            for rank, mine in zip(self.hosts.ranks(host), self._shares(host), strict=True)
            for piece in mine
        ]

    def share(self, rank: int) -> list[Piece]:
        """What a rank reads from peers for its host."""
        host = self.hosts.of_rank[rank]
        return self._shares(host)[self.hosts.ranks(host).index(rank)]

    def _shares(self, host: int) -> list[list[Piece]]:
        assert self.manifest is not None, "what replicas keep is not read from peers"
        foreign = [run for run in self.runs if not self.is_on(host, run)]
        return shares(foreign, self.manifest.tensors, len(self.hosts.ranks(host)))

    def buckets(
        self, stretches: Sequence[Stretch], bucket_bytes: int = DEFAULT_BUCKET_BYTES
    ) -> Iterator[tuple[Stretch, Bucket]]:
        """Buckets within runs or pieces, numbered through: every host plans the same."""
        assert self.manifest is not None, "what replicas keep is not sent"
        tensors, index = self.manifest.tensors, 0
        for stretch in stretches:
            end = stretch.offset + stretch.length
            first = bisect_right(tensors, stretch.offset, key=lambda one: one.offset) - 1
            last = bisect_left(tensors, end, key=lambda one: one.offset)
            chunks = cut_chunks(tensors[first:last])
            inside = (chunk for chunk in chunks if stretch.offset <= chunk.offset < end)
            for bucket in plan_buckets(inside, bucket_bytes):
                yield stretch, msgspec.structs.replace(bucket, index=index)
                index += 1


def parts_on(version: Version, host: int, received: Sequence[str]) -> tuple[Part, ...]:
    """Where the version's bytes lie on a host.

    Args:
        version: that every rank has staged.
        host: the host.
        received: by rank, the name of the segment that it received into.
    """
    if version.mode == "streamed":
        return ()
    parts = [
        _part(version.sources[run.rank], version.sources[run.rank].segment, run.start, run)
        for run in version.runs
        if version.is_on(host, run)
    ]
    for rank, piece in version.received(host):
        meta, before = version.metas[rank], parts[-1] if parts else None
        if before and _continues(before, meta.address, received[rank], piece):
            length = before.length + piece.length
            parts[-1] = msgspec.structs.replace(before, length=length)
        else:
            parts.append(_part(meta, received[rank], piece.place, piece))
    return tuple(sorted(parts, key=lambda part: part.offset))


def _part(meta: RankMeta, segment: str, start: int, what: Run | Piece) -> Part:
    return Part(
        address=meta.address, segment=segment, start=start, offset=what.offset, length=what.length
    )


def _continues(part: Part, address: str, segment: str, piece: Piece) -> bool:
    return (part.address, part.segment) == (address, segment) and (
        (part.offset + part.length, part.start + part.length) == (piece.offset, piece.place)
    )
