"""Real replicas that serve while they are updated."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
from ps_replicas import ReplicaProcess, greedy, weights
from ps_tools import DEVICE, EngineProcess, Handles

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import AdapterError, UpdateFailed
from checkpoint_engine.ps import ParameterServer
from children import Child, wait_until

Replicas = tuple[ReplicaProcess, ReplicaProcess]
Engines = tuple[EngineProcess, EngineProcess]


def register(server: ParameterServer, seed: int) -> str:
    name = f"step-{seed}"
    server.register_checkpoint(name, named_tensors=weights(seed))
    server.gather_metas(name)
    return name


def calls(*replicas: ReplicaProcess) -> list[Callable[[Handles], None]]:
    endpoints = [replica.url for replica in replicas]
    return engine_requests(endpoints, rank=0, world_size=1, timeout_seconds=60)


def bring(server: ParameterServer, seed: int, *replicas: ReplicaProcess) -> str:
    """Update and check; returns the version's digest."""
    report = server.update(register(server, seed), calls(*replicas))
    assert report.verified
    for replica in replicas:
        check_serves(replica, seed, report.digest)
    return report.digest


def check_serves(replica: ReplicaProcess, seed: int, digest: str) -> None:
    """Label, digests as the live parameters have them, and what it says."""
    info = replica.info
    assert (info["weight_version"], info["state"]) == (f"step-{seed}", "serving")
    assert (info["digest"], info["served_digest"]) == (digest, digest)
    assert replica.health == (200, "serving")
    choice = replica.generate()
    assert choice["token_ids"] == greedy(seed)
    assert [span["version"] for span in choice["weight_versions"]] == [f"step-{seed}"]


def test_replicas_are_brought_forward_and_prove_it(
    server: ParameterServer, replicas: Replicas
) -> None:
    assert greedy(1) != greedy(2), "the test could not tell the versions apart"
    assert bring(server, 1, *replicas) != bring(server, 2, *replicas)


def test_health_answers_while_weights_change(
    server: ParameterServer, replicas: Replicas, engines: Engines
) -> None:
    """The reference blocks its event loop; here another engine keeps the update waiting."""
    replica, slow = replicas[0], engines[0]
    bring(server, 1, replica)
    name = register(server, 2)
    answers: list[dict[str, Any]] = []
    requests = [*calls(replica), slow.request(behaviour="block")]
    updating = threading.Thread(target=lambda: answers.append(server.update(name, requests)))
    updating.start()
    slow.wait_for("loading")
    wait_until(lambda: is_paused(replica), "the pause")
    assert replica.health == (200, "updating")
    asking = threading.Thread(target=lambda: answers.append(replica.generate()))
    asking.start()
    assert replica.health == (200, "updating")
    assert answers == [], "requests wait while weights change"
    slow.send("go")
    updating.join()
    asking.join()
    (choice,) = (answer for answer in answers if isinstance(answer, dict))
    assert choice["token_ids"] == greedy(2)
    assert replica.health == (200, "serving")


def is_paused(replica: ReplicaProcess) -> bool:
    """Its digests cannot be asked for while its weights may change."""
    try:
        replica.get("/weight_info", timeout=0.2)
    except httpx.TimeoutException:
        return True
    return False


def test_a_replica_returns_to_its_base_when_another_engine_fails(
    server: ParameterServer, replicas: Replicas, engines: Engines
) -> None:
    replica, bad = replicas[0], engines[0]
    digest = bring(server, 1, replica)
    requests = [*calls(replica), bad.request(behaviour="raise")]
    with pytest.raises(UpdateFailed, match="load_weights refused") as failure:
        server.update(register(server, 2), requests)
    (kept,) = (r for r in failure.value.report.replicas if r.name == replica.name)
    assert (kept.outcome, kept.digest, kept.way_back) == ("kept", digest, "staged")
    check_serves(replica, 1, digest)
    bring(server, 3, *replicas)


def test_a_version_that_does_not_fit_changes_nobody(
    server: ParameterServer, replicas: Replicas
) -> None:
    digest = bring(server, 1, *replicas)
    tensors = weights(2)
    del tensors["model.norm.weight"]
    server.register_checkpoint("partial", named_tensors=tensors)
    server.gather_metas("partial")
    with pytest.raises(UpdateFailed, match=r"lacks 'model\.norm\.weight'") as failure:
        server.update("partial", calls(*replicas))
    assert failure.value.report.outcome == "aborted"
    for replica in replicas:
        check_serves(replica, 1, digest)


