"""Weights read from peers, who take no part: by some ranks of a server, and by new instances."""

from __future__ import annotations

import json
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest
from ps_tools import EngineProcess, digests, rank_processes, register, version

from checkpoint_engine.errors import TransferError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.update.metas import load_metas_file, save_metas_file
from children import Child, call_all, wait_until

Start = Callable[..., list[Child]]
LARGE = 40  # tensors, in about five buckets


@pytest.fixture
def start(socket_folder: Path) -> Iterator[Start]:
    """Starts the ranks of one server, each on the host that is named for it."""
    started: list[Child] = []
    with ExitStack() as stack:

        def ranks_on(*hosts: str) -> list[Child]:
            ranks = rank_processes(stack, hosts)
            started.extend(ranks)
            return ranks

        yield ranks_on
        for rank in started:  # some do not listen
            rank.kill()


def block(ranks: list[Child], seconds: float = 60.0) -> None:
    for rank in ranks:
        rank.send("block", seconds=seconds)
        rank.wait_for("blocked")


def arrivals(child: Child) -> list[tuple[str, int]]:
    with child._changed:
        return [
            (heard["source"], heard["place"])
            for heard in child._heard
            if heard.get("event") == "arrived"
        ]


# Some ranks of a server


def test_ranks_read_from_others_whose_threads_do_something_else(start: Start) -> None:
    ranks = start("a", "b", "c")
    call_all(ranks, "register", name="old", seed=1)
    assert {one["outcome"] for one in call_all(ranks, "update", name="old")} == {"published"}
    whole = call_all(ranks, "register_large", name="new", seed=2, num_tensors=LARGE)[0]
    block([ranks[0], ranks[2]])
    outcome = ranks[1].call("update", name="new", ranks=[1])
    assert (outcome["outcome"], outcome["error"]) == ("published", None)
    assert [replica["rank"] for replica in outcome["replicas"]] == [0], "the only one of its group"
    assert ranks[1].call("weights") == whole


def test_who_is_not_among_the_ranks_does_not_wait_and_calls_nobody(start: Start) -> None:
    ranks = start("a", "b")
    call_all(ranks, "register", name="new", seed=3)
    outcome = ranks[0].call("update", name="new", ranks=[1])
    assert (outcome["outcome"], outcome["replicas"]) == ("not_taking_part", [])
    assert ranks[1].call("update", name="new", ranks=[1])["outcome"] == "published"
    assert ranks[0].call("weights") == {}
    assert ranks[1].call("weights") == digests(version(3))
    with pytest.raises(RuntimeError, match="not of world size 2"):
        ranks[1].call("update", name="new", ranks=[2])


def test_every_rank_of_a_host_reads_its_share(start: Start) -> None:
    source = start("a")
    whole = source[0].call("register_large", name="v", seed=4, num_tensors=LARGE)
    readers = start("b", "b")
    call_all(readers, "load_metas", metas=source[0].call("metas"))
    for reader in readers:
        reader.call("read_at", bytes_per_second=1 << 40)
    outcomes = call_all(readers, "update", name="loaded")
    assert [outcome["outcome"] for outcome in outcomes] == ["published"] * 2
    assert call_all(readers, "weights") == [whole] * 2
    first, second = (len(arrivals(reader)) for reader in readers)
    assert abs(first - second) <= 1
    assert first + second == 6, "the five buckets are cut once, so that both read the same"


# New instances


def test_a_new_instance_reads_from_all_who_have_it(start: Start) -> None:
    sources = start("a", "b", "c", "d")
    whole = call_all(sources, "register_large", name="v1", seed=5, num_tensors=LARGE)[0]
    block(sources[1:])
    (reader,) = start("e")
    reader.call("read_at", bytes_per_second=1 << 40)
    outcome = reader.call("join", metas=sources[0].call("metas"))
    assert (outcome["version"], outcome["outcome"]) == ("v1", "published")
    assert reader.call("weights") == whole
    num_buckets = [[source for source, _ in arrivals(reader)].count(one)
                   for one in {source for source, _ in arrivals(reader)}]  # fmt: skip
    assert sorted(num_buckets) == [1, 1, 1, 2]


