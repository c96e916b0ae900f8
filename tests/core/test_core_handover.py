"""Store memory in other processes' hands: mapped, leased, and clean whatever they do to it."""

from __future__ import annotations

import fcntl
import mmap
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch
from core_tools import (
    MIB,
    TIMEOUT_SECONDS,
    Background,
    BytesSource,
    num_fds,
    pattern,
    u8,
    wait_until,
)

from checkpoint_engine.errors import CheckpointEngineError, HandoverError, PeerLost, ProtocolError
from checkpoint_engine.store import Segment, Store
from checkpoint_engine.transport import sockets
from checkpoint_engine.transport.channel import Channel
from checkpoint_engine.transport.handover import Attachment, Attachments, Held, Hold, LetGo, Refused
from checkpoint_engine.update.sessions import Door

pytestmark = pytest.mark.usefixtures("no_garbage", "socket_folder")

HOLDER = Path(__file__).with_name("handover_holder.py")
F_ADD_SEALS, F_SEAL_SHRINK = 1033, 2


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


@pytest.fixture
def door(store: Store) -> Iterator[Door]:
    """The owner's: where segments of the store are asked for."""
    door = Door(store.segment)
    yield door
    door.close()


@pytest.fixture
def segment(store: Store) -> Segment:
    """Holds version 1 and is leased once, by the store."""
    return put(store, 1)


def put(store: Store, number: int, *, pooled: bool = True, num_bytes: int = 5000) -> Segment:
    source = BytesSource({"w": u8(num_bytes, number)})
    return store.register(f"v{number}", source, pooled=pooled).segment


def leases_become(segment: Segment, num_leases: int) -> None:
    wait_until(lambda: segment.num_leases == num_leases)


# Leases


def test_the_bytes_are_there_and_leased_until_closed(door: Door, segment: Segment) -> None:
    attachment = Attachment.open(door.address, segment.name)
    assert attachment.memory == segment.memory
    assert segment.num_leases == 2
    attachment.close()
    leases_become(segment, 1)


def test_leases_follow_letting_go_and_holding(door: Door, segment: Segment) -> None:
    one = Attachment.open(door.address, segment.name)
    other = Attachment.open(door.address, segment.name)
    assert segment.num_leases == 3
    assert one.let_go(), "the map of pooled memory is worth keeping"
    leases_become(segment, 2)
    one.hold()
    assert segment.num_leases == 3
    for attachment in (one, other):
        attachment.close()
    leases_become(segment, 1)


def test_letting_go_twice_ends_one_lease(door: Door, segment: Segment) -> None:
    attachment = Attachment.open(door.address, segment.name)
    attachment.let_go()
    attachment.let_go()
    leases_become(segment, 1)
    attachment.hold()
    assert segment.num_leases == 2


def test_memory_that_is_not_pooled_is_not_worth_keeping(door: Door, store: Store) -> None:
    segment = put(store, 1, pooled=False)
    attachment = Attachment.open(door.address, segment.name)
    store.unregister("v1")
    assert store.allocated_bytes > 0, "it is leased"
    assert not attachment.let_go()
    wait_until(lambda: store.allocated_bytes == 0)


def test_tensors_outlive_the_attachment_and_keep_the_lease(door: Door, segment: Segment) -> None:
    attachment = Attachment.open(door.address, segment.name)
    tensor = torch.frombuffer(attachment.memory[256:1256], dtype=torch.uint8)
    view = tensor[10:20]
    attachment.close()
    del attachment, tensor
    assert bytes(view.tolist()) == pattern(5000, 1)[266:276]
    assert segment.num_leases == 2
    view.fill_(0)
    del view
    leases_become(segment, 1)


def test_leased_memory_is_not_written_over(door: Door, store: Store, segment: Segment) -> None:
    attachment = Attachment.open(door.address, segment.name)
    for number in range(2, 8):
        assert put(store, number) is not segment
    assert attachment.memory[:5000] == pattern(5000, 1)
    attachment.let_go()
    leases_become(segment, 0)
    assert segment in {put(store, number) for number in (8, 9)}


