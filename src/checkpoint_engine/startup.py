"""Start-up: an engine that comes up without weights gets them before it serves.

Reading a checkpoint again for every new instance is slow, and what the file says may no longer be
what the fleet serves. The weights are in memory already, at whoever published them last. So an
engine is built with whatever its parameters happen to hold, and a connector brings the rest: a
parameter server inside the engine's own process joins the one that serves, and its engine, which
others call over HTTP, is a function of this process. What fills a new instance is therefore the
same transaction that fills all others: verified, of one version, and followed to the last one
that was published meanwhile. Where nobody serves yet, the connector waits to be offered the first
update. There is no handle to be guessed and waited at: a name that is known beforehand is one
that anybody can take.

    connector = CkptEngineConnector("ckptengine:///run/metas.json")     # or "ckptengine://"
    loader = CkptEngineModelLoader(connector, initialize=Model)
    model = loader.load_model(model_config=config)

Engines import both names from `checkpoint_engine.adapters`.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import unquote, urlsplit

import torch

from checkpoint_engine.adapters.base import Identity, Served
from checkpoint_engine.adapters.callback import Run
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import (
    AdapterError,
    DeadlineExceeded,
    PeerLost,
    UsageError,
)
from checkpoint_engine.manifest import Version
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session
from checkpoint_engine.update.metas import load_metas_file
from checkpoint_engine.worker import update_weights_from_ipc

__all__ = ["CkptEngineConnector", "CkptEngineModelLoader", "Loaded"]

SCHEME = "ckptengine"

Model = TypeVar("Model", bound=torch.nn.Module)
Take = Callable[[str], None]
"""Takes one update from a handle, from greeting to end; raises if it was not published."""


class CkptEngineConnector:
    """Where an engine's first weights come from.

    Under torchrun the workers of one engine, each with a connector, join together: each reads a
    part, and their host reads every byte once.

    Args:
        url: "ckptengine:///path/metas.json" joins the server that wrote that file (`ckpt-engine
            update --save-metas-file`); "ckptengine://" waits to be offered an update.
        device: where tensors are handed over; "cpu" hands over views of staged memory.
        timeout_seconds: until the weights are there.

    Raises:
        UsageError: it is no such URL.
    """

    def __init__(
        self, url: str, device: torch.device | str = "cpu", *, timeout_seconds: float = 600.0
    ) -> None:
        self.url, self.device = url, torch.device(device)
        self._metas_file = _metas_file(url)
        self._timeout_seconds = timeout_seconds
        self._offers: queue.SimpleQueue[_Offer] = queue.SimpleQueue()
        self._closed = False

    def __enter__(self) -> CkptEngineConnector:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def waits(self) -> bool:
        """Whether the weights are what is offered first, rather than what a server has."""
        return self._metas_file is None

    def bring(self, take: Take) -> None:
        """Have `take` called until this engine serves what is published.

        It is called once, and again for each version that is published meanwhile; where the
        connector waits, for each update that is offered until one is published.

        Raises:
            UsageError, ManifestError: the file of metas is not usable.
            TransferError: no rank of the server answers, or none has all bytes.
            UpdateFailed: the engine does not take the version; says why.
            DeadlineExceeded: the time is over.
        """
        if self._metas_file is None:
            try:
                self._await_first(take)
            finally:
                self.close()
            return
        metas, limit = load_metas_file(self._metas_file), timedelta(seconds=self._timeout_seconds)
        with closing(ParameterServer()) as server:
            server.join(metas, [lambda handles: take(handles[server.rank][1])], timeout=limit)

    def offer(self, handle: str) -> None:
        """Give the engine an update to take; called by its server when it is asked to take one.

        Returns when the update is over, so that the answer to whoever asked is the truth.

        Raises:
            CheckpointEngineError: it was not published.
        """
        if self._closed:
            raise UsageError("the engine has its first weights, or will get none; ask it itself")
        offer = _Offer(handle, Future())
        self._offers.put(offer)
        if not wait([offer.over], self._timeout_seconds).done:
            raise DeadlineExceeded(
                f"the engine has not taken {handle} in {self._timeout_seconds:.0f} s"
            )
        offer.over.result()

    def update_weights_from_ipc(
        self, load_weights: Run, post_hook: Callable[[], object] | None = None
    ) -> None:
        """Bring the weights through an engine's own loader; see `worker.update_weights_from_ipc`.

        Raises:
            CheckpointEngineError: as `bring` does.
        """
        device_id = str(self.device)
        self.bring(
            lambda handle: update_weights_from_ipc(
                None, handle, device_id, run=load_weights, post_hook=post_hook
            )
        )

    def weight_iterator(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the version; on "cpu", views that keep its memory while they are held.

        Raises:
            CheckpointEngineError: as `bring` does, before the first tensor.
        """
        given: list[tuple[str, torch.Tensor]] = []
        whole: list[tuple[str, torch.Tensor]] = []

        def end_version() -> None:
            whole[:] = given
            given.clear()

        self.update_weights_from_ipc(given.extend, end_version)
        yield from whole

    def close(self) -> None:
        """Refuse what is still offered."""
        self._closed = True
        while not self._offers.empty():
            self._offers.get().over.set_exception(PeerLost("the engine takes no first weights"))

    def _await_first(self, take: Take) -> None:
        deadline = time.monotonic() + self._timeout_seconds
        while True:
            try:
                offer = self._offers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty as error:
                raise DeadlineExceeded(
                    f"no update was published here in {self._timeout_seconds:.0f} s"
                ) from error
            try:
                take(offer.handle)
            except Exception as error:  # whatever it is, whoever offered is told
                offer.over.set_exception(error)
            else:
                offer.over.set_result(None)
                return