def asking_for(replica: ReplicaProcess, weight_version: str) -> Callable[[Handles], None]:
    """A call that accepts one version only."""

    def request(handles: Handles) -> None:
        body = {"zmq_handles": dict(handles), "weight_version": weight_version}
        response = replica.post("/update_weights_from_ipc", body)
        if response.is_error:
            raise AdapterError(response.text)

    return request


def test_a_replica_that_was_told_to_expect_another_version_refuses(
    server: ParameterServer, replicas: Replicas
) -> None:
    digest = bring(server, 1, *replicas)
    name = register(server, 2)
    requests = [asking_for(replicas[0], name), asking_for(replicas[1], "step-99")]
    with pytest.raises(UpdateFailed, match="'step-99' was asked for, 'step-2' offered"):
        server.update(name, requests)
    for replica in replicas:
        check_serves(replica, 1, digest)
    requests = [asking_for(replica, "agreed") for replica in replicas]
    assert server.update(name, requests, weight_version="agreed").outcome == "published"
    assert {replica.info["weight_version"] for replica in replicas} == {"agreed"}


def test_a_quarantined_replica_is_out_until_an_update_brings_it_forward(
    server: ParameterServer, replicas: Replicas
) -> None:
    digest = bring(server, 1, *replicas)
    good, bad = replicas
    name = register(server, 2)
    requests = [*calls(good), asking_for(bad, "step-99")]
    report = server.update(name, requests, on_failure="quarantine")
    outcomes = {replica.name: replica.outcome for replica in report.replicas}
    assert outcomes == {good.name: "published", bad.name: "quarantined"}
    check_serves(good, 2, report.digest)
    assert bad.health == (503, "quarantined")
    assert (bad.info["weight_version"], bad.info["digest"]) == ("step-1", digest)
    refused = bad.post("/v1/completions", {"prompt": [1], "max_tokens": 1})
    assert refused.status_code == 503
    assert "step-99" in refused.text
    bring(server, 3, *replicas)


def test_a_replica_whose_server_is_killed_returns_to_its_base_by_itself(
    server: ParameterServer, replicas: Replicas, engines: Engines
) -> None:
    """Killed when the replica has applied and waits, and nobody is left to decide."""
    replica, slow = replicas[0], engines[0]
    digest = bring(server, 1, replica)
    with Child("ps/ps_rank.py") as doomed:
        doomed.call("meet")
        doomed.call("register_model", name="step-2", seed=2)
        doomed.send("update_engines", name="step-2", endpoints=[replica.url], others=1)
        handle = doomed.wait_for("called")["handle"]
        number = slow.send("update", handle=handle, behaviour="block")
        slow.wait_for("loading")
        wait_until(lambda: is_paused(replica), "the pause")
        doomed.kill()
    wait_until(lambda: replica.health == (200, "serving"), "serving again")
    check_serves(replica, 1, digest)
    slow.send("go")
    with pytest.raises(RuntimeError, match="AdapterError"):
        slow.result(number)
    bring(server, 3, *replicas)


def test_a_replica_that_is_killed_in_its_pause_leaves_the_other_on_a_true_version(
    server: ParameterServer, replicas: Replicas, engines: Engines
) -> None:
    survivor, victim = replicas
    slow = engines[0]
    digest = bring(server, 1, *replicas)
    name = register(server, 2)
    failures: list[UpdateFailed] = []

    def update() -> None:
        requests = [*calls(survivor, victim), slow.request(behaviour="block")]
        with pytest.raises(UpdateFailed) as failure:
            server.update(name, requests, timeout=timedelta(seconds=60))
        failures.append(failure.value)

    updating = threading.Thread(target=update)
    updating.start()
    slow.wait_for("loading")
    wait_until(lambda: is_paused(victim), "the pause")
    victim.kill()
    slow.send("go")
    updating.join()
    outcomes = {replica.name: replica.outcome for replica in failures[0].report.replicas}
    assert (outcomes[survivor.name], outcomes[victim.name]) == ("kept", "lost")
    check_serves(survivor, 1, digest)
    bring(server, 3, survivor)


def test_a_replica_greets_with_what_it_serves(server: ParameterServer, replicas: Replicas) -> None:
    """So an update that fails early still reports who serves what."""
    digest = bring(server, 1, replicas[0])
    name = register(server, 2)
    handle = {DEVICE: "ipc:///nowhere"}
    with pytest.raises(UpdateFailed, match="nowhere"):
        server.update(name, [lambda _: calls(replicas[0])[0](list(handle.items()))])
    with pytest.raises(UpdateFailed) as failure:
        server.update(name, calls(replicas[0]), min_replicas=2)
    (replica,) = failure.value.report.replicas
    assert (replica.outcome, replica.digest) == ("kept", digest)
    check_serves(replicas[0], 1, digest)
