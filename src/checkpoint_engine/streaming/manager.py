"""A trainer's new weights on all of its samplers, in one call.

    manager = CheckpointEngineManager(model=trainers, sampler=samplers)     # the driver of Ray
    manager = CheckpointEngineManager(model=self, rank=0, world_size=4)     # plain processes: the
    manager = CheckpointEngineManager(sampler=self, rank=2, world_size=4)   # same in each of them
    report = manager.sync_weights(label="step-120")

It only sets going what `CheckpointEngineMixin` does in each process: the tensors, and the votes on
them, go from the trainer to the samplers and not through here. So a driver that dies half way
leaves nobody between two versions.
"""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from concurrent.futures import wait as wait_for
from typing import Any, NamedTuple

import torch.distributed as dist

from checkpoint_engine.device_utils import same_stream
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    UpdateFailed,
    UsageError,
)
from checkpoint_engine.streaming.base import CheckpointEngine
from checkpoint_engine.streaming.steps import Wanted
from checkpoint_engine.update.protocol import Report

__all__ = ["CheckpointEngineManager"]

CANCEL_SECONDS = 0.2
HEAR_SECONDS = 2.0  # for the trainer to find out by itself that another has failed
LEAVE_SECONDS = 30.0  # for others to hear what was decided, or to leave


