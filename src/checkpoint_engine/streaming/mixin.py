"""What a trainer's or a sampler's class mixes in to take part in `CheckpointEngineManager`'s syncs.

    class Trainer(CheckpointEngineMixin):
        def __init__(self): self.model = ...        # plain, sharded by FSDP2, with peft's LoRA

    class Sampler(CheckpointEngineMixin):
        def __init__(self): self.model = ...        # whose weights are replaced in place
        def hold_requests(self, timeout_seconds): self.server.pause(timeout_seconds)  # or raises
        def release_requests(self): self.server.resume()

Its methods are called by a manager, in this process or, if it is a Ray actor, by the driver's.
"""

from __future__ import annotations

import math
import secrets
import sys
from collections.abc import Mapping
from typing import Any, ClassVar

from checkpoint_engine.device_utils import DeviceManager
from checkpoint_engine.errors import CheckpointEngineError, UsageError
from checkpoint_engine.manifest import Version
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.streaming.names import new_engine
from checkpoint_engine.streaming.sampler import SamplerSide
from checkpoint_engine.streaming.seats import Seats
from checkpoint_engine.streaming.steps import Wanted
from checkpoint_engine.streaming.trainer import FollowingSide, TrainerSide
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import Report

__all__ = ["CheckpointEngineMixin"]


class CheckpointEngineMixin:
    """See the module's text. Calls come from one thread at a time; requests may run in others.

    A sampler that has no model in this process defines `load_weights(named)` instead: it takes a
    list of names and tensors, all of a version, which it may not keep.

    Attributes:
        model: the trainer's, or the sampler's; peft's model takes its place with a first adapter.
        checkpoint_engine_name: of a streaming engine. Default "nccl" where there are GPUs, "hccl"
            for NPUs, else "ray" in Ray's actors and "gloo" elsewhere.
        checkpoint_engine_settings: what it is made with, such as `timeout`.
    """

    model: Any
    checkpoint_engine_name: ClassVar[str | None] = None
    checkpoint_engine_settings: ClassVar[Mapping[str, Any]] = {}

    _checkpoint_syncs: int = 0
    _checkpoint_engine: StreamingEngine | None = None
    _checkpoint_side: TrainerSide | FollowingSide | SamplerSide | None = None
    _checkpoint_seats: Seats | None = None
    _checkpoint_place: tuple[int, int, dict[str, Any]] | None = None

    # ── what a sampler's class may define ───────────────────────────────────────────────────

    def hold_requests(self, timeout_seconds: float) -> None:
        """Stop requests, or raise DeadlineExceeded; weights change until `release_requests`."""

    def release_requests(self) -> None:
        """Let requests go on."""

    # ── what a sampler serves ───────────────────────────────────────────────────────────────

    def served_version(self) -> Version | None:
        """The weights that are served, None before the first sync, or if they are of none."""
        return self._checkpoint_seats.version if self._checkpoint_seats else None

    def adapters(self) -> dict[str, Version]:
        """The adapters that are attached, by name; `parent` is the base that each is made for."""
        return dict(self._checkpoint_seats.adapters) if self._checkpoint_seats else {}

    def detach_adapter(self, name: str) -> None:
        """Take an adapter off; requests must wait.

        Raises:
            UsageError: there is none of that name.
        """
        if self._checkpoint_seats is None:
            raise UsageError(f"no adapter {name!r} is attached: nothing was received yet")
        self._checkpoint_seats.detach(name)

    # ── what a manager calls ────────────────────────────────────────────────────────────────

    def next_checkpoint_sync(self) -> int:
        """The number of this side's next sync, by whatever manager: it outlives them."""
        self._checkpoint_syncs += 1
        return self._checkpoint_syncs

    def prepare_checkpoint_engine(self, is_master: bool) -> dict[str, Any]:
        """Get ready to meet; returns where the master is, if this is it."""
        engine = self._engine()
        engine.is_master = is_master
        return engine.prepare()

    def init_checkpoint_process_group(
        self,
        rank: int,
        world_size: int,
        master_metadata: Mapping[str, Any] | None = None,
        timeout_seconds: float = math.inf,
    ) -> None:
        """Meet: 0 is the trainer's first process, -1 its others, samplers follow from 1 on.

        Waits for the first for so many seconds, or as long as the engine does.

        Raises:
            UsageError: a sampler has neither a model nor `load_weights`.
            DeadlineExceeded: the trainer cannot be reached.
        """
        place = (rank, world_size, dict(master_metadata or {}))
        if self._checkpoint_side is not None:
            if self._checkpoint_place == place and (rank <= 0 or self._engine().is_let_in()):
                return
            if rank == 0:
                raise UsageError("finalize_checkpoint_engine comes before meeting others")
            self.finalize_checkpoint_engine()  # the trainer, or its number of samplers, is another
        engine = self._engine()
        if rank > 0 and self._checkpoint_seats is None:
            self._checkpoint_seats = Seats(self)
        longest = engine.settings.timeout_seconds
        wait_seconds = min(timeout_seconds, longest)
        engine.init_process_group(rank, world_size, master_metadata, timeout_seconds=wait_seconds)
        if rank == 0:
            self._checkpoint_side = TrainerSide(engine)
        elif rank < 0:
            keys = Rendezvous.at(
                engine.meeting(master_metadata), -1, 1, timeout_seconds=wait_seconds
            )
            self._checkpoint_side = FollowingSide(keys, longest)
        else:
            assert self._checkpoint_seats is not None, "made above"
            self._checkpoint_side = SamplerSide(engine, self._checkpoint_seats)
        self._checkpoint_place = place

    def send_weights(self, wanted: Wanted) -> Report:
        """A trainer's part in a sync: see `CheckpointEngineManager.sync_weights`."""
        side = self._checkpoint_side
        if not isinstance(side, (TrainerSide, FollowingSide)):
            raise UsageError("init_checkpoint_process_group comes first, with rank 0 or -1")
        return side.sync(self.model, wanted)

    def receive_weights(self) -> Report:
        """A sampler's part in a sync: see `CheckpointEngineManager.sync_weights`."""
        side = self._checkpoint_side
        if not isinstance(side, SamplerSide):
            raise UsageError("init_checkpoint_process_group comes first, with a rank from 1 on")
        return side.sync()

    def cancel_checkpoint_engine(self, error: CheckpointEngineError) -> None:
        """End a sync that another thread is in, which raises this, unless it is decided already."""
        if self._checkpoint_side is not None:
            self._checkpoint_side.cancel(error)

    def finalize_checkpoint_engine(self) -> None:
        """Leave the others; what is served stays."""
        if self._checkpoint_side is not None:
            self._checkpoint_side.close()
        if self._checkpoint_engine is not None:
            self._checkpoint_engine.finalize()
        self._checkpoint_side = self._checkpoint_engine = None

    def _engine(self) -> StreamingEngine:
        if self._checkpoint_engine is None:
            name = self.checkpoint_engine_name or _default_name()
            settings = dict(self.checkpoint_engine_settings)
            if name == "ray":  # the manager tells who is where, so the name is not looked for
                settings.setdefault("group_name", secrets.token_hex(8))
            engine = new_engine(name, **settings)
            if not isinstance(engine, StreamingEngine):
                raise UsageError(
                    f"the engine {name!r} has no way for votes: a manager needs a subclass of "
                    "StreamingEngine"
                )
            self._checkpoint_engine = engine
        return self._checkpoint_engine


def _default_name() -> str:
    backend = DeviceManager().backend
    ray = sys.modules.get("ray")
    return "ray" if backend == "gloo" and ray is not None and ray.is_initialized() else backend
