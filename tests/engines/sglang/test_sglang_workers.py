"""Two tensor parallel workers of one SGLang server: they change together, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_server import tensors_of
from lora_tools import bring_lora, make_lora, unload_lora
from sglang_server import SGLangServer
from sglang_tools import LORA_OPTIONS, WITHOUT_PINNING, bring, look, requests_to

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(600)

OPTIONS = ("--tp", "2")
CORES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}  # else it wants a NUMA node for each
LAST = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def fresh(python: Path, checkpoints: list[Path], logs: Path) -> list[int]:
    """Tokens of version 1 by a server that was started on it; how a sum is split shows in them."""
    with SGLangServer(python, checkpoints[1], logs / "fresh-tp2", *OPTIONS, **CORES) as server:
        server.wait_for("/ready", 200)
        return server.generate()


@pytest.fixture(scope="module")
def server(
    python: Path, checkpoints: list[Path], logs: Path, fresh: list[int]
) -> Iterator[SGLangServer]:
    """Started on version 0, after the other has ended."""
    with SGLangServer(python, checkpoints[0], logs / "tp2", *OPTIONS, **CORES) as server:
        server.wait_for("/ready", 200)
        yield server


def test_both_workers_serve_the_new_version(
    ps: ParameterServer, server: SGLangServer, checkpoints: list[Path], fresh: list[int]
) -> None:
    bring(ps, [server], "step-0", checkpoints[0])
    before = look(server)
    report = bring(ps, [server], "step-1", checkpoints[1])
    assert [replica.outcome for replica in report.replicas] == ["published"] * 2
    assert (server.generate(), server.label) == (fresh, "step-1")
    ps.rollback(requests_to([server]))
    assert look(server) == before


def test_both_go_back_when_loading_fails_half_way(
    ps: ParameterServer, server: SGLangServer, checkpoints: list[Path]
) -> None:
    bring(ps, [server], "step-0", checkpoints[0])
    before = look(server)
    tensors = tensors_of(checkpoints[1])
    with pytest.raises(UpdateFailed) as failure:
        bring(ps, [server], "bad", {**tensors, LAST: tensors[LAST][:-1].clone()})
    assert [replica.outcome for replica in failure.value.report.replicas] == ["kept"] * 2
    assert look(server) == before
    assert server.status("/ready") == 200, "it goes on"


# LoRA


@pytest.fixture(scope="module")
def loras(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    return [make_lora(root / f"{n}", checkpoints[0], seed=n) for n in range(2)]


def test_both_workers_serve_an_adapter(
    ps: ParameterServer,
    python: Path,
    checkpoints: list[Path],
    loras: list[Path],
    logs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_LORA_DIR", str(tmp_path / "served"))
    options, variables = (*OPTIONS, *LORA_OPTIONS), {**CORES, **WITHOUT_PINNING}
    paths = [f"{n}={folder}" for n, folder in enumerate(loras)]
    with SGLangServer(
        python, checkpoints[0], logs / "with", *options, "--lora-paths", *paths, **variables
    ) as server:
        server.wait_for("/ready", 200)
        expected = [server.generate(lora=lora) for lora in ("0", "1", None)]
    assert len({tuple(tokens) for tokens in expected}) == 3, "all differ"
    with SGLangServer(python, checkpoints[0], logs / "without", *options, **variables) as server:
        server.wait_for("/ready", 200)
        for number in (0, 1):
            bring_lora(ps, [server], f"{number}", loras[number], "helper")
            assert server.generate(lora="helper") == expected[number]
        unload_lora(ps, [server], "helper")
        assert server.generate() == expected[2]