# Writing


def test_writing_into_a_tensor_leaves_the_owners_bytes(door: Door, segment: Segment) -> None:
    """Loaders of real engines write into the tensors that they are given."""
    attachment = Attachment.open(door.address, segment.name)
    torch.frombuffer(attachment.memory, dtype=torch.uint8).fill_(0)
    other = Attachment.open(door.address, segment.name)
    assert segment.memory[:5000] == other.memory[:5000] == pattern(5000, 1)
    assert bytes(attachment.memory[:5000]) == bytes(5000)
    attachment.close()
    other.close()


def test_a_map_for_a_gpu_cannot_be_written_and_is_as_good_unpinned(
    door: Door, segment: Segment
) -> None:
    """Where there is no GPU nothing can be pinned, and it says so."""
    attachment = Attachment.open(door.address, segment.name, for_gpu=True)
    assert attachment.memory.readonly
    assert attachment.memory == segment.memory
    assert attachment.is_pinned or "cannot be pinned" in attachment.not_pinned
    attachment.discard_writes()
    assert attachment.memory == segment.memory
    attachment.close()
    leases_become(segment, 1)


# Kept maps


def test_a_map_is_kept_and_used_again(door: Door, store: Store, segment: Segment) -> None:
    attachments = Attachments(keep_maps=True)
    attachment = attachments.attach(door.address, segment.name)
    attachments.release(door.address, segment.name, attachment)
    fds = num_fds()
    for number in range(2, 10):
        again = attachments.attach(door.address, segment.name)
        assert again is attachment
        attachments.release(door.address, segment.name, again)
        leases_become(segment, 1)
        store.unregister(store.labels[0])
        assert put(store, number) is segment
        assert again.memory[:5000] == pattern(5000, number)
    assert num_fds() == fds
    attachments.close()


def test_two_at_once_have_maps_of_their_own(door: Door, segment: Segment) -> None:
    attachments = Attachments(keep_maps=True)
    held = [attachments.attach(door.address, segment.name) for _ in range(2)]
    assert held[0] is not held[1]
    assert segment.num_leases == 3
    while held:
        attachments.release(door.address, segment.name, held.pop())
    attachments.close()
    leases_become(segment, 1)


def test_a_kept_map_of_memory_that_is_gone_is_dropped(
    door: Door, store: Store, segment: Segment
) -> None:
    attachments = Attachments(keep_maps=True)
    attachment = attachments.attach(door.address, segment.name)
    attachments.release(door.address, segment.name, attachment)
    leases_become(segment, 1)
    del attachment
    store.unregister("v1", force=True)
    with pytest.raises(HandoverError, match="its version was unregistered"):
        attachments.attach(door.address, segment.name)


def num_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:ckpt-engine")


def take_and_give_back(attachments: Attachments, door: Door, segment: Segment) -> None:
    """What a replica does in each update."""
    num_leases = segment.num_leases
    attachment = attachments.attach(door.address, segment.name)
    attachments.release(door.address, segment.name, attachment)
    leases_become(segment, num_leases)


def test_a_kept_map_goes_when_its_owner_frees_the_memory(door: Door, store: Store) -> None:
    """Without another update: what is mapped, or pinned, is not free."""
    attachments, before = Attachments(keep_maps=True), num_maps()
    for number in range(2):
        take_and_give_back(attachments, door, put(store, number))
        assert num_maps() == before + 2
        store.unregister(f"v{number}", force=True)
        wait_until(lambda: num_maps() == before)


def test_memory_that_the_owner_returned_is_not_kept_by_idle_maps(door: Door, store: Store) -> None:
    """A map keeps the pages: replicas would hold another model with every such update."""
    attachments = Attachments(keep_maps=True)
    before = num_maps()
    for number in range(5):
        take_and_give_back(attachments, door, put(store, number))
        store.unregister(f"v{number}", force=True)
    last = put(store, 5)

    def one_is_kept() -> bool:
        take_and_give_back(attachments, door, last)
        return num_maps() == before + 2  # the owner's own, and the one that is kept

    wait_until(one_is_kept)
    attachments.close()


