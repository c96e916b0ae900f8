"""An engine known only by its loader: what `worker.update_weights_from_ipc` is given.

The engine has paused by itself when it calls us, and resumes when we return. `run` takes the new
weights, `post_hook` post-processes them. What a loader makes of them is its own affair, so bytes
are verified where they are staged, and the way back is the version that this loader was given last:
staged memory that is kept for it, or its open files. Before a first update it is a snapshot of the
module whose loader this is; without a module, or memory for one, there is none.

The loader of a module is watched, too: it must write every parameter (`adapters.module`).

A streamed version is read, checked and loaded in groups of whole tensors: memory for one group, or
for the largest tensor, is needed on top. So is any version on a GPU, where each group is checked
in the GPU's memory before the loader is given it (`adapters.feed`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from checkpoint_engine.adapters.base import Content, Identity, Served
from checkpoint_engine.adapters.feed import Feed
from checkpoint_engine.adapters.hook import run_hook
from checkpoint_engine.adapters.module import Snapshot, Watch
from checkpoint_engine.adapters.streamed import Streamed
from checkpoint_engine.errors import AdapterError
from checkpoint_engine.manifest import Version
from checkpoint_engine.memory import IdleWorkers, byte_workers

__all__ = ["CallbackAdapter", "Kept", "Run"]

Run = Callable[[list[tuple[str, torch.Tensor]]], object]

GROUP_BYTES = 512 << 20
STREAMED_BYTES = 64 << 20


@dataclass(frozen=True)
class Kept:
    """What is remembered of a loader from one update to the next.

    `torn`: its weights are of no version, so that a snapshot of them would lead nowhere.
    """

    served: Content | None = None
    previous: Content | None = None
    epoch: int = 0
    undecided: str | None = None
    torn: bool = False


class CallbackAdapter:
    """See the module's text; the methods are those of `adapters.base.Adapter`.

    Args:
        run: takes a list of (name, tensor) and loads it; called once or more for each update.
        post_hook: called after the last `run`.
        device: where the tensors are handed over; "cpu" hands over views of staged memory.
        kept: what the adapter of this loader's last update remembered.
    """

    def __init__(
        self,
        run: Run,
        post_hook: Callable[[], object] | None,
        device: torch.device,
        kept: Kept,
    ) -> None:
        self.identity = _identity()
        self.epoch, self.undecided = kept.epoch, kept.undecided
        self._run, self._post_hook, self._device = run, post_hook, device
        self._served, self._previous = kept.served, kept.previous
        owner = getattr(run, "__self__", None)
        self._model = owner if isinstance(owner, torch.nn.Module) else None
        self._snapshot: Snapshot | None = None
        self._watch: Watch | None = None
        self._feed: Feed | None = None
        self._torn = kept.torn
        self._incoming: Content | None = None
        self._loaded = False  # whether the loader has been called

    def keep(self) -> Kept:
        """What the next update's adapter needs to know."""
        return Kept(self._served, self._previous, self.epoch, self.undecided, self._torn)

    def base(self) -> str | None:
        """Digest of what this loader was given last."""
        return self._served.manifest.digest if self._served else None

    def recall(self, digest: str) -> Content | None:
        """What the loader was given before the last, as it was staged."""
        if self._previous is None or self._previous.manifest.digest != digest:
            return None
        self._previous.discard_writes()
        return self._previous

    def prepare(self, content: Content, version: Version) -> str:
        """Verify the staged bytes; most of names and shapes is the loader's to check.

        Raises:
            AdapterError: the version lacks a tensor that a module was given before, or the GPU has
                no memory for what it is copied through.
        """
        self._incoming = content
        self._feed = self._new_feed(content)
        if self._feed is None or isinstance(content, Streamed):
            with IdleWorkers() as pool:
                content.verify(pool)
        self._watch = self._new_watch()
        if self._served is not None and self._served.is_there():
            if self._model is not None:
                _check_complete(content, self._served)
            return self._served.way_back
        if self._model is not None and not self._torn:
            self._snapshot = Snapshot.take(self._model)
        return "snapshot" if self._snapshot else "none"

    def abort(self) -> None:
        """Release the staged version."""
        self._drop_incoming()
        self._snapshot = None
        self._rest()

    def pause(self, timeout_seconds: float) -> None:
        """The engine has paused before it called."""

    def apply(self) -> None:
        """Run the loader over every tensor, then the hook."""
        assert self._incoming is not None, "prepare comes before apply"
        self._load(self._incoming, self._watch)

    def check(self) -> Served:
        """The engine does not show its parameters."""
        return Served(digest=None, served_digest=None)

    def publish(self) -> None:
        """Keep the new version and the one before; the label is the engine's own."""
        before, self._previous, self._served = self._previous, self._served, self._incoming
        self._incoming = self._snapshot = None
        self._torn = False
        if before is not None and before is not self._served:
            before.release()
        self._rest()

    def roll_back(self) -> None:
        """Restore the snapshot, or load the version before again, as it was staged.

        There is nothing to do if the first bytes of a streamed version were found wrong.

        Raises:
            AdapterError: there is none, or the loader fails on it too.
            VerificationError, SourceError: its bytes are not what they were.
        """
        self._drop_incoming()
        if not self._loaded:
            self.abort()
            return
        if self._snapshot is not None:
            self._snapshot.restore()
            self.abort()
            return
        if self._served is None:
            raise AdapterError(
                "the loader failed and there is no version to go back to: restart the engine, or "
                "send a complete version before it serves again"
            )
        self._served.discard_writes()
        self._feed = self._new_feed(self._served)
        if self._feed is None:
            with byte_workers() as pool:
                self._served.verify(pool)
        self._load(self._served, self._new_watch())
        self._rest()

    def resume(self) -> None:
        """The engine resumes when it is returned to."""

    def quarantine(self, reason: str) -> None:
        """The failed call is what the engine gets to know."""

    def tear(self, reason: str) -> None:
        """The failed call is what the engine gets to know; nothing can be restored from here."""
        self.abort()
        self._served = None
        self._torn = True

    def _drop_incoming(self) -> None:
        if self._incoming is not None and self._incoming is not self._previous:
            self._incoming.release()
        self._incoming = None

    def _rest(self) -> None:
        if self._feed is not None:
            self._feed = None
            torch.cuda.empty_cache()  # what went through it is the engine's again
        for kept in (self._served, self._previous):
            if kept is not None:
                kept.rest()

    def _new_watch(self) -> Watch | None:
        return Watch(self._model) if self._model is not None else None

    def _new_feed(self, content: Content) -> Feed | None:
        return Feed(content, self._device) if self._device.type == "cuda" else None

    def _load(self, content: Content, watch: Watch | None) -> None:
        groups = self._feed.groups() if self._feed else self._groups(content)
        with contextlib.closing(groups):  # also by what fails: the way back needs the memory
            for group in groups:
                self._give(group, watch)
                del group  # its memory is the next one's
        with watch or contextlib.nullcontext():
            if self._post_hook is not None:
                run_hook(self._post_hook, self._model, self._device)
        if watch is not None:
            watch.check()
        if self._device.type == "cuda":  # what fails there, fails here
            torch.cuda.synchronize(self._device)

    def _groups(self, content: Content) -> Generator[list[tuple[str, torch.Tensor]], None, None]:
        group: list[tuple[str, torch.Tensor]] = []
        group_bytes, most_bytes = 0, self._most_bytes(content)
        for meta in content.manifest.tensors:
            if group and group_bytes + meta.length > most_bytes:
                yield group
                group, group_bytes = [], 0
            group.append((meta.name, content.tensor(meta).to(self._device)))
            group_bytes += meta.length
        yield group

    def _give(self, group: list[tuple[str, torch.Tensor]], watch: Watch | None) -> None:
        self._loaded = True
        with watch or contextlib.nullcontext():
            if watch is not None:
                watch.give(group)
            self._run(group)

    def _most_bytes(self, content: Content) -> float:
        """Of one call of the loader; views of staged memory cost nothing."""
        if isinstance(content, Streamed):
            return STREAMED_BYTES
        return math.inf if self._device.type == "cpu" else GROUP_BYTES


def _check_complete(content: Content, served: Content) -> None:
    """What a version lacks would go on being served from the version before."""
    names = {meta.name for meta in content.manifest.tensors}
    missing = [meta.name for meta in served.manifest.tensors if meta.name not in names]
    if missing:
        raise AdapterError(
            f"the version lacks {len(missing)} tensors that the one before had, such as "
            f"{missing[0]!r}: send every tensor of the model"
        )


def _identity() -> Identity:
    """Workers of one engine share their parent process, and know each other by torch's group."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        return Identity(
            replica=f"engine {os.getppid()} rank {rank}",
            engine=f"parent {os.getppid()}",
            rank=rank,
            world_size=world_size,
        )
    return Identity(replica=f"engine {os.getpid()}", engine=f"process {os.getpid()}")
