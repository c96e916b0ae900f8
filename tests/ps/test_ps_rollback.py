"""Back to the version before: by hand, by a probe, and with every server of then dead."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator

import pytest
from ps_replicas import ReplicaProcess, weights
from ps_tools import EngineProcess, digests, register, version

from checkpoint_engine.calls import engine_requests
from checkpoint_engine.errors import AdapterError, UpdateFailed, UsageError
from checkpoint_engine.ps import ParameterServer
from checkpoint_engine.update.probe import Probe, http_check, watch

Engines = tuple[EngineProcess, EngineProcess]
NOW = 0.01


def bring(server: ParameterServer, engines: Engines, seed: int, **options: object) -> None:
    register(server, f"step-{seed}", seed)
    server.update(f"step-{seed}", [engine.request() for engine in engines], **options)  # type: ignore[arg-type]
    server.unregister_checkpoint(f"step-{seed}")


def served(engines: Engines) -> list[dict[str, str]]:
    return [engine.weights for engine in engines]


def test_engines_return_to_the_version_before_and_forth(
    server: ParameterServer, engines: Engines
) -> None:
    requests = [engine.request() for engine in engines]
    for seed in (1, 2):
        bring(server, engines, seed)
    for seed in (1, 2, 1):
        report = server.rollback(requests)
        assert (report.version, report.outcome) == (f"step-{seed}", "published")
        assert served(engines) == [digests(version(seed))] * 2
    bring(server, engines, 3)
    assert server.rollback(requests).version == "step-1", "what was served before it"


def test_engines_return_with_every_server_of_then_dead(
    make_server: Callable[..., ParameterServer], engines: Engines
) -> None:
    before = make_server()
    for seed in (1, 2):
        bring(before, engines, seed)
    before.close()
    make_server().rollback([engine.request() for engine in engines], to="step-1")
    assert served(engines) == [digests(version(1))] * 2


def test_what_a_loader_wrote_into_an_earlier_version_is_undone(
    server: ParameterServer, engines: Engines
) -> None:
    register(server, "step-1", 1)
    engine = engines[0]
    server.update("step-1", [engine.request(behaviour="write into what it is given")])
    register(server, "step-2", 2)
    server.update("step-2", [engine.request()])
    server.rollback([engine.request()])
    assert engine.weights == digests(version(1))


def test_a_version_that_one_engine_does_not_keep_changes_nothing(
    server: ParameterServer, engines: Engines
) -> None:
    for seed in (1, 2):
        bring(server, engines, seed)
    bring(server, (engines[0],), 3)  # type: ignore[arg-type]
    with pytest.raises(UpdateFailed, match="keeps no version 'step-2'") as failure:
        server.rollback([engine.request() for engine in engines], to="step-2")
    assert failure.value.report.outcome == "aborted"
    assert served(engines) == [digests(version(3)), digests(version(2))]


def test_a_version_that_nobody_published_is_wrong_usage(
    server: ParameterServer, engines: Engines
) -> None:
    with pytest.raises(UsageError, match="nothing was published before"):
        server.rollback([])
    bring(server, engines, 1)
    with pytest.raises(UsageError, match="no version 'step-9' was published"):
        server.rollback([engines[0].request()], to="step-9")


def test_an_update_for_another_base_is_refused(server: ParameterServer, engines: Engines) -> None:
    requests = [engine.request() for engine in engines]
    register(server, "step-1", 1)
    first = server.update("step-1", requests)
    register(server, "step-2", 2)
    second = server.update("step-2", requests, base=first.digest)
    register(server, "step-3", 3)
    with pytest.raises(UpdateFailed, match=f"is made for base {first.digest}") as failure:
        server.update("step-3", requests, base=first.digest)
    assert failure.value.report.outcome == "aborted"
    assert second.digest in str(failure.value), "it says what is served instead"
    assert served(engines) == [digests(version(2))] * 2


# A probe


def test_a_probe_that_says_no_brings_everyone_back(
    server: ParameterServer, engines: Engines
) -> None:
    bring(server, engines, 1)
    with pytest.raises(UpdateFailed, match="probe: AdapterError: the check says no") as failure:
        bring(server, engines, 2, probe=lambda: False)
    report = failure.value.report
    assert (report.version, report.outcome) == ("step-2", "rolled_back")
    assert {replica.outcome for replica in report.replicas} == {"published"}
    assert served(engines) == [digests(version(1))] * 2


def test_a_probe_that_says_no_where_there_is_no_way_back_says_that_too(
    server: ParameterServer, engines: Engines
) -> None:
    with pytest.raises(UpdateFailed, match="nothing was published before") as failure:
        bring(server, engines, 1, probe=lambda: False)
    assert failure.value.report.outcome == "published"
    assert served(engines) == [digests(version(1))] * 2


def test_a_probe_that_is_content_changes_nothing(server: ParameterServer, engines: Engines) -> None:
    asked = []
    for seed in (1, 2):
        bring(server, engines, seed, probe=Probe(lambda: asked.append(1), 3 * NOW, NOW))
    assert len(asked) > 2
    assert served(engines) == [digests(version(2))] * 2


def test_as_many_checks_may_fail_as_are_allowed() -> None:
    answers = iter([True, False, True, False, True, False])
    error = watch(Probe(lambda: next(answers), 60.0, NOW, max_failures=2))
    assert error is not None
    assert next(answers, "all asked") == "all asked", "the third failure was one too many"
    assert watch(Probe(lambda: True, 0.0)) is None


@pytest.fixture
def site() -> Iterator[tuple[str, list[int]]]:
    """A URL, and the statuses that it answers with, one after the other."""
    statuses: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/health", statuses
        server.shutdown()
        thread.join()


def test_a_check_over_http_fails_with_the_status(site: tuple[str, list[int]]) -> None:
    url, statuses = site
    statuses += [200, 503]
    http_check(url)()
    with pytest.raises(AdapterError, match="answered 503"):
        http_check(url)()
    with pytest.raises(AdapterError, match="Connect"):
        http_check("http://127.0.0.1:9/")()


# Replicas


def test_replicas_return_and_prove_it(
    make_server: Callable[..., ParameterServer],
    replicas: tuple[ReplicaProcess, ReplicaProcess],
) -> None:
    requests = engine_requests([replica.url for replica in replicas], rank=0, world_size=1)
    first = make_server()
    digest_of = {}
    for seed in (1, 2):
        first.register_checkpoint(f"v{seed}", named_tensors=weights(seed))
        first.gather_metas(f"v{seed}")
        digest_of[seed] = first.update(f"v{seed}", requests).digest
    first.close()
    report = make_server().rollback(requests)
    assert report.verified, "recomputed from live parameters"
    for replica in replicas:
        info = replica.info
        assert (info["weight_version"], info["digest"]) == ("v1", digest_of[1])
        assert info["kept"] == [digest_of[2]]