class CheckpointEngineManager:
    """See the module's text.

    With both sides it drives them: each is one object with `CheckpointEngineMixin`, a list of them,
    a list of Ray actors whose class has it, or a group that has such a list as `_actors`. The first
    of the trainer's sends. With one side it is that process's part alone: the others have managers
    of their own, and all call the same methods equally often.

    Args:
        model: the trainer's process, or all of them, the first one first.
        sampler: a sampler, or all of them.
        rank: of one side: 0 is the trainer's first process, -1 another of its, samplers follow from
            1 on. Default for a trainer: 0 or -1, by its rank in `torch.distributed`.
        world_size: of one side: the trainer's first process and all samplers.
        master_metadata: of one side: where the first process is, what its `metadata` says; default
            is what `$MASTER_ADDR` and `$MASTER_PORT` say.
        timeout_seconds: the longest that one call may take. A sync that takes longer is given up,
            as it is if the call is interrupted, unless it is decided.

    Raises:
        UsageError: these cannot be the sides of a sync.
    """

    def __init__(
        self,
        model: Any = None,
        sampler: Any = None,
        *,
        rank: int | None = None,
        world_size: int | None = None,
        master_metadata: Mapping[str, Any] | None = None,
        timeout_seconds: float = 3600.0,
    ) -> None:
        self._trainers = _members("trainer", model)
        self._samplers = _members("sampler", sampler)
        self._timeout_seconds = timeout_seconds
        self._metadata = master_metadata
        self._drives = bool(self._trainers and self._samplers)
        self._has_met = False
        self._numbers = itertools.count(secrets.randbits(48))  # others may drive the same members
        if self._drives:
            if (rank, world_size, master_metadata) != (None, None, None):
                raise UsageError("rank, world_size and master_metadata are of one side alone")
            return
        if len(self._trainers) + len(self._samplers) != 1:
            raise UsageError("give model= and sampler=, or the one of them that this process is")
        if world_size is None or (self._samplers and rank is None):
            raise UsageError("one side needs world_size=, and a sampler its rank= from 1 on")
        if world_size < 2:
            raise UsageError(f"world_size={world_size}: it is one and the number of samplers")
        self._rank = _trainer_rank() if rank is None else rank
        self._world_size = world_size
        if (self._rank > 0) != bool(self._samplers) or not -1 <= self._rank < world_size:
            ranks = f"from 1 to {world_size - 1}" if self._samplers else "0, others of a trainer -1"
            raise UsageError(f"rank={self._rank}, world_size={world_size}: this side's are {ranks}")

    @property
    def metadata(self) -> dict[str, Any]:
        """Where the trainer's first process is, for the others' `master_metadata`; its own only."""
        if self._drives or self._rank != 0:
            raise UsageError("the trainer's first process knows where it is: ask its manager")
        found: dict[str, Any] = self._trainers[0].itself.prepare_checkpoint_engine(True)
        return found

    def sync_weights(
        self, merge_and_sync: bool = True, adapter_name: str | None = None, *, label: str = ""
    ) -> Report:
        """Have all samplers serve what the trainer has, or none.

        Training goes on from the same bits afterwards; it waits until this returns.

        Args:
            merge_and_sync: send the whole model, with its adapters merged if it has any. False
                sends an adapter, and before it the base to samplers that do not serve it.
            adapter_name: which one; default those that are active.
            label: what to call the version; default "sync-1" and so on.

        Raises:
            UsageError: the model has no such adapter.
            UpdateFailed: not published; says which sampler could not, and why. All others serve
                what they served before; `report` says what each does, if it came so far.
            DeadlineExceeded, PeerLost: a trainer's process, or a sampler, cannot be reached.
        """
        number = next(self._numbers) if self._drives else self._own.next_checkpoint_sync()
        deadline = time.monotonic() + self._timeout_seconds
        self._meet(deadline)
        calls: list[_Call] = []
        try:
            wanted = Wanted(merge_and_sync, adapter_name, label, number)
            for trainer in self._trainers:
                _begin(calls, trainer, "send_weights", wanted)
            for sampler in self._samplers:
                _begin(calls, sampler, "receive_weights")
            self._wait(calls, deadline)
        except BaseException as error:
            self._cancel(calls, UpdateFailed(f"interrupted there by {type(error).__name__}"))
            raise
        report: Report = _first_result(calls, deadline)
        return report

    def close(self) -> None:
        """Leave; samplers go on serving. Who is gone has left.

        Raises:
            DeadlineExceeded: one does not leave; says which.
        """
        deadline = time.monotonic() + LEAVE_SECONDS
        for call in self._left(deadline):
            with contextlib.suppress(PeerLost):
                _result(call, deadline)

    @property
    def _own(self) -> Any:
        """Of one side alone, this process's."""
        (own,) = [*self._trainers, *self._samplers]
        return own.itself

    def _left(self, deadline: float) -> list[_Call]:
        members = [*self._samplers, *self._trainers]
        calls = [_start(member, "finalize_checkpoint_engine") for member in members]
        wait_for([call.future for call in calls], deadline - time.monotonic())
        self._has_met = False
        return calls

    def _wait(self, calls: Sequence[_Call], deadline: float) -> None:
        """Wait for the first, which decides, and for the others to hear of it."""
        first, futures = calls[0].future, [call.future for call in calls]
        waiting = set(futures)
        while waiting and not first.done():
            done, waiting = wait_for(waiting, deadline - time.monotonic(), FIRST_COMPLETED)
            if not done:
                late = f"took longer there than its timeout_seconds={self._timeout_seconds:g}"
                self._cancel(calls, DeadlineExceeded(f"sync_weights {late}"))
                return
            if any(_foreign_causes([call for call in calls if call.future in done])):
                if wait_for([first], HEAR_SECONDS).done:
                    break
                self._cancel(calls, UpdateFailed("another process failed beside the sync"))
                return
        wait_for(futures, LEAVE_SECONDS)

    def _cancel(self, calls: Sequence[_Call], error: CheckpointEngineError) -> None:
        """Have nobody in this process go on behind the back of a call that ends.

        A trainer would read weights that are trained on by then. Actors end by themselves, and
        train after that.
        """
        futures = [call.future for call in calls]
        members = [*self._trainers, *self._samplers]
        here = [member.itself for member in members if not member.is_actor]
        deadline = time.monotonic() + LEAVE_SECONDS
        while here and time.monotonic() < deadline:
            for member in here:  # again, since it may not have begun when it was told first
                member.cancel_checkpoint_engine(error)
            if not wait_for(futures, CANCEL_SECONDS).not_done:
                return

    def _meet(self, deadline: float) -> None:
        """Again each time, since a sampler may have been started anew; who has met does nothing."""
        if not self._drives:
            self._own.prepare_checkpoint_engine(self._rank == 0)
            self._own.init_checkpoint_process_group(
                self._rank, self._world_size, self._metadata, deadline - time.monotonic()
            )
            return
        if not self._has_met:
            self._left(time.monotonic() + LEAVE_SECONDS)  # who has met others before
        members = [*self._trainers, *self._samplers]
        prepared = [
            _start(member, "prepare_checkpoint_engine", index == 0)
            for index, member in enumerate(members)
        ]
        metadata = [found or {} for found in _results(prepared, deadline)]
        sides = CheckpointEngine.build_topology(len(self._trainers), len(self._samplers), metadata)
        each = [
            (side["rank"][index], side["world_size"][index], side["master_metadata"][index])
            for side in sides
            for index in range(len(side["rank"]))
        ]
        joined = [
            _start(member, "init_checkpoint_process_group", *arguments)
            for member, arguments in zip(members, each, strict=True)
        ]
        _results(joined, deadline)
        self._has_met = True


