"""Buckets broadcast from one member to all others through a process group.

The group is our own, beside any that the trainer has: of one rank per host, or of a trainer and its
samplers. Bytes are sent from, and received into, the memory where they lie. After any error a group
is dead, and half of its ranks do not know it yet: `abandon` ends what is under way in it, here and
at the others, and the next broadcast meets under a new name. Gloo listens at this host's one
address, and does not notice every death: who hears of one abandons the group.

    collective = Collective(rendezvous, index=0, size=2)
    collective.connect("update-17", timeout_seconds=60)
    collective.broadcast(memory[a:b], root=0, timeout_seconds=60)
    landed = collective.begin(memory[b:c], root=0, timeout_seconds=60)      # the next may begin
    landed()
"""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError, wait
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch.distributed import BroadcastOptions, ProcessGroupGloo

from checkpoint_engine.errors import CheckpointEngineError, TransferError
from checkpoint_engine.transport.group_store import GroupStore
from checkpoint_engine.transport.rendezvous import Rendezvous

__all__ = ["BACKENDS", "Collective"]

POLL_SECONDS = 1e-4
LOOK = timedelta(milliseconds=50)  # in which who waits sees that the group was abandoned
MAKE_POLL_SECONDS = 0.05
MAKE_GRACE_SECONDS = 5.0  # in which gloo says itself what it waits for
AT_ONCE = timedelta(milliseconds=1)
GRACE_SECONDS = 5.0  # in which gloo says itself that a broadcast takes too long
DEVICE_GRACE = timedelta(seconds=10)  # in which we do: torch would say that it has ended well
MOST_UNDER_WAY = 4  # that anybody begins before the first has landed
LONGEST_CONNECT = timedelta(seconds=30)
NCCL_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",  # abort the communicator; 3, the default, the process
    "TORCH_NCCL_ENABLE_MONITORING": "0",  # whose monitor ends the process, too
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",  # after which a group cannot be let go of for 8 minutes
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",  # else a minute in which a group cannot be closed
}


