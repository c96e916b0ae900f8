"""Starts processes of the tests in no time: what they import is imported once, and then forked.

    process = fork("ps/ps_rank.py", ["an argument"], {**os.environ, "RANK": "0"})
    process.stdout.readline()

A script runs as if Python had been started with it. What is to be started as its user would start
it, or by other means than a fork, is one of `subprocess`.
"""

from __future__ import annotations

import ast
import atexit
import functools
import gc
import json
import os
import pkgutil
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).parent
JOB_BYTES = 100_000
START_SECONDS = 60.0
FORKING = threading.Lock()


class Process:
    """A forked process: as much of `subprocess.Popen` as is needed."""

    def __init__(self, pid: int, descriptor: int, stdin: int, stdout: int) -> None:
        self.pid, self._descriptor = pid, descriptor
        self.stdin, self.stdout = os.fdopen(stdin, "w"), os.fdopen(stdout)

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


def fork(script: str, arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Start a script of the tests with this environment, and pipes for its input and output."""
    job = {"script": script, "arguments": arguments, "environment": dict(environment)}
    its_input, stdin = os.pipe()
    stdout, its_output = os.pipe()
    with FORKING:
        socket.send_fds(_nursery(), [json.dumps(job).encode()], [its_input, its_output])
        pid, descriptors, _, _ = socket.recv_fds(_nursery(), JOB_BYTES, 1)
    os.close(its_input)
    os.close(its_output)
    assert pid, "the nursery died"
    return Process(int(pid), *descriptors, stdin, stdout)


def fork_command(arguments: Sequence[str], environment: Mapping[str, str]) -> Process:
    """Start `ckpt-engine`, which has no input."""
    process = fork("ckpt_engine.py", arguments, environment)
    process.stdin.close()
    return process


@functools.cache
def _nursery() -> socket.socket:
    """The connection to the process that forks, which ends with this one."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.settimeout(START_SECONDS)
    with theirs:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen([sys.executable, __file__], stdin=theirs, env=environment)

    @atexit.register
    def end() -> None:
        ours.close()
        process.wait(START_SECONDS)

    return ours


# ── the nursery's side ──────────────────────────────────────────────────────────────────────


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    with socket.socket(fileno=0) as control:
        while True:
            message, descriptors, _, _ = socket.recv_fds(control, JOB_BYTES, 2)
            if not message:
                return
            job = json.loads(message)
            import_what_it_imports(HERE / job["script"])
            gc.freeze()  # a child has nothing to collect of what it begins with
            if os.fork() == 0:
                own = os.pidfd_open(os.getpid())
                socket.send_fds(control, [str(os.getpid()).encode()], [own])
                os.close(own)
                break
            for descriptor in descriptors:
                os.close(descriptor)
    live(job["script"], job["arguments"], job["environment"], descriptors)


def import_what_it_imports(script: Path) -> None:
    """But for modules of the tests, which may mean something else in another room."""
    for statement in ast.parse(script.read_bytes()).body:
        if isinstance(statement, ast.ImportFrom):
            names = [f"{statement.module}.{alias.name}" for alias in statement.names]
        elif isinstance(statement, ast.Import):
            names = [alias.name for alias in statement.names]
        else:
            continue
        for name in names:
            package = name.partition(".")[0]
            if not any((folder / f"{package}.py").exists() for folder in (HERE, script.parent)):
                pkgutil.resolve_name(name)


def live(
    script: str, arguments: Sequence[str], environment: Mapping[str, str], descriptors: list[int]
) -> None:
    """Be Python that was started with a script."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w")
    path = str(HERE / script)
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    runpy.run_path(path, run_name="__main__")


if __name__ == "__main__":
    main()
