"""Starts `ckpt-engine replica` in no time: what it imports is imported once, here, and forked.

    with Nursery() as nursery:
        process = nursery.start(["replica", "--model", ...], environment)

A process that is to be started as its user would start it, or by other means than a fork, is one of
`subprocess`.
"""

from __future__ import annotations

import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from checkpoint_engine.cli import main
from children import TIMEOUT_SECONDS, Child, serve

IMPORTED_BY_A_REPLICA = (
    "checkpoint_engine.replica.replica",
    "checkpoint_engine.replica.server",
    "transformers.models.qwen3.modeling_qwen3",
)


class Process:
    """A forked command: as much of `subprocess.Popen` as is needed."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid, self.stdout = pid, connection.makefile("r")
        connection.close()  # the file keeps it open
        self._descriptor = os.pidfd_open(pid)

    def __del__(self) -> None:
        os.close(self._descriptor)

    def poll(self) -> int | None:
        """None while it runs; the exit status is the nursery's to know."""
        return 0 if select.select([self._descriptor], [], [], 0)[0] else None

    def wait(self, timeout: float) -> None:
        if not select.select([self._descriptor], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            signal.pidfd_send_signal(self._descriptor, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery(Child):
    """The process from which commands are forked."""

    def __init__(self) -> None:
        super().__init__("replica_nursery.py", HF_HUB_OFFLINE="1")

    def start(self, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
        with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(folder) / "out")
            listener.bind(address)
            listener.listen()
            listener.settimeout(TIMEOUT_SECONDS)
            pid = self.call("fork", out=address, arguments=arguments, environment=environment)
            return Process(pid, listener.accept()[0])


class Forks:
    """The nursery's commands."""

    def fork(self, out: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
        """The pid of a new process that writes to the socket at `out`."""
        child = os.fork()
        if child == 0:
            run(out, arguments, environment)
        return child


def run(out: str, arguments: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.environ.clear()
        os.environ.update(environment)
        with socket.socket(socket.AF_UNIX) as connection, open(os.devnull) as nothing:
            connection.connect(out)
            os.dup2(nothing.fileno(), 0)
            os.dup2(connection.fileno(), 1)
        sys.stdout = os.fdopen(1, "w")
        sys.argv = ["ckpt-engine", *arguments]
        main()
    except SystemExit:
        pass
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


if __name__ == "__main__":
    for name in IMPORTED_BY_A_REPLICA:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    serve(Forks())
