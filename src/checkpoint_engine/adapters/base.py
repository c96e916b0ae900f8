"""What the transaction asks of an inference engine.

    prepare ─► pause ─► apply ─► check ─► publish ─► resume
        └ abort   └───────┴────────┴── roll_back ─► resume, or tear

Every step may raise; the session turns that into a "no", with the traceback. Only `pause` to
`resume` keep requests waiting. A new engine is one class with these methods.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from checkpoint_engine.adapters.staged import Staged
from checkpoint_engine.manifest import Version

__all__ = ["Adapter", "Identity", "Served"]


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

    def recall(self, digest: str) -> Staged | None:
        """The version of this digest, if it was served before and its memory is still kept here."""
        ...

    def prepare(self, staged: Staged, version: Version) -> str:
        """While serving: verify, check that everything fits, and secure the way back.

        Returns "staged", "snapshot" or "none": how `roll_back` would work. Owns `staged` from
        here on, even when it raises: releases it in `abort` or `roll_back` unless it was recalled,
        or keeps it as the next way back.
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
