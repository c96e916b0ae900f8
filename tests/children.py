"""Processes that are spoken to in lines of JSON, and that answer in lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from nursery import HERE, Process, fork

Start = Callable[[str, Sequence[str], Mapping[str, str]], "Process | subprocess.Popen[str]"]

TIMEOUT_SECONDS = 60.0
STOP_SECONDS = 10.0


def free_port() -> int:
    """Below those that the kernel gives away itself: nobody gets it before it is used."""
    while True:
        port = secrets.choice(range(20_000, 32_000))
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_until(condition: Callable[[], bool], what: str = "the condition") -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.005)


class Talker:
    """Takes commands, one JSON object a line, and answers each with {"id": ..., ...}.

    What else it says are events, {"event": ..., ...}.
    """

    def __init__(self, commands: TextIO, answers: TextIO) -> None:
        self._commands, self._answers = commands, answers
        self._heard: list[dict[str, Any]] = []
        self._changed = threading.Condition()
        self._ended = False
        self._num_commands = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, do: str, **arguments: Any) -> int:
        """Give a command; returns its id."""
        with self._changed:
            self._num_commands += 1
            number = self._num_commands
            try:
                self._commands.write(json.dumps({"id": number, "do": do, **arguments}) + "\n")
                self._commands.flush()
            except BrokenPipeError:
                raise RuntimeError("the process died") from None
        return number

    def call(self, do: str, **arguments: Any) -> Any:
        """Give a command and wait for its result; raises RuntimeError with the child's error."""
        return self.result(self.send(do, **arguments))

    def result(self, number: int) -> Any:
        """Wait for the result of a command, which is then forgotten."""
        answer = self._take(lambda message: message.get("id") == number)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer["result"]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The next event of this kind, which is then forgotten."""
        return self._take(lambda message: message.get("event") == event)

    def forget(self) -> None:
        """Forget the events so far."""
        with self._changed:
            self._heard.clear()

    def has_answered(self, number: int) -> bool:
        """Whether the result of a command is there, or will never be."""
        with self._changed:
            return self._ended or any(heard.get("id") == number for heard in self._heard)

    @property
    def ended(self) -> bool:
        """Whether it has closed its side, as it does when it dies."""
        return self._ended

    def hang_up(self) -> None:
        """End of input, which every process takes as its end."""
        with contextlib.suppress(BrokenPipeError):
            self._commands.close()

    def _take(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def found() -> list[dict[str, Any]]:
            return [message for message in self._heard if wanted(message)]

        with self._changed:
            self._changed.wait_for(lambda: found() or self._ended, TIMEOUT_SECONDS)
            messages = found()
            if not messages:
                died = "the process died" if self._ended else "the process says nothing"
                raise RuntimeError(died)
            self._heard.remove(messages[0])
        return messages[0]

    def _read(self) -> None:
        # Whoever dies with a command unread resets its connection.
        with contextlib.suppress(ConnectionResetError):
            for line in self._answers:
                with self._changed:
                    self._heard.append(json.loads(line))
                    self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class Child(Talker):
    """A script of the tests in a process of its own; the context manager ends it."""

    def __init__(self, script: str, *arguments: str, start: Start = fork, **env: str) -> None:
        self.process = start(
            script, arguments, {**os.environ, **python_path(), "OMP_NUM_THREADS": "1", **env}
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        super().__init__(self.process.stdin, self.process.stdout)

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        if self.ended:  # the kernel closes what a process has before that can be seen to have ended
            self._end()
        return self.process.poll() is None

    @property
    def stopped(self) -> bool:
        try:
            status = Path(f"/proc/{self.pid}/status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # it died just now
            return False
        return "State:\tT" in status and self.alive

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: no handler runs."""
        self.signal(signal.SIGKILL)
        self.close()

    def close(self) -> None:
        """End its input, and it; kill it if it does not end."""
        self.hang_up()
        if not self._end():
            self.signal(signal.SIGKILL)
            self.process.wait(TIMEOUT_SECONDS)
        self._reader.join(TIMEOUT_SECONDS)
        self._answers.close()

    def _end(self) -> bool:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_SECONDS)
        return self.process.poll() is not None

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def spawn(
    script: str,
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    inside: Sequence[str] = (),
    options: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start a script as its user would; `inside` is a command that runs Python's."""
    return subprocess.Popen(
        [*inside, sys.executable, *options, str(HERE / script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def call_all(children: Sequence[Talker], do: str, **arguments: Any) -> list[Any]:
    """The same command on every rank; an argument that is a list has a value for each."""

    def own(index: int) -> dict[str, Any]:
        return {k: v[index] if isinstance(v, list) else v for k, v in arguments.items()}

    numbers = [child.send(do, **own(index)) for index, child in enumerate(children)]
    return [child.result(number) for child, number in zip(children, numbers, strict=True)]


def python_path() -> dict[str, str]:
    """The variable with which a script in a folder of the tests finds this module."""
    known = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([str(HERE), *([known] if known else [])])}


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
