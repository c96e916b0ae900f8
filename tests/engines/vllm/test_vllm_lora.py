"""LoRA adapters on a real vLLM: what it answers is that of a server started with them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine_server import environment
from lora_tools import bring_lora, make_lora, unload_lora
from vllm_server import EXTENSION, PROMPT, VllmServer, weights_of
from vllm_tools import update

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer

pytestmark = pytest.mark.timeout(900)

OPTIONS = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
MAY_LOAD = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
LONG = 400


@pytest.fixture(scope="module")
def loras(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    return [make_lora(root / f"{n}", checkpoints[0], seed=n) for n in range(2)]


@pytest.fixture(scope="module")
def expected(
    start: Callable[..., VllmServer], checkpoints: list[Path], loras: list[Path]
) -> dict[tuple[int, int | None], list[int]]:
    """By checkpoint and adapter (None: none), the tokens of servers that were started with them."""
    tokens: dict[tuple[int, int | None], list[int]] = {}
    modules = [f"{n}={folder}" for n, folder in enumerate(loras)]
    for number in range(2):
        with start(checkpoints[number], *OPTIONS, "--lora-modules", *modules) as server:
            tokens[number, None] = server.generate()
            for lora in range(2):
                tokens[number, lora] = server.generate(model=f"{lora}")
    assert len({tuple(some) for some in tokens.values()}) == len(tokens), "all differ"
    return tokens


@pytest.fixture(scope="module")
def lora_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One for all, as the server reads from it after the test that loaded."""
    folder = tmp_path_factory.mktemp("served") / "loras"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_LORA_DIR", str(folder))
        yield folder


@pytest.fixture(scope="module")
def server(
    start: Callable[..., VllmServer],
    checkpoints: list[Path],
    expected: dict[tuple[int, int | None], list[int]],
    lora_folders: Path,
) -> Iterator[VllmServer]:
    options = ("--worker-extension-cls", EXTENSION, *OPTIONS)
    with start(checkpoints[0], *options, **MAY_LOAD) as server:
        yield server


@pytest.fixture
def at_zero(ps: ParameterServer, server: VllmServer, loras: list[Path]) -> VllmServer:
    """The server with the first adapter as "helper"."""
    bring_lora(ps, [server], "zero", loras[0], "helper")
    return server


def shown(server: VllmServer) -> dict[str, str]:
    return Endpoint(server.url).loras()


Expected = dict[tuple[int, "int | None"], list[int]]


def test_it_serves_what_a_fresh_start_would(
    ps: ParameterServer, server: VllmServer, loras: list[Path], expected: Expected
) -> None:
    for number in (0, 1, 0):
        report = bring_lora(ps, [server], f"step-{number}", loras[number], "helper")
        assert (report.outcome, report.verified, report.lora) == ("published", True, "helper")
        assert shown(server)["helper"].endswith(f"/helper/{report.digest}")
        assert server.generate(model="helper") == expected[0, number]
        assert server.generate() == expected[0, None], "the base is as it was"
    assert not server.is_paused


def test_what_is_replaced_is_read_once_and_not_at_every_step(
    ps: ParameterServer, at_zero: VllmServer, loras: list[Path], expected: Expected
) -> None:
    """vLLM's `load_inplace` stays set in what requests carry."""
    bring_lora(ps, [at_zero], "one", loras[1], "helper")
    folder = Path(shown(at_zero)["helper"])
    away = folder.with_name("away")
    folder.rename(away)
    try:
        assert at_zero.generate(model="helper") == expected[0, 1]
    finally:
        away.rename(folder)


