"""One rank and engines in processes of their own, known by their loaders alone."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
from ps_tools import DEVICE, EngineProcess, Handles, digests, register, version

from checkpoint_engine.errors import UpdateFailed, UsageError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.registry import Registry
from children import free_port

Engines = tuple[EngineProcess, EngineProcess]
SHORT = timedelta(seconds=2)


def bring(server: ParameterServer, engines: Engines, seed: int, name: str | None = None) -> None:
    """An update that succeeds on both engines."""
    name = name or f"step-{seed}"
    register(server, name, seed)
    report = server.update(name, [engine.request() for engine in engines])
    assert report.outcome == "published"
    for engine in engines:
        assert engine.weights == digests(version(seed))


def test_one_rank_brings_two_engines_forward_again_and_again(
    server: ParameterServer, engines: Engines
) -> None:
    for seed in (1, 2, 3):
        bring(server, engines, seed)


def test_the_report_says_what_was_done(server: ParameterServer, engines: Engines) -> None:
    register(server, "step-1", 1)
    requests = [engine.request(hook="post_hook") for engine in engines]
    report = server.update("step-1", requests, weight_version="rl-17")
    assert (report.version, report.outcome, report.mode) == ("rl-17", "published", "staged")
    assert report.bytes_sent == 0, "on one host nothing is copied"
    assert not report.verified, "these engines do not show their parameters"
    assert [replica.outcome for replica in report.replicas] == ["published"] * 2
    assert {replica.name for replica in report.replicas} == {f"engine {e.pid}" for e in engines}
    assert {replica.way_back for replica in report.replicas} == {"none"}
    assert report.pause_seconds == max(replica.pause_seconds or 0 for replica in report.replicas)
    assert report.seconds.keys() >= {"stage", "attach", "verify", "enter", "apply", "publish"}
    assert [engine.call("num_hooks") for engine in engines] == [1, 1]


def test_one_function_may_call_several_engines_at_once(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)

    def call_both(handles: Handles) -> None:
        threads = [threading.Thread(target=e.request(), args=(handles,)) for e in engines]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    report = server.update("step-1", call_both)
    assert len(report.replicas) == 2
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_a_loader_that_is_no_method_is_served_too(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    report = server.update(
        "step-1", lambda handles: engines[0].call("update_function", handle=handles[0][1])
    )
    assert report.outcome == "published"


def test_the_loader_of_a_plain_dict_is_served_too(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    loaded: list[dict[str, str]] = []
    server.update(
        "step-1",
        lambda handles: loaded.append(engines[0].call("update_dict", handle=handles[0][1])),
    )
    assert loaded == [digests(version(1))]


def test_who_registered_nothing_may_join_another_server(
    make_server: Callable[..., ParameterServer], engines: Engines
) -> None:
    theirs, ours = make_server(), make_server()
    register(theirs, "step-1", 1)
    ours.gather_metas("step-1")
    ours.load_metas(theirs.get_metas())
    ours.update("step-1", engines[0].request(), ranks=[0])
    assert engines[0].weights == digests(version(1))


# A no


def test_one_engine_that_refuses_at_load_rolls_the_other_back(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    good, bad = engines
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [good.request(), bad.request(behaviour="raise")])
    report = failure.value.report
    assert (report.outcome, report.base) == ("rolled_back", report.replicas[0].digest)
    assert {replica.outcome for replica in report.replicas} == {"kept"}
    assert {replica.way_back for replica in report.replicas} == {"staged"}
    assert report.reason.where == f"engine {bad.pid}"
    message = str(failure.value)
    assert message.startswith("update to 'step-2' rolled back: ")
    assert "load_weights refused the last tensor" in message.splitlines()[0]
    assert "in load_weights" in message, "the remote traceback"
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2
    bring(server, engines, seed=3)


def test_the_first_cause_is_the_requests_own_exception(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)

    def unreachable(handles: Handles) -> None:
        raise ConnectionRefusedError("engine 7 is not there")

    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [engines[0].request(), unreachable])
    report = failure.value.report
    assert report.outcome == "aborted"
    assert str(report.reason) == (
        "rank 0, request 1: ConnectionRefusedError: engine 7 is not there"
    )
    assert "in unreachable" in str(failure.value)
    assert engines[0].weights == digests(version(1))
    bring(server, engines, seed=3)


def test_without_a_version_before_a_failed_load_is_torn_and_the_next_update_mends_it(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-1", engines[0].request(behaviour="raise"))
    (replica,) = failure.value.report.replicas
    assert replica.outcome == "torn"
    assert "load_weights refused the last tensor" in str(failure.value), "the first cause"
    bring(server, engines, seed=2)


def test_require_rollback_refuses_the_first_update_and_allows_the_second(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    requests = [engine.request() for engine in engines]
    with pytest.raises(UpdateFailed, match="no way back") as failure:
        server.update("step-1", requests, require_rollback=True)
    assert failure.value.report.outcome == "aborted"
    assert [engine.weights for engine in engines] == [{}, {}]
    server.update("step-1", requests)
    register(server, "step-2", 2)
    assert server.update("step-2", requests, require_rollback=True).outcome == "published"


def test_a_request_that_calls_nobody_is_explained(server: ParameterServer) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UpdateFailed, match="no engine said hello"):
        server.update("step-1", lambda handles: None)


def test_a_handle_is_worth_nothing_when_no_update_is_under_way(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    handles: list[tuple[str, str]] = []

    def keep_handle(given: Handles) -> None:
        handles.extend(given)
        engines[0].request()(given)

    server.update("step-1", keep_handle)
    with pytest.raises(RuntimeError, match="UpdateRefused: no update is under way"):
        engines[0].call("update", handle=dict(handles)[DEVICE])
    assert engines[0].weights == digests(version(1))


# Death and silence


def test_an_engine_that_is_killed_while_it_loads_leaves_the_other_on_a_true_version(
    server: ParameterServer, engines: Engines, engine_pool: list[EngineProcess]
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    survivor, victim = engines

    def kill() -> None:
        victim.wait_for("loading")
        victim.kill()

    victim.forget()
    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [survivor.request(), victim.request(behaviour="block")])
    killer.join()
    outcomes = {replica.name: replica.outcome for replica in failure.value.report.replicas}
    assert outcomes == {f"engine {survivor.pid}": "kept", f"engine {victim.pid}": "lost"}
    assert survivor.weights == digests(version(1))
    with EngineProcess() as restarted:
        bring(server, (survivor, restarted), seed=3)


def test_an_engine_that_is_killed_is_left_behind_where_that_is_wanted(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    survivor, victim = engines
    victim.forget()
    killer = threading.Thread(target=lambda: (victim.wait_for("loading"), victim.kill()))
    killer.start()
    report = server.update(
        "step-2",
        [survivor.request(), victim.request(behaviour="block")],
        on_failure="quarantine",
    )
    killer.join()
    outcomes = {replica.name: replica.outcome for replica in report.replicas}
    assert outcomes == {f"engine {survivor.pid}": "published", f"engine {victim.pid}": "lost"}
    assert survivor.weights == digests(version(2))


def test_a_loader_that_hangs_ends_the_update_at_the_deadline(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    good, hanging = engines
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [good.request(), hanging.request(behaviour="block")], timeout=SHORT)
    report = failure.value.report
    assert report.outcome == "rolled_back"
    assert report.reason.type == "DeadlineExceeded"
    assert f"engine {hanging.pid}" in report.reason.message
    assert f"engine {good.pid}" not in report.reason.message
    assert good.weights == digests(version(1))
    hanging.send("go")
    assert hanging.weights == digests(version(1)), "it went back to its base by itself"
    bring(server, engines, seed=3)


def test_a_request_that_hangs_before_its_engine_says_hello_ends_at_the_deadline(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    released = threading.Event()

    def hang(handles: Handles) -> None:
        released.wait(60)

    try:
        with pytest.raises(UpdateFailed, match="deadline passed"):
            server.update("step-1", [engines[0].request(), hang], timeout=SHORT)
    finally:
        released.set()
    assert engines[0].weights == {}


# Quarantine


def test_quarantine_publishes_to_those_that_are_well(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    good, bad = engines
    report = server.update(
        "step-2", [good.request(), bad.request(behaviour="raise")], on_failure="quarantine"
    )
    outcomes = {replica.name: replica.outcome for replica in report.replicas}
    assert outcomes == {f"engine {good.pid}": "published", f"engine {bad.pid}": "quarantined"}
    assert report.outcome == "published"
    assert "load_weights refused" in report.reason.message
    assert good.weights == digests(version(2))
    assert bad.weights == digests(version(1))
    bring(server, engines, seed=3)


def test_min_replicas_holds_an_update_back(server: ParameterServer, engines: Engines) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    requests = [engines[0].request(), engines[1].request(behaviour="raise")]
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", requests, on_failure="quarantine", min_replicas=2)
    assert failure.value.report.outcome == "rolled_back"
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_fewer_engines_than_min_replicas_are_not_touched(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UpdateFailed, match="min-replicas"):
        server.update("step-1", engines[0].request(), min_replicas=2)
    assert engines[0].weights == {}


@pytest.mark.parametrize("policy", [{"on_failure": "ignore"}, {"min_replicas": 0}])
def test_a_policy_that_cannot_be_is_refused_at_once(
    server: ParameterServer, policy: dict[str, object]
) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UsageError):
        server.update("step-1", lambda handles: None, **policy)  # type: ignore[arg-type]


# Records


@pytest.mark.parametrize("published", [True, False])
def test_the_report_is_written_and_the_registry_knows(
    published: bool, server: ParameterServer, engines: Engines, tmp_path: Path
) -> None:
    register(server, "step-1", 1)
    path = tmp_path / "report.json"
    behaviour = "load" if published else "raise"
    try:
        server.update("step-1", engines[0].request(behaviour=behaviour), report=path)
    except UpdateFailed:
        assert not published
    written = json.loads(path.read_text())
    outcome = "published" if published else "rolled_back"
    assert (written["version"], written["outcome"]) == ("step-1", outcome)
    registry = Registry(tmp_path / "state" / "registry.sqlite")
    (record,) = registry.history()
    assert (record.id, record.outcome, record.digest) == (
        written["update"],
        outcome,
        written["digest"],
    )
    assert (record.published_at is not None) == published
    registry.close()


def test_a_report_that_cannot_be_written_is_refused_before_anything_changes(
    server: ParameterServer, engines: Engines, tmp_path: Path
) -> None:
    register(server, "step-1", 1)
    with pytest.raises(UsageError, match="nowhere"):
        server.update("step-1", engines[0].request(), report=tmp_path / "nowhere" / "r.json")
    assert engines[0].weights == {}


def test_a_registry_that_cannot_be_opened_is_refused_before_anything_changes(
    make_server: Callable[..., ParameterServer],
    engines: Engines,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    (blocked / "registry.sqlite").write_bytes(b"this is no database" * 100)
    monkeypatch.setenv("CKPT_ENGINE_STATE_DIR", str(blocked))
    server = make_server()
    register(server, "step-1", 1)
    with pytest.raises(UsageError, match="registry"):
        server.update("step-1", engines[0].request())
    assert engines[0].weights == {}


def failing_with(error: Exception) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", [UsageError("the disk is full"), OSError("the disk is gone")])
def test_a_publish_that_cannot_be_recorded_is_rolled_back(
    error: Exception, server: ParameterServer, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Absence of a record means abort, so a decision without a record is none."""
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    with monkeypatch.context() as patch, pytest.raises(UpdateFailed, match=str(error)) as failure:
        patch.setattr(Registry, "publish", failing_with(error))
        server.update("step-2", [engine.request() for engine in engines])
    assert failure.value.report.outcome == "rolled_back"
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2
    bring(server, engines, seed=3)


