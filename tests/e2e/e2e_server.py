"""Replica processes that tests start, and what they ask of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx

from nursery import Process, fork_command

COMMAND = (sys.executable, "-m", "checkpoint_engine")


def make_environment(state: Path) -> dict[str, str]:
    """An environment whose sockets and registry are the test's own."""
    sockets = Path("/tmp") / f"ce-{os.getpid()}"  # short: a socket's path has 107 bytes
    sockets.mkdir(mode=0o700, exist_ok=True)
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("CKPT_ENGINE", "RANK"))},
        "CKPT_ENGINE_SOCKET_DIR": str(sockets),
        "CKPT_ENGINE_STATE_DIR": str(state),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


class Server:
    """A replica process and where it answers."""

    def __init__(self, process: subprocess.Popen[str] | Process) -> None:
        self.process = process

    @cached_property
    def endpoint(self) -> str:
        """Waits for it to serve, the first time."""
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        assert words, "the replica ended before it served"
        return words[-1]

    def info(self) -> dict[str, Any]:
        return dict(httpx.get(f"{self.endpoint}/weight_info", timeout=30).json())

    def complete(self, **body: Any) -> httpx.Response:
        return httpx.post(f"{self.endpoint}/v1/completions", json=body, timeout=30)


class Servers:
    """Starts replicas in one environment, and ends them all when closed.

    They are forked, if no other command is given.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._processes: list[subprocess.Popen[str] | Process] = []

    def start(self, folder: Path, *options: str, command: Sequence[str] | None = None) -> Server:
        arguments = ["replica", "--model", str(folder), "--port", "0", *options]
        environment = dict(self._environment)
        process: subprocess.Popen[str] | Process
        if command is None:
            process = fork_command(arguments, environment)
        else:
            process = subprocess.Popen(
                [*command, *arguments], stdout=subprocess.PIPE, text=True, env=environment
            )
        self._processes.append(process)
        return Server(process)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(30)
            assert process.stdout is not None
            process.stdout.close()
