"""One replica: a model that serves, what it is called, and how it is updated.

The replica is what the adapter calls the server around its model: it pauses generation, changes the
label, and says truthfully what state it is in. Digests are recomputed from the live parameters
whenever they are asked for, chunk by chunk, so that an update's pause waits for one chunk at most.

    replica = load_replica(folder, load_format="auto", wait_for_initial_weights=False)
    replica.engine.start()
    serve(create_app(replica, ...), host, port)
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from checkpoint_engine.adapters.base import Identity, Served
from checkpoint_engine.adapters.live import LiveModel
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.compare import TensorDigest, WeightDigests, sample_names
from checkpoint_engine.errors import DeadlineExceeded, UpdateFailed, UpdateRefused, UsageError
from checkpoint_engine.manifest import Version, version_digest
from checkpoint_engine.replica.engine import Engine
from checkpoint_engine.sources import SafetensorsSource, safetensors_files
from checkpoint_engine.startup import CkptEngineConnector, CkptEngineModelLoader
from checkpoint_engine.transport.handover import Attachments
from checkpoint_engine.update import session

__all__ = ["Replica", "load_replica"]

INFO_SECONDS = 120.0
SCRUB_SECONDS = 1.0
PAUSE_SECONDS = 60.0
HISTORY_LENGTH = 100
LOAD_FORMATS = ("auto", "dummy", "ckpt_engine")
# A folder is data: nothing of it is run, and what is not in it is not fetched.
TRUST: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}

T = TypeVar("T")


class Replica:
    """A model, the engine that generates from it, and the adapter that updates it.

    Args:
        model: a causal LM on the CPU; its parameters are changed in place.
        tokenizer: the model's.
        name: what reports call this replica.
        label: weight version of the parameters as they are; None if they are no version, and the
            replica serves nothing before its first update.
        folder: what the parameters were loaded from, if they were.
        names: which of the model's names that version has; default all.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str,
        label: str | None,
        folder: Path | None = None,
        names: frozenset[str] | None = None,
    ) -> None:
        self.engine = Engine(model, tokenizer)
        self._live = LiveModel(model)
        self._adapter = TransformersAdapter(
            model,
            Identity(replica=name, engine=f"process {os.getpid()}"),
            self,
            (lambda: SafetensorsSource(safetensors_files(folder))) if folder else None,
            names,
        )
        self._attachments = Attachments(keep_maps=True)
        self._updating = threading.Lock()
        # Held while weights change, so that nobody digests half of each version.
        self._weights = threading.Lock()
        # Cleared before an update asks for that lock: whoever digests comes back to it at once.
        self._calm = threading.Event()
        self._calm.set()
        self._num_changes = 0
        self._scrubbing = self._adapter.scrub()
        # Orders an operator's pause and resume with those of an update.
        self._holding = threading.Lock()
        self._held_by_update = False
        self._label = label
        self._history: list[dict[str, Any]] = []
        self._trouble: tuple[str, str] | None = None
        self._held_by_operator = self._flush_cache = self._stale_cache = False
        self._expected_label: str | None = None
        if label is None:
            self.engine.set_accepting("the replica waits for its first weights")
        else:
            digest = self._adapter.base() or ""
            self.engine.set_version(label, digest)
            self._remember(label, digest)

    @property
    def state(self) -> str:
        """One of torn, quarantined, updating, waiting, paused, serving."""
        if self._trouble is not None:
            return self._trouble[0]
        if self._label is None:
            return "waiting"
        if self._updating.locked():
            return "updating"
        return "paused" if self._held_by_operator else "serving"

    @property
    def num_chunks(self) -> int:
        """Calls of `scrub` that look at every parameter once."""
        return self._live.num_chunks

    def info(self) -> dict[str, Any]:
        """The label, both digests as the live parameters have them now, state and history.

        `kept` are the digests of versions to which the replica can return by itself.

        Raises:
            DeadlineExceeded: an update was always under way.
        """
        return self._digested(self._info)

    def weight_digests(self, sample: float = 1.0, seed: int = 0) -> WeightDigests:
        """The digests of single tensors as the live parameters have them now.

        Args:
            sample: share of the bytes, above 0 and up to 1; whole tensors are taken.
            seed: which; replicas of the same names, dtypes and shapes choose alike.

        Raises:
            UsageError: that is no share.
            DeadlineExceeded: an update was always under way.
        """
        chosen = sample_names(self._live.metas({}), sample, seed)
        return self._digested(lambda: self._weight_digests(chosen))

    def scrub(self) -> None:
        """Compare the next chunk of the live parameters with what was loaded or published there.

        If it differs, the weights are of no version: the replica is torn, and serves nothing
        until an update has been published. While weights change it does nothing.
        """
        if not self._weights.acquire(timeout=SCRUB_SECONDS):
            return
        try:
            if self.state in ("torn", "waiting"):
                return
            name = next(self._scrubbing)
            if name is not None:
                self._adapter.disown()
                self._fail(f"{name!r} has changed in memory since it was written")
        finally:
            self._weights.release()

    def update(self, handle: str, *, weight_version: str | None, flush_cache: bool) -> None:
        """Take one update, from greeting to resume.

        Args:
            handle: of the rank that serves this replica.
            weight_version: the label that must be offered; None for any.
            flush_cache: recompute the cache of requests in flight under the new weights.

        Raises:
            UpdateRefused: another update is under way.
            UpdateFailed: it was not published; says why. The state says what is served.
        """
        if not self._updating.acquire(blocking=False):
            raise UpdateRefused("another update of this replica is under way; try again later")
        try:
            self._flush_cache, self._expected_label = flush_cache, weight_version
            outcome = session.run(handle, self._adapter, self._attachments)
        finally:
            self._updating.release()
        if outcome.state != "published":
            raise UpdateFailed(f"the update was not published: {outcome.error}")

    def pause(self) -> None:
        """The operator's pause: requests wait, updates still go through."""
        with self._holding:
            self._held_by_operator = True
        try:
            self.engine.pause(PAUSE_SECONDS)
        except DeadlineExceeded:
            self.resume()
            raise

    def resume(self) -> None:
        """End the operator's pause. During an update's pause, or when torn, requests still wait."""
        with self._holding:
            self._held_by_operator = False
            if not self._held_by_update:
                self._go_on()

    # ── what the adapter asks of the server around its model ────────────────────────────────

    def accept(self, version: Version) -> None:
        """Refuse a version other than the one that the caller named."""
        if self._expected_label not in (None, version.label):
            raise UpdateRefused(
                f"weight version {self._expected_label!r} was asked for, {version.label!r} offered"
            )

    def hold(self, timeout_seconds: float) -> None:
        """Stop at a token boundary; from here on the weights are the adapter's."""
        self._calm.clear()
        if not self._weights.acquire(timeout=timeout_seconds):
            self._calm.set()
            raise DeadlineExceeded("the weights are still being digested; try again")
        self._num_changes += 1
        with self._holding:
            self._held_by_update = True
        try:
            self.engine.pause(timeout_seconds)
        except DeadlineExceeded:
            self._let_go()
            raise

    def publish(self, version: Version, served: Served) -> None:
        """Label first, then caches: what is served never has another version's name."""
        digest = served.digest or ""
        self._label, self._trouble = version.label, None
        self.engine.set_version(version.label, digest)
        self._remember(version.label, digest)
        self._stale_cache = self._stale_cache or self._flush_cache
        self.engine.set_accepting(None)

    def release(self) -> None:
        """The weights are whole again: let requests go on, unless the operator holds them."""
        if self._trouble is not None and self._trouble[0] == "torn":
            self._trouble = None
            self.engine.set_accepting(None)
        self._let_go()

    def quarantine(self, reason: str) -> None:
        """Refuse requests, and be unhealthy, until an update has been published here."""
        if self.state == "torn":
            return  # which is worse, and mended by the same
        self._trouble = ("quarantined", reason)
        self.engine.set_accepting(f"the replica is quarantined: {reason}")

    def tear(self, reason: str) -> None:
        """The parameters are of no version: fail what is in flight and serve nothing."""
        self._fail(reason)
        self._settle()

    def _fail(self, reason: str) -> None:
        self._trouble = ("torn", reason)
        self.engine.set_accepting(f"the replica's weights are torn: {reason}")
        self.engine.fail_all(f"the replica's weights are torn: {reason}")

    # ── digests while requests and updates go on ────────────────────────────────────────────

    def _info(self) -> Generator[None, None, dict[str, Any]]:
        served = yield from self._adapter.recompute()
        return {
            "weight_version": self._label,
            "digest": served.digest,
            "served_digest": served.served_digest,
            "state": self.state,
            "reason": self._trouble[1] if self._trouble else None,
            "kept": list(self._adapter.kept),
            "history": list(self._history),
        }

    def _weight_digests(self, chosen: frozenset[str]) -> Generator[None, None, WeightDigests]:
        digests = yield from self._live.digesting(chosen)
        metas, tied = self._live.metas(digests), self._live.tied()
        return WeightDigests(
            weight_version=self._label,
            digest=version_digest(meta for meta in metas if meta.name in chosen),
            tensors=tuple(
                TensorDigest.of(meta, tied=tied[meta.name], digested=meta.name in chosen)
                for meta in metas
            ),
            not_persistent=tuple(sorted(self._live.not_persistent)),
        )

    def _digested(self, begin: Callable[[], Generator[None, None, T]]) -> T:
        """Digest in steps, and begin again if weights have changed between two of them."""
        deadline = time.monotonic() + INFO_SECONDS
        changes, steps = self._num_changes, begin()
        while True:
            calm = self._calm.wait(INFO_SECONDS) and self._weights.acquire(timeout=INFO_SECONDS)
            if not calm:
                raise DeadlineExceeded("the weights are still changing; ask again later")
            try:
                if changes != self._num_changes:
                    if time.monotonic() > deadline:
                        raise DeadlineExceeded("the weights change too often; ask again later")
                    changes, steps = self._num_changes, begin()
                next(steps)
            except StopIteration as end:
                result: T = end.value
                return result
            finally:
                self._weights.release()

    def _let_go(self) -> None:
        self._settle()
        with self._holding:
            self._held_by_update = False
            if not self._held_by_operator:
                self._go_on()

    def _settle(self) -> None:
        """Weights no longer change, if they did: whoever digests may go on."""
        if not self._calm.is_set():
            self._weights.release()
            self._calm.set()

    def _go_on(self) -> None:
        self.engine.resume(flush_cache=self._stale_cache)
        self._stale_cache = False

    def _remember(self, label: str, digest: str) -> None:
        self._history.append({"weight_version": label, "digest": digest, "at": time.time()})
        del self._history[:-HISTORY_LENGTH]


