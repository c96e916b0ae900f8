"""LoRA adapters to vLLM: requests wait from before it is loaded until all engines have it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from ps_lora_engine import LoraEngine, lora_tensors, serving
from ps_lora_vllm import LoraVllm
from test_ps_lora import bring, equal, folders, requests_to

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer


@pytest.fixture
def vllm(lora_root: Path) -> Iterator[LoraVllm]:
    with serving(LoraVllm()) as engine:
        assert isinstance(engine, LoraVllm)
        yield engine


def test_caches_are_dropped_while_requests_wait(server: ParameterServer, vllm: LoraVllm) -> None:
    bring(server, [vllm], 1)
    steps = [path.partition("?")[0] for path in vllm.asked]
    last = [one for one in steps if one not in ("/v1/models", "/collective_rpc")][-4:]
    assert last == ["/pause", "/v1/load_lora_adapter", "/reset_prefix_cache", "/resume"]
    assert equal(vllm.served["helper"], lora_tensors(1))


def test_one_that_somebody_has_paused_stays_so(server: ParameterServer, vllm: LoraVllm) -> None:
    vllm.paused = True
    bring(server, [vllm], 1)
    assert vllm.paused
    server.unload_lora("helper", requests_to([vllm]))
    assert vllm.paused


def test_what_a_worker_says_is_read_though_http_says_that_all_is_well(
    server: ParameterServer, vllm: LoraVllm
) -> None:
    vllm.says = "ValueError: LoRA rank 64 is greater than max_lora_rank 16."
    with pytest.raises(UpdateFailed, match="rank 64 is greater"):
        bring(server, [vllm], 1)
    assert (vllm.served, vllm.paused) == ({}, False)
    assert "/v1/load_lora_adapter" not in vllm.asked


@pytest.mark.parametrize("lacking", ["takes_loras", "may_load"])
def test_one_started_without_adapters_says_how_to_start_it(
    server: ParameterServer, vllm: LoraVllm, lacking: str
) -> None:
    setattr(vllm, lacking, False)
    with pytest.raises(UpdateFailed, match=r"--enable-lora.*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"):
        bring(server, [vllm], 1)


def test_what_would_mix_two_adapters_is_not_served(server: ParameterServer, vllm: LoraVllm) -> None:
    bring(server, [vllm], 1)
    vllm.drops = False
    with pytest.raises(UpdateFailed, match="keeps its prefix cache; it stays paused") as failed:
        bring(server, [vllm], 2)
    assert [replica.outcome for replica in failed.value.report.replicas] == ["torn"]
    assert vllm.paused
    vllm.drops = True
    vllm.paused = False
    bring(server, [vllm], 2)
    assert equal(vllm.served["helper"], lora_tensors(2))


def test_requests_wait_until_engines_of_other_kinds_have_it_too_or_it_is_taken_back(
    server: ParameterServer, vllm: LoraVllm, lora_root: Path
) -> None:
    with serving(LoraEngine()) as sglang:
        bring(server, [vllm, sglang], 1)

        def fail(engine: LoraEngine, name: str, folder: Path) -> None:
            if Path(engine.shown[name]).name != before:
                (folder / "adapter_config.json").chmod(0o600)
                (folder / "adapter_config.json").write_text("{}")

        before = Path(sglang.shown["helper"]).name
        sglang.on_loaded = fail
        with pytest.raises(UpdateFailed) as failed:
            bring(server, [vllm, sglang], 2)
        assert failed.value.report.outcome == "rolled_back"
        assert all(equal(e.served["helper"], lora_tensors(1)) for e in (vllm, sglang))
        assert not vllm.paused
        assert {Path(engine.shown["helper"]) for engine in (vllm, sglang)} < set(folders(lora_root))


@pytest.mark.parametrize("was_paused", [False, True])
def test_a_pause_that_was_answered_by_an_error_is_taken_back_unless_it_was_there(
    server: ParameterServer, vllm: LoraVllm, was_paused: bool
) -> None:
    vllm.paused, vllm.pauses_late = was_paused, True
    with pytest.raises(UpdateFailed, match="504"):
        bring(server, [vllm], 1)
    assert (vllm.paused, vllm.served) == (was_paused, {})


@pytest.mark.parametrize("was_paused", [False, True])
def test_if_the_one_before_is_gone_requests_for_others_go_on_without_it(
    server: ParameterServer, vllm: LoraVllm, was_paused: bool
) -> None:
    bring(server, [vllm], 1)
    vllm.paused = was_paused

    def lose(engine: LoraEngine, name: str, folder: Path) -> None:
        engine.shown[name] = "/somewhere/else"
        shutil.rmtree(before)

    before, vllm.on_loaded = Path(vllm.shown["helper"]), lose
    with pytest.raises(UpdateFailed, match="nothing is served as 'helper' now") as failed:
        bring(server, [vllm], 2)
    assert [replica.outcome for replica in failed.value.report.replicas] == ["torn"]
    assert vllm.shown == {}
    assert vllm.paused == was_paused
    last = [path.partition("?")[0] for path in vllm.asked if path != "/v1/models"]
    assert "/reset_prefix_cache" in last[-2:], "nothing of two adapters is cached"
    vllm.on_loaded = None
    bring(server, [vllm], 2)
    assert equal(vllm.served["helper"], lora_tensors(2))


def test_the_folder_of_an_unloaded_adapter_stays_for_requests_in_flight(
    server: ParameterServer, vllm: LoraVllm, lora_root: Path
) -> None:
    bring(server, [vllm], 1)
    (folder,) = folders(lora_root)
    server.unload_lora("helper", requests_to([vllm]))
    assert vllm.shown == {}
    assert folders(lora_root) == [folder]
