"""A replica process to update, started as anybody would start one: `ckpt-engine replica`.

Its weights are random and nobody asks it anything, so that updates are measured and nothing else.

    with replica_process(folder) as endpoint:
        server.update("v1", engine_requests([endpoint], rank=0, world_size=1))
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from checkpoint_engine.children import next_line

__all__ = ["replica_process"]

START_SECONDS = 180.0
STOP_SECONDS = 20.0


@contextmanager
def replica_process(folder: Path) -> Iterator[str]:
    """Serve the model in `folder` on loopback while the block runs; yields the endpoint.

    Raises:
        PeerLost: it died; its last words are in the message.
        DeadlineExceeded: it does not answer.
    """
    log = folder / "replica.log"
    arguments = ["--model", str(folder), "--load-format", "dummy", "--port", "0", "--name", "bench"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with log.open("w") as errors:
        child = subprocess.Popen(  # noqa: S603 - our own command, typed arguments
            [sys.executable, "-m", "checkpoint_engine", "replica", *arguments],
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
        )
    try:
        announced = next_line(child, START_SECONDS, "the replica", log)
        yield announced.split()[-1].decode()  # the URL
    finally:
        _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait(STOP_SECONDS)
    if child.stdout is not None:
        child.stdout.close()
