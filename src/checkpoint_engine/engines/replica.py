"""Our own replica: one call does everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from checkpoint_engine.engines.endpoint import Endpoint

__all__ = ["Replica"]


class Replica:
    """`ckpt-engine replica`, and whatever speaks as it does; see `Engine`."""

    name: ClassVar[str] = "replica"

    def recognises(self, endpoint: Endpoint) -> bool:
        """By whom its model is owned."""
        return endpoint.owner() == "ckpt-engine"

    def update(
        self, endpoint: Endpoint, handles: Mapping[str, str], label: str, timeout_seconds: float
    ) -> None:
        """It pauses, labels and resumes by itself, in the session."""
        body = {
            "method": "update_weights_from_ipc",
            "args": [dict(handles)],
            "timeout": timeout_seconds,
        }
        endpoint.post("/collective_rpc", body, timeout_seconds=timeout_seconds)
