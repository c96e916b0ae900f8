"""The engines as one process uses them: two in one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_weights import MIB, equal, weights

import checkpoint_engine
from checkpoint_engine.errors import (
    CheckpointEngineError,
    PeerLost,
    SourceError,
    TransferError,
    UsageError,
    VerificationError,
)
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
from checkpoint_engine.streaming import engine as engine_module
from checkpoint_engine.streaming.carriers import NUM_SLOTS
from checkpoint_engine.streaming.messages import Ear
from children import wait_until

KINDS = [GlooCheckpointEngine, SharedMemoryCheckpointEngine]
Pair = tuple[Any, Any]


@pytest.fixture(params=KINDS)
def pair(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[Pair]:
    """A trainer's engine and a sampler's that have met."""
    make: Callable[[], Pair] = lambda: connected(request.param)  # noqa: E731
    trainer, sampler = make()
    yield trainer, sampler
    sampler.finalize()
    trainer.finalize()


def connected(kind: Any, **settings: Any) -> Pair:
    settings = {"bucket_size": 4 * MIB, "timeout": 20, **settings}
    trainer, sampler = kind(**settings, is_master=True), kind(**settings)
    metadata = [trainer.prepare(), sampler.prepare()]
    of_trainer, of_sampler = kind.build_topology(1, 1, metadata)
    for engine, arguments in ((trainer, of_trainer), (sampler, of_sampler)):
        engine.init_process_group(**{name: values[0] for name, values in arguments.items()})
    return trainer, sampler


async def received(engine: Any, **options: Any) -> dict[str, torch.Tensor]:
    return {name: tensor async for name, tensor in engine.receive_weights(**options)}


def sync(pair: Pair, sent: Any, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    async def both() -> Any:
        return await asyncio.gather(
            pair[0].send_weights(sent, **options), received(pair[1], copy=True)
        )

    return tuple(asyncio.run(both()))  # type: ignore[return-value]


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


def test_a_tensor_that_is_given_twice_fails_both_ends(pair: Pair) -> None:
    async def both() -> Any:
        twice = [("a", torch.ones(2)), ("a", torch.ones(2))]
        return await asyncio.gather(
            pair[0].send_weights(twice), received(pair[1]), return_exceptions=True
        )

    at_sender, at_receiver = asyncio.run(both())
    assert isinstance(at_sender, SourceError)
    assert isinstance(at_receiver, SourceError)
    assert "the sender gave up: tensor 'a' is given twice" in str(at_receiver)
    assert sync(pair, weights(1))[0].label == "sync-2"


def test_bytes_that_change_on_their_way_are_given_to_nobody(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    carrier, seen = pair[1].link.carrier, []
    receive = carrier.receive

    def damaged(index: int, data: torch.Tensor, timeout_seconds: float) -> Callable[[], None]:
        landed = receive(index, data, timeout_seconds)

        def damages() -> None:
            landed()
            if index == 1:
                data[7] ^= 1

        return damages

    async def take() -> None:
        async for name, _ in pair[1].receive_weights():
            seen.append(name)

    async def both() -> Any:
        sent = {name: torch.ones(4 * MIB, dtype=torch.uint8) for name in "abc"}
        return await asyncio.gather(pair[0].send_weights(sent), take(), return_exceptions=True)

    with monkeypatch.context() as patch:
        patch.setattr(carrier, "receive", damaged)
        at_sender, at_receiver = asyncio.run(both())
    assert isinstance(at_receiver, VerificationError)
    assert isinstance(at_sender, VerificationError)
    assert "rank 1 gave up" in str(at_sender)
    assert "'b'" in str(at_receiver)
    assert "b" not in seen
    assert sync(pair, weights(1))[0].label == "sync-2"


def test_a_trainer_that_is_cancelled_tells_its_samplers(pair: Pair) -> None:
    async def both() -> Any:
        async def endless() -> Any:
            yield "a", torch.ones(2)
            await asyncio.sleep(1000)

        sending = asyncio.create_task(pair[0].send_weights(endless()))
        receiving = asyncio.create_task(received(pair[1]))
        await asyncio.sleep(0.2)
        sending.cancel()
        return await asyncio.gather(sending, receiving, return_exceptions=True)

    at_sender, at_receiver = asyncio.run(both())
    assert isinstance(at_sender, asyncio.CancelledError)
    assert "the sender gave up: CancelledError" in str(at_receiver)
    sync(pair, weights(1))


@pytest.mark.parametrize("who", [0, 1])
def test_whoever_is_cancelled_before_the_meeting_leaves_nothing_behind(
    pair: Pair, who: int
) -> None:
    async def alone() -> None:
        waits = received(pair[1]) if who else pair[0].send_weights(weights(1))
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waits, 0.1)

    for seed in range(3):
        asyncio.run(alone())
        assert len(sync(pair, weights(seed))[1]) == len(weights(seed))


def test_a_trainer_that_is_cancelled_while_the_others_meet_goes_at_once(
    socket_folder: Path,
) -> None:
    """A receiver that hangs there would keep it."""
    trainer, sampler = connected(GlooCheckpointEngine, timeout=1000)
    joining, released = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        joining.set()
        released.wait(60)
        raise TransferError("it hung")

    sampler.link.carrier.join = hang

    async def both() -> None:
        receiving = asyncio.create_task(received(sampler))
        sending = asyncio.create_task(trainer.send_weights(weights(1)))
        assert await asyncio.to_thread(joining.wait, 60)
        sending.cancel()
        await asyncio.wait([sending], timeout=15)  # gloo itself gives up in 30
        assert sending.cancelled()
        released.set()
        with pytest.raises(CheckpointEngineError):
            await receiving

    asyncio.run(both())
    sampler.finalize()
    trainer.finalize()


def test_a_link_that_broke_between_two_syncs_is_made_anew(pair: Pair) -> None:
    """Both live, so no sync is lost by it."""
    sync(pair, weights(1))
    break_link_to(int(pair[1]._presence.address.rpartition(":")[2]))
    wait_until(lambda: pair[0].lost() == [1])
    sync(pair, weights(2))
    assert pair[0].lost() == []


@pytest.mark.filterwarnings("ignore:.*(unclosed|Unclosed):ResourceWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_engines_that_are_dropped_without_an_end_do_not_stop_the_collector(
    kind: Any, socket_folder: Path
) -> None:
    """As by an error whose frames have them; whichever thread collects would wait for ever."""
    pair = connected(kind)
    sync(pair, weights(1))
    for engine in pair:
        engine.itself = engine
    dropped = weakref.ref(pair[0])
    del pair, engine
    collecting = threading.Thread(target=gc.collect, daemon=True)
    collecting.start()
    collecting.join(20)
    assert not collecting.is_alive()
    assert dropped() is None


def break_link_to(port: int) -> None:
    """End this process's TCP connections to that port, as the kernel does without an answer."""
    for entry in os.scandir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # it is not connected, or closed meanwhile
            if not os.readlink(entry.path).startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.family == socket.AF_INET and one.getpeername()[1] == port:
                    one.shutdown(socket.SHUT_RDWR)


