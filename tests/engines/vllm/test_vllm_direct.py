"""A vLLM whose layers run on what was loaded is loaded directly, into its live parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_server import ROOT, save_tensors
from vllm_server import EXTENSION, VllmServer, make_checkpoint, weights_of
from vllm_tools import Fresh, lacking, update

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)  # servers start one after the other

UNPACKED = ("--worker-cls", "unpacked.Worker")
WORKERS = ("--worker-extension-cls", EXTENSION)
TWO = ("--tensor-parallel-size", "2")
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    fail = tmp_path_factory.mktemp("fail") / "fail"
    return {"FAIL": str(fail), "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parent}"}


@pytest.fixture(scope="module")
def server(
    start: Callable[..., VllmServer],
    fresh: Fresh,
    checkpoints: list[Path],
    variables: dict[str, str],
) -> Iterator[VllmServer]:
    """Started on the first checkpoint; which version it serves, tests leave open."""
    fresh(checkpoints[1], *UNPACKED, **variables)
    with start(checkpoints[0], *UNPACKED, *WORKERS, **variables) as server:
        fresh.remember(checkpoints[0], server, *UNPACKED)
        yield server


@pytest.fixture
def tokens(fresh: Fresh, server: VllmServer, checkpoints: list[Path]) -> list[list[int]]:
    return [fresh(folder, *UNPACKED) for folder in checkpoints[:2]]


@pytest.mark.parametrize("mode", ["staged", "streamed"])
def test_it_answers_as_one_started_on_the_new_checkpoint(
    ps: ParameterServer,
    server: VllmServer,
    tokens: list[list[int]],
    checkpoints: list[Path],
    mode: str,
) -> None:
    for number in (1, 0):
        label = f"{mode}-{number}"
        update(ps, server, weights_of(checkpoints[number]), label, mode)
        assert (server.generate(), server.label) == (tokens[number], label)


def test_a_load_that_fails_half_way_ends_on_the_version_before(
    ps: ParameterServer,
    server: VllmServer,
    tokens: list[list[int]],
    checkpoints: list[Path],
    variables: dict[str, str],
) -> None:
    update(ps, server, weights_of(checkpoints[0]), "start")
    Path(variables["FAIL"]).touch()
    with pytest.raises(UpdateFailed, match="the loader fails half-way") as failed:
        update(ps, server, weights_of(checkpoints[1]), "step-1")
    assert failed.value.report.replicas[0].outcome == "kept"
    assert (server.generate(), server.label, server.is_paused) == (tokens[0], "start", False)
    update(ps, server, weights_of(checkpoints[1]), "step-2")
    assert server.generate() == tokens[1]


def test_what_was_not_written_is_named(
    ps: ParameterServer,
    start: Callable[..., VllmServer],
    fresh: Fresh,
    checkpoints: list[Path],
    variables: dict[str, str],
    tmp_path: Path,
) -> None:
    """With random weights there is no version before, to compare names with or go back to."""
    expected = fresh(checkpoints[1], *UNPACKED, **variables)
    file = save_tensors(tmp_path / "bad.safetensors", lacking(checkpoints[1]))
    dummy = ("--load-format", "dummy")
    with start(checkpoints[0], *UNPACKED, *WORKERS, *dummy, **variables) as server:
        with pytest.raises(UpdateFailed, match=r"of 32768 elements of .*layers\.1.*qkv_proj"):
            update(ps, server, file, "bad")
        assert server.is_paused
        update(ps, server, weights_of(checkpoints[1]), "step-1")
        assert (server.generate(), server.is_paused) == (expected, False)


def test_a_tied_and_padded_vocabulary_on_two_workers(
    ps: ParameterServer,
    start: Callable[..., VllmServer],
    fresh: Fresh,
    variables: dict[str, str],
    tmp_path: Path,
) -> None:
    old, new = (
        make_checkpoint(tmp_path / f"{n}", seed=n, tied=True, vocab_size=500) for n in range(2)
    )
    expected = fresh(new, *UNPACKED, *TWO, **CORES, **variables)
    with start(old, *UNPACKED, *TWO, *WORKERS, **CORES, **variables) as server:
        before = server.generate()
        for file, tokens in ((new, expected), (old, before)):
            report = update(ps, server, weights_of(file), file.name)
            assert [replica.outcome for replica in report.replicas] == ["published"] * 2
            assert server.generate() == tokens
