"""Bytes broadcast between hosts, each played by a process; one of them dies."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import mmap
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from collective_member import content
from core_tools import MIB, TIMEOUT_SECONDS, Background, wait_until

from checkpoint_engine.errors import TransferError
from checkpoint_engine.manifest import Chunk
from checkpoint_engine.plan.buckets import Bucket
from checkpoint_engine.timeline import Timeline
from checkpoint_engine.transport import collective as collective_module
from checkpoint_engine.transport.collective import MOST_UNDER_WAY, Collective
from checkpoint_engine.transport.keystore import LocalKeyStore
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update import staging

MEMBER = Path(__file__).with_name("collective_member.py")


class Member:
    """The other host."""

    def __init__(self, port: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(MEMBER), str(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.answer() == "ready"

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()


@pytest.fixture
def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def collective(port: int) -> Iterator[Collective]:
    """This host's, member 0; its rank keeps the shared keys."""
    rendezvous = Rendezvous.of_environment(0, 2, "127.0.0.1", port)
    collective = Collective(rendezvous, index=0, size=2)
    yield collective
    collective.abandon()
    rendezvous.close()


@pytest.fixture
def start_member(port: int) -> Iterator[Callable[[], Member]]:
    members: list[Member] = []

    def start() -> Member:
        members.append(Member(port))
        return members[-1]

    yield start
    for member in members:
        with member.process:
            assert member.process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                member.process.stdin.close()  # it leaves, which its rank 0 waits for
            try:
                member.process.wait(10)
            except subprocess.TimeoutExpired:
                member.process.kill()


def meet(collective: Collective, member: Member, name: str) -> None:
    member.tell(f"connect {name}")
    collective.connect(name, TIMEOUT_SECONDS)
    assert member.answer() == "done"


def check_both_ways(collective: Collective, member: Member, num_bytes: int) -> None:
    member.tell(f"receive {num_bytes}")
    sent = content(num_bytes)
    collective.broadcast(memoryview(sent), root=0, timeout_seconds=TIMEOUT_SECONDS)
    assert member.answer() == hashlib.sha256(sent).hexdigest()
    assert sent == content(num_bytes)
    member.tell(f"send {num_bytes}")
    received = bytearray(num_bytes + 2)
    place = memoryview(received)[1:-1]
    collective.broadcast(place, root=1, timeout_seconds=TIMEOUT_SECONDS)
    assert member.answer() == "done"
    assert received == b"\0" + content(num_bytes) + b"\0", "where they belong, and nowhere else"


def test_bytes_arrive_where_they_belong(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    for num_bytes in (1, 1000, 5 * MIB):
        check_both_ways(collective, member, num_bytes)
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 300)


def test_a_member_that_dies_fails_the_broadcast_and_a_new_group_works(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    check_both_ways(collective, member, 1000)
    received = bytearray(1000)
    waiting = Background(
        lambda: collective.broadcast(memoryview(received), root=1, timeout_seconds=TIMEOUT_SECONDS)
    )
    assert not waiting.is_done(within_seconds=0.05)
    member.tell("die")
    with pytest.raises(TransferError, match="broadcast from host 1"):
        waiting.result()
    collective.abandon()
    member = start_member()
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 1000)


