"""First weights: read from disk by all ranks, or brought by the connector that engines import."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from core_tools import Background
from ps_replicas import weights
from ps_tools import EngineProcess, Handles, digests, large_version, register, version
from safetensors.torch import save_file
from torch.distributed import TCPStore

from checkpoint_engine.adapters import CkptEngineConnector, CkptEngineModelLoader
from checkpoint_engine.errors import (
    DeadlineExceeded,
    PeerLost,
    TransferError,
    UpdateFailed,
    UsageError,
)
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.replica.replica import load_replica
from checkpoint_engine.update.metas import save_metas_file
from children import Child, call_all

Publish = Callable[..., str]


@pytest.fixture
def publish(server: ParameterServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Publish:
    """Has a server of another host offer tensors; returns the URL by which it is joined."""

    def publish(name: str, tensors: dict[str, torch.Tensor]) -> str:
        with monkeypatch.context() as patch:
            patch.setenv("CKPT_ENGINE_HOST", "another host")
            server.register_checkpoint(name, named_tensors=tensors)
            server.gather_metas(name)
        file = tmp_path / "metas of all.json"
        save_metas_file(file, server.get_metas())
        return f"ckptengine://{str(file).replace(' ', '%20')}"

    return publish


@pytest.fixture
def start_ranks() -> Iterator[Callable[..., list[Child]]]:
    """Two processes of one launch, on one host; this one keeps their keys, as torchrun does."""
    keys = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with ExitStack() as stack:
        started: list[Child] = []

        def start(host: str) -> list[Child]:
            variables = {
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(keys.port),
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "CKPT_ENGINE_HOST": host,
            }
            started.extend(
                stack.enter_context(Child("ps/ps_rank.py", RANK=str(rank), **variables))
                for rank in range(2)
            )
            return started[-2:]

        yield start
        for rank in started:  # to end properly takes seconds, and shows nothing
            rank.kill()


def num_leases(server: ParameterServer) -> int:
    return sum(segment.num_leases for segment in server._store._segments)


class Plain(torch.nn.Module):
    """Has what `version` makes, and nothing that loads it."""

    def __init__(self, num_columns: int = 33) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, num_columns))
        self.bias = torch.nn.Parameter(torch.zeros(10, dtype=torch.bfloat16))
        self.register_buffer("step", torch.tensor(0))


class SelfLoading(Plain):
    """As the models of vLLM and SGLang are."""

    def load_weights(self, named: list[tuple[str, torch.Tensor]]) -> None:
        self.load_state_dict(dict(named))


# From disk


def test_ranks_of_a_host_read_a_checkpoint_at_once_and_each_byte_once(
    start_ranks: Callable[..., list[Child]], tmp_path: Path
) -> None:
    tensors = large_version(1, num_tensors=6)
    for number, name in enumerate(tensors):  # several files, neither of them one rank's
        save_file({name: tensors[name]}, tmp_path / f"part-{number // 4}-{number}.safetensors")
    ranks = start_ranks("a")
    call_all(ranks, "meet")
    halted = ranks[1].send("register_share", name="v1", folder=str(tmp_path), halting=True)
    ranks[1].wait_for("reading")
    first = ranks[0].call("register_share", name="v1", folder=str(tmp_path))
    assert not ranks[1].has_answered(halted), "it is in the middle of reading"
    ranks[1].send("go")
    second = ranks[1].result(halted)
    call_all(ranks, "gather", name="v1")
    call_all(ranks, "update", name="v1")
    assert call_all(ranks, "weights") == [digests(tensors)] * 2
    whole = sum(tensor.nbytes for tensor in tensors.values())
    assert whole <= first + second < whole + 64_000, "with what is read besides, such as this"
    assert abs(first - second) <= 64_000


# From who serves


def test_tensors_are_handed_over_and_the_source_is_let_go_of(
    publish: Publish, server: ParameterServer
) -> None:
    url, before = publish("v1", version(1)), num_leases(server)
    with CkptEngineConnector(url) as connector:
        got = dict(connector.weight_iterator())
    assert digests(got) == digests(version(1))
    assert num_leases(server) == before


@pytest.mark.parametrize("kind", [Plain, SelfLoading])
def test_a_model_is_loaded_and_ready_to_serve(publish: Publish, kind: type[Plain]) -> None:
    with CkptEngineConnector(publish("v1", version(2))) as connector:
        loader = CkptEngineModelLoader(connector, initialize=lambda columns: kind(columns))
        model = loader.load_model(model_config=33)
    assert digests(model.state_dict()) == digests(version(2))
    assert not model.training
    assert (loader.loaded is None) == (kind is SelfLoading)


@pytest.mark.parametrize("kind", [Plain, SelfLoading])
def test_a_version_that_does_not_fit_is_an_error(publish: Publish, kind: type[Plain]) -> None:
    with CkptEngineConnector(publish("v1", version(3))) as connector:
        loader = CkptEngineModelLoader(connector, initialize=lambda columns: kind(columns))
        with pytest.raises(UpdateFailed, match=r"weight(.|\n)*\[?64, 33"):
            loader.load_model(model_config=32)


def test_what_is_published_meanwhile_is_followed(
    publish: Publish, server: ParameterServer, engines: tuple[EngineProcess, EngineProcess]
) -> None:
    given: list[dict[str, str]] = []

    def load_weights(named: list[tuple[str, torch.Tensor]]) -> None:
        given.append(digests(dict(named)))
        if len(given) == 1:
            publish("v2", version(5))
            server.update("v2", engines[0].request())

    with CkptEngineConnector(publish("v1", version(4))) as connector:
        connector.update_weights_from_ipc(load_weights)
    assert given == [digests(version(4)), digests(version(5))]


def test_workers_of_one_engine_read_each_byte_once(
    publish: Publish, start_ranks: Callable[..., list[Child]]
) -> None:
    tensors = large_version(6, num_tensors=24)
    url = publish("v1", tensors)
    workers = start_ranks("b")
    call_all(workers, "read_at", bytes_per_second=1 << 40)
    call_all(workers, "connect", url=url)
    assert call_all(workers, "weights") == [digests(tensors)] * 2
    arrived = [
        sum(heard["length"] for heard in worker._heard if heard.get("event") == "arrived")
        for worker in workers
    ]
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes <= sum(arrived) < num_bytes + 256 * len(tensors), "and what aligns them"
    assert min(arrived) > num_bytes / 3, "each its share"


def test_a_replica_serves_what_its_peers_have_under_its_name_and_digest(
    publish: Publish, server: ParameterServer, model_folder: Path
) -> None:
    url = publish("step-7", weights(7))
    replica = load_replica(
        model_folder,
        name="r",
        load_format="ckpt_engine",
        wait_for_initial_weights=False,
        url=url,
    )
    info = replica.info()
    assert (info["weight_version"], info["state"]) == ("step-7", "serving")
    assert info["digest"] == server._gathered().digest


def test_a_replica_whose_peers_are_gone_does_not_start(
    publish: Publish, server: ParameterServer, model_folder: Path
) -> None:
    url = publish("v1", weights(8))
    server.close()
    with pytest.raises(TransferError, match="no source answers"):
        load_replica(
            model_folder,
            name="r",
            load_format="ckpt_engine",
            wait_for_initial_weights=False,
            url=url,
        )


def test_a_replica_of_other_load_formats_joins_nobody(model_folder: Path) -> None:
    for load_format, message in (("auto", "is for --load-format ckpt_engine"), ("pt", "one of")):
        with pytest.raises(UsageError, match=message):
            load_replica(
                model_folder,
                name="r",
                load_format=load_format,
                wait_for_initial_weights=False,
                url="ckptengine:///metas.json",
            )


# From the first update


def offered(connector: CkptEngineConnector) -> Callable[[Handles], None]:
    """A request that an engine's server answers when the update is over."""
    return lambda handles: connector.offer(handles[0][1])


