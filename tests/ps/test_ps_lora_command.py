"""`ckpt-engine lora`, as it is typed."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from ps_lora_engine import LoraEngine, lora_tensors, save_lora, serving
from ps_lora_vllm import LoraVllm
from test_ps_lora import equal

HEARD_SECONDS = 1.0


@pytest.fixture
def engine() -> Iterator[LoraEngine]:
    with serving(LoraEngine()) as engine:
        yield engine


def test_load_replace_list_and_unload(
    run: Callable[..., CompletedProcess[str]], engine: LoraEngine, tmp_path: Path
) -> None:
    variables = {"CKPT_ENGINE_LORA_DIR": str(tmp_path / "loras")}
    at = ("--endpoint", engine.url)
    for seed in (1, 2):
        folder = save_lora(tmp_path / f"sft-{seed}", seed)
        done = run("lora", "load", "helper", str(folder), *at, **variables)
        assert done.returncode == 0, done.stderr
        assert f"adapter helper: sft-{seed} published" in done.stdout
        assert equal(engine.served["helper"], lora_tensors(seed))
    (listed,) = json.loads(run("lora", "list", *at, "--json", **variables).stdout)
    assert listed["loras"] == engine.shown
    assert listed["digests"]["helper"] == Path(engine.shown["helper"]).name
    assert "helper" in run("lora", "list", *at, **variables).stdout
    done = run("lora", "unload", "helper", *at, "--json", **variables)
    assert json.loads(done.stdout)["lora"] == "helper"
    assert engine.served == {}
    versions = run("versions", **variables).stdout
    assert versions.count("→") == 1
    assert [name in versions for name in ("sft-1", "sft-2", "unloaded")] == [True] * 3


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """Processes that are started here do, also if these tests were started with `nohup ... &`."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
@pytest.mark.parametrize(
    ("asked_to_end", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 128 + signal.SIGTERM)]
)
def test_asked_to_end_in_the_middle_it_leaves_the_one_before_and_lets_requests_go_on(
    environment: dict[str, str], tmp_path: Path, asked_to_end: signal.Signals, status: int
) -> None:
    environment["CKPT_ENGINE_LORA_DIR"] = str(tmp_path / "loras")
    loading, may_go_on = threading.Event(), threading.Event()

    def wait(engine: LoraEngine, name: str, folder: Path) -> None:
        loading.set()
        assert may_go_on.wait(60)

    def load(seed: int) -> subprocess.Popen[str]:
        folder = save_lora(tmp_path / f"sft-{seed}", seed)
        words = ["lora", "load", "helper", str(folder), "--endpoint", vllm.url]
        return subprocess.Popen(
            [sys.executable, "-m", "checkpoint_engine", *words],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )

    with serving(LoraVllm()) as vllm:
        with load(1) as first:
            assert first.wait(60) == 0
        vllm.on_loaded = wait
        with load(2) as second:
            try:
                assert loading.wait(60)
                assert vllm.paused
                second.send_signal(asked_to_end)
                vllm.on_loaded = None
                time.sleep(HEARD_SECONDS)  # an engine that answers before would have been in time
                may_go_on.set()
                assert second.wait(60) == status, second.stderr and second.stderr.read()
            finally:
                may_go_on.set()
                second.kill()
        assert not vllm.paused
        assert equal(vllm.served["helper"], lora_tensors(1))


def test_what_is_refused_says_why_and_exits_accordingly(
    run: Callable[..., CompletedProcess[str]], engine: LoraEngine, tmp_path: Path
) -> None:
    variables = {"CKPT_ENGINE_LORA_DIR": str(tmp_path / "loras")}
    folder, at = save_lora(tmp_path / "adapter", 1), ("--endpoint", engine.url)
    done = run("lora", "unload", "helper", *at, **variables)
    assert (done.returncode, "has no LoRA adapter 'helper'" in done.stderr) == (3, True)
    done = run("lora", "load", "../helper", str(folder), *at, **variables)
    assert (done.returncode, "cannot be called" in done.stderr) == (2, True)
    done = run("lora", "load", "helper", str(tmp_path), *at, **variables)
    assert done.returncode != 0
    assert "holds no adapter_model.safetensors" in done.stderr
    assert engine.served == {}
