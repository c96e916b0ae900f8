"""A transformers model that serves in this process.

Everything that can be prepared is prepared while requests go on: the staged bytes are verified,
names, shapes and dtypes checked, casts computed, and the way back secured. The way back is the
version before, which is kept in its staged memory or, if it was streamed, in its open files; before
the first update it is a snapshot of the parameters, or for a streamed one, for which memory is
short, the files that the model was loaded from. Requests wait only while bytes are copied (or read)
and digested.

After an update the version before stays, too: the fleet can return to it with no server left.

    adapter = TransformersAdapter(model, identity, serving)
    outcome = session.run(handle, adapter, attachments)
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Protocol

import torch

from checkpoint_engine.adapters.base import Content, Identity, Served
from checkpoint_engine.adapters.live import LiveModel, Plan, Storage, check_written, write
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.errors import AdapterError, SourceError, VerificationError
from checkpoint_engine.manifest import Version
from checkpoint_engine.memory import IdleWorkers, byte_workers
from checkpoint_engine.sources import SafetensorsSource
from checkpoint_engine.store import digest_in_place

__all__ = ["Serving", "TransformersAdapter"]


class Serving(Protocol):
    """The server around the model."""

    def accept(self, version: Version) -> None:
        """Raise UpdateRefused if this is not the version that was asked for."""
        ...

    def hold(self, timeout_seconds: float) -> None:
        """Stop requests at a token boundary; until `release`, weights may change."""
        ...

    def publish(self, version: Version, served: Served) -> None:
        """Label what is served now, then drop the caches that are stale."""
        ...

    def release(self) -> None:
        """Weights no longer change: let requests go on."""
        ...

    def quarantine(self, reason: str) -> None:
        """Be unhealthy until the next update."""
        ...

    def tear(self, reason: str) -> None:
        """Stay paused and unhealthy."""
        ...


class TransformersAdapter:
    """See the module's text; the methods are those of `adapters.base.Adapter`.

    Args:
        model: on the CPU; its parameters are written in place.
        identity: who greets.
        serving: the server around the model.
        loaded_from: opens the files that the model was loaded from, if it was.
        names: which of the model's names the version that it was loaded with has; default all.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        identity: Identity,
        serving: Serving,
        loaded_from: Callable[[], SafetensorsSource] | None = None,
        names: frozenset[str] | None = None,
    ) -> None:
        self.identity = identity
        self.epoch = 0
        self.undecided: str | None = None
        self._live = LiveModel(model)
        self._serving = serving
        self._loaded_from = loaded_from
        self._names = self._live.names if names is None else self._live.names & names
        self._recorded = self._live.digests()
        self._served = self._describe(self._recorded, self._names)
        self._base: Content | None = None
        self._previous: Content | None = None
        self._incoming: Content | None = None
        self._version: Version | None = None
        self._plan = self._back = Plan()
        self._written: dict[Storage, bytes] = {}
        self._next: Served | None = None
        self._pause_ends = math.inf
        self._torn = False

    def recompute(self) -> Generator[None, None, Served]:
        """Digest the live parameters, one chunk in each step, as `LiveModel.digesting` does."""
        digests = yield from self._live.digesting(self._live.names)
        return self._describe(digests, self._names)

    def scrub(self) -> Iterator[str | None]:
        """Compare what is live with what was written for ever; see `LiveModel.differing`."""
        while True:
            yield from self._live.differing(lambda storage: self._recorded[storage])
            yield None

    def disown(self) -> None:
        """The live parameters are of no version, until an update has been published.

        Unlike `tear` it leaves an update alone that is being prepared, which may mend them.
        """
        self._torn = True

    @property
    def names(self) -> frozenset[str]:
        """Which of the model's names the version that is served has."""
        return self._names

    def base(self) -> str | None:
        """Digest of what is served, as it was last computed; None if that is no version."""
        return None if self._torn else self._served.digest

    def recall(self, digest: str) -> Content | None:
        """The version before the one that is served, if it is that one."""
        return self._previous if digest in self.kept else None

    @property
    def kept(self) -> tuple[str, ...]:
        """Digests of the versions that this replica can return to by itself."""
        return (self._previous.manifest.digest,) if self._previous else ()

    def prepare(self, content: Content, version: Version) -> str:
        """See the module's text.

        Raises:
            VerificationError: the staged bytes are not the version's.
            SourceError: a file of a streamed version is not what it was.
            AdapterError: the version does not fit the model.
        """
        self._incoming, self._version = content, version
        self._serving.accept(version)
        with IdleWorkers() as pool:
            content.verify(pool)
        self._plan = self._live.bind(content)
        return self._secure_way_back(streamed=isinstance(content, Streamed))

    def abort(self) -> None:
        """Release the staged version."""
        self._plan, self._written = Plan(), {}
        if self._base is None:
            self._back = Plan()
        if self._incoming is not None and self._incoming is not self._previous:
            self._incoming.release()
        self._incoming = self._version = self._next = None
        self._rest()

    def pause(self, timeout_seconds: float) -> None:
        """Wait for the token boundary."""
        self._pause_ends = time.monotonic() + timeout_seconds
        self._serving.hold(timeout_seconds)

    def apply(self) -> None:
        """Copy every chunk and digest it where it landed.

        Raises:
            DeadlineExceeded: the pause would last longer than it may.
            SourceError, VerificationError: a streamed chunk is not what was announced.
        """
        with byte_workers() as pool:
            self._written = write(self._plan, pool, deadline=self._pause_ends)

    def check(self) -> Served:
        """Compare the digests of the live parameters with those of the version."""
        assert self._incoming is not None, "prepare comes before check"
        check_written(self._plan, self._written)
        names = self._live.names & {meta.name for meta in self._incoming.manifest.tensors}
        self._next = self._describe(self._written, names)
        return self._next

    def publish(self) -> None:
        """Label, caches; the version before stays, the one before that is no longer needed."""
        assert self._next is not None, "check comes before publish"
        assert self._incoming is not None, "prepare comes before publish"
        assert self._version is not None, "prepare comes before publish"
        self._served, self._next = self._next, None
        self._names = self._live.names & {m.name for m in self._incoming.manifest.tensors}
        before, self._previous, self._base = self._previous, self._base, self._incoming
        self._incoming, self._torn = None, False
        self._back, self._plan = self._plan, Plan()
        self._recorded, self._written = self._written, {}
        if before is not None and before is not self._base:
            before.release()
        self._rest()
        self._serving.publish(self._version, self._served)

    def roll_back(self) -> None:
        """Write the base again and check that it is what was served before.

        Without a way back that succeeds only while nothing has been written.

        Raises:
            VerificationError: it is not.
            SourceError: the files that lead back can no longer be read.
        """
        with byte_workers() as pool:
            check_written(self._back, write(self._back, pool))
        if self._live.digest() != self._served.served_digest:
            raise VerificationError(
                "the way back did not lead to what was served before"
                if self._back.copies
                else "weights had changed and there is no way back: update this replica again"
            )
        self._torn = False
        self.abort()

    def resume(self) -> None:
        """Let requests go on, unless the parameters are of no version."""
        if not self._torn:
            self._serving.release()

    def quarantine(self, reason: str) -> None:
        """Keep the replica out of service until the next update."""
        self._serving.quarantine(reason)

    def tear(self, reason: str) -> None:
        """Stay paused; the parameters are of no version."""
        self._torn = True
        self.abort()
        self._serving.tear(reason)

    def _rest(self) -> None:
        for kept in (self._base, self._previous):
            if kept is not None:
                kept.rest()

    def _secure_way_back(self, *, streamed: bool) -> str:
        """Fix how `roll_back` will work, if it will; see the module's text."""
        if self._base is not None and not self._base.is_there():
            self._base.release()
            self._base, self._back = None, Plan()
        if self._base is None and streamed:
            self._base = self._loaded()
        if self._base is not None:
            return self._base.way_back
        if streamed:
            return "none"
        self._back = self._live.snapshot()
        return "snapshot"

    def _loaded(self) -> Content | None:
        """The files that the model was loaded from, if they hold exactly what is served."""
        if self._loaded_from is None:
            return None
        try:
            source = self._loaded_from()
            loaded = Streamed(digest_in_place(source), source.files)
            back = self._live.bind(loaded)
            check_written(back, self._recorded)
        except (SourceError, AdapterError):
            return None  # they do not lead back: the report says "none"
        self._back = back
        return loaded

    def _describe(self, digests: Mapping[Storage, bytes], names: frozenset[str]) -> Served:
        served = self._live.digest_of(digests, self._live.names)
        same = names == self._live.names
        digest = served if same else self._live.digest_of(digests, names)
        return Served(digest=digest, served_digest=served)