def test_an_engine_without_weights_waits_for_the_first_update_that_is_published(
    server: ParameterServer,
) -> None:
    with CkptEngineConnector("ckptengine://", timeout_seconds=30.0) as connector:
        loader = CkptEngineModelLoader(connector, initialize=lambda _: Plain())
        loading = Background(lambda: loader.load_model(model_config=None))
        server.register_checkpoint("unfit", named_tensors={"weight": torch.zeros(3)})
        server.gather_metas("unfit")
        with pytest.raises(UpdateFailed, match="lacks 'bias'"):
            server.update("unfit", offered(connector))
        register(server, "v1", 10)
        assert server.update("v1", offered(connector)).outcome == "published"
        model = loading.result()
        assert isinstance(model, Plain)
        assert digests(model.state_dict()) == digests(version(10))
        assert loader.loaded is not None
        assert loader.loaded.version.label == "v1"
        with pytest.raises(UsageError, match="has its first weights"):
            connector.offer("ipc:///x")


def test_nobody_waits_for_ever() -> None:
    connector = CkptEngineConnector("ckptengine://", timeout_seconds=0.05)
    with pytest.raises(DeadlineExceeded, match="has not taken ipc:///x"):
        connector.offer("ipc:///x")
    connector = CkptEngineConnector("ckptengine://", timeout_seconds=0.05)
    with pytest.raises(DeadlineExceeded, match="no update was published here"):
        connector.update_weights_from_ipc(lambda named: None)


def test_what_is_offered_to_an_engine_that_gives_up_is_refused() -> None:
    connector = CkptEngineConnector("ckptengine://", timeout_seconds=30.0)
    offering = Background(lambda: connector.offer("ipc:///x"))
    while connector._offers.empty():
        pass
    connector.close()
    with pytest.raises(PeerLost, match="takes no first weights"):
        offering.result()


@pytest.mark.parametrize(
    "url", ["", "metas.json", "/metas.json", "file:///metas.json", "ckptengine://host/metas.json"]
)
def test_other_urls_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match="neither ckptengine:///path"):
        CkptEngineConnector(url)
