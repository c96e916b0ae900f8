"""Staged memory as tensors: what is mapped, what is checked, what is let go."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor

import msgspec
import pytest
import torch
from toy_adapter import Memory

from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.errors import ManifestError, VerificationError
from checkpoint_engine.manifest import CHUNK_BYTES
from checkpoint_engine.memory import byte_workers
from checkpoint_engine.plan.merge import merge
from checkpoint_engine.transport.handover import Part

TENSORS = {
    "bias": torch.arange(5, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
    "large": torch.arange(CHUNK_BYTES // 4 + 9, dtype=torch.float32),
    "scalar": torch.tensor(2.5, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def pool() -> Iterator[Executor]:
    with byte_workers() as pool:
        yield pool


def test_tensors_are_views_with_their_own_dtype_and_shape(pool: Executor) -> None:
    memory = Memory()
    staged = memory.staged("v", TENSORS)
    staged.verify(pool)
    tensors = dict(staged.tensors())
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, TENSORS[name])
        assert (tensor.dtype, tensor.shape) == (TENSORS[name].dtype, TENSORS[name].shape)
    shard = memory.store["v"]
    tensors["bias"][0] = 77
    (meta,) = (meta for meta in shard.manifest.tensors if meta.name == "bias")
    assert bytes(shard.memory[meta.offset : meta.offset + 8]) == (77).to_bytes(8, "little")


@pytest.mark.parametrize("name", ["bias", "large", "scalar"])
@pytest.mark.parametrize("last", [False, True])
def test_a_flipped_bit_is_found_and_its_tensor_named(name: str, last: bool, pool: Executor) -> None:
    memory = Memory()
    staged = memory.staged("v", TENSORS)
    (meta,) = (meta for meta in staged.manifest.tensors if meta.name == name)
    memory.store["v"].memory[meta.end - 1 if last else meta.offset] ^= 128
    with pytest.raises(VerificationError, match=f"tensor '{name}'.*nothing was changed"):
        staged.verify(pool)


def test_bytes_between_tensors_belong_to_nobody(pool: Executor) -> None:
    memory = Memory()
    staged = memory.staged("v", TENSORS)
    (meta,) = (meta for meta in staged.manifest.tensors if meta.name == "bias")
    memory.store["v"].memory[meta.end] ^= 1
    staged.verify(pool)


def test_a_version_may_lie_in_the_segments_of_several_ranks(pool: Executor) -> None:
    memory = Memory()
    shards = [
        memory.register("rank 0", {name: TENSORS[name] for name in ("bias", "large")}),
        memory.register("rank 1", {name: TENSORS[name] for name in ("empty", "scalar")}),
    ]
    manifest, runs = merge([shard.manifest for shard in shards])
    parts = [
        Part(
            address="here",
            segment=shards[run.rank].segment.name,
            start=run.start,
            offset=run.offset,
            length=run.length,
        )
        for run in reversed(runs)
    ]
    staged = Staged.attach(manifest, parts, memory)  # type: ignore[arg-type]
    staged.verify(pool)
    for name, tensor in staged.tensors():
        assert torch.equal(tensor, TENSORS[name])
    assert manifest.digest == Memory().register("whole", TENSORS).manifest.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"length": 4096}, "parts have 4096 of"),
        ({"offset": 256}, "hole or overlap at byte 0"),
        ({"start": -1}, "beyond the end"),
        ({"start": 1 << 40}, "beyond the end"),
        ({"length": -1}, "beyond the end|hole or overlap"),
        ({"length": 1 << 40}, "beyond the end"),
    ],
)
def test_parts_that_are_not_the_manifests_bytes_are_refused(
    change: dict[str, int], message: str
) -> None:
    memory = Memory()
    shard = memory.register("v", TENSORS)
    (part,) = memory.parts(shard)
    lying = msgspec.structs.replace(part, **change)
    with pytest.raises(ManifestError, match=message):
        Staged.attach(shard.manifest, [lying], memory)  # type: ignore[arg-type]
    assert memory.held == [], "what was attached before the refusal is let go"


@pytest.mark.parametrize("parts", [0, 2])
def test_too_few_or_too_many_parts_are_refused(parts: int) -> None:
    memory = Memory()
    shard = memory.register("v", TENSORS)
    with pytest.raises(ManifestError):
        Staged.attach(shard.manifest, memory.parts(shard) * parts, memory)  # type: ignore[arg-type]
    assert memory.held == []


def test_release_lets_go_once() -> None:
    memory = Memory()
    staged = memory.staged("v", TENSORS)
    assert len(memory.held) == 1
    staged.release()
    staged.release()
    assert memory.held == []
