"""LoRA adapters to SGLang: who has paused it, who asks for what is unloaded, what it lets go of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ps_lora_engine import LoraEngine, lora_tensors, serving
from test_ps_lora import bring, equal, folders, requests_to

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer


@pytest.fixture
def sglang(lora_root: Path) -> Iterator[LoraEngine]:
    with serving(LoraEngine()) as engine:
        yield engine


def test_requests_go_on_once_it_is_replaced(server: ParameterServer, sglang: LoraEngine) -> None:
    bring(server, [sglang], 1)
    assert "/pause_generation" not in sglang.asked, "nobody waits for a name that is new"
    bring(server, [sglang], 2)
    assert "/pause_generation" in sglang.asked
    assert not sglang.paused


def test_one_that_somebody_has_paused_stays_so(server: ParameterServer, sglang: LoraEngine) -> None:
    """It may be torn: SGLang says whether it is paused, not why."""
    bring(server, [sglang], 1)
    sglang.paused = True
    bring(server, [sglang], 2)
    assert equal(sglang.served["helper"], lora_tensors(2))
    assert sglang.paused


def test_what_could_not_end_is_not_waited_for(server: ParameterServer, sglang: LoraEngine) -> None:
    bring(server, [sglang], 1)
    sglang.paused, sglang.num_running = True, 1
    with pytest.raises(UpdateFailed, match=r"paused with requests.*POST /continue_generation"):
        bring(server, [sglang], 2)
    assert sglang.paused
    assert equal(sglang.served["helper"], lora_tensors(1))


def test_one_that_is_unhealthy_is_not_paused(server: ParameterServer, sglang: LoraEngine) -> None:
    """It could not say whether it was before, so nobody would know whether to let it go on."""
    bring(server, [sglang], 1)
    sglang.healthy = False
    with pytest.raises(UpdateFailed, match="is unhealthy"):
        bring(server, [sglang], 2)
    assert not sglang.paused
    assert equal(sglang.served["helper"], lora_tensors(1))


@pytest.mark.parametrize("was_paused", [False, True])
def test_a_pause_that_was_answered_by_an_error_is_taken_back_unless_it_was_there(
    server: ParameterServer, sglang: LoraEngine, was_paused: bool
) -> None:
    bring(server, [sglang], 1)
    sglang.paused, sglang.pauses_late = was_paused, True
    with pytest.raises(UpdateFailed, match="504"):
        bring(server, [sglang], 2)
    assert sglang.paused == was_paused
    assert equal(sglang.served["helper"], lora_tensors(1))


def test_what_requests_load_again_while_it_is_unloaded_goes_with_its_folder(
    server: ParameterServer, sglang: LoraEngine, lora_root: Path
) -> None:
    bring(server, [sglang], 1)
    sglang.reloads = 1_000_000
    report = server.unload_lora("helper", requests_to([sglang]))
    assert (report.outcome, report.degraded) == ("published", ())
    assert (sglang.served, folders(lora_root)) == ({}, [])


def test_what_it_has_let_go_of_by_itself_can_be_read_again_however_old(
    server: ParameterServer, sglang: LoraEngine, lora_root: Path
) -> None:
    """As with `--max-loaded-loras`: it shows no more what it will read again for a request."""
    bring(server, [sglang], 1, "evicted")
    (folder,) = folders(lora_root)
    os.utime(folder, (1, 1))
    del sglang.served["evicted"], sglang.shown["evicted"]
    bring(server, [sglang], 2, "other")
    assert folder.exists()


def test_the_version_before_is_not_loaded_again_from_a_folder_that_was_touched(
    server: ParameterServer, sglang: LoraEngine, lora_root: Path
) -> None:
    bring(server, [sglang], 1)
    config = Path(sglang.shown["helper"]) / "adapter_config.json"
    config.chmod(0o600)
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))

    def lie(engine: LoraEngine, name: str, folder: Path) -> None:
        engine.shown[name] = "/somewhere/else"

    sglang.on_loaded = lie
    with pytest.raises(UpdateFailed, match="nothing is served as 'helper' now") as failed:
        bring(server, [sglang], 2)
    assert [replica.outcome for replica in failed.value.report.replicas] == ["torn"]
    assert sglang.served == {}
    assert folders(lora_root) == [], "or a request would have it loaded again"


def test_a_version_from_before_that_is_refused_stays_for_requests_that_came_when_it_was_served(
    server: ParameterServer, sglang: LoraEngine, lora_root: Path
) -> None:
    bring(server, [sglang], 1)
    bring(server, [sglang], 2)
    both = folders(lora_root)
    sglang.refuses = {"helper.ckpt-trial": "no room"}
    with pytest.raises(UpdateFailed, match="no room"):
        bring(server, [sglang], 1)
    assert folders(lora_root) == both


def test_a_name_that_trials_have_is_refused(server: ParameterServer, sglang: LoraEngine) -> None:
    with pytest.raises(UpdateFailed, match="are for trials alone"):
        bring(server, [sglang], 1, "helper.ckpt-trial")
    assert sglang.served == {}
