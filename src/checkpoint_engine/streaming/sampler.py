"""A sampler's side of a sync: versions are received whole, and served when all samplers have them.

side = SamplerSide(engine, seats)
report = side.sync()
"""

from __future__ import annotations

import contextlib
import threading
import time

import torch

from checkpoint_engine.adapters.held import Held
from checkpoint_engine.errors import (
    CheckpointEngineError,
    DeadlineExceeded,
    PeerLost,
    UpdateFailed,
    UsageError,
    VerificationError,
)
from checkpoint_engine.streaming.engine import StreamingEngine
from checkpoint_engine.streaming.messages import with_sender
from checkpoint_engine.streaming.orders import PATIENCE, Ending, Order, raise_failed
from checkpoint_engine.streaming.seats import Seats
from checkpoint_engine.streaming.threads import alone, blocking
from checkpoint_engine.streaming.transaction import sampler_name, take_part, withdraw
from checkpoint_engine.transport.rendezvous import Rendezvous
from checkpoint_engine.update.protocol import Report, decode
from checkpoint_engine.update.session import Outcome

__all__ = ["SamplerSide"]


CANCEL_SECONDS = 0.2
LEAVE_SECONDS = 20.0  # for a sync in its pause to hear what was decided

SERVES = {
    "kept": "the version of before is served",
    "published": "the new version is served",
    "torn": "no version is served",
}


class SamplerSide:
    """This sampler's part in a stream that it has joined. Borrows all that it is given.

    Args:
        engine: has met the others.
        seats: what is served, which outlives this.
    """

    def __init__(self, engine: StreamingEngine, seats: Seats) -> None:
        self._engine, self._seats = engine, seats
        self._keys = engine.link.rendezvous.fork()
        self._timeout_seconds = engine.link.settings.timeout_seconds
        self._past: list[Rendezvous] = []
        self._turn = threading.Lock()

    def sync(self) -> Report:
        """Take what comes; returns how it went for all samplers.

        Raises:
            UpdateFailed: it is not served; what was served before is, by every sampler, or the
                report says otherwise.
        """
        with alone(self._turn):
            ending = self._one()
            while ending.more:
                try:
                    ending = self._one()
                except UpdateFailed as error:
                    told = f"the base is served, its adapter is not: {error}"
                    raise UpdateFailed(told) from error
        return raise_failed(ending)

    def cancel(self, error: CheckpointEngineError) -> None:
        """End a sync that another thread is in, if any, until all of a version is here."""
        self._engine.cancel(error)

    def close(self) -> None:
        """Leave, after a sync that another thread is in, which is ended if it can be still."""
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            self.cancel(UsageError("the engine was finalized meanwhile"))
            if self._turn.acquire(timeout=CANCEL_SECONDS):  # else it may not have begun to receive
                self._turn.release()
                break
        self._keys.give_back()

    def _one(self) -> Ending:
        try:
            tensors = blocking(self._received())
        except CheckpointEngineError as error:
            raise UpdateFailed(f"nothing was changed: {error}") from error
        keys = self._scope()
        cause: CheckpointEngineError | None = None
        try:
            outcome = self._take(keys, tensors)
        except BaseException as error:
            with contextlib.suppress(PeerLost, DeadlineExceeded):
                withdraw(keys, error)
            if not isinstance(error, CheckpointEngineError):
                raise
            if isinstance(error, (PeerLost, DeadlineExceeded)):  # who would tell how it ended
                raise UpdateFailed(f"nothing was changed: {error}") from error
            cause = error  # before anything was offered
        try:
            with with_sender():
                ending: Ending = decode(keys.get("end", PATIENCE * self._timeout_seconds), Ending)
        except CheckpointEngineError as error:
            if cause is not None:
                raise UpdateFailed(f"nothing was changed: {cause}") from cause
            raise UpdateFailed(
                f"{outcome.state} here, and no more is known: {error}; {SERVES[outcome.state]} "
                "here, and the next sync brings all samplers to one"
            ) from error
        return ending

    async def _received(self) -> dict[str, torch.Tensor]:
        return {
            name: tensor.to("cpu", copy=True)
            async for name, tensor in self._engine.receive_weights()
        }

    def _take(self, keys: Rendezvous, tensors: dict[str, torch.Tensor]) -> Outcome:
        """Offer what was received to the transaction over all samplers."""
        held = Held(tensors)
        version = self._engine.version
        if version is None or version.digest != held.manifest.digest:
            raise VerificationError("what is held here is not what arrived: memory has changed it")
        with with_sender():
            order = decode(keys.get("order", PATIENCE * self._timeout_seconds), Order)
        name = sampler_name(keys.rank)
        return self._seats.take(order, held, name, lambda adapter: take_part(keys, adapter))

    def _scope(self) -> Rendezvous:
        keys = self._keys.scope(f"sync {self._engine.link.number}")
        self._past = [*self._past[-1:], keys]
        if len(self._past) > 1:
            self._past[0].clear()
        return keys
