"""What the transaction asks of an inference engine.

    prepare ─► pause ─► apply ─► check ─► publish ─► resume
        └ abort   └───────┴────────┴── roll_back ─► resume, or tear

Every step may raise; the session turns that into a "no", with the traceback. Only `pause` to
`resume` keep requests waiting. A new engine is one class with these methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec
import torch

from checkpoint_engine.manifest import Manifest, TensorMeta, Version
from checkpoint_engine.memory import Workers

__all__ = ["Adapter", "Content", "Identity", "Served"]


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who greets.

    `engine` is equal for the workers of one engine; `rank` and `world_size` count those.
    """

    replica: str
    engine: str
    rank: int = 0
    world_size: int = 1


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """Digests recomputed from live parameters; None where the engine does not show them.

    `digest` covers the version's names, `served_digest` every parameter and persistent buffer.
    """

    digest: str | None
    served_digest: str | None


class Content(Protocol):
    """The bytes of one version, wherever they lie: `staged.Staged`, `streamed.Streamed`.

    Attributes:
        manifest: its tensors, validated.
        way_back: how an engine returns to it: "staged" from memory, "source" from files, "peer"
            from other servers' memory.
    """

    manifest: Manifest
    way_back: str

    def verify(self, pool: Workers) -> None:
        """While serving: raise unless the bytes are those of the manifest, or are to be had."""
        ...

    def is_there(self) -> bool:
        """Whether it can still be read, as far as can be seen without reading it."""
        ...

    def tensor(self, meta: TensorMeta) -> torch.Tensor:
        """One whole tensor: a view of memory, or read into memory of its own, and checked."""
        ...

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every name with its tensor, one after the other."""
        ...

    def chunk(self, meta: TensorMeta, start: int, end: int) -> Callable[[], memoryview]:
        """Gives one digest chunk, checked; valid until its thread asks for another."""
        ...

    def discard_writes(self) -> None:
        """Forget what was written into its tensors."""
        ...

    def rest(self) -> None:
        """It is kept, and not read before `verify` or `is_there` is called again."""
        ...

    def release(self) -> None:
        """It is no longer needed."""
        ...


class Adapter(Protocol):
    """One worker of one engine. Its methods are called by one session at a time.

    Attributes:
        identity: what it says of itself when it greets a rank.
        epoch: the highest epoch offered so far; the session writes it.
        undecided: an update that was applied and never decided; the session writes it.
    """

    identity: Identity
    epoch: int
    undecided: str | None

    def base(self) -> str | None:
        """Digest of the version being served, None if the engine does not know."""
        ...

    def recall(self, digest: str) -> Content | None:
        """The version of this digest, if it was served before and is still kept here."""
        ...

    def prepare(self, content: Content, version: Version) -> str:
        """While serving: verify, check that everything fits, and secure the way back.

        Returns "staged", "snapshot", "source", "peer" or "none": how `roll_back` works. Owns
        `content` from here on, even when it raises: releases it in `abort` or `roll_back` unless it
        was recalled, or keeps it as the next way back.
        """
        ...

    def abort(self) -> None:
        """Release what `prepare` took, if anything; no weight has changed."""
        ...

    def pause(self, timeout_seconds: float) -> None:
        """Stop requests at the next token boundary, or raise DeadlineExceeded."""
        ...

    def apply(self) -> None:
        """Write the prepared weights into the live model."""
        ...

    def check(self) -> Served:
        """Recompute what is served now; raises VerificationError if it is not what was sent."""
        ...

    def publish(self) -> None:
        """Change the label, then the caches. The version is decided: nothing is rolled back."""
        ...

    def roll_back(self) -> None:
        """Return to the base, verify it, release the staged version; torn if this raises."""
        ...

    def resume(self) -> None:
        """Let requests go on."""
        ...

    def quarantine(self, reason: str) -> None:
        """Keep the replica out of service until an update has brought it forward."""
        ...

    def tear(self, reason: str) -> None:
        """The weights are of no version: stay paused and unhealthy, and say so."""
        ...
