"""A cycle that comes to no end tells both why, and the next one is as if there had been none."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from stream_pair import KINDS, Pair, connected, failing, received, sync
from stream_weights import MIB, equal, weights

from checkpoint_engine.errors import (
    CheckpointEngineError,
    PeerLost,
    SourceError,
    TransferError,
    UpdateFailed,
    UsageError,
    VerificationError,
)
from checkpoint_engine.streaming import GlooCheckpointEngine
from checkpoint_engine.streaming import engine as engine_module
from checkpoint_engine.streaming.messages import Ear
from checkpoint_engine.streaming.receiving import Receiving
from checkpoint_engine.streaming.sending import Sending
from checkpoint_engine.streaming.watch import Lines, Watch
from children import wait_until


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


def test_a_receiver_that_leaves_while_a_way_is_made_is_noticed(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A device's first broadcast waits for all others, and nothing ends that."""
    making, released = threading.Event(), threading.Event()

    def make(*_: Any) -> None:
        making.set()
        released.wait(60)
        raise TransferError("it was never made")

    def leave() -> None:
        making.wait(60)
        pair[1].cancel(UpdateFailed("its process is told to end"))

    leaving = threading.Thread(target=leave)
    leaving.start()
    with monkeypatch.context() as patch:
        patch.setattr(pair[0].link.carrier, "send", make)
        at_sender, _ = failing(pair, weights(1))
    assert "rank 1 gave up: UpdateFailed: its process is told to end" in str(at_sender)
    assert not released.is_set()
    released.set()
    leaving.join()
    assert sync(pair, weights(2))[0].label == "sync-2"


def test_a_cycle_that_is_given_up_when_all_was_taken_fails_at_both_ends(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at the receivers alone, while the call that sent returns."""
    wait_done = Watch.wait_done

    def give_up_after(watch: Watch, digest: str, timeout_seconds: float) -> None:
        wait_done(watch, digest, timeout_seconds)
        pair[0].cancel(UpdateFailed("the sync was interrupted"))

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "wait_done", give_up_after)
        at_sender, at_receiver = failing(pair, weights(1))
    assert isinstance(at_sender, UpdateFailed)
    assert "the sync was interrupted" in str(at_sender)
    assert "the sender gave up: UpdateFailed: the sync was interrupted" in str(at_receiver)
    assert sync(pair, weights(2))[0].label == "sync-2"


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


def test_finalize_ends_a_cycle_whose_generator_waits(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    listeners: list[threading.Thread] = []
    close = Lines.close

    def noted(lines: Lines) -> None:
        listeners.extend(one for one in threading.enumerate() if one.name == "ckpt-watch")
        close(lines)

    monkeypatch.setattr(Lines, "close", noted)

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
    assert not listeners, "which would look at lines that are closed"


def test_a_cycle_that_is_given_up_before_it_begins_does_not_begin(pair: Pair) -> None:
    """Nobody would end it, and a receiver that joined would wait."""
    sending = Sending(pair[0].link, pair[0]._lines)
    pair[0].link.under_way.add(sending._end)
    pair[0].link.cancel(UsageError("early"))
    with pytest.raises(TransferError, match="given up"):
        asyncio.run(sending.run(weights(1), ""))
    assert sync(pair, weights(1))[0].label == "sync-1"


def test_of_two_threads_that_fail_at_once_one_says_it(pair: Pair) -> None:
    """They share a connection, which is for one thread at a time."""
    receiving = Receiving(pair[1].link, pair[1]._presence, pair[1]._places)
    said: list[BaseException] = []

    def say(error: BaseException) -> None:
        said.append(error)
        time.sleep(0.1)

    receiving._say_failed = say  # type: ignore[method-assign]
    receiving._listener = threading.Thread()  # has heard nothing
    receiving._listener.start()
    failing = [
        threading.Thread(target=receiving._fail, args=(UsageError(f"thread {number}"),))
        for number in range(2)
    ]
    for thread in failing:
        thread.start()
    for thread in failing:
        thread.join()
    assert len(said) == 1
    with pytest.raises(UsageError, match=str(said[0])):
        receiving.next()


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
