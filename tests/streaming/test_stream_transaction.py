"""A stream's transaction, by what samplers say in it."""

from __future__ import annotations

import msgspec

from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.transaction import _Said, conduct
from checkpoint_engine.transport.keystore import LocalKeyStore
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import PROTOCOL, Hello


def test_two_samplers_of_one_rank_are_told_so() -> None:
    keys = Rendezvous(LocalKeyStore(), 0, 3)
    hello = Hello(
        protocol=PROTOCOL, replica="sampler 0", engine="sampler 0", rank=0, world_size=1, base=None
    )
    for _ in range(2):
        said = _Said(rank=1, message=hello)
        keys.log("said").append(msgspec.msgpack.encode(said))
    version = Version(label="step-1", digest="d")
    report = conduct(keys, version, 8, lambda is_decided: [], timeout_seconds=60)
    assert report.outcome == "aborted"
    assert report.reason is not None
    assert report.reason.message == "two samplers are rank 1: each has one of its own, from 1 on"
