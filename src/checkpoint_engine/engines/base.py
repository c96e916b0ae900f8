"""What a rank needs to know of an engine to have it take an update.

The transaction is between sessions in the engine's workers and their rank (`update.session`); over
HTTP an engine is only asked to begin it, and to do around it what its workers cannot: stop
requests, drop caches, show the label. Its answer comes when all of that is over.

An engine is one class with these methods. Those of third parties are found by entry points of the
group `checkpoint_engine.engines`, each a function without arguments that returns one.

LoRA adapters have no session in a worker: an engine that takes them reads them from a folder, and
has the methods of `LoraEngine`, too, which `adapters.lora` calls in this order:

    check ─► hold ─► load or unload ─► let go
                        └─ failed, as did the way back: unload ─► drop caches ─► let go
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Protocol, runtime_checkable

from checkpoint_engine.engines.endpoint import Endpoint

__all__ = ["Engine", "LoraEngine"]


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


@runtime_checkable
class LoraEngine(Engine, Protocol):
    """An engine that takes LoRA adapters while it runs, and shows the path of each.

    Every method raises AdapterError if the engine did not do it; says what it said.
    """

    def check_lora(
        self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float
    ) -> None:
        """Raise unless it would take the adapter in this folder. What it serves stays as it is."""
        ...

    def hold_loras(self, endpoint: Endpoint, timeout_seconds: float) -> bool:
        """Keep requests waiting, if they can wait while an adapter is replaced.

        Returns:
            Whether `let_go_loras` is due; not if somebody else keeps them waiting.
        """
        ...

    def load_lora(self, endpoint: Endpoint, name: str, folder: str, timeout_seconds: float) -> None:
        """Serve the adapter in this folder under this name, in place of what had it before.

        No request that uses it may fail for it, nor end as a mixture of what two adapters have
        cached. Returns once the engine reads the folder of the one before no more.
        """
        ...

    def unload_lora(self, endpoint: Endpoint, name: str, timeout_seconds: float) -> bool:
        """Serve nothing under this name, if anything is; requests in flight end as they began.

        Returns:
            Whether its folder may go: nobody in flight needs it. Until it has, an engine may load
            it again for somebody who asks; so this is called again afterwards.
        """
        ...

    def drop_lora_caches(self, endpoint: Endpoint) -> None:
        """Return once nobody can be answered from what two adapters have cached."""
        ...

    def let_go_loras(self, endpoint: Endpoint) -> None:
        """Let requests go on."""
        ...
