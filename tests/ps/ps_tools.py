"""Versions of a small model, and processes that are spoken to in lines of JSON."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.ps import ParameterServer

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 60.0
STOP_SECONDS = 10.0
DEVICE = f"GPU-{platform.machine()}"

Handles = Sequence[tuple[str, str]]


def version(seed: int) -> dict[str, torch.Tensor]:
    """Tensors of three dtypes, one of them larger than a page."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "bias": torch.randn(10, generator=generator).to(torch.bfloat16),
        "step": torch.tensor(seed),
        "weight": torch.randn(64, 33, generator=generator),
    }


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """What is equal for equal bytes."""
    return {
        name: hashlib.sha256(
            bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        ).hexdigest()
        for name, tensor in tensors.items()
    }


def register(server: ParameterServer, name: str, seed: int, **options: Any) -> None:
    server.register_checkpoint(name, named_tensors=version(seed), **options)
    server.gather_metas(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.005)


class Child:
    """A script of this folder in a process of its own; the context manager ends it.

    It takes commands, one JSON object a line, and answers each with {"id": ..., ...}. What else
    it says are events, {"event": ..., ...}.
    """

    def __init__(self, script: str, *arguments: str, options: Sequence[str] = (), **env: str):
        self._process = subprocess.Popen(
            [sys.executable, *options, str(HERE / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        self._heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._num_commands = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, do: str, **arguments: Any) -> int:
        """Give a command; returns its id."""
        with self._changed:
            self._num_commands += 1
            number = self._num_commands
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        return number

    def call(self, do: str, **arguments: Any) -> Any:
        """Give a command and wait for its result; raises RuntimeError with the child's error."""
        return self.result(self.send(do, **arguments))

    def result(self, number: int) -> Any:
        """Wait for the result of a command."""
        answer = self._wait_for(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of this kind, which is then forgotten."""
        found = self._wait_for(lambda message: message.get("event") == event)
        with self._changed:
            self._heard.remove(found)
        return found

    def forget(self) -> None:
        """Forget the events so far."""
        with self._changed:
            self._heard.clear()

    def kill(self) -> None:
        """SIGKILL: no handler runs."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(TIMEOUT_SECONDS)

    def close(self) -> None:
        """End of input, which every script takes as its end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self.alive:
            try:
                self._process.stdin.close()
                self._process.wait(STOP_SECONDS)
            except (subprocess.TimeoutExpired, BrokenPipeError):
                self.kill()
        self._reader.join(TIMEOUT_SECONDS)
        for pipe in (self._process.stdin, self._process.stdout):
            if not pipe.closed:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wait_for(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [message for message in self._heard if wanted(message)]

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, TIMEOUT_SECONDS)
            messages = found()
        if not messages:
            raise RuntimeError("the process died" if self._ended else "the process says nothing")
        return messages[0]

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            with self._changed:
                self._heard.append(json.loads(line))
                self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class EngineProcess(Child):
    """An engine that is known by its loader alone: see `ps_engine.py`."""

    def __init__(self) -> None:
        super().__init__("ps_engine.py")

    def request(self, **behaviour: Any) -> Callable[[Handles], None]:
        """A `req_func` that makes this engine take the update in some way."""

        def request(handles: Handles) -> None:
            self.call("update", handle=dict(handles)[DEVICE], **behaviour)

        return request

    @property
    def weights(self) -> dict[str, str]:
        """Digests of what it serves."""
        return self.call("weights")


# ── the child's side ────────────────────────────────────────────────────────────────────────


def say(**message: Any) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


def commands() -> Any:
    """The next command, None at the end of input."""
    line = sys.stdin.readline()
    return json.loads(line) if line else None


def serve(methods: object) -> None:
    """Answer commands with the methods of an object until the input ends."""
    while (command := commands()) is not None:
        number, name = command.pop("id"), command.pop("do")
        try:
            say(id=number, result=getattr(methods, name)(**command))
        except Exception as error:
            say(id=number, error=f"{type(error).__name__}: {error}")
