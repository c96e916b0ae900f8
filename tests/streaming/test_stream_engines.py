"""The engines as one process uses them: two in one event loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_pair import Pair, connected, received, sync
from stream_weights import MIB, equal, weights

import checkpoint_engine
from checkpoint_engine.errors import DeadlineExceeded, SourceError, UsageError
from checkpoint_engine.streaming import (
    CheckpointEngine,
    CudaIpcCheckpointEngine,
    GlooCheckpointEngine,
    HCCLCheckpointEngine,
    NCCLCheckpointEngine,
    SharedMemoryCheckpointEngine,
    cuda_ipc,
    engine_class,
    engine_names,
    names,
    new_engine,
    receiving,
)
from checkpoint_engine.streaming.carriers import NUM_SLOTS


def test_both_ends_know_what_it_was(pair: Pair) -> None:
    report, found = sync(pair, weights(1), label="step-7")
    assert all(equal(found[name], tensor) for name, tensor in weights(1).items())
    for engine in pair:
        assert (engine.version.label, engine.version.digest) == ("step-7", report.digest)
    assert report.num_bytes == sum(tensor.nbytes for tensor in weights(1).values())
    assert set(report.seconds) == {"meet", "generate", "fill", "move", "total"}
    assert sync(pair, weights(2))[0].label == "sync-2"


def test_a_module_is_sent_by_its_named_parameters(pair: Pair) -> None:
    model, copy = torch.nn.Linear(300, 20), torch.nn.Linear(300, 20)
    _, found = sync(pair, model.named_parameters())
    copy.load_state_dict(found)
    assert all(map(equal, model.parameters(), copy.parameters()))


def test_a_generator_may_use_its_memory_again(pair: Pair) -> None:
    def generated() -> Iterator[tuple[str, torch.Tensor]]:
        memory = torch.empty(100_000)
        for number in range(200):
            yield str(number), memory.fill_(number)

    _, found = sync(pair, generated())
    assert all((found[str(number)] == number).all() for number in range(200))


def test_tensors_are_views_that_are_used_again_unless_they_are_copied(pair: Pair) -> None:
    sent = {str(number): torch.full((4 * MIB,), number, dtype=torch.uint8) for number in range(9)}

    async def addresses(**options: Any) -> tuple[list[int], list[torch.Tensor]]:
        kept = [tensor async for _, tensor in pair[1].receive_weights(**options)]
        return [tensor.data_ptr() for tensor in kept], kept

    async def both(**options: Any) -> Any:
        return (await asyncio.gather(pair[0].send_weights(sent), addresses(**options)))[1]

    places, _ = asyncio.run(both())
    assert len(set(places)) == NUM_SLOTS, "the slots of the ring"
    _, kept = asyncio.run(both(copy=True))
    assert all((tensor == number).all() for number, tensor in enumerate(kept))


def test_the_event_loop_goes_on_while_nobody_comes(pair: Pair) -> None:
    async def wait() -> int:
        receiving = asyncio.create_task(received(pair[1]))
        for _ in range(20):
            await asyncio.sleep(0.01)
        assert not receiving.done()
        await asyncio.gather(pair[0].send_weights(weights(1)), receiving)
        return len(receiving.result())

    assert asyncio.run(wait()) == len(weights(1))


def test_a_trainer_s_other_processes_make_weights_and_send_none() -> None:
    engine = GlooCheckpointEngine()
    engine.init_process_group(rank=-1, world_size=3)
    rest = iter(weights(1).items())
    assert asyncio.run(engine.send_weights(rest)) is None
    assert list(rest) == []
    engine.finalize()


def test_the_topology_fits_both_ways_in_which_it_is_asked_for() -> None:
    master = {"master_addr": "10.0.0.1", "master_port": 4711}
    for metadata in ([master], [master, {}, {}, {}, {}]):
        trainer, samplers = GlooCheckpointEngine.build_topology(2, 3, metadata)
        assert trainer == {
            "rank": [0, -1],
            "world_size": [4, 4],
            "master_metadata": [master, master],
        }
        assert samplers["rank"] == [1, 2, 3]
    with pytest.raises(UsageError, match="is_master = True"):
        GlooCheckpointEngine.build_topology(2, 3, [{}, {}])


def test_finalize_may_be_called_twice_and_prepare_begins_anew(socket_folder: Path) -> None:
    trainer, sampler = connected(GlooCheckpointEngine)
    for _ in range(2):
        sync((trainer, sampler), weights(1))
        for engine in (sampler, sampler, trainer, trainer):
            engine.finalize()
        trainer.is_master = True
        metadata = trainer.prepare()
        trainer.init_process_group(rank=0, world_size=2)
        sampler.init_process_group(rank=1, world_size=2, master_metadata=metadata)
    sampler.finalize()
    trainer.finalize()


def test_meeting_again_is_following_the_trainer(socket_folder: Path) -> None:
    trainer, sampler = connected(GlooCheckpointEngine)
    with pytest.raises(UsageError, match=r"finalize\(\) comes before"):
        trainer.init_process_group(rank=0, world_size=3)
    sync((trainer, sampler), weights(1))
    other, unused = connected(GlooCheckpointEngine)
    sampler.init_process_group(rank=1, world_size=2, master_metadata=other.prepare())
    _, found = sync((other, sampler), weights(2))
    assert all(equal(found[name], tensor) for name, tensor in weights(2).items())
    for engine in (sampler, trainer, unused, other):
        engine.finalize()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"bucket_size": 1 << 20}, "a number of bytes, 4194304 or more"),
        ({"bucket_size": 64e6}, "bucket_size=64000000.0: a bucket has a number of bytes"),
        ({"timeout": 0}, "timeout=0"),
        ({"timeout": float("inf")}, "timeout=inf: .* a year at most"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"compression": "lz4"}, "there are none, zstd"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GlooCheckpointEngine(**settings)


def test_all_who_did_not_come_are_named(socket_folder: Path) -> None:
    trainer = GlooCheckpointEngine(timeout=0.5)
    trainer.is_master = True
    trainer.prepare()
    trainer.init_process_group(rank=0, world_size=4)
    with pytest.raises(DeadlineExceeded, match=r"ranks 1, 2, 3 of 3 receivers did not come"):
        asyncio.run(trainer.send_weights(weights(1)))
    trainer.finalize()


@pytest.mark.parametrize("sent", [7, [torch.ones(2)], [("a", torch.ones(2), "b")], ["ab"]])
def test_what_are_no_weights_is_told(pair: Pair, sent: Any) -> None:
    async def both() -> Any:
        return await asyncio.gather(
            pair[0].send_weights(sent), received(pair[1]), return_exceptions=True
        )

    for error in asyncio.run(both()):
        assert isinstance(error, SourceError)
        assert "a name and a tensor" in str(error)


def test_wrong_uses_are_told(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, sampler = pair
    with pytest.raises(UsageError, match="only rank 0 sends"):
        asyncio.run(sampler.send_weights({}))
    with pytest.raises(UsageError, match="ranks from 1 receive"):
        asyncio.run(received(trainer))
    with pytest.raises(UsageError, match="come first"):
        asyncio.run(GlooCheckpointEngine().send_weights({}))
    with pytest.raises(UsageError, match="is rank 1 already, not 0"):
        sampler.init_process_group(rank=0, world_size=2)
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UsageError, match="pass master_metadata="):
        GlooCheckpointEngine().init_process_group(rank=1, world_size=2)
    with pytest.raises(UsageError, match="rank 5 is not one of world size 2"):
        GlooCheckpointEngine().init_process_group(rank=5, world_size=2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for hosts without a GPU")
@pytest.mark.parametrize(
    "kind", [CudaIpcCheckpointEngine, NCCLCheckpointEngine, HCCLCheckpointEngine]
)
def test_devices_that_are_not_there_are_not_pretended(kind: type[CheckpointEngine]) -> None:
    with pytest.raises(UsageError, match="use GlooCheckpointEngine, or SharedMemory"):
        kind()


def test_engines_are_found_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"gloo", "nccl", "hccl", "cuda_ipc", "shm", "ray"} <= set(engine_names())
    assert engine_class("shm") is SharedMemoryCheckpointEngine
    assert isinstance(new_engine("gloo", bucket_size=8 * MIB), GlooCheckpointEngine)
    with pytest.raises(UsageError, match="no streaming engine 'pigeon'; there are"):
        engine_class("pigeon")

    target = f"{GlooCheckpointEngine.__module__}:GlooCheckpointEngine"
    found = EntryPoints([EntryPoint("pigeon", target, names.GROUP)])
    monkeypatch.setattr(names, "entry_points", lambda **wanted: found.select(**wanted))
    assert engine_class("pigeon") is GlooCheckpointEngine
    assert engine_names()[0] == "pigeon"


def test_engines_have_public_names() -> None:
    assert checkpoint_engine.GlooCheckpointEngine is GlooCheckpointEngine
    assert checkpoint_engine.CheckpointEngine is CheckpointEngine


def test_parts_of_a_large_tensor_have_each_their_time(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiving, "CAUSE_SECONDS", 0.1)
    pair = connected(GlooCheckpointEngine, timeout=2)
    carrier = pair[0].link.carrier
    send = carrier.send

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.3)
        return send(*arguments)

    monkeypatch.setattr(carrier, "send", slowly)
    large = torch.arange(12 * MIB, dtype=torch.int32)  # 12 buckets, 3.6 seconds
    _, found = sync(pair, {"large": large})
    assert torch.equal(found["large"], large)
    for engine in reversed(pair):
        engine.finalize()


@pytest.mark.parametrize(
    "metadata", [{"master_port": 1}, {"master_addr": "a", "master_port": "b"}, [1]]
)
def test_metadata_that_is_none_is_refused(metadata: Any) -> None:
    with pytest.raises(UsageError, match=r"not what the master's prepare\(\) returned"):
        GlooCheckpointEngine().init_process_group(rank=1, world_size=2, master_metadata=metadata)


def test_rings_that_no_receiver_has_open_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what a ring is made of is its carrier's least concern."""
    monkeypatch.setattr(cuda_ipc, "device_uuid", lambda *_: "GPU")
    same = bytes(64)  # a driver may give a handle again
    monkeypatch.setattr(cuda_ipc.cuda, "share", lambda size, _: (torch.empty(size), same))
    rings: dict[str, torch.Tensor] = {}
    carrier = cuda_ipc._CudaMemory(torch.device("cuda", 0), rings)
    first = carrier.plan("stream-1", [""], 1024, rebuild=True)
    for number in range(2, 6):  # cycles that fail before the first bucket
        kept = [first] if number < 4 else [""]
        way = carrier.plan(f"stream-{number}", kept, 1024, rebuild=True)
        assert list(rings)[-1] == way
        assert (first in rings) == (number < 4)
        assert len(rings) <= 3
    assert len(rings) == 2
