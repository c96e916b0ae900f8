"""A replica process that a test has started."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from typing import Any

import httpx


@dataclass(frozen=True)
class Server:
    """A replica process and where it answers."""

    process: subprocess.Popen[str]
    endpoint: str

    def info(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.endpoint}/weight_info", timeout=30).json())

    def complete(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.endpoint}/v1/completions", json=body, timeout=30)
