"""`ckpt-engine bench`: what it measures in processes of its own, and what it does without."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from checkpoint_engine.bench.libraries import measure_library
from checkpoint_engine.bench.measure import Unavailable
from checkpoint_engine.bench.startup import measure_startup
from checkpoint_engine.bench.stream import measure_ray, measure_streams

MIB = 1 << 20


def ignore(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("library", ["mooncake", "nixl"])
def test_reads_by_a_library_are_compared_with_the_library_alone(library: str) -> None:
    try:
        samples = measure_library(library, 64 * MIB, rounds=1, warmups=0, tell=ignore)
    except Unavailable as error:
        if "does not load" in str(error):
            pytest.skip(str(error))  # scripts/setup has said so, too
        raise
    both = {f"p2p by {library}", f"bare {library}"}
    assert set(samples) == both | {f"{name} from 4" for name in both}
    assert all(seconds > 0 for (seconds,) in samples.values())


def test_a_library_that_does_not_start_is_done_without(
    run: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    rows = ["--only", "p2p-nixl", "--only", "p2p-nixl-4"]
    done = run("bench", "--size", "small", "--rounds", "1", *rows, "--json", UCX_TLS="no-such")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["rows"] == []
    (word,) = result["without"]
    assert word.startswith("Without p2p-nixl, p2p-nixl-4: ")


def test_two_ranks_are_compared_with_one(tmp_path: Path) -> None:
    tensors = {str(number): torch.ones(MIB, dtype=torch.uint8) for number in range(8)}
    save_file(tensors, tmp_path / "model.safetensors")
    samples = measure_startup(tmp_path / "model.safetensors", rounds=2, warmups=0, tell=ignore)
    assert {name: len(seconds) for name, seconds in samples.items()} == {
        "start-up of one": 2,
        "start-up of two ranks": 2,
    }


def test_streams_are_compared_with_bare_ones() -> None:
    samples = measure_streams(32 * MIB, rounds=1, warmups=0, tell=ignore)
    ours = {"stream", "stream by shm", "stream to slow and fast", "stream to slow"}
    assert set(samples) == ours | {"bare buckets", "bare bytes", "tensor by tensor"}


def test_streams_are_compared_with_the_object_store_of_ray() -> None:
    samples = measure_ray(32 * MIB, rounds=1, warmups=0, tell=ignore)
    assert set(samples) == {"stream beside Ray", "Ray object store"}