def test_memory_of_owners_that_died_is_not_kept_by_idle_maps(store: Store) -> None:
    """A trainer that is started again listens at another address."""
    attachments = Attachments(keep_maps=True)
    segment = put(store, 1)
    before = num_maps()
    for _ in range(5):
        door = Door(store.segment)
        take_and_give_back(attachments, door, segment)
        assert num_maps() == before + 1
        door.close()
    attachments.close()


def test_attaching_again_after_the_owner_is_gone(door: Door, segment: Segment) -> None:
    attachments = Attachments(keep_maps=True)
    attachment = attachments.attach(door.address, segment.name)
    attachments.release(door.address, segment.name, attachment)
    door.close()
    with pytest.raises(HandoverError, match="is its process alive"):
        attachments.attach(door.address, segment.name)


def test_without_kept_maps_the_lease_lasts_until_the_last_tensor_is_gone(
    door: Door, segment: Segment
) -> None:
    """An engine's loader may keep tensors; what it keeps must stay as it is."""
    attachments = Attachments(keep_maps=False)
    attachment = attachments.attach(door.address, segment.name)
    tensor = torch.frombuffer(attachment.memory[:1000], dtype=torch.uint8)
    attachments.release(door.address, segment.name, attachment)
    assert attachments.attach(door.address, segment.name) is not attachment
    del attachment
    leases_become(segment, 2)
    assert bytes(tensor.tolist()) == pattern(5000, 1)[:1000]
    del tensor
    leases_become(segment, 1)


# Other processes


