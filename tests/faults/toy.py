"""What the processes of these tests have in common: versions of a toy model, and faults.

Every version has a seed, and with it a label, a digest and an answer that no other version gives.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from checkpoint_engine.adapters.live import LiveModel
from checkpoint_engine.errors import AdapterError
from children import say

WIDTH = 512
HANG_SECONDS = 1.0
HOLD_SECONDS = 20.0
RELEASED = threading.Event()  # whoever holds an update up


@dataclass(frozen=True)
class Truth:
    """What a replica that serves a version says, and nobody else."""

    label: str
    digest: str
    answer: float


def make_model(seed: int) -> torch.nn.Module:
    """4 MB of weights."""
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(4)]
    return torch.nn.Sequential(*layers, torch.nn.Tanh()).requires_grad_(False)


def answer(model: torch.nn.Module) -> float:
    """What a model says; weights that are a mixture say something else."""
    return float(model(torch.linspace(-5, 5, WIDTH)).sum())


def label(seed: int) -> str:
    return f"step-{seed}"


@cache
def truth(seed: int) -> Truth:
    model = make_model(seed)
    return Truth(label(seed), LiveModel(model).digest(), answer(model))


class Faults:
    """What this process is going to do, once each, at named points of its next update."""

    def __init__(self) -> None:
        self._armed: dict[str, str] = {}

    def arm(self, point: str, what: str) -> None:
        assert what in DEEDS, f"no such fault: {what}"
        RELEASED.clear()
        self._armed[point] = what

    def disarm(self) -> None:
        self._armed.clear()
        RELEASED.set()

    def strike(self, point: str) -> None:
        """Called wherever something may go wrong."""
        what = self._armed.pop(point, None)
        if what is not None:
            say(event="fault", point=point, what=what)
            DEEDS[what]()

    def after_message(self, channel: Any, points: dict[str, str]) -> None:
        """Strike when a message of some kind has been sent on any channel."""
        send = channel.send

        def sending(this: Any, body: Any, *rest: Any, **named: Any) -> None:
            send(this, body, *rest, **named)
            kind = type(body).__name__ + getattr(body, "step", "")
            if kind in points:
                self.strike(points[kind])

        channel.send = sending


def _signal(number: int) -> Callable[[], None]:
    """To this very thread, which another that takes a signal would let go on for a moment."""
    return lambda: signal.pthread_kill(threading.get_ident(), number)


def _raise() -> None:
    raise RuntimeError("something broke")


def _refuse() -> None:
    raise AdapterError("not these weights")


def _exit() -> None:
    os._exit(1)


def limit(what: int, amount: int) -> None:
    """A limit that can be lifted again."""
    resource.setrlimit(what, (amount, resource.getrlimit(what)[1]))


def lift(what: int) -> None:
    limit(what, resource.getrlimit(what)[1])


def _no_memory() -> None:
    """An allocation fails; only this one, as Python hangs if a thread's start is refused memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit(resource.RLIMIT_AS, pages * resource.getpagesize())
    try:
        torch.empty(1 << 30, dtype=torch.uint8)
    finally:
        lift(resource.RLIMIT_AS)


def _cut() -> None:
    """Break every TCP connection of this process but those to the ranks' shared keys."""
    keys_port = int(os.environ["MASTER_PORT"]) + 1
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError), socket.socket(fileno=os.dup(int(descriptor))) as end:
            is_link = end.family in (socket.AF_INET, socket.AF_INET6)
            if is_link and keys_port not in (end.getsockname()[1], end.getpeername()[1]):
                end.shutdown(socket.SHUT_RDWR)


DEEDS: dict[str, Callable[[], object]] = {
    "kill": _signal(signal.SIGKILL),
    "stop": _signal(signal.SIGSTOP),
    "tell": lambda: None,  # and nothing else
    "hold": lambda: RELEASED.wait(HOLD_SECONDS),  # until it is disarmed
    "hang": lambda: time.sleep(HANG_SECONDS),
    "raise": _raise,
    "refuse": _refuse,
    "exit": _exit,
    "cut": _cut,
    "no memory": _no_memory,
    "full disk": lambda: limit(resource.RLIMIT_FSIZE, 0),
}


# ── lines of text between a trainer and the replicas that it calls ──────────────────────────


@contextmanager
def listening(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{path}.new")
        listener.listen()
        os.rename(f"{path}.new", path)  # whoever sees it can connect
        yield listener


def ask(path: str, line: str, timeout_seconds: float) -> str:
    """One line there, one back; "" if the other died."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_seconds)
        connection.connect(path)
        with connection.makefile("rw") as stream:
            stream.write(line + "\n")
            stream.flush()
            try:
                return stream.readline()
            except ConnectionResetError:
                return ""