def load_replica(
    folder: Path,
    *,
    name: str,
    load_format: str,
    wait_for_initial_weights: bool,
    url: str = "ckptengine://",
) -> Replica:
    """A replica from a Hugging Face folder.

    Args:
        folder: configuration, tokenizer and, with "auto", weights.
        name: what reports call it.
        load_format: "auto" loads the weights, "dummy" makes random ones, "ckpt_engine" takes them
            from who has published them.
        wait_for_initial_weights: serve nothing before the first update.
        url: with "ckpt_engine", where from: see `startup.CkptEngineConnector`. One that waits
            makes a replica that does: its server is who offers it updates.

    Raises:
        UsageError: the folder, the load format or the URL is not usable.
        CheckpointEngineError: the weights could not be had from there.
    """
    if load_format not in LOAD_FORMATS:
        raise UsageError(f"--load-format is one of {', '.join(LOAD_FORMATS)}, not {load_format!r}")
    connector = CkptEngineConnector(url)
    if load_format != "ckpt_engine" and not connector.waits:
        raise UsageError("--ckpt-engine-url is for --load-format ckpt_engine")
    with _reading(folder):
        tokenizer = AutoTokenizer.from_pretrained(folder, **TRUST)
        config = AutoConfig.from_pretrained(folder, **TRUST)

    def initialize(config: PretrainedConfig) -> PreTrainedModel:
        with _reading(folder):
            made: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=config.dtype or torch.float32
            )
        return made

    model: PreTrainedModel
    if load_format == "auto":
        with _reading(folder):
            model = AutoModelForCausalLM.from_pretrained(
                folder, dtype="auto", use_safetensors=True, **TRUST
            )
        label = None if wait_for_initial_weights else "initial"
        return Replica(model, tokenizer, name=name, label=label, folder=folder)
    if load_format == "dummy" or connector.waits:
        waits = wait_for_initial_weights or load_format == "ckpt_engine"
        label = None if waits else "dummy"
        return Replica(initialize(config), tokenizer, name=name, label=label)
    loader = CkptEngineModelLoader(connector, initialize=initialize)
    model = loader.load_model(model_config=config)
    assert loader.loaded is not None, "a transformers model does not load itself"
    label, names = loader.loaded.version.label, loader.loaded.names
    return Replica(model, tokenizer, name=name, label=label, names=names)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """A folder that is not as it should be is its user's to mend."""
    try:
        yield
    except (OSError, ValueError, SafetensorError) as error:
        raise UsageError(f"{folder}: cannot be loaded: {str(error).splitlines()[0]}") from error