@contextmanager
def holder(door: Door, segment: Segment) -> Iterator[subprocess.Popen[str]]:
    """A process that has attached the segment."""
    process = subprocess.Popen(
        [sys.executable, str(HOLDER), door.address, segment.name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert reply(process) == f"held {segment.memory[0]}"
            yield process
        finally:
            process.kill()


def reply(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: subprocess.Popen[str], command: str) -> str:
    assert process.stdin is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()
    return reply(process)


def test_another_process(door: Door, store: Store, segment: Segment) -> None:
    with holder(door, segment) as process:
        assert segment.num_leases == 2
        tell(process, "let_go")
        leases_become(segment, 1)
        store.unregister("v1")
        assert put(store, 2) is segment
        first = pattern(5000, 2)[0]
        assert tell(process, "hold") == f"done {first}"
        assert segment.num_leases == 2
        assert tell(process, f"write {first ^ 0xFF}") == f"done {first ^ 0xFF}"
        assert segment.memory[0] == first
        tell(process, "close")
        leases_become(segment, 1)


def test_a_process_that_is_killed_ends_its_lease(
    door: Door, store: Store, segment: Segment
) -> None:
    with holder(door, segment) as process:
        store.unregister("v1", force=True)
        assert segment.num_leases == 1
        assert store.allocated_bytes > 0
        process.kill()
        process.wait(TIMEOUT_SECONDS)
        leases_become(segment, 0)
    assert put(store, 2) is segment


# What is refused


def test_a_segment_that_is_gone(door: Door, store: Store, segment: Segment) -> None:
    store.unregister("v1", force=True)
    fds = num_fds()
    for name in (segment.name, "", "another"):
        with pytest.raises(HandoverError, match="the segment is gone"):
            Attachment.open(door.address, name)
    wait_until(lambda: num_fds() == fds)


def test_a_segment_that_goes_while_it_is_asked_for(store: Store) -> None:
    """Between finding a segment and leasing it the store may return or refill it."""
    segment = put(store, 1)

    def find(name: str) -> Segment | None:
        found = store.segment(name)
        store.unregister("v1", force=True)
        return found

    door = Door(find)
    with pytest.raises(HandoverError, match="the segment is gone"):
        Attachment.open(door.address, segment.name)
    door.close()


def test_an_owner_that_is_gone(door: Door, segment: Segment) -> None:
    address = door.address
    door.close()
    with pytest.raises(HandoverError, match="cannot connect"):
        Attachment.open(address, segment.name)


@contextmanager
def owner(serve: Callable[[Channel[Hold | LetGo]], object]) -> Iterator[str]:
    """An owner that answers the first who connects in a way of its own."""
    listener, address = sockets.listen()
    listener.settimeout(TIMEOUT_SECONDS)

    def accept() -> None:
        connection, _ = listener.accept()
        channel: Channel[Hold | LetGo] = Channel(connection, Hold | LetGo)
        assert isinstance(channel.receive(TIMEOUT_SECONDS), Hold)
        serve(channel)
        channel.close()

    serving = Background(accept)
    with listener:
        yield address
        serving.result()


def unsealed() -> int:
    descriptor = os.memfd_create("ckpt-engine", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, mmap.PAGESIZE)
    return descriptor


def sealed_against_growing() -> int:
    descriptor = unsealed()
    fcntl.fcntl(descriptor, F_ADD_SEALS, 4)
    return descriptor


def empty() -> int:
    descriptor = os.memfd_create("ckpt-engine", os.MFD_ALLOW_SEALING)
    fcntl.fcntl(descriptor, F_ADD_SEALS, F_SEAL_SHRINK)
    return descriptor


def a_file() -> int:
    return os.open(__file__, os.O_RDONLY)


def a_pipe() -> int:
    read, write = os.pipe()
    os.close(write)
    return read


@pytest.mark.parametrize("make", [unsealed, sealed_against_growing, empty, a_file, a_pipe])
def test_memory_that_could_shrink_under_its_readers(make: Callable[[], int]) -> None:
    """A page that is cut off is a SIGBUS in whoever reads it."""
    fds = num_fds()
    descriptor = make()

    def serve(channel: Channel[Hold | LetGo]) -> None:
        channel.send(Held(pooled=True), (descriptor,))

    with owner(serve) as address, pytest.raises(HandoverError, match="handed over"):
        Attachment.open(address, "segment")
    os.close(descriptor)
    assert num_fds() == fds


@pytest.mark.parametrize(
    ("serve", "kind"),
    [
        (lambda channel: channel.send(Held(pooled=True)), ProtocolError),
        (lambda channel: channel.send(Refused("no")), HandoverError),
        (lambda channel: channel.send(LetGo()), ProtocolError),
        (lambda channel: channel.close(), PeerLost),
    ],
    ids=["no descriptor", "refused", "nonsense", "death"],
)
def test_owners_that_break_the_protocol(
    serve: Callable[[Channel[Hold | LetGo]], object], kind: type[CheckpointEngineError]
) -> None:
    fds = num_fds()
    with owner(serve) as address, pytest.raises(kind):
        Attachment.open(address, "segment")
    assert num_fds() == fds


@pytest.mark.parametrize("second", [Held(pooled=True), Hold("another")], ids=["nonsense", "twice"])
def test_receivers_that_break_the_protocol_lose_their_lease(
    door: Door, segment: Segment, second: Held | Hold
) -> None:
    channel: Channel[Held | Refused] = Channel(
        sockets.connect(door.address, TIMEOUT_SECONDS), Held | Refused
    )
    with closing(channel):
        channel.send(Hold(segment.name))
        assert channel.receive(TIMEOUT_SECONDS) == Held(pooled=True)
        assert segment.num_leases == 2
        channel.send(second)
        with pytest.raises(PeerLost):
            channel.receive(1)
    leases_become(segment, 1)


def test_a_large_segment_is_mapped_not_copied(door: Door, store: Store) -> None:
    segment = put(store, 9, num_bytes=32 * MIB)
    attachment = Attachment.open(door.address, segment.name)
    assert len(attachment.memory) == 32 * MIB
    segment.memory[31 * MIB] ^= 0xFF
    assert attachment.memory[31 * MIB] == segment.memory[31 * MIB], "the same page"
    attachment.close()
