"""Replica processes, and requests that never stop.

Replicas are children started as anybody would start them, `ckpt-engine replica`, and spoken to over
HTTP. Requests are sent to each of them all the while, so that an update that disturbs serving, or
an answer whose weight versions do not add up, is noticed.

    with Fleet(folder, num_replicas=2, log_dir=log_dir, token=token) as fleet:
        with Traffic(fleet, prompts):
            ...
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx

from checkpoint_engine.children import next_line
from checkpoint_engine.errors import AdapterError

__all__ = ["Fleet", "Replica", "Traffic"]

START_SECONDS = 120.0
STOP_SECONDS = 20.0
REQUEST_SECONDS = 60.0


@dataclass(frozen=True)
class Replica:
    """A running replica."""

    name: str
    endpoint: str

    def generate(self, prompts: Sequence[Sequence[int]], **options: Any) -> list[dict[str, Any]]:
        """The choices of one completion request, in order; raises AdapterError if refused."""
        body = {"prompt": [list(prompt) for prompt in prompts], "return_token_ids": True, **options}
        response = httpx.post(f"{self.endpoint}/v1/completions", json=body, timeout=REQUEST_SECONDS)
        if response.is_error:
            raise AdapterError(f"{self.name}: {response.status_code}: {response.text[:500]}")
        choices: list[dict[str, Any]] = response.json()["choices"]
        return sorted(choices, key=lambda choice: choice["index"])

    def update(self, handles: Mapping[str, str], weight_version: str) -> None:
        """Take an update, but only to this version; raises AdapterError if it does not."""
        response = httpx.post(
            f"{self.endpoint}/update_weights_from_ipc",
            json={"zmq_handles": dict(handles), "weight_version": weight_version},
            headers={"Authorization": f"Bearer {os.environ['CKPT_ENGINE_TOKEN']}"},
            timeout=REQUEST_SECONDS,
        )
        if response.is_error:
            raise AdapterError(f"{self.name}: {response.status_code}: {response.text[:500]}")

    def weight_info(self) -> Mapping[str, Any]:
        """What it serves; see `ckpt-engine replica`."""
        response = httpx.get(f"{self.endpoint}/weight_info", timeout=REQUEST_SECONDS)
        response.raise_for_status()
        info: dict[str, Any] = response.json()
        return info


class Fleet:
    """Replica processes of one model. Owns them: they are gone when this is closed.

    Attributes:
        replicas: those that were started, dead or alive.
        dead: names of those that were killed and are not back yet.

    Raises:
        PeerLost: one died before it served; its last words are in the message.
        DeadlineExceeded: one does not answer.
    """

    def __init__(self, folder: Path, *, num_replicas: int, log_dir: Path, token: str) -> None:
        self._folder, self._log_dir, self._token = folder, log_dir, token
        self._children: list[subprocess.Popen[bytes]] = []
        self.replicas: tuple[Replica, ...] = ()
        self.dead: set[str] = set()
        try:
            self._children += [self._spawn(number, port=0) for number in range(num_replicas)]
            self.replicas = tuple(
                Replica(f"replica-{number}", self._endpoint(number))
                for number in range(num_replicas)
            )
        except BaseException:
            self.close()
            raise

    @property
    def endpoints(self) -> list[str]:
        """The replicas' URLs."""
        return [replica.endpoint for replica in self.replicas]

    @property
    def alive(self) -> tuple[Replica, ...]:
        """The replicas that were not killed."""
        return tuple(replica for replica in self.replicas if replica.name not in self.dead)

    def kill(self, number: int) -> None:
        """SIGKILL: it has no chance to say goodbye."""
        self.dead.add(self.replicas[number].name)
        self._children[number].kill()

    def restart(self, number: int) -> None:
        """Start a killed replica anew at its old address, and wait until it serves."""
        child, replica = self._children[number], self.replicas[number]
        child.wait(STOP_SECONDS)
        assert child.stdout is not None, "its output is a pipe"
        child.stdout.close()
        port = int(replica.endpoint.rpartition(":")[2])
        self._children[number] = self._spawn(number, port)
        self._endpoint(number)
        self.dead.discard(replica.name)

    def close(self) -> None:
        """Ask the replicas to end, and end those that do not."""
        for child in self._children:
            child.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for child in self._children:
            try:
                child.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait(STOP_SECONDS)
            if child.stdout is not None:
                child.stdout.close()

    def __enter__(self) -> Fleet:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self.close()

    def _spawn(self, number: int, port: int) -> subprocess.Popen[bytes]:
        name = f"replica-{number}"
        arguments = ["--model", str(self._folder), "--port", str(port), "--name", name]
        environment = {
            **os.environ,
            "CKPT_ENGINE_TOKEN": self._token,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        with (self._log_dir / f"{name}.log").open("a") as log:
            return subprocess.Popen(  # noqa: S603 - our own command, typed arguments
                [sys.executable, "-m", "checkpoint_engine", "replica", *arguments],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
            )

    def _endpoint(self, number: int) -> str:
        """The URL that a replica announces on its first line."""
        child, name = self._children[number], f"replica-{number}"
        log = self._log_dir / f"{name}.log"
        return next_line(child, START_SECONDS, name, log).split()[-1].decode()


class Traffic:
    """One client for each replica that asks for completions, one after the other, until stopped.

    What fails while its replica is dead counts as cut off, not as failed.
    """

    def __init__(self, fleet: Fleet, prompts: Sequence[Sequence[int]], num_tokens: int = 24):
        self.num_answered = self.num_failed = self.num_cut_off = self.num_across_versions = 0
        self.failures: list[str] = []
        self._fleet, self._prompts, self._num_tokens = fleet, prompts, num_tokens
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._ask, args=(replica,), name="demo-traffic", daemon=True)
            for replica in fleet.replicas
        ]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(REQUEST_SECONDS)

    def _ask(self, replica: Replica) -> None:
        number = 0
        while not self._stopped.is_set():
            prompt = self._prompts[number % len(self._prompts)]
            number += 1
            try:
                (choice,) = replica.generate([prompt], max_tokens=self._num_tokens, seed=number)
                problem = _misfit(choice)
            except (AdapterError, httpx.HTTPError) as error:
                problem, choice = f"{replica.name}: {error}", {"weight_versions": []}
            with self._lock:
                self.num_answered += problem is None
                self.num_across_versions += len(choice["weight_versions"]) > 1
                if problem is not None and replica.name in self._fleet.dead:
                    self.num_cut_off += 1
                elif problem is not None:
                    self.num_failed += 1
                    self.failures.append(problem)
            self._stopped.wait(0.05)  # leaves some of two cores to the trainer


def _misfit(choice: Mapping[str, Any]) -> str | None:
    """Why the weight versions of an answer do not cover its tokens, if they do not."""
    covered = 0
    for span in choice["weight_versions"]:
        if span["start"] != covered or span["end"] <= covered:
            return f"weight versions overlap or leave a hole at token {covered}"
        covered = span["end"]
    num_tokens = len(choice["token_ids"])
    return None if covered == num_tokens else f"{covered} of {num_tokens} tokens have a version"


def new_token() -> str:
    """A bearer token for one demo."""
    return secrets.token_urlsafe(24)