@dataclass(frozen=True)
class _Offer:
    """An update that waits to be taken, and how it ended."""

    handle: str
    over: Future[None]


@dataclass(frozen=True)
class Loaded:
    """What a model was loaded with: the version, and which of the model's names it has."""

    version: Version
    names: frozenset[str]


class CkptEngineModelLoader(Generic[Model]):
    """Builds a model and fills it by way of a connector.

    A model with a method `load_weights`, which takes (name, tensor) pairs, loads itself, as those
    of vLLM and SGLang do. Any other is a torch module on the CPU whose parameters are written in
    place, and verified there: names, shapes and dtypes must be those of the version.

    Args:
        connector: brings the weights.
        initialize: makes the model from its configuration, with any content.

    Attributes:
        loaded: what the model was filled with last; None where it loads itself.
    """

    def __init__(
        self, connector: CkptEngineConnector, *, initialize: Callable[[Any], Model]
    ) -> None:
        self.loaded: Loaded | None = None
        self._connector = connector
        self._initialize = initialize

    def load_model(self, *, model_config: Any, device_config: Any = None) -> Model:
        """The model with the published weights, in eval mode.

        Args:
            model_config: what `initialize` is given.
            device_config: accepted for compatibility; the connector's device counts.

        Raises:
            CheckpointEngineError: as the connector's `bring` does.
        """
        with self._connector.device:
            model = self._initialize(model_config)
        load_weights = getattr(model, "load_weights", None)
        if load_weights is not None:
            self._connector.update_weights_from_ipc(load_weights)
        else:
            self.loaded = _fill(model, self._connector)
        return model.eval()


def _fill(model: torch.nn.Module, connector: CkptEngineConnector) -> Loaded:
    serving = _NotServing()
    process = f"process {os.getpid()}"
    adapter = TransformersAdapter(model, Identity(replica=process, engine=process), serving)
    connector.bring(partial(_take, adapter, Attachments(keep_maps=False)))
    assert serving.version is not None, "what was published was labelled"
    return Loaded(serving.version, adapter.names)


def _take(adapter: TransformersAdapter, attachments: Attachments, handle: str) -> None:
    outcome = session.run(handle, adapter, attachments)
    if outcome.state != "published":
        raise AdapterError(f"the first weights were not taken: {outcome.error}")


class _NotServing:
    """What stands around a model that does not serve yet: no request waits for anything."""

    version: Version | None = None

    def accept(self, version: Version) -> None:
        """Any version is welcome."""

    def hold(self, timeout_seconds: float) -> None:
        """Nothing runs."""

    def publish(self, version: Version, served: Served) -> None:
        """Remember what was loaded."""
        self.version = version

    def release(self) -> None:
        """Nothing waits."""

    def quarantine(self, reason: str) -> None:
        """Whoever loads fails."""

    def tear(self, reason: str) -> None:
        """Whoever loads fails."""


def _metas_file(url: str) -> Path | None:
    parts = urlsplit(url)
    if parts.scheme != SCHEME or parts.netloc or parts.query or parts.fragment:
        raise UsageError(
            f"{url!r} is neither {SCHEME}:///path/metas.json, to join, nor {SCHEME}://, to wait"
        )
    return Path(unquote(parts.path)) if parts.path not in ("", "/") else None