class _Member(NamedTuple):
    """One that takes part: an object, or a Ray actor.

    Attributes:
        name: in what is said of it.
        itself: with `CheckpointEngineMixin`.
    """

    name: str
    itself: Any

    @property
    def is_actor(self) -> bool:
        return hasattr(self.itself.send_weights, "remote")


class _Call(NamedTuple):
    """Of a method of the member of that name."""

    name: str
    future: Future[Any]


def _members(what: str, side: Any) -> list[_Member]:
    if side is None:
        return []
    found = getattr(side, "_actors", side)
    members = list(found) if isinstance(found, Sequence) else [found]
    for member in members:
        if not hasattr(member, "cancel_checkpoint_engine"):
            raise UsageError(
                f"{member!r:.200} takes no part in a sync: derive its class from "
                "CheckpointEngineMixin, of Ray's actors too"
            )
    return [_Member(f"{what} {index}", one) for index, one in enumerate(members)]


def _trainer_rank() -> int:
    return -1 if dist.is_available() and dist.is_initialized() and dist.get_rank() else 0


def _begin(calls: list[_Call], member: _Member, method: str, *arguments: Any) -> None:
    """Call a method of an object on a thread, or of a Ray actor where it is, and note the call.

    Whoever is interrupted here finds it among the calls, or it has not begun.
    """
    call = getattr(member.itself, method)
    if member.is_actor:
        calls.append(_Call(member.name, call.remote(*arguments).future()))
        return
    future: Future[Any] = Future()
    enter_stream = same_stream()

    def run() -> None:
        try:
            enter_stream()
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    calls.append(_Call(member.name, future))
    threading.Thread(target=run, name="ckpt-sync", daemon=True).start()


def _start(member: _Member, method: str, *arguments: Any) -> _Call:
    calls: list[_Call] = []
    _begin(calls, member, method, *arguments)
    return calls[0]


def _results(calls: Sequence[_Call], deadline: float) -> list[Any]:
    """What all of them give; raises what the first one did that failed."""
    return [_result(call, deadline) for call in calls]


def _first_result(calls: Sequence[_Call], deadline: float) -> Any:
    """What the first of them gives, which decides; the others have ended, or hang."""
    first, *others = calls
    try:
        return _result(first, deadline)
    except CheckpointEngineError as error:
        for name, cause in _foreign_causes(others):  # who failed by itself knows more
            said = f"{name}: {type(cause).__name__}: {cause}; so {first.name}: {error}"
            raise UpdateFailed(said) from cause
        raise


def _foreign_causes(calls: Sequence[_Call]) -> Iterator[tuple[str, Exception]]:
    """What failed, of those that have ended, for a reason that is none of this package's."""
    for call in calls:
        try:
            if call.future.done():
                _result(call, time.monotonic())
        except CheckpointEngineError:
            pass
        except Exception as cause:
            yield call.name, cause


def _result(call: _Call, deadline: float) -> Any:
    try:
        return call.future.result(deadline - time.monotonic())
    except (FutureTimeoutError, TimeoutError) as error:
        if call.future.done():
            raise
        raise DeadlineExceeded(f"{call.name} does not answer: is it up, and not held?") from error
    except Exception as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, CheckpointEngineError):  # Ray's account of it stands before its text
            raise cause from error
        if type(error).__name__ in ("ActorDiedError", "RayActorError", "ActorUnavailableError"):
            raise PeerLost(f"{call.name} is gone: {error}") from error
        raise