def test_several_are_under_way_at_once(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    sizes = (5 * MIB, 1000, MIB)
    sent = [content(num_bytes) for num_bytes in sizes]
    landed = [collective.begin(memoryview(one), 0, TIMEOUT_SECONDS) for one in sent]
    for num_bytes, one in zip(sizes, sent, strict=True):
        member.tell(f"receive {num_bytes}")
        assert member.answer() == hashlib.sha256(one).hexdigest()
    for wait in landed:
        wait()
    check_both_ways(collective, member, 300)


def test_nothing_is_kept_of_what_has_landed(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    memory = mmap.mmap(-1, 1000)
    member.tell("send 1000")
    landed = collective.begin(memoryview(memory), 1, TIMEOUT_SECONDS)
    landed()
    assert member.answer() == "done"

    def is_free() -> bool:
        with contextlib.suppress(BufferError):  # something views it
            memory.close()
        return memory.closed

    wait_until(is_free)
    del landed


def test_who_abandons_what_is_under_way_does_not_wait_for_it(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    forgotten = collective.begin(memoryview(bytearray(1000)), 1, TIMEOUT_SECONDS)
    waiting = Background(forgotten)
    del forgotten
    left = Background(collective.abandon)
    assert left.is_done(within_seconds=TIMEOUT_SECONDS / 3), "and so can everybody else go on"
    with pytest.raises(TransferError, match="broadcast from host 1"):
        waiting.result()
    member.tell("abandon")
    assert member.answer() == "done"
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 300)


@pytest.mark.parametrize("seconds", [0.05, 0.1, 0.2, 0.4])
def test_who_hears_of_a_death_need_not_wait_for_gloo_to_notice_it(
    collective: Collective, start_member: Callable[[], Member], seconds: float
) -> None:
    """It does not always: what it sends to a member that dies, it may send until the deadline."""
    member = start_member()
    meet(collective, member, "update-1")
    memory = memoryview(content(4 * MIB))

    def send() -> None:
        landed = [collective.begin(memory, 0, 600) for _ in range(4)]
        while True:
            landed.pop(0)()
            landed.append(collective.begin(memory, 0, 600))

    sending = Background(send)
    member.tell("go on")
    assert not sending.is_done(within_seconds=seconds)
    member.process.kill()
    member.process.wait()
    collective.abandon()
    with pytest.raises(TransferError, match=r"broadcast from host 0|abandoned"):
        sending.result()
    member = start_member()
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 300)


def test_who_hears_that_a_group_is_abandoned_is_written_to_no_more(
    collective: Collective, start_member: Callable[[], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also while another thread is at it."""
    disconnect, begun = collective_module._disconnect, threading.Event()

    def slowly(*arguments: Any) -> None:
        begun.set()
        time.sleep(0.5)
        disconnect(*arguments)

    member = start_member()
    meet(collective, member, "update-1")
    received = memoryview(bytearray(1000))
    waiting = Background(collective.begin(received, 1, TIMEOUT_SECONDS))
    monkeypatch.setattr(collective_module, "_disconnect", slowly)
    first = Background(collective.abandon)
    assert begun.wait(TIMEOUT_SECONDS)
    collective.abandon()
    with pytest.raises(TransferError, match=r"abandoned meanwhile|broadcast from host 1"):
        waiting.result()
    member.tell("send 1000")
    assert member.answer().startswith("TransferError: broadcast from host 1")
    assert not any(received)
    first.result()


def test_nothing_is_written_any_more_once_a_delivery_has_failed(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    received = memoryview(bytearray(3000))
    buckets = [
        Bucket(number, number * 1000, 1000, (Chunk(number * 1000, 1000, b"other bytes", "w"),))
        for number in range(3)
    ]
    hauls = [staging._Haul(received[one.offset : one.end], root=1) for one in buckets]
    failing = Background(
        lambda: staging._haul(buckets, hauls, collective, Timeline("test"), TIMEOUT_SECONDS)
    )
    wait_until(lambda: len(collective._under_way) == len(buckets))
    for _ in range(2):
        member.tell("send 1000")
        assert member.answer() == "done"
    with pytest.raises(TransferError, match="bucket 0, stage arrive"):
        failing.result()
    member.tell("send 1000")
    assert member.answer().startswith("TransferError: broadcast from host 1")
    assert not any(received[2000:])


def test_nothing_is_written_any_more_once_a_delivery_was_interrupted(
    collective: Collective, start_member: Callable[[], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its memory is another's by then."""

    def interrupted(buckets: Any, stages: Any, *_: Any, **__: Any) -> None:
        stages["fill"](buckets[0], 0)
        raise KeyboardInterrupt

    monkeypatch.setattr(staging, "run_pipeline", interrupted)
    member = start_member()
    meet(collective, member, "update-1")
    received = memoryview(bytearray(1000))
    bucket = Bucket(0, 0, 1000, (Chunk(0, 1000, b"other bytes", "w"),))
    hauls = [staging._Haul(received, root=1)]
    with pytest.raises(KeyboardInterrupt):
        staging._haul([bucket], hauls, collective, Timeline("test"), TIMEOUT_SECONDS)
    member.tell("send 1000")
    assert member.answer().startswith("TransferError: broadcast from host 1")
    assert not any(received)


def test_who_abandons_wakes_the_others(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    member.tell("receive 1000")
    collective.abandon()
    assert member.answer().startswith("TransferError: broadcast from host 0")
    member.tell("abandon")
    assert member.answer() == "done"
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 1000)


def test_a_member_that_says_nothing(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    member = start_member()
    meet(collective, member, "update-1")
    with pytest.raises(TransferError, match="broadcast from host 1"):
        collective.broadcast(memoryview(bytearray(10)), root=1, timeout_seconds=0.2)


def test_a_member_that_does_not_come() -> None:
    collective = Collective(Rendezvous(LocalKeyStore(), 0, 2), index=0, size=2)
    with pytest.raises(TransferError, match="host 0 of 2 could not join the group"):
        collective.connect("update-1", 0.2)


def test_a_group_that_is_not_made_has_a_deadline(
    collective: Collective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever gloo waits for, as for a member that has told where it listens and is gone."""
    released = threading.Event()
    make = collective_module.ProcessGroupGloo

    class Hanging(make):  # type: ignore[misc, valid-type]
        def __init__(self, *_: Any) -> None:
            released.wait(60)

    monkeypatch.setattr(collective_module, "ProcessGroupGloo", Hanging)
    monkeypatch.setattr(collective_module, "MAKE_GRACE_SECONDS", 0.1)
    with pytest.raises(TransferError, match="the group was not made in 0 s"):
        collective.connect("update-1", 0.1)
    released.set()


def test_who_is_connected_waits_for_those_who_are_not(
    collective: Collective, start_member: Callable[[], Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it begins before would end only with their connecting, a minute after a death."""
    connected = threading.Event()
    make = collective_module.ProcessGroupGloo

    class Telling(make):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            connected.set()

    with monkeypatch.context() as patch:
        patch.setattr(collective_module, "ProcessGroupGloo", Telling)
        member = start_member()
        member.tell("linger update-1")
        joining = Background(lambda: collective.connect("update-1", TIMEOUT_SECONDS))
        assert connected.wait(TIMEOUT_SECONDS)
        assert not joining.is_done(within_seconds=1)
        collective.abandon()
        with pytest.raises(TransferError, match="abandoned while it was made"):
            joining.result()
    member.process.kill()
    member = start_member()
    meet(collective, member, "update-2")
    check_both_ways(collective, member, 300)


def test_a_group_is_gone_when_what_it_had_begun_has_failed(
    collective: Collective, start_member: Callable[[], Member]
) -> None:
    """Else others wait for it: not even the error that tells of it may keep its connections."""
    member = start_member()
    meet(collective, member, "update-1")
    group = weakref.ref(collective._group)
    gc.disable()
    try:
        collective.begin(memoryview(content(64 * MIB)), root=0, timeout_seconds=TIMEOUT_SECONDS)
        collective.abandon()
        wait_until(lambda: group() is None)
    finally:
        gc.enable()


class _Device:
    """A group as torch has them for devices: what it aborts says that it has ended well."""

    def __init__(self) -> None:
        self._is_aborted = False

    def broadcast(self, *_: Any) -> _Device:
        return self

    def is_completed(self) -> bool:
        return self._is_aborted

    def wait(self) -> None:
        assert self._is_aborted

    def abort(self) -> None:
        self._is_aborted = True


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Collective:
    monkeypatch.setitem(collective_module.BACKENDS, "device", lambda *_: _Device())
    alone = Rendezvous(LocalKeyStore(), 0, 1)
    collective = Collective(alone, index=0, size=1, backend="device")
    collective.connect("first", TIMEOUT_SECONDS)
    return collective


MEMORY = torch.empty(8, dtype=torch.uint8, device="meta")


def test_what_a_device_has_aborted_has_not_landed(device: Collective) -> None:
    landed = device.begin(MEMORY, root=0, timeout_seconds=TIMEOUT_SECONDS)
    device.abandon()
    with pytest.raises(TransferError, match="the group was abandoned meanwhile"):
        landed()


def test_what_a_device_aborts_while_it_is_waited_for_has_not_landed(
    device: Collective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From another thread, between its end and the look at the group."""
    landed = device.begin(MEMORY, root=0, timeout_seconds=TIMEOUT_SECONDS)
    monkeypatch.setattr(_Device, "wait", lambda _: device.abandon())
    monkeypatch.setattr(_Device, "is_completed", lambda _: True)
    with pytest.raises(TransferError, match="the group was abandoned meanwhile"):
        landed()


def test_a_broadcast_of_a_device_is_late_before_torch_says_that_it_has_ended_well(
    device: Collective,
) -> None:
    landed = device.begin(MEMORY, root=0, timeout_seconds=0.1)
    torchs = threading.Timer(2.0, device.abandon)
    torchs.start()
    with pytest.raises(TransferError, match="it did not end in 0 s"):
        landed()
    torchs.cancel()


def test_the_deadline_of_a_devices_broadcast_begins_with_it(device: Collective) -> None:
    """As torch's does, which does not wait either for what was begun before."""
    landed = device.begin(MEMORY, root=0, timeout_seconds=0.5)
    time.sleep(MOST_UNDER_WAY * 0.5 + 0.1)
    begun = device.begin(MEMORY, root=0, timeout_seconds=TIMEOUT_SECONDS)
    torchs = threading.Timer(0.2, device.abandon)
    torchs.start()
    with pytest.raises(TransferError, match="it did not end in 0 s"):
        landed()
    with pytest.raises(TransferError, match="abandoned"):
        begun()
    torchs.join()


def test_each_broadcast_of_a_device_has_its_time(
    device: Collective, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow receiver lets the sender begin one after the other, each in time."""
    several = [device.begin(MEMORY, root=0, timeout_seconds=1.0) for _ in range(MOST_UNDER_WAY)]
    monkeypatch.setattr(_Device, "wait", lambda _: None)
    for landed in several:
        over = time.monotonic() + 0.6
        monkeypatch.setattr(_Device, "is_completed", lambda _, over=over: time.monotonic() > over)
        landed()
