"""Versions that are streamed from peers: for hosts that have no room to stage what they join."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from ps_replicas import ReplicaProcess
from ps_tools import EngineProcess, digests, register, version
from test_ps_streamed import MODEL_BYTES, RING_BYTES, SLACK_BYTES, make_large, memory

from checkpoint_engine.errors import UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import Child, free_port

Engines = tuple[EngineProcess, EngineProcess]
MakeServer = Callable[..., ParameterServer]


@pytest.fixture
def source(socket_folder: Path) -> Iterator[Child]:
    """A server elsewhere, which others read from."""
    port = str(free_port() - 1)
    with Child(
        "ps/ps_rank.py", RANK="0", WORLD_SIZE="1", MASTER_PORT=port, CKPT_ENGINE_HOST="elsewhere"
    ) as child:
        child.call("meet")
        yield child


def publish(source: Child, seed: int) -> None:
    source.call("register", name=f"step-{seed}", seed=seed)
    assert source.call("update", name=f"step-{seed}")["outcome"] == "published"


def test_memory_decides_and_nothing_is_staged(
    source: Child, make_server: MakeServer, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_MEMORY_BYTES", "4096")
    publish(source, 1)
    joiner = make_server()
    report = joiner.join(source.call("metas"), [engine.request() for engine in engines])
    assert (report.mode, report.version) == ("streamed", "step-1")
    assert "do not fit in the 0.0 MB left of the budget" in report.why
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2
    assert joiner._store.allocated_bytes == 0


def test_the_way_back_leads_to_peers_as_long_as_they_have_the_version(
    source: Child, server: ParameterServer, engines: Engines
) -> None:
    good, bad = engines
    publish(source, 1)
    metas, num_leases = source.call("metas"), source.call("num_leases")
    requests = [good.request(), bad.request()]
    report = server.join(metas, requests, mode="streamed")
    assert {replica.way_back for replica in report.replicas} == {"none"}
    assert source.call("num_leases") == num_leases
    publish(source, 2)
    with pytest.raises(UpdateFailed, match="refused the last tensor") as failure:
        server.join(metas, [good.request(), bad.request(behaviour="raise")], mode="streamed")
    assert failure.value.report.outcome == "rolled_back"
    assert {replica.way_back for replica in failure.value.report.replicas} == {"peer"}
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2
    source.call("unregister", name="step-1")
    publish(source, 3)  # now its own engine needs step-1 no more
    report = server.join(metas, requests, mode="streamed")
    assert {replica.way_back for replica in report.replicas} == {"none"}
    assert [engine.weights for engine in engines] == [digests(version(3))] * 2


def test_what_was_staged_is_a_way_back_from_what_is_streamed(
    source: Child, server: ParameterServer, engines: Engines
) -> None:
    engine = engines[0]
    register(server, "before", 7)
    server.update("before", [engine.request()])
    publish(source, 1)
    with pytest.raises(UpdateFailed, match="refused the last tensor") as failure:
        bad = [engine.request(behaviour="raise")]
        server.join(source.call("metas"), bad, mode="streamed")
    (replica,) = failure.value.report.replicas
    assert replica.way_back == "staged"
    assert engine.weights == digests(version(7))


def test_wrong_bytes_of_the_only_peer_are_not_loaded(
    source: Child, server: ParameterServer, engines: Engines
) -> None:
    publish(source, 1)
    source.call("flip", name="step-1")
    with pytest.raises(UpdateFailed, match="bytes of tensor 'bias' are wrong"):
        server.join(source.call("metas"), [engines[0].request()], mode="streamed")
    assert engines[0].weights == {}


def test_memory_stays_within_the_ring(source: Child, tmp_path: Path) -> None:
    files = make_large(tmp_path)
    replica = ReplicaProcess(tmp_path, "large")
    port = str(free_port() - 1)
    joiner = Child("ps/ps_rank.py", RANK="0", WORLD_SIZE="1", MASTER_PORT=port)
    try:
        rises = {mode: rise(source, joiner, replica, files[mode], mode) for mode in files}
    finally:
        joiner.close()
        replica.close()
    assert max(rises["streamed"]) < 2 * RING_BYTES + SLACK_BYTES, "slots of its own, and read into"
    assert min(rises["staged"]) > MODEL_BYTES


def rise(
    source: Child, joiner: Child, replica: ReplicaProcess, file: str, mode: str
) -> tuple[int, int]:
    """By how much an update from a peer lifts the joiner's memory and the replica's at most."""
    assert replica.url
    if mode == "streamed":
        joiner.call("meet")
    pids = (joiner.pid, replica.pid)
    source.call("register_files", name=mode, files=[file], mode="staged")
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")
    before = [memory(pid, "VmRSS") for pid in pids]
    joiner.call("load_metas", metas=source.call("metas"), mode=mode)
    report = joiner.call("update_engines", name=mode, endpoints=[replica.url])
    assert (report["error"], report["mode"]) == (None, mode)
    own, served = (memory(p, "VmHWM") - b for p, b in zip(pids, before, strict=True))
    return own, served
