"""Our own replica: one call does everything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import AdapterError

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
        """It pauses, labels and resumes by itself, in the session.

        vLLM's workers answer with their errors, since they may not raise: 200 says nothing then.
        """
        body = {
            "method": "update_weights_from_ipc",
            "args": [dict(handles)],
            "timeout": timeout_seconds,
        }
        answer = endpoint.post("/collective_rpc", body, timeout_seconds=timeout_seconds)
        results = answer.get("results") if isinstance(answer, dict) else None
        for result in results if isinstance(results, list) else []:
            if isinstance(result, dict) and result.get("error"):
                raise AdapterError(f"{endpoint.url}/collective_rpc: {result['error']}")
