"""Tensors that are read from the memory of peers; sources and reader are this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
import torch

from checkpoint_engine.errors import SourceError
from checkpoint_engine.manifest import CHUNK_BYTES, Manifest
from checkpoint_engine.plan.routes import holdings
from checkpoint_engine.sources import TensorSource
from checkpoint_engine.store import Shard, Store
from checkpoint_engine.transport.peers import PeerServer
from checkpoint_engine.transport.remote import Remote, RemoteTensors

NUM_CHUNKS = 5


class Source:
    """A peer with one version in its memory."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.store = Store()
        self.shard: Shard = self.store.register("v", TensorSource(tensors))
        self.server = PeerServer("127.0.0.1", self.store.segment, lambda topic: b"")

    def close(self) -> None:
        self.server.close()
        self.store.close()


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "large": torch.randint(0, 256, (CHUNK_BYTES * (NUM_CHUNKS - 1) + 5,)).to(torch.uint8),
        "small": torch.arange(3.0),
    }


@pytest.fixture
def sources(tensors: dict[str, torch.Tensor]) -> Iterator[list[Source]]:
    with ExitStack() as stack:
        yield [stack.enter_context(closing(Source(tensors))) for _ in range(2)]


@pytest.fixture
def remote(sources: list[Source]) -> Iterator[RemoteTensors]:
    manifest = sources[0].shard.manifest
    with closing(remote_of(manifest, sources)) as remote:
        yield remote


def remote_of(manifest: Manifest, sources: list[Source]) -> RemoteTensors:
    shards = {
        number: (source.shard.segment.name, source.shard.manifest)
        for number, source in enumerate(sources)
    }
    peers = {number: source.server.peer for number, source in enumerate(sources)}
    held = tuple(holdings(manifest, shards))
    return RemoteTensors(manifest, Remote(peers=peers, held=held))


def read(remote: RemoteTensors, tensor: torch.Tensor, name: str = "large") -> bytes:
    memory = memoryview(bytearray(tensor.nbytes))
    for start in range(0, tensor.nbytes, CHUNK_BYTES):
        remote.read_into(name, start, memory[start : start + CHUNK_BYTES])
    return bytes(memory)


def num_leases(sources: list[Source]) -> list[int]:
    """Beside that of the version itself."""
    return [source.shard.segment.num_leases - 1 for source in sources]


def test_chunks_take_turns_and_leases_are_held_only_while_it_is_read(
    remote: RemoteTensors, sources: list[Source], tensors: dict[str, torch.Tensor]
) -> None:
    assert num_leases(sources) == [0, 0]
    remote.check()
    assert num_leases(sources) == [1, 1]
    assert read(remote, tensors["large"]) == bytes(tensors["large"].numpy())
    assert read(remote, tensors["small"], "small") == bytes(tensors["small"].numpy())
    remote.rest()
    assert num_leases(sources) == [0, 0]
    remote.check()
    assert read(remote, tensors["large"]) == bytes(tensors["large"].numpy())


def test_a_peer_that_goes_away_in_the_middle_is_replaced(
    remote: RemoteTensors, sources: list[Source], tensors: dict[str, torch.Tensor]
) -> None:
    remote.check()
    read(remote, tensors["large"])
    sources[0].server.close()
    assert read(remote, tensors["large"]) == bytes(tensors["large"].numpy())
    sources[1].server.close()
    with pytest.raises(SourceError, match=r"tensor 'large': no peer that has it is left .*;"):
        read(remote, tensors["large"])


def test_a_peer_whose_bytes_were_rejected_is_not_asked_again(
    remote: RemoteTensors, sources: list[Source], tensors: dict[str, torch.Tensor]
) -> None:
    for source in sources:
        source.shard.memory[0] ^= 1
    remote.check()
    memory = memoryview(bytearray(CHUNK_BYTES))
    for _ in sources:
        remote.read_into("large", 0, memory)
        remote.reject("large")
    with pytest.raises(SourceError, match="its bytes of tensor 'large' are wrong"):
        remote.read_into("large", 0, memory)


@pytest.mark.parametrize("num_left", [1, 0])
def test_what_peers_no_longer_have_is_found_by_the_check(
    remote: RemoteTensors, sources: list[Source], num_left: int
) -> None:
    sources[0].store.unregister("v")
    if num_left:
        remote.check()
        return
    sources[1].server.close()
    with pytest.raises(SourceError, match="its version was unregistered"):
        remote.check()
