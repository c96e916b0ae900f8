"""Versions that are streamed from files: into loaders and replicas, by one rank and by several."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
from ps_replicas import ReplicaProcess, save_model, weights
from ps_tools import EngineProcess, digests, rank_processes, version
from safetensors.torch import load_file, save_file
from test_ps_replicas import calls, check_serves, is_paused

from checkpoint_engine.errors import UpdateFailed, UsageError
from checkpoint_engine.manifest import Manifest
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.update.streaming import check_modes
from children import Child, call_all, free_port, wait_until

Engines = tuple[EngineProcess, EngineProcess]
Replicas = tuple[ReplicaProcess, ReplicaProcess]


@pytest.fixture
def save(tmp_path: Path) -> Callable[[int], Path]:
    """Writes a version of the engines' model to a file."""

    def save(seed: int) -> Path:
        path = tmp_path / f"{seed}.safetensors"
        save_file(version(seed), path)
        return path

    return save


@pytest.fixture
def rank(socket_folder: Path) -> Iterator[Child]:
    """A parameter server in a process of its own, to be killed."""
    port = str(free_port() - 1)
    with Child("ps/ps_rank.py", RANK="0", WORLD_SIZE="1", MASTER_PORT=port) as child:
        child.call("meet")
        yield child


def register(server: ParameterServer, seed: int, path: Path, mode: str = "streamed") -> str:
    server.register_checkpoint(f"step-{seed}", files=[path], mode=mode)
    server.gather_metas(f"step-{seed}")
    return f"step-{seed}"


def test_loaders_are_brought_forward_and_back(
    server: ParameterServer, engines: Engines, save: Callable[[int], Path]
) -> None:
    requests = [engine.request() for engine in engines]
    ways = []
    for seed in (1, 2):
        path = save(seed)
        report = server.update(register(server, seed, path), requests)
        assert (report.mode, report.why) == ("streamed", "as asked")
        ways += [replica.way_back for replica in report.replicas]
        assert [engine.weights for engine in engines] == [digests(version(seed))] * 2
        path.unlink()
        server.unregister_checkpoint(f"step-{seed}")
    assert ways == ["none", "none", "source", "source"]
    assert server.rollback(requests).version == "step-1", "from files that are gone"
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_an_engine_that_fails_brings_all_back_to_their_files(
    server: ParameterServer, engines: Engines, save: Callable[[int], Path]
) -> None:
    good, bad = engines
    server.update(register(server, 1, save(1)), [good.request(), bad.request()])
    requests = [good.request(), bad.request(behaviour="raise")]
    with pytest.raises(UpdateFailed, match="refused the last tensor") as failure:
        server.update(register(server, 2, save(2)), requests)
    assert failure.value.report.outcome == "rolled_back"
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_no_way_back_is_said_before_and_can_be_refused(
    server: ParameterServer, engines: Engines, save: Callable[[int], Path]
) -> None:
    engine = engines[0]
    name = register(server, 1, save(1))
    with pytest.raises(UpdateFailed, match="no way back") as failure:
        server.update(name, [engine.request()], require_rollback=True)
    assert failure.value.report.outcome == "aborted"
    assert engine.weights == {}
    assert server.update(name, [engine.request()]).replicas[0].way_back == "none"
    name = register(server, 2, save(2))
    report = server.update(name, [engine.request()], require_rollback=True)
    assert report.replicas[0].way_back == "source"


@pytest.mark.parametrize("has_base", [True, False])
def test_a_rank_that_dies_in_the_middle(
    server: ParameterServer,
    rank: Child,
    engines: Engines,
    save: Callable[[int], Path],
    has_base: bool,
) -> None:
    """With a base the engine returns to it alone; without, its call says that it could not."""
    engine = engines[0]
    if has_base:
        server.update(register(server, 1, save(1)), [engine.request()])
    server.close()
    engine.forget()
    rank.call("register_files", name="step-2", files=[str(save(2))], mode="streamed")
    rank.send("update_engines", name="step-2", endpoints=[], others=1)
    handle = rank.wait_for("called")["handle"]
    taking = engine.send("update", handle=handle, behaviour="block")
    engine.wait_for("loading")
    rank.kill()
    engine.send("go")
    ending = "kept" if has_base else "torn"
    with pytest.raises(RuntimeError, match=rf"was not published \({ending}\)"):
        engine.result(taking)
    if has_base:
        assert engine.weights == digests(version(1))