class _Broadcast:
    """One that was begun. Torch's part of it keeps its memory, and its group's connections."""

    def __init__(self, work: Any) -> None:
        self._work = work
        self._failure: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether it has ended; what it kept is let go of then."""
        work = self._work
        if work is not None and work.is_completed():
            del work
            with suppress(RuntimeError):  # which whoever waits is told
                self.wait()
        return self._work is None

    def ends(self, within: timedelta) -> bool:
        """Wait until it ends, or as long as this."""
        work = self._work
        if work is not None:
            with suppress(RuntimeError):  # that it takes longer, or has failed
                work.wait(within)
            del work
        return self.is_over

    def wait(self) -> None:
        """Wait until it ends; raises RuntimeError if it failed, whoever asks."""
        work = self._work
        try:
            if work is not None:
                work.wait()  # until its own deadline, which it was begun with
        except RuntimeError as error:
            self._failure = str(error)
        finally:
            del work
            self._work = None
        if self._failure is not None:  # anew each time: it keeps the frames that it goes through
            raise RuntimeError(self._failure)


class Collective:
    """A group of `size` members, of which this one is `index`.

    Args:
        rendezvous: of all members.
        index: of this one.
        size: how many there are.
        backend: one of `BACKENDS`; what is broadcast lies where that one reads it.
    """

    def __init__(
        self, rendezvous: Rendezvous, *, index: int, size: int, backend: str = "gloo"
    ) -> None:
        self._rendezvous, self.index, self.size = rendezvous, index, size
        self._make = BACKENDS[backend]
        self._group: Any = None
        self._under_way: list[_Broadcast] = []
        self._lock, self._abandoning = threading.Lock(), threading.Lock()
        self._store: GroupStore | None = None

    def connect(self, name: str, timeout_seconds: float) -> None:
        """Meet the other members under `name`, unless the group of before still works.

        All members must call it, and abandon it, for the same updates.

        Raises:
            TransferError: a member did not come in time.
        """
        if self._group is not None:
            return
        timeout = timedelta(seconds=timeout_seconds)
        store = self._store = self._rendezvous.group_store(f"gloo/{name}")
        store.set_timeout(timeout)
        try:
            self._group = self._make(
                store, self.index, self.size, timeout, self._rendezvous.address
            )
        except (RuntimeError, CheckpointEngineError) as error:
            self.abandon()
            raise TransferError(
                f"host {self.index} of {self.size} could not join the group: {_first_line(error)}"
            ) from error

    def broadcast(
        self, memory: memoryview | torch.Tensor, root: int, timeout_seconds: float
    ) -> None:
        """Send `memory` from member `root` to all others, whose `memory` it fills.

        Raises:
            TransferError: a member died, the deadline passed, or the group was abandoned, which it
                must be after the others.
        """
        self.begin(memory, root, timeout_seconds)()

    def begin(
        self, memory: memoryview | torch.Tensor, root: int, timeout_seconds: float
    ) -> Callable[[], None]:
        """Begin a `broadcast`, and return what waits for its end, which need not be called.

        Several may be under way, begun in the same order by all members. Of one group, one thread
        begins them.

        Raises:
            TransferError: as `broadcast`; what is returned raises it, too.
        """
        group = self._group
        if group is None:
            raise TransferError("the group was abandoned meanwhile")
        options = BroadcastOptions()
        options.rootRank = root
        options.timeout = timedelta(seconds=timeout_seconds)
        if isinstance(memory, memoryview):
            memory = torch.frombuffer(memory, dtype=torch.uint8)
        with _failing(root):
            begun = _Broadcast(group.broadcast([memory], options))
        with self._lock:
            self._under_way = [*_unfinished(self._under_way), begun]
        if self._group is not group:
            with self._abandoning:
                self._end(group, [begun])  # which has not heard of it
        ended = partial(begun.ends, LOOK) if memory.is_cpu else partial(_ends_queued, begun)
        # Of a device torch counts from now, too, and does not wait for those before it.
        longest_seconds = MOST_UNDER_WAY * timeout_seconds
        latest = math.inf if memory.is_cpu else time.monotonic() + longest_seconds
        grace_seconds = GRACE_SECONDS if memory.is_cpu else 0.0

        def landed() -> None:
            deadline = min(latest, time.monotonic() + timeout_seconds + grace_seconds)
            with _failing(root):
                while not ended():
                    if self._group is not group:
                        with self._abandoning:  # until no byte is moved any more
                            raise RuntimeError("the group was abandoned meanwhile")
                    if time.monotonic() > deadline:
                        raise RuntimeError(f"it did not end in {timeout_seconds:.0f} s")
                begun.wait()
                if self._group is not group:  # what a device aborts ends as if it had gone well
                    raise RuntimeError("the group was abandoned meanwhile")

        return landed

    def abandon(self) -> None:
        """End what is under way in the group, and close it; members that wait fail, too.

        No byte is moved any more, from or into any memory.
        """
        with self._abandoning:  # who comes second returns when it is done, too
            group, self._group = self._group, None
            store, self._store = self._store, None
            with self._lock:
                under_way, self._under_way = self._under_way, []
            if group is not None:
                self._end(group, under_way)
            if store is not None:
                store.close()

    def _end(self, group: Any, begun: Sequence[_Broadcast]) -> None:
        """Let go of a group, whatever it has begun."""
        if not isinstance(group, ProcessGroupGloo):
            group.abort()  # or what is queued on the device waits there for the others, for ever
            return
        _disconnect(group, (other for other in range(self.size) if other != self.index))
        if _unfinished(begun):
            # The last who lets go of it waits for them, and holds the interpreter's lock meanwhile.
            threading.Thread(target=_outlive, args=(begun, group), daemon=True).start()


def _ends_queued(begun: _Broadcast) -> bool:
    """Of what a device does torch would look once in a millisecond, or two buckets' time."""
    if begun.is_over:
        return True
    time.sleep(POLL_SECONDS)
    return False


