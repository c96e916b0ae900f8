"""LoRA adapters on a real SGLang: what it answers is that of a server started with them."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from lora_tools import bring_lora, make_lora, unload_lora
from sglang_server import SGLangServer
from sglang_tools import LORA_OPTIONS, WITHOUT_PINNING, bring

from checkpoint_engine.engines.endpoint import Endpoint
from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import wait_until

pytestmark = pytest.mark.timeout(900)

LONG = 300

Tokens = dict["int | None", list[int]]


@pytest.fixture(scope="module")
def loras(checkpoints: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    return [make_lora(root / f"{n}", checkpoints[0], seed=n) for n in range(2)]


@pytest.fixture(scope="module")
def expected(python: Path, checkpoints: list[Path], loras: list[Path], logs: Path) -> Tokens:
    """By adapter (None: none), the tokens of a server that was started with them."""
    paths = [f"{n}={folder}" for n, folder in enumerate(loras)]
    options = (*LORA_OPTIONS, "--lora-paths", *paths)
    with SGLangServer(
        python, checkpoints[0], logs / "started-with", *options, **WITHOUT_PINNING
    ) as server:
        server.wait_for("/ready", 200)
        tokens: Tokens = {n: server.generate(lora=f"{n}") for n in range(2)}
        tokens[None] = server.generate()
    assert len({tuple(some) for some in tokens.values()}) == 3, "all differ"
    return tokens


@pytest.fixture(scope="module")
def server(
    python: Path,
    checkpoints: list[Path],
    expected: Tokens,
    logs: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[SGLangServer]:
    folder = tmp_path_factory.mktemp("served") / "loras"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CKPT_ENGINE_LORA_DIR", str(folder))
        with SGLangServer(
            python, checkpoints[0], logs / "lora", *LORA_OPTIONS, **WITHOUT_PINNING
        ) as server:
            server.wait_for("/ready", 200)
            yield server


@pytest.fixture
def at_zero(ps: ParameterServer, server: SGLangServer, loras: list[Path]) -> SGLangServer:
    """The server with the first adapter as "helper"."""
    bring_lora(ps, [server], "zero", loras[0], "helper")
    return server


def shown(server: SGLangServer) -> dict[str, str]:
    return Endpoint(server.url).loras()


def test_it_serves_what_a_fresh_start_would(
    ps: ParameterServer, server: SGLangServer, loras: list[Path], expected: Tokens
) -> None:
    for number in (0, 1, 0):
        report = bring_lora(ps, [server], f"step-{number}", loras[number], "helper")
        assert (report.outcome, report.verified, report.lora) == ("published", True, "helper")
        assert list(shown(server)) == ["helper"]
        assert shown(server)["helper"].endswith(f"/helper/{report.digest}")
        assert server.generate(lora="helper") == expected[number]
        assert server.generate() == expected[None], "the base is as it was"


class Asking:
    """Somebody who asks for the adapter again and again, several at a time."""

    def __init__(self, server: SGLangServer, num_threads: int = 3) -> None:
        self.answers: list[list[int]] = []
        self._server, self._done = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(num_threads)]

    def _ask(self) -> None:
        while not self._done.is_set():
            self.answers.append(self._server.generate(lora="helper"))  # asserts that it is 200

    def __enter__(self) -> Asking:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.answers) > 3, "answers")
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        for thread in self._threads:
            thread.join()


def test_no_request_fails_while_it_is_replaced_and_each_is_of_one_adapter(
    ps: ParameterServer, at_zero: SGLangServer, loras: list[Path], expected: Tokens
) -> None:
    """SGLang refuses a second one of a name: between the two there is none."""
    with Asking(at_zero) as asking:
        for number in (1, 0, 1):
            bring_lora(ps, [at_zero], f"asked-{number}", loras[number], "helper")
    assert {tuple(some) for some in asking.answers} == {tuple(expected[0]), tuple(expected[1])}
    assert at_zero.generate(lora="helper") == expected[1]


def test_a_request_in_flight_ends_on_the_adapter_that_it_began_with(
    ps: ParameterServer, at_zero: SGLangServer, loras: list[Path], expected: Tokens
) -> None:
    alone = at_zero.generate(LONG, lora="helper")
    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.extend(at_zero.generate(LONG, lora="helper")))
    thread.start()
    wait_until(lambda: at_zero.num_running > 0, "a running request")
    bring_lora(ps, [at_zero], "one", loras[1], "helper")
    thread.join()
    assert tokens == alone
    assert at_zero.generate(lora="helper") == expected[1]


@pytest.mark.parametrize(
    "options", [{"rank": 16}, {"targets": ("gate_proj", "q_proj")}], ids=["rank", "targets"]
)
def test_what_sglang_would_not_take_changes_nothing(
    ps: ParameterServer,
    at_zero: SGLangServer,
    checkpoints: list[Path],
    expected: Tokens,
    tmp_path: Path,
    options: dict[str, object],
) -> None:
    before = shown(at_zero)
    folder = make_lora(tmp_path / "bad", checkpoints[0], seed=7, **options)  # type: ignore[arg-type]
    with pytest.raises(UpdateFailed, match="max-lora-rank") as failed:
        bring_lora(ps, [at_zero], "bad", folder, "helper")
    assert failed.value.report.outcome == "aborted"
    assert shown(at_zero) == before
    assert at_zero.generate(lora="helper") == expected[0]


def test_it_stays_when_the_base_is_updated(
    ps: ParameterServer, at_zero: SGLangServer, checkpoints: list[Path], expected: Tokens
) -> None:
    bring(ps, [at_zero], "base-1", checkpoints[1])
    assert at_zero.generate(lora="helper") not in list(expected.values())
    bring(ps, [at_zero], "base-0", checkpoints[0])
    assert at_zero.generate(lora="helper") == expected[0]
    assert at_zero.generate() == expected[None]


def test_unloaded_it_is_gone_though_requests_ask_for_it(
    ps: ParameterServer, at_zero: SGLangServer, expected: Tokens
) -> None:
    """SGLang loads again, by itself, what it has known, as long as there is something to load."""
    alone = at_zero.generate(LONG, lora="helper")
    tokens: list[int] = []
    thread = threading.Thread(target=lambda: tokens.extend(at_zero.generate(LONG, lora="helper")))
    thread.start()
    wait_until(lambda: at_zero.num_running > 0, "a running request")
    assert unload_lora(ps, [at_zero], "helper").outcome == "published"
    thread.join()
    assert tokens == alone
    assert status(at_zero, [1, 2, 3], "helper") == 400
    assert shown(at_zero) == {}
    assert at_zero.generate() == expected[None]
    with pytest.raises(UpdateFailed, match="has no LoRA adapter 'helper'"):
        unload_lora(ps, [at_zero], "helper")


def test_unloaded_while_many_ask_for_it_it_is_gone(
    ps: ParameterServer, at_zero: SGLangServer, expected: Tokens
) -> None:
    """Each of them would have it loaded again; those who come too late are refused."""
    statuses: set[int] = set()
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            statuses.add(status(at_zero, [1, 2, 3], "helper"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        wait_until(lambda: 200 in statuses, "an answer")
        report = unload_lora(ps, [at_zero], "helper")
        wait_until(lambda: 400 in statuses, "a refusal")
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert (report.outcome, report.degraded) == ("published", ())
    assert statuses == {200, 400}
    assert shown(at_zero) == {}
    assert at_zero.generate() == expected[None]


def test_one_that_somebody_has_paused_stays_so(
    ps: ParameterServer, at_zero: SGLangServer, loras: list[Path], expected: Tokens
) -> None:
    at_zero.client.post("/pause_generation", json={"mode": "retract"}).raise_for_status()
    try:
        bring_lora(ps, [at_zero], "one", loras[1], "helper")
        assert at_zero.client.get("/ready").status_code == 503
    finally:
        at_zero.client.post("/continue_generation", json={}).raise_for_status()
    assert at_zero.generate(lora="helper") == expected[1]


def status(server: SGLangServer, prompt: Sequence[int], lora: str) -> int:
    body = {"input_ids": prompt, "sampling_params": {"max_new_tokens": 1}, "lora_path": lora}
    return server.client.post("/generate", json=body).status_code