def test_an_engine_that_dies_in_the_middle_brings_the_other_back(
    server: ParameterServer, engines: Engines, save: Callable[[int], Path]
) -> None:
    good, doomed = engines
    server.update(register(server, 1, save(1)), [good.request(), doomed.request()])
    doomed.forget()

    def kill(handles: Any) -> None:
        taking = doomed.send("update", handle=handles[0][1], behaviour="block")
        doomed.wait_for("loading")
        doomed.kill()
        doomed.result(taking)

    with pytest.raises(UpdateFailed) as failure:
        server.update(register(server, 2, save(2)), [good.request(), kill])
    assert failure.value.report.outcome == "rolled_back"
    assert good.weights == digests(version(1))


def test_memory_decides_and_the_report_says_why(
    make_server: Callable[..., ParameterServer],
    engines: Engines,
    save: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CKPT_ENGINE_MEMORY_BYTES", "4096")
    server = make_server()
    name = register(server, 1, save(1), mode="auto")
    report = server.update(name, [engines[0].request()])
    assert report.mode == "streamed"
    assert "do not fit in the 0.0 MB left of the budget" in report.why
    assert engines[0].weights == digests(version(1))


# Replicas, which know the folder that they were loaded from


def save_weights(path: Path, seed: int) -> Path:
    save_file(weights(seed), path)
    return path


def test_replicas_are_brought_forward_and_back_to_what_was_streamed(
    server: ParameterServer, replicas: Replicas, engines: Engines, tmp_path: Path
) -> None:
    name = register(server, 1, save_weights(tmp_path / "1", 1))
    report = server.update(name, calls(*replicas))
    assert (report.mode, report.verified) == ("streamed", True)
    for replica in replicas:
        check_serves(replica, 1, report.digest)
    name = register(server, 2, save_weights(tmp_path / "2", 2))
    requests = [*calls(*replicas), engines[0].request(behaviour="raise at the end")]
    with pytest.raises(UpdateFailed) as failure:
        server.update(name, requests)
    assert {r.way_back for r in failure.value.report.replicas} == {"source", "none"}
    for replica in replicas:
        check_serves(replica, 1, report.digest)


def test_replicas_go_back_by_themselves_when_the_rank_dies(
    server: ParameterServer, rank: Child, replicas: Replicas, engines: Engines, tmp_path: Path
) -> None:
    """Their weights are the new ones already, an engine is still loading, and files are gone."""
    replica, slow = replicas[0], engines[0]
    paths = [save_weights(tmp_path / str(seed), seed) for seed in (1, 2)]
    report = server.update(register(server, 1, paths[0]), calls(replica))
    server.close()
    rank.call("register_files", name="step-2", files=[str(paths[1])], mode="streamed")
    rank.send("update_engines", name="step-2", endpoints=[replica.url], others=1)
    handle = rank.wait_for("called")["handle"]
    loading = slow.send("update", handle=handle, behaviour="block")
    slow.wait_for("loading")
    wait_until(lambda: is_paused(replica), "the pause")
    for path in paths:
        path.unlink()
    rank.kill()
    wait_until(lambda: replica.health[1] == "serving", "the way back")
    check_serves(replica, 1, report.digest)
    slow.send("go")
    with pytest.raises(RuntimeError, match="not published"):
        slow.result(loading)


def test_a_file_that_was_written_into_changes_nothing(
    server: ParameterServer, replicas: Replicas, tmp_path: Path
) -> None:
    name = register(server, 1, save_weights(tmp_path / "1", 1))
    report = server.update(name, calls(*replicas))
    path = save_weights(tmp_path / "2", 2)
    name = register(server, 2, path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"!")
    with pytest.raises(UpdateFailed, match="the file was changed after its version") as failure:
        server.update(name, calls(*replicas))
    assert failure.value.report.outcome == "aborted"
    for replica in replicas:
        check_serves(replica, 1, report.digest)


# Several ranks


@pytest.fixture(params=["one host", "two hosts"])
def pair(request: pytest.FixtureRequest, socket_folder: Path) -> Iterator[list[Child]]:
    hosts = ("a", "a") if request.param == "one host" else ("a", "b")
    with ExitStack() as stack:
        yield rank_processes(stack, hosts)


def test_ranks_that_digest_a_share_each_stream_the_whole(
    pair: list[Child], save: Callable[[int], Path]
) -> None:
    options = {"files": (str(save(1)),), "mode": "streamed"}
    call_all(pair, "register_files", name="step-1", share=[[0, 2], [1, 2]], **options)
    reports = call_all(pair, "update", name="step-1")
    assert [report["error"] for report in reports] == [None, None]
    assert {(report["mode"], report["bytes_sent"]) for report in reports} == {("streamed", 0)}
    assert call_all(pair, "weights") == [digests(version(1))] * 2


def test_ranks_that_disagree_on_the_mode_are_told(
    pair: list[Child], save: Callable[[int], Path]
) -> None:
    numbers = [
        child.send(
            "register_files", name="step-1", files=[str(save(1))], mode=mode, share=[rank, 2]
        )
        for rank, (child, mode) in enumerate(zip(pair, ("streamed", "staged"), strict=True))
    ]
    for child, number in zip(pair, numbers, strict=True):
        with pytest.raises(RuntimeError, match=r"ranks \[0\] stream this version"):
            child.result(number)


def test_a_host_without_the_files_is_named(
    server: ParameterServer, save: Callable[[int], Path]
) -> None:
    register(server, 1, save(1))
    (meta,) = server._gathered().metas
    elsewhere = msgspec.structs.replace(
        meta, rank=1, host="elsewhere", files="", manifest=Manifest.of(())
    )
    with pytest.raises(UsageError, match=r"ranks \[1\] have none there"):
        check_modes([meta, elsewhere])


# Memory

MODEL_BYTES = 240 << 20
RING_BYTES = 4 * (4 << 20)
SLACK_BYTES = 32 << 20


def test_memory_stays_within_the_ring(rank: Child, tmp_path: Path) -> None:
    """Peak memory of the server and of the replica; the same measure sees a staged version."""
    files = make_large(tmp_path)
    replica = ReplicaProcess(tmp_path, "large")
    try:
        rises = {mode: rise(rank, replica, files[mode], mode) for mode in ("streamed", "staged")}
    finally:
        replica.close()
    assert max(rises["streamed"]) < RING_BYTES + SLACK_BYTES
    assert min(rises["staged"]) > MODEL_BYTES - SLACK_BYTES


def make_large(folder: Path) -> dict[str, str]:
    """A folder of a large model, and two other versions of it."""
    save_model(folder, seed=0, vocab_size=MODEL_BYTES // 2 // (32 * 4))
    tensors = load_file(folder / "model.safetensors")
    files = {}
    for number, mode in enumerate(("streamed", "staged"), 1):
        for tensor in tensors.values():
            tensor.view(-1)[:5] = number
        files[mode] = str(folder / f"{mode}.safetensors")
        save_file(tensors, files[mode])
    return files


def rise(rank: Child, replica: ReplicaProcess, file: str, mode: str) -> tuple[int, int]:
    """By how much an update lifts the memory of the server and of the replica at most."""
    assert replica.url
    pids = (rank.pid, replica.pid)
    for pid in pids:
        Path(f"/proc/{pid}/clear_refs").write_text("5")  # the peak begins anew
    before = [memory(pid, "VmRSS") for pid in pids]
    rank.call("register_files", name=mode, files=[file], mode=mode)
    report = rank.call("update_engines", name=mode, endpoints=[replica.url])
    assert (report["error"], report["mode"]) == (None, mode)
    server, served = (memory(p, "VmHWM") - b for p, b in zip(pids, before, strict=True))
    return server, served


def memory(pid: int, name: str) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))