def test_a_consumer_that_is_cancelled_ends_the_cycle(pair: Pair) -> None:
    async def both() -> Any:
        async def stuck() -> None:
            async for _ in pair[1].receive_weights():
                await asyncio.sleep(1000)

        sending = asyncio.create_task(pair[0].send_weights(weights(1)))
        receiving = asyncio.create_task(stuck())
        await asyncio.sleep(0.3)
        receiving.cancel()
        await asyncio.gather(receiving, return_exceptions=True)
        return await asyncio.gather(sending, return_exceptions=True)

    for seed in range(3):
        (at_sender,) = asyncio.run(both())
        assert "rank 1 gave up" in str(at_sender)
        assert len(sync(pair, weights(seed))[1]) == len(weights(seed))


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


def test_finalize_ends_a_cycle_whose_generator_waits(pair: Pair) -> None:
    async def waited() -> None:
        goes_on = asyncio.Event()

        async def tensors() -> AsyncIterator[tuple[str, torch.Tensor]]:
            yield "a", torch.ones(3)
            await goes_on.wait()
            yield "b", torch.ones(4 * MIB)

        sending = asyncio.create_task(pair[0].send_weights(tensors()))
        receiving = asyncio.create_task(received(pair[1]))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(pair[0].finalize)
        goes_on.set()
        with pytest.raises(UsageError, match="was finalized meanwhile"):
            await asyncio.wait_for(sending, 30)
        with pytest.raises(UsageError, match="the sender gave up"):
            await receiving

    asyncio.run(waited())


