"""The examples with which the interface was described run as they are written."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from children import python_path

HERE = Path(__file__).parent
TIMEOUT_SECONDS = 100
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(socket_folder: Path) -> Iterator[Start]:
    """Runs a script of this folder; ends it with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(script: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(HERE / script), *arguments],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **python_path(), "OMP_NUM_THREADS": "1", **variables},
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def last_word(process: subprocess.Popen[str]) -> dict[str, object]:
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    assert process.returncode == 0
    found: dict[str, object] = json.loads(output.splitlines()[-1]) if output else {}
    return found


def test_one_trainer_and_four_samplers(start: Start) -> None:
    trainer = start("seed_basic.py", "train")
    assert trainer.stdout is not None
    metadata = json.loads(trainer.stdout.readline())["metadata"]
    samplers = [
        start("seed_basic.py", "infer", str(rank), json.dumps(metadata)) for rank in range(1, 5)
    ]
    assert [last_word(sampler) for sampler in samplers] == [{"same": True}] * 4
    assert last_word(trainer) == {}


def test_a_training_loop_and_its_sampler(start: Start, free_port: int) -> None:
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port)}
    sampler = start("seed_rlhf.py", "sampler", **where)
    trainer = start("seed_rlhf.py", "trainer", **where)
    assert last_word(sampler) == {"same": True}
    assert last_word(trainer) == {}


def test_the_basic_interface_has_what_is_described() -> None:
    from checkpoint_engine import CheckpointEngine

    described = {
        "prepare", "build_topology", "init_process_group", "send_weights", "receive_weights",
        "finalize",
    }  # fmt: skip
    assert described <= set(vars(CheckpointEngine))
    assert described - {"build_topology"} == CheckpointEngine.__abstractmethods__


@pytest.mark.parametrize("script", ["seed_basic.py", "seed_rlhf.py"])
def test_only_the_import_is_an_alias(script: str) -> None:
    aliases = [
        (name.name, name.asname)
        for node in ast.walk(ast.parse((HERE / script).read_text()))
        if isinstance(node, ast.ImportFrom)
        for name in node.names
        if name.asname
    ]
    assert aliases == [("GlooCheckpointEngine", "NCCLCheckpointEngine")]