def _disconnect(group: Any, others: Iterable[int]) -> None:
    """Close the connections of a group of gloo's.

    It has no call for that, but does it when a message that is waited for does not come. (What it
    is sending to a member that has died may still wait until its deadline, by then for nothing.)
    """
    for other in others:
        with suppress(RuntimeError):
            group.recv([torch.empty(1, dtype=torch.uint8)], other, 0).wait(AT_ONCE)


def _gloo(store: GroupStore, index: int, size: int, timeout: timedelta, address: str) -> Any:
    """To connect to a member that has died, gloo waits several timeouts, and nothing ends that.

    So a thread does it, and a group that nobody wants any more by then is closed at once. Who is
    connected waits until all are: what it began before could end only when those others give up.
    (The timeout, as short as the life of such a thread is to be, is that of connections alone: for
    members to come the store has its own, as broadcasts have.)
    """
    options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = min(timeout, LONGEST_CONNECT)
    options._devices = [ProcessGroupGloo.create_device(hostname=address)]
    made: Future[Any] = Future()

    def make() -> None:
        with suppress(InvalidStateError):  # it is no longer wanted
            try:
                group = ProcessGroupGloo(store, index, size, options)
                _meet_connected(store, size)
                made.set_result(group)
            except Exception as error:  # the store's, too
                made.set_exception(error)

    threading.Thread(target=make, name="ckpt-connect", daemon=True).start()
    deadline = time.monotonic() + timeout.total_seconds() + MAKE_GRACE_SECONDS
    while not made.done():
        wait([made], MAKE_POLL_SECONDS)
        if store.is_closed and made.cancel():
            raise TransferError("the group was abandoned while it was made")
        if time.monotonic() > deadline and made.cancel():
            raise TransferError(f"the group was not made in {timeout.total_seconds():.0f} s")
    return made.result()


def _meet_connected(store: GroupStore, size: int) -> None:
    """Wait until every member of the group is connected to all others."""
    if store.add("num_connected", 1) == size:
        store.set("all_connected", b"")
    store.get("all_connected")


def _nccl(store: GroupStore, index: int, size: int, timeout: timedelta, address: str) -> Any:
    kind = import_module("torch.distributed").ProcessGroupNCCL
    options = kind.Options()
    options._timeout = MOST_UNDER_WAY * timeout + DEVICE_GRACE  # which is that of broadcasts
    with _environment(NCCL_ENVIRONMENT):
        return kind(store, index, size, options)


def _hccl(store: GroupStore, index: int, size: int, timeout: timedelta, address: str) -> Any:
    kind = import_module("torch_npu._C._distributed_c10d").ProcessGroupHCCL
    options = kind.Options()
    options._timeout = MOST_UNDER_WAY * timeout + DEVICE_GRACE  # which is that of broadcasts
    return kind(store, index, size, options)


BACKENDS: dict[str, Callable[[GroupStore, int, int, timedelta, str], Any]] = {
    "gloo": _gloo,
    "nccl": _nccl,
    "hccl": _hccl,
}


@contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """What a group reads when it is made, and of which there is no option."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _failing(root: int) -> Iterator[None]:
    """As an error of ours."""
    try:
        yield
    except RuntimeError as error:
        raise TransferError(f"broadcast from host {root}: {_first_line(error)}") from error


def _unfinished(begun: Sequence[_Broadcast]) -> list[_Broadcast]:
    return [one for one in begun if not one.is_over]


def _outlive(begun: Sequence[_Broadcast], group: Any) -> None:
    """Keep a group until what it has begun has ended, which has its deadline."""
    for one in begun:
        with suppress(RuntimeError):
            one.wait()


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