def test_an_end_that_cannot_be_recorded_is_told_and_changes_nothing(
    server: ParameterServer, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(server, "step-1", 1)
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "finish", failing_with(UsageError("the disk is full")))
        report = server.update("step-1", engines[0].request())
    assert report.outcome == "published"
    assert any("the disk is full" in entry for entry in report.degraded)
    assert engines[0].weights == digests(version(1))


def test_an_older_coordinator_is_refused_by_who_knows_a_newer_one(
    server: ParameterServer, engines: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    with monkeypatch.context() as patch, pytest.raises(UpdateFailed, match="newer coordinator"):
        patch.setattr(Registry, "next_epoch", lambda registry: 7)
        server.update("step-2", engines[0].request())
    assert engines[0].weights == digests(version(1))
    bring(server, engines, seed=3)


def test_an_engine_of_two_workers_changes_as_one(server: ParameterServer) -> None:
    with EngineProcess() as first, EngineProcess() as second:
        workers, port = (first, second), free_port()
        joining = [
            worker.send("join_group", rank=rank, world_size=2, port=port)
            for rank, worker in enumerate(workers)
        ]
        for worker, number in zip(workers, joining, strict=True):
            worker.result(number)

        def call_engine(*behaviours: str) -> Callable[[Handles], None]:
            def call(handles: Handles) -> None:
                numbers = [
                    worker.send("update", handle=handles[0][1], behaviour=behaviour)
                    for worker, behaviour in zip(workers, behaviours, strict=True)
                ]
                for worker, number in zip(workers, numbers, strict=True):
                    worker.result(number)

            return call

        register(server, "step-1", 1)
        report = server.update("step-1", call_engine("load", "load"))
        assert sorted(replica.name.split()[-1] for replica in report.replicas) == ["0", "1"]
        register(server, "step-2", 2)
        with pytest.raises(UpdateFailed, match="load_weights refused"):
            server.update("step-2", call_engine("load", "raise"))
        with pytest.raises(UpdateFailed, match="load_weights refused"):
            server.update("step-2", call_engine("raise", "load"), on_failure="quarantine")
        assert [worker.weights for worker in workers] == [digests(version(1))] * 2


# What loaders do to what they are given


def test_a_loader_may_keep_what_it_is_given(server: ParameterServer, engines: Engines) -> None:
    """The memory is not used again while a tensor views it, though the store would reuse it."""
    register(server, "step-1", 1, use_shared_memory_pool=True)
    engine = engines[0]
    server.update("step-1", engine.request(behaviour="keep views"))
    for seed in (2, 3, 4, 5):
        register(server, f"step-{seed}", seed, use_shared_memory_pool=True)
        server.update(f"step-{seed}", engine.request())
    assert engine.call("given") == list(digests(version(1)).values())
    assert engine.weights == digests(version(5))


def test_a_loader_that_writes_into_what_it_is_given_spoils_no_version(
    server: ParameterServer, engines: Engines
) -> None:
    """Neither the other engine's, which maps the same memory, nor its own way back."""
    register(server, "step-1", 1)
    writer, other = engines
    requests = [writer.request(behaviour="write into what it is given"), other.request()]
    server.update("step-1", requests)
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2
    server.update("step-1", [other.request()])
    assert other.weights == digests(version(1))
    register(server, "step-2", 2)
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [writer.request(), other.request(behaviour="raise")])
    assert {replica.outcome for replica in failure.value.report.replicas} == {"kept"}
    assert [engine.weights for engine in engines] == [digests(version(1))] * 2


def test_a_loader_that_keeps_failing_is_torn_and_the_other_is_not(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, seed=1)
    register(server, "step-2", 2)
    good, bad = engines
    with pytest.raises(UpdateFailed) as failure:
        server.update("step-2", [good.request(), bad.request(behaviour="raise", always=True)])
    outcomes = {replica.name: replica.outcome for replica in failure.value.report.replicas}
    assert outcomes == {f"engine {good.pid}": "kept", f"engine {bad.pid}": "torn"}
    assert good.weights == digests(version(1))
    bring(server, engines, seed=3)
