"""Weights from a trainer's GPU to samplers on it; skipped where there is none.

NCCL refuses two ranks on one GPU of one host, so each is told that it is a host of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_stream import weights

from checkpoint_engine.device_utils import device_uuid
from checkpoint_engine.ps import ParameterServer
from children import Child, call_all, spawn

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")

MIB = 1 << 20
SLACK_BYTES = 16 * MIB
SETTINGS = {"bucket_size": 4 * MIB, "timeout": 30}


class Pair:
    """A trainer and a sampler."""

    def __init__(self, engine: str = "cuda_ipc", **environment: str) -> None:
        self.engine, self._environment = engine, environment
        self.ranks = [self.new_rank(rank) for rank in range(2)]

    def new_rank(self, rank: int) -> Child:
        alone = {"NCCL_HOSTID": f"host-{rank}", "NCCL_SOCKET_IFNAME": "lo"}
        return Child("gpu/gpu_stream.py", start=spawn, **alone, **self._environment)

    def meet(self, **settings: Any) -> None:
        settings = {"engine": self.engine, "settings": SETTINGS | settings}
        self.metadata, _ = call_all(self.ranks, "make", is_master=[True, False], **settings)
        call_all(self.ranks, "meet", rank=[0, 1], world_size=2, metadata=self.metadata)

    def replace_sampler(self) -> None:
        self.ranks[1].close()
        self.ranks[1] = self.new_rank(1)
        self.ranks[1].call("make", engine=self.engine, is_master=False, settings=SETTINGS)
        self.ranks[1].call("meet", rank=1, world_size=2, metadata=self.metadata)

    def sync(self, seed: int) -> str:
        sending = self.ranks[0].send("send", seed=seed)
        digest = self.ranks[1].call("receive", seed=seed)
        assert self.ranks[0].result(sending)["digest"] == digest
        return str(digest)

    def finalize(self) -> None:
        for rank in reversed(self.ranks):
            rank.call("finalize")

    def close(self) -> None:
        for rank in self.ranks:
            rank.close()


@pytest.fixture(params=["cuda_ipc", "nccl"])
def pair(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[Pair]:
    pair = Pair(request.param)
    pair.meet()
    yield pair
    pair.close()


def test_every_kind_of_tensor_arrives_and_has_the_versions_digest(
    pair: Pair, lone_server: ParameterServer
) -> None:
    digests = [pair.sync(seed) for seed in range(3)]
    lone_server.register_checkpoint("v", named_tensors=weights(2, "cpu"))
    assert digests[2] == lone_server._store["v"].manifest.digest
    pair.finalize()


@pytest.mark.parametrize("setting", ["expandable_segments:True", "backend:cudaMallocAsync"])
def test_it_does_not_matter_how_torch_allocates(socket_folder: Path, setting: str) -> None:
    pair = Pair(PYTORCH_CUDA_ALLOC_CONF=setting)
    try:
        pair.meet()
        pair.sync(1)
        pair.finalize()
    finally:
        pair.close()


def test_a_gpu_is_found_by_its_uuid(socket_folder: Path) -> None:
    pair = Pair(CUDA_VISIBLE_DEVICES=device_uuid())
    try:
        pair.meet()
        pair.sync(1)
        pair.finalize()
    finally:
        pair.close()


def test_bytes_that_changed_on_the_way_are_found(pair: Pair) -> None:
    pair.ranks[0].call("spoil")
    sending = pair.ranks[0].send("send", seed=1)
    with pytest.raises(RuntimeError, match=r"VerificationError: tensor .*: bytes differ"):
        pair.ranks[1].call("receive", seed=1)
    with pytest.raises(RuntimeError, match="VerificationError: rank 1 gave up"):
        pair.ranks[0].result(sending)


def test_a_sampler_that_dies_is_named_and_may_come_back(pair: Pair) -> None:
    sending = pair.ranks[0].send("send", seed=1)
    with pytest.raises(RuntimeError, match="the process died"):
        pair.ranks[1].call("receive", seed=1, die_after=50)
    with pytest.raises(RuntimeError, match="PeerLost: rank 1"):
        pair.ranks[0].result(sending)
    pair.replace_sampler()
    pair.sync(2)
    pair.finalize()


@pytest.mark.parametrize(
    ("how", "error"), [("die", "PeerLost: rank 1"), ("hang", "DeadlineExceeded: rank 1 hangs")]
)
def test_a_broadcast_that_a_sampler_leaves_ends_and_the_trainer_lives(
    socket_folder: Path, how: str, error: str
) -> None:
    pair = Pair("nccl")
    try:
        pair.meet(timeout=8)
        pair.sync(1)
        pair.ranks[1].call("leave_broadcast", how=how)
        sending = pair.ranks[0].send("send", seed=2)
        pair.ranks[1].send("receive", seed=2)
        with pytest.raises(RuntimeError, match=error):
            pair.ranks[0].result(sending)
        pair.replace_sampler()
        pair.sync(3)
        pair.finalize()
    finally:
        pair.close()


def test_memory_of_the_gpu_is_given_back(pair: Pair) -> None:
    pair.sync(1)  # loads kernels, which stay
    pair.finalize()
    before = pair.ranks[0].call("used_bytes")
    pair.meet(bucket_size=64 * MIB)
    pair.sync(2)
    between = call_all(pair.ranks, "used_bytes")[0]
    assert between - before > 3 * 64 * MIB
    pair.finalize()
    assert abs(pair.ranks[0].call("used_bytes") - before) < SLACK_BYTES
