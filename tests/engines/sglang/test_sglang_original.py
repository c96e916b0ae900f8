"""SGLang's own update.py, unmodified, with our package in place of MoonshotAI's."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_server import OWN_GROUP, environment
from sglang_server import SGLangServer

from children import wait_until

pytestmark = pytest.mark.timeout(600)


def command(python: Path, server: SGLangServer, folder: Path | None, *options: str) -> list[str]:
    """SGLang's way: its script starts torchrun by itself."""
    source = ("--checkpoint-path", str(folder)) if folder else ()
    return [
        str(python), "-m", "sglang.srt.checkpoint_engine.update", *source,
        "--inference-parallel-size", "1", "--endpoint", server.url, *options,
    ]  # fmt: skip


def variables(python: Path) -> dict[str, str]:
    return environment(PATH=f"{python.parent}:/usr/bin:/bin")


def run_update(python: Path, server: SGLangServer, folder: Path | None, *options: str) -> None:
    done = subprocess.run(
        command(python, server, folder, *options),
        capture_output=True,
        text=True,
        timeout=300,
        env=variables(python),
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]


@contextmanager
def staying(python: Path, server: SGLangServer, folder: Path, metas: Path) -> Iterator[None]:
    """A script that has updated the server, and stays so that others can join it."""
    log = metas.with_suffix(".log")
    options = ("--save-metas-file", str(metas), "--sleep-time", "600")
    with log.open("w") as out:
        process = subprocess.Popen(
            command(python, server, folder, *options),
            stdout=out,
            stderr=subprocess.STDOUT,
            env=variables(python),
            **OWN_GROUP,
        )
    try:
        wait_until(lambda: "Update weights without" in log.read_text(), "the first update")
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)


def test_sglangs_own_script_brings_the_new_weights(
    python: Path,
    shared_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Callable[[int], list[int]],
) -> None:
    for number in (1, 2):  # one file, and several with an index
        label = f"script-{number}"
        run_update(python, shared_server, checkpoints[number], "--weight-version", label)
        assert (shared_server.generate(), shared_server.label) == (fresh(number), label)


def test_without_a_weight_version_the_old_label_stays(
    python: Path,
    shared_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Callable[[int], list[int]],
) -> None:
    label = shared_server.label
    run_update(python, shared_server, checkpoints[1])
    assert shared_server.generate() == fresh(1)
    assert shared_server.label == label, "its script tells nobody another: ours always does"


def test_a_script_may_join_what_another_has_registered(
    python: Path,
    shared_server: SGLangServer,
    checkpoints: list[Path],
    fresh: Callable[[int], list[int]],
    tmp_path: Path,
) -> None:
    metas = tmp_path / "metas"
    with staying(python, shared_server, checkpoints[2], metas):
        run_update(python, shared_server, checkpoints[1])
        joins = ("--load-metas-file", str(metas), "--weight-version", "joined")
        run_update(python, shared_server, None, *joins)
    assert (shared_server.generate(), shared_server.label) == (fresh(2), "joined")
