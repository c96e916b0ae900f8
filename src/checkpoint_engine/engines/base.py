"""What a rank needs to know of an engine to have it take an update.

The transaction is between sessions in the engine's workers and their rank (`update.session`); over
HTTP an engine is only asked to begin it, and to do around it what its workers cannot: stop
requests, drop caches, show the label. Its answer comes when all of that is over.

An engine is one class with these methods. Those of third parties are found by entry points of the
group `checkpoint_engine.engines`, each a function without arguments that returns one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol

from checkpoint_engine.engines.endpoint import Endpoint

__all__ = ["Engine"]


class Engine(Protocol):
    """One kind of engine. It keeps nothing between calls, which come from several threads.

    Attributes:
        name: what users choose it by, as in `--engine vllm`.
    """

    name: ClassVar[str]

    def recognises(self, endpoint: Endpoint) -> bool:
        """Whether the server behind an endpoint is of this kind: by asking, not by guessing.

        Raises:
            AdapterError: it does not answer at all.
        """
        ...

    def update(
        self, endpoint: Endpoint, handles: Mapping[str, str], label: str, timeout_seconds: float
    ) -> None:
        """Have it take one update, whole; returns when requests are served again.

        Args:
            endpoint: where it listens.
            handles: by device uuid, where its workers' sessions say hello.
            label: of the version, which the engine is to show once it serves it.
            timeout_seconds: until its workers are ready, and again until it is over.

        Raises:
            AdapterError: it did not take the update, or did not go on as it should afterwards.
        """
        ...
