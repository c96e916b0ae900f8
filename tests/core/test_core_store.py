"""Host memory: allocated once, used again, given back, and never touched while leased."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from core_tools import MIB, Background, BytesSource, Weights, num_fds, pattern, u8

import checkpoint_engine.store
from checkpoint_engine.errors import SourceError, StoreError
from checkpoint_engine.plan.layout import TensorSpec
from checkpoint_engine.store import Segment, Store

PAGE = mmap.PAGESIZE
F_ADD_SEALS, F_GET_SEALS = 1033, 1034
F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_FUTURE_WRITE = 1, 2, 4, 16

pytestmark = pytest.mark.usefixtures("no_garbage")


@pytest.fixture
def store() -> Iterator[Store]:
    store = Store()
    yield store
    store.close()


def version(number: int, num_bytes: int = 1000) -> BytesSource:
    return BytesSource({"w": u8(num_bytes, number)})


def num_maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:ckpt-engine")


def put(store: Store, number: int, *, num_bytes: int = 1000, pooled: bool = True) -> Segment:
    return store.register(f"v{number}", version(number, num_bytes), pooled=pooled).segment


def holds(segment: Segment, number: int, num_bytes: int = 1000) -> bool:
    return segment.memory[:num_bytes] == pattern(num_bytes, number)


# Versions


def test_a_registered_version(store: Store) -> None:
    weights: Weights = {"b": u8(300, 1), "a": u8(5, 2), "empty": u8(0)}
    shard = store.register("step-1", BytesSource(weights, {"a": ["tied"]}))
    assert store.labels == ["step-1"]
    assert store["step-1"] is shard
    assert len(shard.memory) == shard.manifest.num_bytes == 768
    for meta in shard.manifest.tensors:
        expected = weights["a" if meta.name == "tied" else meta.name].data
        assert shard.memory[meta.offset : meta.end] == expected


def test_an_empty_version(store: Store) -> None:
    """What a rank registers that holds none of the tensors."""
    shard = store.register("step-1", BytesSource({}))
    assert (shard.manifest.tensors, len(shard.memory)) == ((), 0)


def test_labels_are_oldest_first_and_taken_once(store: Store) -> None:
    put(store, 1)
    put(store, 2, pooled=False)
    assert store.labels == ["v1", "v2"]
    allocated = store.allocated_bytes
    with pytest.raises(StoreError, match="'v1' is already registered; unregister it first"):
        put(store, 1)
    assert (store.labels, store.allocated_bytes) == (["v1", "v2"], allocated)


def test_unknown_labels(store: Store) -> None:
    with pytest.raises(StoreError, match="'v1' is not registered here; registered: none"):
        store["v1"]
    put(store, 2)
    with pytest.raises(StoreError, match="'v1' is not registered here; registered: v2"):
        store.unregister("v1")
    assert store.labels == ["v2"]


def test_two_threads_cannot_register_one_label(store: Store) -> None:
    """One of them fails, and its memory does not leak."""
    entered, registered = threading.Event(), threading.Event()

    class Slow(BytesSource):
        def read_into(self, name: str, start: int, out: memoryview) -> None:
            entered.set()
            assert registered.wait(10)
            super().read_into(name, start, out)

    slow = Background(lambda: store.register("v1", Slow({"w": u8(1000, 7)})))
    assert entered.wait(10)
    with pytest.raises(StoreError, match="already registered"):
        put(store, 1, pooled=False)
    registered.set()
    first = slow.result()
    assert store["v1"] is first
    assert store.allocated_bytes == first.segment.capacity_bytes


class Failing(BytesSource):
    """Ends in the middle."""

    def read_into(self, name: str, start: int, out: memoryview) -> None:
        if name == "z":
            raise SourceError("the disk is gone")
        super().read_into(name, start, out)


def failure(store: Store, *, pooled: bool) -> str:
    """What registering a version that cannot be read says; keeps nothing of the exception."""
    source = Failing({"a": u8(20 * MIB), "z": u8(1)})
    try:
        store.register("broken", source, pooled=pooled)
    except SourceError as error:
        return str(error)
    return "it was registered"


def test_a_version_that_fails_midway_leaves_nothing(store: Store) -> None:
    put(store, 1, pooled=False)
    before = store.labels, store.allocated_bytes, num_fds(), num_maps()
    assert failure(store, pooled=False) == "the disk is gone"
    assert (store.labels, store.allocated_bytes, num_fds(), num_maps()) == before
    assert failure(store, pooled=True) == "the disk is gone"
    store.unregister("v1", force=True)
    assert (store.labels, store.allocated_bytes) == ([], 0)
    assert num_maps() == before[3] - 1


def test_a_pooled_version_that_fails_leaves_the_newest(store: Store) -> None:
    for number in (1, 2):
        put(store, number)
    assert failure(store, pooled=True) == "the disk is gone"
    assert store.labels[-1] == "v2"
    assert holds(store["v2"].segment, 2)


# Reuse


def test_pooled_memory_is_used_again(store: Store) -> None:
    first = put(store, 1)
    store.unregister("v1")
    assert put(store, 2, num_bytes=500) is first
    store.unregister("v2")
    assert put(store, 3, num_bytes=4000) is first
    assert holds(first, 3, 4000)
    assert store.allocated_bytes == first.capacity_bytes


def test_pooled_memory_that_is_too_small_is_given_back(store: Store) -> None:
    put(store, 1)
    store.unregister("v1")
    larger = put(store, 2, num_bytes=2 * PAGE + 1)
    assert store.allocated_bytes == larger.capacity_bytes == 3 * PAGE


def test_the_smallest_segment_that_fits_is_used(store: Store) -> None:
    segments = [put(store, n, num_bytes=size) for n, size in enumerate((9 * PAGE, 3 * PAGE))]
    for number in (0, 1):
        store.unregister(f"v{number}")
    assert put(store, 2, num_bytes=2 * PAGE) is segments[1]
    assert put(store, 3, num_bytes=2 * PAGE) is segments[0]


def test_other_memory_is_given_back_at_once(store: Store) -> None:
    before = num_fds(), num_maps()
    first = put(store, 1, pooled=False)
    assert num_fds() > before[0]
    assert num_maps() == before[1] + 1
    store.unregister("v1")
    assert (store.allocated_bytes, num_fds(), num_maps()) == (0, *before)
    assert put(store, 2, pooled=False) is not first


@pytest.mark.parametrize("retain", [1, 2, 3])
def test_the_last_k_pooled_versions_are_kept(retain: int) -> None:
    store = Store(retain=retain)
    put(store, 100, pooled=False)
    names = set()
    for number in range(10):
        names.add(put(store, number).name)
        kept = range(max(0, number - retain + 1), number + 1)
        assert store.labels == ["v100", *(f"v{n}" for n in kept)]
        assert all(holds(store[f"v{n}"].segment, n) for n in kept)
    assert len(names) == retain, "they take turns in the same memory"
    store.close()


def test_memory_is_never_used_again_while_it_is_leased(store: Store) -> None:
    first = put(store, 1)
    with first.lease():
        others = {put(store, number).name for number in range(2, 9)}
        assert "v1" not in store.labels
        assert first.name not in others
        assert holds(first, 1)
        assert store.segment(first.name) is first
    names = {put(store, number).name for number in range(9, 13)}
    assert first.name in names, "the lease is over"


def test_memory_is_not_given_back_while_it_is_leased(store: Store) -> None:
    for pooled in (False, True):
        segment = put(store, 1, pooled=pooled)
        with segment.lease(), segment.lease():
            store.unregister("v1", force=True)
            assert holds(segment, 1)
            assert segment.num_leases == 2
            assert store.allocated_bytes == segment.capacity_bytes
        assert store.allocated_bytes == (segment.capacity_bytes if pooled else 0)


def test_unregister_with_force_empties_the_pool(store: Store) -> None:
    before = num_fds(), num_maps()
    for number in range(5):
        put(store, number)
    store.unregister("v3")
    assert store.allocated_bytes == 2 * PAGE
    store.unregister("v4", force=True)
    assert (store.allocated_bytes, num_fds(), num_maps()) == (0, *before)


def test_segments_are_found_by_name_until_they_are_gone(store: Store) -> None:
    segment = put(store, 1, pooled=False)
    assert store.segment(segment.name) is segment
    assert store.segment("another") is None
    store.unregister("v1")
    assert store.segment(segment.name) is None


def test_close_gives_all_back(store: Store) -> None:
    before = num_fds(), num_maps()
    put(store, 1)
    put(store, 2, pooled=False)
    store.close()
    assert (store.labels, store.allocated_bytes, num_fds(), num_maps()) == ([], 0, *before)
    store.close()


def test_close_gives_back_the_pool_when_no_version_is_left(store: Store) -> None:
    fds = num_fds()
    put(store, 1)
    store.unregister("v1")
    store.close()
    assert (store.allocated_bytes, num_fds()) == (0, fds)


def test_what_was_leased_when_the_store_closed_is_given_back_afterwards(store: Store) -> None:
    fds = num_fds()
    segment = put(store, 1)
    with segment.lease():
        store.close()
        assert holds(segment, 1)
    assert (store.allocated_bytes, num_fds()) == (0, fds)


def unpooled(store: Store, number: int) -> None:
    put(store, number, pooled=False)
    store.unregister(f"v{number}")


def pooled(store: Store, number: int) -> None:
    put(store, number)
    store.unregister(f"v{number}")


def forced(store: Store, number: int) -> None:
    put(store, number)
    store.unregister(f"v{number}", force=True)


@pytest.mark.parametrize("round_of", [unpooled, pooled, forced])
def test_a_thousand_rounds_leave_nothing(
    store: Store, round_of: Callable[[Store, int], None]
) -> None:
    process = psutil.Process()
    for number in range(100):
        round_of(store, number)
    before = num_fds(), num_maps(), store.allocated_bytes, threading.active_count()
    rss_bytes = process.memory_info().rss
    for number in range(1000):
        round_of(store, number)
    assert (num_fds(), num_maps(), store.allocated_bytes, threading.active_count()) == before
    # A page lost in each round would be 4 MiB.
    assert process.memory_info().rss - rss_bytes < 3 * MIB


# Budget


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("budget_bytes", [0, 1000, PAGE, 2 * PAGE + 1, 3 * PAGE, 25 * PAGE])
def test_the_budget_is_never_exceeded(budget_bytes: int, pooled: bool) -> None:
    store = Store(retain=99, budget_bytes=budget_bytes)

    def fill() -> None:
        for number in range(100):
            put(store, number, num_bytes=PAGE // 2 * (number + 1), pooled=pooled)
            assert store.allocated_bytes <= budget_bytes

    with pytest.raises(StoreError, match=r"exceeds the store's budget.*unregister versions"):
        fill()
    labels = store.labels
    assert labels == [f"v{number}" for number in range(len(labels))], "the refused one is not there"
    assert store.allocated_bytes <= budget_bytes
    store.close()


def test_what_is_unregistered_makes_room() -> None:
    store = Store(budget_bytes=2 * PAGE)
    put(store, 1, pooled=False)
    with pytest.raises(StoreError, match="budget"):
        put(store, 2, num_bytes=PAGE + 1, pooled=False)
    store.unregister("v1")
    put(store, 2, num_bytes=PAGE + 1, pooled=False)
    store.close()


def test_idle_memory_makes_room_for_a_larger_version() -> None:
    store = Store(budget_bytes=3 * PAGE)
    put(store, 1, num_bytes=PAGE + 1)
    store.unregister("v1")
    put(store, 2, num_bytes=2 * PAGE + 1)
    assert store.allocated_bytes == 3 * PAGE
    store.close()


def test_more_than_the_host_has_is_refused(store: Store) -> None:
    class Huge(BytesSource):
        def specs(self) -> list[TensorSpec]:
            return [TensorSpec(names=("w",), dtype="U8", shape=(1 << 45,))]

    fds = num_fds()
    with pytest.raises(StoreError, match=r"does not fit in the \d+ bytes of memory"):
        store.register("v1", Huge({}))
    assert (store.labels, store.allocated_bytes, num_fds()) == ([], 0, fds)


def test_no_descriptor_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(name: str, flags: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(os, "memfd_create", exhausted)
    with pytest.raises(StoreError, match="Too many open files"):
        put(store, 1)
    assert (store.labels, store.allocated_bytes) == ([], 0)


def test_no_page_is_left(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(memory: mmap.mmap) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(checkpoint_engine.store, "_fault_in", exhausted)
    fds = num_fds()
    with pytest.raises(StoreError, match="Cannot allocate memory"):
        put(store, 1)
    assert (store.labels, store.allocated_bytes) == ([], 0)
    assert num_fds() == fds


def test_kernels_that_cannot_populate_are_helped(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_engine.store, "MADV_POPULATE_WRITE", 9999)
    segment = put(store, 1, num_bytes=9000)
    assert holds(segment, 1, 9000)
    pages = os.fstat(segment.descriptor).st_blocks * 512
    assert pages == segment.capacity_bytes, "every page is there"


# Seals


@pytest.fixture
def segment(store: Store) -> Segment:
    return put(store, 1)


def test_every_page_is_there_from_the_start(store: Store) -> None:
    segment = store.allocate(5 * MIB, pooled=True)
    assert os.fstat(segment.descriptor).st_blocks * 512 == segment.capacity_bytes == 5 * MIB
    segment.release()


def test_nobody_can_resize_it(segment: Segment) -> None:
    expected = F_SEAL_SEAL | F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE
    assert fcntl.fcntl(segment.descriptor, F_GET_SEALS) == expected
    for size in (0, segment.capacity_bytes - 1, segment.capacity_bytes + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(segment.descriptor, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(segment.descriptor, F_ADD_SEALS, F_SEAL_SHRINK)


def test_nobody_else_can_write_into_it(segment: Segment) -> None:
    with pytest.raises(PermissionError):
        mmap.mmap(segment.descriptor, segment.capacity_bytes)
    with pytest.raises(PermissionError):
        os.pwrite(segment.descriptor, b"x", 0)
    again = os.open(f"/proc/self/fd/{segment.descriptor}", os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            mmap.mmap(again, segment.capacity_bytes)
    finally:
        os.close(again)


def test_its_owner_can_write_and_others_read(segment: Segment) -> None:
    segment.memory[0:3] = b"abc"
    private = mmap.mmap(segment.descriptor, segment.capacity_bytes, flags=mmap.MAP_PRIVATE)
    assert private[:3] == b"abc"
    private[:3] = b"xyz"
    assert segment.memory[:3] == b"abc"
    private.close()


def test_its_descriptor_does_not_survive_exec(segment: Segment) -> None:
    assert not os.get_inheritable(segment.descriptor)


def test_memory_that_is_let_go_of_in_this_moment_is_used_again(store: Store) -> None:
    """What a replica lets go of is heard a little later than that the update is over."""
    first = store.allocate(4096, pooled=True)
    releasing = threading.Timer(0.02, first.release)
    releasing.start()
    assert store.allocate(4096, pooled=True) is first
    releasing.join()


def test_what_files_occupy_in_a_control_group_is_available(tmp_path: Path) -> None:
    """Whoever has just read a checkpoint has not used up the memory to stage it in."""
    stat = "anon 9\nshmem 300\ninactive_file 700"
    for name, text in (("max", "5000"), ("current", "4000"), ("stat", stat)):
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert checkpoint_engine.store.available_bytes(group=tmp_path) == 1700
    assert checkpoint_engine.store.available_bytes(200, tmp_path) == 1900
    assert checkpoint_engine.store.available_bytes(900, tmp_path) == 2000, "others' is not its own"
    (tmp_path / "memory.max").write_text("max\n")
    assert checkpoint_engine.store.available_bytes(group=tmp_path) > 1 << 20
