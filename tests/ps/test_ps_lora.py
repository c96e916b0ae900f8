"""LoRA adapters to several engines: all or none, from folders that nobody has touched."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from ps_lora_engine import CONFIG, LoraEngine, lora_tensors, save_lora, serving
from ps_tools import rank_processes

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import SourceError, TransferError, UpdateFailed, UsageError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.registry import Registry, state_dir
from checkpoint_engine.sources import LoraSource
from checkpoint_engine.update.protocol import Report
from children import call_all


@pytest.fixture
def pair(lora_root: Path) -> Iterator[list[LoraEngine]]:
    with serving(LoraEngine()) as first, serving(LoraEngine()) as second:
        yield [first, second]


def bring(
    server: ParameterServer, engines: list[LoraEngine], seed: int, lora: str = "helper", **more: Any
) -> Report:
    """Adapter number `seed` to all of them, from memory."""
    label = f"step-{seed}"
    server.register_source(label, LoraSource.of_tensors(lora_tensors(seed), CONFIG))
    server.gather_metas(label)
    try:
        return server.update(label, requests_to(engines), lora=lora, **more)
    finally:
        server.unregister_checkpoint(label)


def requests_to(engines: list[LoraEngine]) -> Any:
    return engine_requests([engine.url for engine in engines], rank=0, world_size=1)


def equal(some: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> bool:
    return some.keys() == others.keys() and all(some[n].equal(others[n]) for n in some)


def folders(root: Path) -> list[Path]:
    return sorted(root.glob("*/*/[!.]*"))


def serve_same(engines: list[LoraEngine], seed: int, lora: str = "helper") -> bool:
    return all(equal(engine.served[lora], lora_tensors(seed)) for engine in engines)


# Loaded, replaced, unloaded


def test_all_engines_get_it_bit_for_bit_and_show_its_digest(
    server: ParameterServer, pair: list[LoraEngine], lora_root: Path
) -> None:
    first = bring(server, pair, 1)
    assert serve_same(pair, 1)
    second = bring(server, pair, 2)
    assert serve_same(pair, 2)
    assert (second.outcome, second.verified, second.lora) == ("published", True, "helper")
    assert {replica.digest for replica in second.replicas} == {second.digest} != {first.digest}
    assert all(Path(engine.shown["helper"]).name == second.digest for engine in pair)
    bring(server, pair, 3)
    kept = {folder.name for folder in folders(lora_root)}
    assert second.digest in kept, "requests may still ask for the version before"
    assert (len(kept), first.digest in kept) == (2, False)
    server.unload_lora("helper", requests_to(pair))
    assert [engine.served for engine in pair] == [{}, {}]
    assert folders(lora_root) == []


def test_from_memory_and_from_a_folder_it_is_one_version(
    server: ParameterServer, pair: list[LoraEngine], tmp_path: Path
) -> None:
    in_memory = bring(server, pair, 1).digest
    folder = save_lora(tmp_path / "adapter", 1)
    server.register_source("folder", LoraSource.of_folder(folder))
    server.gather_metas("folder")
    assert server.update("folder", requests_to(pair), lora="helper").digest == in_memory
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"])  # a set, inside
    server.register_source("peft", LoraSource.of_tensors(lora_tensors(1), config))
    server.gather_metas("peft")
    digest = server.update("peft", requests_to(pair), lora="helper").digest
    assert digest != in_memory, "the configuration is part of it"
    assert serve_same(pair, 1)


def test_adapters_of_other_names_are_left_alone(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    bring(server, pair, 1, "one")
    bring(server, pair, 2, "two")
    bring(server, pair, 3, "one")
    assert serve_same(pair, 3, "one")
    assert serve_same(pair, 2, "two")
    server.unload_lora("one", requests_to(pair))
    assert serve_same(pair, 2, "two")


def test_the_base_of_an_update_is_the_adapter_before(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    first = bring(server, pair, 1)
    bring(server, pair, 2, base=first.digest)
    with pytest.raises(UpdateFailed, match="is made for base"):
        bring(server, pair, 3, base=first.digest)
    assert serve_same(pair, 2)


def test_it_is_recorded_and_is_no_version_of_weights(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    digest = bring(server, pair, 1).digest
    server.unload_lora("helper", requests_to(pair))
    registry = Registry(state_dir() / "registry.sqlite")
    try:
        found = [(one.version, one.digest, one.lora) for one in registry.versions()]
        assert registry.last_published() is None
        assert [record.lora for record in registry.history()] == ["helper", "helper"]
    finally:
        registry.close()
    assert found == [("unloaded", "", "helper"), ("step-1", digest, "helper")]
    with pytest.raises(UsageError, match="nothing was published before"):
        server.rollback(requests_to(pair))


# All or none


def test_if_one_would_not_take_it_none_is_given_it(
    server: ParameterServer, pair: list[LoraEngine], lora_root: Path
) -> None:
    bring(server, pair, 1)
    pair[1].refuses = {"helper.ckpt-trial": "rank 64 is above --max-lora-rank 8"}
    before = folders(lora_root)
    with pytest.raises(UpdateFailed, match="rank 64 is above --max-lora-rank 8") as failed:
        bring(server, pair, 2)
    assert failed.value.report.outcome == "aborted"
    assert serve_same(pair, 1)
    assert folders(lora_root) == before
    assert all(list(engine.served) == ["helper"] for engine in pair)


def lies(engine: LoraEngine, name: str, folder: Path) -> None:
    engine.shown[name] = "/somewhere/else"
    engine.on_loaded = None


def adds_a_file(engine: LoraEngine, name: str, folder: Path) -> None:
    folder.chmod(0o700)
    (folder / "adapter_model.bin").write_bytes(b"what an engine may prefer")
    engine.on_loaded = None


def puts_a_link(engine: LoraEngine, name: str, folder: Path) -> None:
    folder.chmod(0o700)
    file = folder / "adapter_config.json"
    file.rename(folder.parents[3] / "elsewhere.json")
    file.symlink_to(folder.parents[3] / "elsewhere.json")
    engine.on_loaded = None


def changes_a_byte(engine: LoraEngine, name: str, folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.chmod(0o600)
    file.write_bytes(data)
    engine.on_loaded = None


def changes_the_scale(engine: LoraEngine, name: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    file.chmod(0o600)
    file.write_text(file.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    engine.on_loaded = None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lies, "shows /somewhere/else as 'helper'"),
        (adds_a_file, "not its two files alone"),
        (puts_a_link, "not its two files alone"),
        (changes_a_byte, "its files have changed"),
        (changes_the_scale, "its files have changed"),
    ],
)
@pytest.mark.parametrize("had_one", [True, False])
def test_what_was_not_read_as_it_was_sent_is_taken_back_everywhere(
    server: ParameterServer,
    pair: list[LoraEngine],
    lora_root: Path,
    spoil: Callable[[LoraEngine, str, Path], None],
    said: str,
    had_one: bool,
) -> None:
    if had_one:
        bring(server, pair, 1)
    before = folders(lora_root)
    pair[1].on_loaded = spoil
    with pytest.raises(UpdateFailed, match=said) as failed:
        bring(server, pair, 2)
    assert failed.value.report.outcome == "rolled_back"
    assert [replica.outcome for replica in failed.value.report.replicas] == ["kept"] * 2
    assert serve_same(pair, 1) if had_one else not (pair[0].served or pair[1].served)
    if had_one:  # the new one stays for an hour: requests that it was shown to may ask for it
        assert set(before) < set(folders(lora_root))
    else:
        assert folders(lora_root) == []
    bring(server, pair, 2)
    assert serve_same(pair, 2)


def test_if_one_fails_while_it_loads_the_others_are_returned_to_what_they_had(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    bring(server, pair, 1)
    old = pair[1].shown["helper"]

    def refuse(engine: LoraEngine, name: str, folder: Path) -> None:
        if str(folder) != old:
            raise RuntimeError("no memory left")  # hangs up without an answer

    pair[1].on_load = refuse
    with pytest.raises(UpdateFailed) as failed:
        bring(server, pair, 2)
    assert failed.value.report.outcome == "rolled_back"
    assert serve_same(pair, 1)


def test_an_engine_that_has_no_such_adapter_keeps_the_others_from_unloading_theirs(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    bring(server, pair[:1], 1)
    with pytest.raises(UpdateFailed, match="has no LoRA adapter 'helper'; it has none"):
        server.unload_lora("helper", requests_to(pair))
    assert serve_same(pair[:1], 1)


# Refused before anybody is asked


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".", "..", ".hidden", "x\0", "a" * 101, "é"])
def test_a_name_that_is_a_path_is_refused(
    server: ParameterServer, pair: list[LoraEngine], name: str
) -> None:
    with pytest.raises(UsageError, match="cannot be called"):
        bring(server, pair, 1, name)
    with pytest.raises(UsageError, match="cannot be called"):
        server.unload_lora(name, requests_to(pair))
    assert pair[0].asked == []


def test_weights_are_no_adapter_and_an_adapter_no_weights(
    server: ParameterServer, pair: list[LoraEngine]
) -> None:
    server.register_checkpoint("weights", named_tensors=lora_tensors(1))
    server.gather_metas("weights")
    with pytest.raises(UsageError, match="no LoRA adapter's tensors"):
        server.update("weights", requests_to(pair), lora="helper")
    server.register_source("adapter", LoraSource.of_tensors(lora_tensors(1), CONFIG))
    server.gather_metas("adapter")
    with pytest.raises(UsageError, match="this is a LoRA adapter"):
        server.update("adapter", requests_to(pair))
    for more in ({"on_failure": "quarantine"}, {"probe": lambda: None}):
        with pytest.raises(UsageError, match="with lora="):
            server.update("adapter", requests_to(pair), lora="helper", **more)
    with pytest.raises(UsageError, match="called by `engine_requests`"):
        server.update("adapter", lambda handles: None, lora="helper")
    assert pair[0].asked == []


def test_an_engine_of_a_kind_without_adapters_says_so(
    server: ParameterServer, lora_root: Path
) -> None:
    with (
        serving(LoraEngine("ckpt-engine")) as engine,
        pytest.raises(UpdateFailed, match="kind 'replica' take no LoRA adapters from here"),
    ):
        bring(server, [engine], 1)


def test_a_folder_that_others_may_write_into_is_not_used(
    server: ParameterServer, pair: list[LoraEngine], lora_root: Path
) -> None:
    lora_root.mkdir(mode=0o777)
    lora_root.chmod(0o777)
    with pytest.raises(UpdateFailed, match="mode 777"):
        bring(server, pair, 1)
    assert pair[0].served == {}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"r": 0}, "of rank 0"),
        ({"r": "8"}, "not the configuration"),
        ({"peft_type": "IA3"}, "a IA3 of rank 2"),
        ({"lora_alpha": float("nan")}, "not the configuration"),
    ],
)
def test_what_is_no_loras_configuration_is_refused(
    tmp_path: Path, config: dict[str, object], said: str
) -> None:
    with pytest.raises(SourceError, match=said):
        LoraSource.of_folder(save_lora(tmp_path / "adapter", 1, **config))


def test_a_folder_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    folder = save_lora(tmp_path / "adapter", 1)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(SourceError, match=r"adapter_config.json: cannot be read"):
        LoraSource.of_folder(folder)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    with pytest.raises(SourceError, match="safe_serialization=True"):
        LoraSource.of_folder(folder)
    with pytest.raises(SourceError, match="without tensors"):
        LoraSource.of_tensors({}, CONFIG)


# Several ranks


@pytest.mark.parametrize("hosts", [("a", "a"), ("a", "b")])
def test_ranks_vote_as_one_each_for_its_own_engine(
    pair: list[LoraEngine], tmp_path: Path, hosts: tuple[str, str]
) -> None:
    """The first alone has the adapter; on another host it arrives by broadcast."""
    urls = [[engine.url for engine in pair]] * 2  # the same for each rank
    with ExitStack() as stack:
        ranks = rank_processes(stack, hosts)
        for seed in (1, 2):
            folder = str(save_lora(tmp_path / f"{seed}", seed))
            outcomes = call_all(ranks, "update_lora", folder=folder, endpoints=urls, lora="helper")
            assert [outcome["outcome"] for outcome in outcomes] == ["published"] * 2
            assert serve_same(pair, seed)
        pair[1].refuses = {"helper.ckpt-trial": "it does not fit"}
        folder = str(save_lora(tmp_path / "3", 3))
        outcomes = call_all(ranks, "update_lora", folder=folder, endpoints=urls, lora="helper")
        assert ["it does not fit" in outcome["error"] for outcome in outcomes] == [True] * 2
        assert serve_same(pair, 2)


def test_new_engines_are_not_brought_to_an_adapter_as_if_it_were_weights(
    server: ParameterServer, pair: list[LoraEngine], make_server: Callable[..., ParameterServer]
) -> None:
    server.register_source("adapter", LoraSource.of_tensors(lora_tensors(1), CONFIG))
    server.gather_metas("adapter")
    server.update("adapter", requests_to(pair), lora="helper")
    with pytest.raises(TransferError, match="no version that its peers could read"):
        make_server().join(server.get_metas(), requests_to(pair))


def test_two_updates_of_one_engine_do_not_undo_each_other(
    server: ParameterServer, pair: list[LoraEngine], make_server: Callable[..., ParameterServer]
) -> None:
    other = make_server()
    refused: list[str] = []

    def meanwhile(engine: LoraEngine, name: str, folder: Path) -> None:
        engine.on_load = None
        with pytest.raises(UpdateFailed, match="adapters is under way; try again later"):
            bring(other, pair[:1], 2)
        refused.append(name)

    pair[0].on_load = meanwhile
    bring(server, pair, 1)
    assert refused == ["helper"]
    assert serve_same(pair, 1)
    bring(other, pair, 2)
    assert serve_same(pair, 2)
