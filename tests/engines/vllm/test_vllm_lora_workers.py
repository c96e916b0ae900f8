"""LoRA adapters on two tensor parallel workers of one vLLM, each of which has a part of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
from engine_server import ROOT
from lora_tools import bring_lora, make_lora, unload_lora
from vllm_server import EXTENSION, VllmServer, weights_of
from vllm_tools import update

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(900)

OPTIONS = (
    "--tensor-parallel-size", "2",
    "--enable-lora", "--max-lora-rank", "8", "--max-loras", "2",
)  # fmt: skip
VARIABLES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
UNPACKED = {"FAIL": "/nonexistent", "PYTHONPATH": f"{ROOT / 'src'}:{Path(__file__).parent}"}

Tokens = Mapping[str, list[int]]
Start = Callable[..., VllmServer]


@pytest.fixture(scope="module")
def loras(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("loras")
    return {f"{n}": make_lora(root / f"{n}", checkpoints[0], seed=n) for n in range(2)}


@pytest.fixture(scope="module", params=["packed", "unpacked"])
def workers(request: pytest.FixtureRequest, start: Start) -> Start:
    """Starts servers of two workers, whose weights are reloaded layerwise or loaded directly."""
    direct = request.param == "unpacked"
    options = (*OPTIONS, *(("--worker-cls", "unpacked.Worker") if direct else ()))
    variables = {**VARIABLES, **(UNPACKED if direct else {})}
    return lambda folder, *more: start(folder, *options, *more, **variables)


@pytest.fixture(scope="module")
def expected(workers: Start, checkpoints: list[Path], loras: dict[str, Path]) -> Tokens:
    """On the second checkpoint, by adapter ("m": none), of a server that was started with them."""
    modules = [f"{name}={folder}" for name, folder in loras.items()]
    with workers(checkpoints[1], "--lora-modules", *modules) as server:
        tokens = {model: server.generate(model=model) for model in ("m", *loras)}
    assert len({tuple(some) for some in tokens.values()}) == 3, "all differ"
    return tokens


@pytest.fixture(scope="module")
def server(
    workers: Start,
    expected: Tokens,
    checkpoints: list[Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[VllmServer]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("served") / "loras"
        patch.setenv("CKPT_ENGINE_LORA_DIR", str(folder))
        extension = ("--worker-extension-cls", EXTENSION)
        with workers(checkpoints[0], *extension) as server:
            yield server


def test_base_and_adapters_are_those_of_a_fresh_start(
    ps: ParameterServer,
    server: VllmServer,
    checkpoints: list[Path],
    loras: dict[str, Path],
    expected: Tokens,
) -> None:
    bring_lora(ps, [server], "zero", loras["0"], "helper")
    report = update(ps, server, weights_of(checkpoints[1]), "base-1")
    assert [replica.outcome for replica in report.replicas] == ["published"] * 2
    assert server.generate(model="helper") == expected["0"]
    report = bring_lora(ps, [server], "one", loras["1"], "helper")
    assert (report.outcome, report.verified) == ("published", True)
    assert server.generate(model="helper") == expected["1"]
    unload_lora(ps, [server], "helper")
    assert server.generate() == expected["m"]


def test_what_the_workers_would_not_take_changes_nothing(
    ps: ParameterServer,
    server: VllmServer,
    checkpoints: list[Path],
    loras: dict[str, Path],
    tmp_path: Path,
) -> None:
    bring_lora(ps, [server], "zero", loras["0"], "helper")
    before = server.generate(model="helper")
    folder = make_lora(tmp_path / "bad", checkpoints[0], seed=7, rank=16)
    with pytest.raises(UpdateFailed, match="LoRA rank 16 is greater than max_lora_rank 8"):
        bring_lora(ps, [server], "bad", folder, "helper")
    assert server.generate(model="helper") == before