def test_a_receiver_that_listens_late_hears_why_the_sender_left(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = Ear.next

    def late(ear: Ear[Any], timeout_seconds: float) -> Any:
        time.sleep(0.3)
        return heard(ear, timeout_seconds)

    async def left() -> None:
        async def tensors() -> AsyncIterator[tuple[str, torch.Tensor]]:
            yield "a", torch.ones(3)
            monkeypatch.setattr(Ear, "next", late)
            await asyncio.to_thread(pair[0].finalize)

        sending = asyncio.create_task(pair[0].send_weights(tensors()))
        with pytest.raises(UsageError, match="the sender gave up: the engine was finalized"):
            await received(pair[1])
        with pytest.raises(UsageError, match="was finalized meanwhile"):
            await sending

    asyncio.run(left())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("secret", ["s" * 40, None])
def test_another_trainer_at_the_same_port_counts_anew(
    kind: Any,
    secret: str | None,
    socket_folder: Path,
    free_port: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also one with a secret of its own, if none is given to both."""
    if secret is not None:
        monkeypatch.setenv("CKPT_ENGINE_SECRET", secret)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port))
    settings = {"bucket_size": 4 * MIB, "timeout": 5}
    sampler = kind(**settings)
    for trainer in (kind(**settings), kind(**settings)):
        trainer.init_process_group(rank=0, world_size=2)
        sampler.init_process_group(rank=1, world_size=2)
        for number in (1, 2):
            report, found = sync((trainer, sampler), weights(number))
            assert report.label == f"sync-{number}"
            assert all(equal(found[name], one) for name, one in weights(number).items())
        trainer.finalize()
    sampler.finalize()


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
        ({"bucket_size": 1 << 20}, "4194304 bytes or more"),
        ({"timeout": 0}, "timeout=0"),
        ({"compression": "lz4"}, "there are none, zstd"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        GlooCheckpointEngine(**settings)


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


def failing(pair: Pair, sent: Any, **options: Any) -> list[BaseException]:
    """What both ends raise."""

    async def both() -> Any:
        return await asyncio.gather(
            pair[0].send_weights(sent, **options), received(pair[1]), return_exceptions=True
        )

    return asyncio.run(both())  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("sent", "label", "words"),
    [(weights(1), 7, "label=7 is no text"), (iter(()), "step-1", "there is no tensor to send")],
)
def test_what_is_no_version_is_told_at_both_ends(
    pair: Pair, sent: Any, label: Any, words: str
) -> None:
    at_sender, at_receiver = failing(pair, sent, label=label)
    assert words in str(at_sender)
    assert f"the sender gave up: {at_sender}" in str(at_receiver)
    assert type(at_sender) is type(at_receiver)
    assert len(sync(pair, weights(1))[1]) == len(weights(1))


@pytest.mark.parametrize("how", ["fails", "breaks"])
def test_a_sampler_whose_loop_was_left_may_begin_another(pair: Pair, how: str) -> None:
    """Asyncio closes the generator a moment later, which is when the sender hears of it."""

    async def consume() -> None:
        try:
            async for _ in pair[1].receive_weights():
                if how == "fails":
                    raise RuntimeError("size mismatch")
                break
        except RuntimeError:
            pass

    async def left_and_again() -> Any:
        sending = asyncio.create_task(pair[0].send_weights(weights(1)))
        await consume()
        again = asyncio.create_task(received(pair[1], copy=True))
        failed = (await asyncio.gather(sending, return_exceptions=True))[0]
        await pair[0].send_weights(weights(2))
        return failed, await again

    failed, found = asyncio.run(left_and_again())
    assert "rank 1 gave up: its consumer left before the last tensor" in str(failed)
    assert all(equal(found[name], tensor) for name, tensor in weights(2).items())


def test_a_loop_that_is_left_when_the_engine_has_ended_ends_quietly(socket_folder: Path) -> None:
    trainer, sampler = connected(GlooCheckpointEngine)

    async def leave() -> None:
        sending = asyncio.create_task(trainer.send_weights(weights(1)))
        stream = sampler.receive_weights()
        await anext(stream)
        await asyncio.get_running_loop().run_in_executor(None, sampler.finalize)
        await stream.aclose()
        with pytest.raises(PeerLost):
            await sending

    asyncio.run(leave())
    trainer.finalize()


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


def test_a_meeting_that_failed_is_no_meeting(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"bucket_size": 4 * MIB, "timeout": 20}
    trainer = GlooCheckpointEngine(**settings, is_master=True)
    sampler = GlooCheckpointEngine(**settings)
    metadata = trainer.prepare()
    trainer.init_process_group(rank=0, world_size=2)

    def fail(*_: Any) -> None:
        raise UsageError("cannot listen there")

    with monkeypatch.context() as patch:
        patch.setattr(engine_module, "Presence", fail)
        with pytest.raises(UsageError, match="cannot listen there"):
            sampler.init_process_group(rank=1, world_size=2, master_metadata=metadata)
    sampler.init_process_group(rank=1, world_size=2, master_metadata=metadata)
    assert len(sync((trainer, sampler), weights(1))[1]) == len(weights(1))
    sampler.finalize()
    trainer.finalize()


def test_a_master_that_cannot_leave_its_secret_listens_no_more(
    socket_folder: Path, monkeypatch: pytest.MonkeyPatch, free_port: int
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port - 2))
    socket_folder.mkdir(mode=0o755)
    engine = GlooCheckpointEngine(is_master=True)
    with pytest.raises(CheckpointEngineError, match=str(socket_folder)):
        engine.prepare()
    socket_folder.chmod(0o700)
    engine.prepare()  # at the same port
    engine.finalize()


def test_rings_that_no_receiver_has_open_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: what a ring is made of is its carrier's least concern."""
    monkeypatch.setattr(cuda_ipc, "device_uuid", lambda *_: "GPU")
    handles = iter(bytes([number]) * 64 for number in range(9))
    monkeypatch.setattr(cuda_ipc.cuda, "share", lambda size, _: (torch.empty(size), next(handles)))
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