def test_a_request_in_flight_goes_on_under_the_new_one_alone(
    ps: ParameterServer, at_zero: VllmServer, loras: list[Path], expected: Expected
) -> None:
    """What it had cached is computed again; and what it caches then is nothing of the old one's."""
    with at_zero.generating(LONG, model="helper") as stream:
        tokens = stream.next() or []
        at_zero.post("/pause?mode=keep")  # or it might end before
        bring_lora(ps, [at_zero], "one", loras[1], "helper")
        assert at_zero.is_paused, "whoever has paused it lets it go on"
        at_zero.post("/resume")
        tokens = tokens + stream.rest()
    assert len(tokens) == LONG, "nobody's request was lost"
    begun = LONG // 2
    expected_next = at_zero.generate(16, [*PROMPT, *tokens[:begun]], model="helper")
    assert tokens[begun : begun + 16] == expected_next
    assert at_zero.generate(model="helper") == expected[0, 1]
    bring_lora(ps, [at_zero], "zero again", loras[0], "helper")
    assert at_zero.generate(model="helper") == expected[0, 0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 16}, "LoRA rank 16 is greater than max_lora_rank 8"),
        ({"targets": ("q_norm",)}, "q_norm"),
    ],
)
def test_what_vllm_would_not_take_changes_nothing(
    ps: ParameterServer,
    at_zero: VllmServer,
    checkpoints: list[Path],
    expected: Expected,
    tmp_path: Path,
    options: dict[str, object],
    said: str,
) -> None:
    before = shown(at_zero)
    if "rank" in options:
        folder = make_lora(tmp_path / "bad", checkpoints[0], seed=7, rank=16)
    else:
        folder = renamed(make_lora(tmp_path / "bad", checkpoints[0], seed=7), "q_proj", "q_norm")
    with pytest.raises(UpdateFailed, match=said) as failed:
        bring_lora(ps, [at_zero], "bad", folder, "helper")
    assert failed.value.report.outcome == "aborted"
    assert at_zero.generate(model="helper") == expected[0, 0]
    assert shown(at_zero) == before
    assert not at_zero.is_paused


def test_an_adapter_of_a_deeper_model_is_refused(
    ps: ParameterServer, at_zero: VllmServer, loras: list[Path], expected: Expected, tmp_path: Path
) -> None:
    """vLLM alone skips what the model does not have, and says nothing."""
    folder = renamed(copied(loras[1], tmp_path / "deep"), "layers.1.", "layers.9.")
    with pytest.raises(UpdateFailed, match=r"no layer 'model.layers.9"):
        bring_lora(ps, [at_zero], "deep", folder, "helper")
    assert at_zero.generate(model="helper") == expected[0, 0]


def test_it_stays_when_the_base_is_updated(
    ps: ParameterServer,
    at_zero: VllmServer,
    checkpoints: list[Path],
    expected: Expected,
) -> None:
    update(ps, at_zero, weights_of(checkpoints[1]), "base-1")
    assert at_zero.generate(model="helper") == expected[1, 0]
    assert at_zero.generate() == expected[1, None]
    update(ps, at_zero, weights_of(checkpoints[0]), "base-0")
    assert at_zero.generate(model="helper") == expected[0, 0]


def test_unloaded_it_is_gone_and_a_request_in_flight_ends_on_it(
    ps: ParameterServer, at_zero: VllmServer, expected: Expected
) -> None:
    alone = at_zero.generate(LONG, model="helper")
    with at_zero.generating(LONG, model="helper") as stream:
        tokens = stream.next() or []
        report = unload_lora(ps, [at_zero], "helper")
        tokens = tokens + stream.rest()
    assert report.outcome == "published"
    assert tokens == alone
    assert shown(at_zero) == {}
    asked = {"model": "helper", "prompt": [1], "max_tokens": 1}
    assert at_zero.client.post("/v1/completions", json=asked).status_code == 404
    assert at_zero.generate() == expected[0, None]
    with pytest.raises(UpdateFailed, match="has no LoRA adapter 'helper'"):
        unload_lora(ps, [at_zero], "helper")


def test_the_command_loads_lists_and_unloads(
    server: VllmServer, loras: list[Path], expected: Expected
) -> None:
    assert run("load", "tutor", str(loras[1]), "--endpoint", server.url)
    assert server.generate(model="tutor") == expected[0, 1]
    (listed,) = json.loads(run("list", "--endpoint", server.url, "--json"))
    assert listed["loras"]["tutor"] == shown(server)["tutor"]
    assert run("unload", "tutor", "--endpoint", server.url)
    assert "tutor" not in shown(server)


def run(*words: str) -> str:
    command = [sys.executable, "-m", "checkpoint_engine", "lora", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to


def renamed(folder: Path, part: str, other: str) -> Path:
    """The adapter for other layers of the same shapes."""
    from safetensors.torch import load_file, save_file

    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace(part, other): tensor for name, tensor in tensors.items()}, file)
    return folder
