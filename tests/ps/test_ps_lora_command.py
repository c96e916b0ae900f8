"""`ckpt-engine lora`, as it is typed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from ps_lora_engine import LoraEngine, lora_tensors, save_lora, serving
from test_ps_lora import equal


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