@pytest.mark.parametrize("transport", ["mooncake", "nixl"])
def test_a_new_instance_reads_through_a_library(
    start: Start, monkeypatch: pytest.MonkeyPatch, transport: str
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_TRANSPORT", transport)
    (source,) = start("a")
    whole = source.call("register_large", name="v1", seed=17, num_tensors=LARGE)
    metas = source.call("metas")
    block([source])
    (reader,) = start("b")
    outcome = reader.call("join", metas=metas)
    assert (outcome["version"], outcome["outcome"]) == ("v1", "published")
    assert reader.call("weights") == whole
    assert arrivals(reader) == [], "nothing came over ZeroMQ"


def test_a_source_that_dies_is_replaced_and_what_it_gave_is_not_read_again(start: Start) -> None:
    sources = start("a", "b", "c")
    whole = call_all(sources, "register_large", name="v1", seed=6, num_tensors=64)[0]
    metas = sources[0].call("metas")
    (reader,) = start("d")
    reader.call("read_at", bytes_per_second=100_000_000)
    joining = reader.send("join", metas=metas)
    wait_until(lambda: len(arrivals(reader)) >= 2, "the first buckets")
    sources[1].kill()
    assert reader.result(joining)["outcome"] == "published"
    assert reader.call("weights") == whole
    places = [place for _, place in arrivals(reader)]
    assert len(places) == len(set(places)) == 8


def test_a_source_with_bad_memory_is_replaced_and_named_if_nobody_else_has_it(
    start: Start,
) -> None:
    sources = start("a", "b")
    whole = call_all(sources, "register_large", name="v1", seed=7, num_tensors=LARGE)[0]
    sources[0].call("flip", name="v1")
    (reader,) = start("c")
    metas = sources[0].call("metas")
    assert reader.call("join", metas=metas)["outcome"] == "published"
    assert reader.call("weights") == whole
    sources[1].kill()
    with pytest.raises(RuntimeError, match=r"'layers\.0'.*no source.*left(.|\n)*differ from the"):
        reader.call("join", metas=metas)
    assert reader.call("weights") == whole


def test_a_source_may_forget_a_version_while_it_is_read(start: Start) -> None:
    (source,) = start("a")
    whole = source.call("register_large", name="v1", seed=8, num_tensors=LARGE)
    (reader,) = start("b")
    reader.call("read_at", bytes_per_second=100_000_000)
    reader.call("load_metas", metas=source.call("metas"))
    reading = reader.send("update", name="loaded")
    wait_until(lambda: len(arrivals(reader)) >= 1, "the first bucket")
    source.call("unregister", name="v1")
    assert source.call("num_leases") == 1, "the reader's"
    source.call("register_large", name="v2", seed=9, num_tensors=LARGE)
    assert reader.result(reading)["outcome"] == "published"
    assert reader.call("weights") == whole
    wait_until(lambda: source.call("num_leases") == 1, "the end of the lease; v2 is registered")


def test_on_its_own_host_a_new_instance_maps_what_is_there(start: Start) -> None:
    (source,) = start("a")
    source.call("register", name="v1", seed=10)
    metas = source.call("metas")
    block([source])
    (reader,) = start("a")
    outcome = reader.call("join", metas=metas)
    assert (outcome["outcome"], outcome["bytes_sent"]) == ("published", 0)
    assert reader.call("weights") == digests(version(10))


def test_hosts_that_received_a_version_are_sources_of_it(start: Start) -> None:
    ranks = start("a", "b")
    names = [ranks[n].send("register", name="v1", seed=11, share=[n, 2]) for n in range(2)]
    for rank, number in zip(ranks, names, strict=True):
        rank.result(number)
    assert {one["outcome"] for one in call_all(ranks, "update", name="v1")} == {"published"}
    metas = ranks[1].call("metas")
    ranks[0].kill()
    (reader,) = start("c")
    assert reader.call("join", metas=metas)["outcome"] == "published"
    assert reader.call("weights") == digests(version(11))


def test_nobody_answers(start: Start) -> None:
    (source,) = start("a")
    source.call("register", name="v1", seed=12)
    metas = source.call("metas")
    source.kill()
    (reader,) = start("b")
    with pytest.raises(RuntimeError, match=r"no source answers: rank 0: .* is gone"):
        reader.call("join", metas=metas)


# While the other server updates


def test_who_joins_in_the_middle_of_an_update_ends_on_what_it_published(
    start: Start,
    make_server: Callable[..., ParameterServer],
    engines: tuple[EngineProcess, EngineProcess],
) -> None:
    server = make_server()
    register(server, "v1", 13)
    server.update("v1", engines[0].request())
    metas = json.loads(json.dumps(server.get_metas()))
    register(server, "v2", 14)
    updating = threading.Thread(
        target=server.update, args=("v2", engines[0].request(behaviour="block"))
    )
    updating.start()
    engines[0].wait_for("loading")
    (reader,) = start("another host")
    joining = reader.send("join", metas=metas)
    reader.wait_for("loaded")
    engines[0].send("go")
    updating.join(30)
    outcome = reader.result(joining)
    assert (outcome["version"], outcome["outcome"]) == ("v2", "published")
    assert reader.call("weights") == digests(version(14))


# The file


def test_the_metas_are_kept_in_a_file_of_their_owner(
    server: ParameterServer, start: Start, tmp_path: Path
) -> None:
    register(server, "v1", 15)
    file = tmp_path / "metas.json"
    file.write_text("of before")
    file.chmod(0o644)
    save_metas_file(file, server.get_metas())
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(tmp_path.glob("metas*")) == [file]
    (reader,) = start("b")
    assert reader.call("join", metas=load_metas_file(file))["outcome"] == "published"
    assert reader.call("weights") == digests(version(15))


def test_there_is_nothing_to_join(
    make_server: Callable[..., ParameterServer], engines: tuple[EngineProcess, EngineProcess]
) -> None:
    server, other = make_server(), make_server()
    register(server, "v1", 16)
    metas = server.get_metas()
    server.update("v1", engines[0].request())
    server.unregister_checkpoint("v1")
    with pytest.raises(TransferError, match="no version that its peers could read"):
        other.join(metas, engines[1].request(), timeout=timedelta(seconds=20))


def test_what_was_rolled_back_is_not_joined(
    make_server: Callable[..., ParameterServer], engines: tuple[EngineProcess, EngineProcess]
) -> None:
    server, other = make_server(), make_server()
    for name, seed in (("v1", 17), ("v2", 18)):
        register(server, name, seed)
        server.update(name, engines[0].request())
    metas = server.get_metas()
    server.rollback(engines[0].request())
    assert engines[0].weights == digests(version(17))
    with pytest.raises(TransferError, match="rolled back"):
        other.join(metas, engines[1].request(), timeout=timedelta(seconds=20))
    register(server, "v3", 19)
    server.update("v3", engines[0].request())
    assert other.join(metas, engines[1].request()).version == "v3"
