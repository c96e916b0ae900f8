"""A process that joins a replica to what a server has published, each time that it is told.

It calls itself another host, so the bytes travel from the server to it over loopback; the replica
maps them from there.

    with joiner_process(endpoint) as join:
        seconds = join(server.get_metas())
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import msgspec

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.children import next_line, say
from checkpoint_engine.ps import ParameterServer

__all__ = ["joiner_process"]

TIMEOUT_SECONDS = 120.0

Join = Callable[[dict[int, Any]], float]


@contextmanager
def joiner_process(endpoint: str) -> Iterator[Join]:
    """Start one for the replica at `endpoint`; yields what makes it join, and gives the seconds."""
    process = subprocess.Popen(  # noqa: S603 - our own module, a URL
        [sys.executable, "-m", __name__, endpoint],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "CKPT_ENGINE_HOST": "joiner"},
    )
    assert process.stdin is not None, "its input is a pipe"
    commands = process.stdin

    def join(metas: dict[int, Any]) -> float:
        commands.write(msgspec.json.encode(metas) + b"\n")
        commands.flush()
        answer = next_line(process, TIMEOUT_SECONDS, "the joiner of the benchmark")
        return msgspec.json.decode(answer, type=float)

    try:
        yield join
    finally:
        process.kill()
        process.communicate()


def _main(endpoint: str) -> None:
    server = ParameterServer(rank=0, world_size=1)
    requests = engine_requests([endpoint], rank=0, world_size=1)
    for line in sys.stdin.buffer:
        metas = msgspec.json.decode(line)
        start = time.perf_counter()
        server.join(metas, requests)
        say(time.perf_counter() - start)


if __name__ == "__main__":
    _main(sys.argv[1])
