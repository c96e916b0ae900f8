"""A real replica, whose engine runs, between its operator and the transaction."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import PreTrainedModel
from update_models import flip, make_qwen3, running_replica, wait_until

from checkpoint_engine.adapters import live
from checkpoint_engine.errors import DeadlineExceeded
from checkpoint_engine.replica.replica import Replica
from checkpoint_engine.replica.sequence import GenerationRequest

WAIT_SECONDS = 30.0


@pytest.fixture
def model() -> PreTrainedModel:
    return make_qwen3(seed=1)


@pytest.fixture
def replica(model: PreTrainedModel) -> Iterator[Replica]:
    with running_replica(model) as replica:
        yield replica


def num_tokens(replica: Replica) -> int:
    """Tokens of one short request, which must not have to wait."""
    request = GenerationRequest(prompt_token_ids=(1, 2), max_tokens=3, temperature=0.0)
    return len(list(replica.engine.submit(request).tokens(timeout_seconds=WAIT_SECONDS)))


class Digesting:
    """Somebody asks for the digests, and the second chunk takes a while."""

    def __init__(self, replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answers: list[dict[str, Any]] = []
        self._begun, self._may_end = threading.Event(), threading.Event()
        chunk_digests = live.chunk_digests
        num_chunks = iter(range(1_000_000))

        def slowly(chunk: memoryview) -> bytes:
            if next(num_chunks) == 1:
                self._begun.set()
                assert self._may_end.wait(WAIT_SECONDS)
            return chunk_digests(chunk)

        monkeypatch.setattr(live, "chunk_digests", slowly)
        self._thread = threading.Thread(target=lambda: self.answers.append(replica.info()))

    def __enter__(self) -> Digesting:
        self._thread.start()
        assert self._begun.wait(WAIT_SECONDS)
        return self

    def end_chunk(self) -> None:
        self._may_end.set()

    def __exit__(self, *_: object) -> None:
        self.end_chunk()
        self._thread.join(WAIT_SECONDS)
        assert not self._thread.is_alive()


def test_an_operator_who_resumes_while_weights_are_digested_is_heard(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    replica.pause()
    with Digesting(replica, monkeypatch):
        replica.resume()
    assert replica.state == "serving"
    assert not replica.engine.paused, "it says that it serves, and requests wait for ever"
    assert num_tokens(replica) == 3


def test_a_chunk_that_is_being_digested_cannot_be_held_and_nothing_is_lost(
    replica: Replica, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Digesting(replica, monkeypatch), pytest.raises(DeadlineExceeded, match="digested"):
        replica.hold(timeout_seconds=0.1)
    assert num_tokens(replica) == 3
    replica.hold(timeout_seconds=WAIT_SECONDS)
    replica.release()
    assert num_tokens(replica) == 3


def test_a_pause_waits_for_one_chunk_and_digests_are_of_one_version(
    replica: Replica, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was digested before the pause is forgotten: the weights changed in it."""
    with Digesting(replica, monkeypatch) as digesting:
        holding = threading.Thread(target=replica.hold, args=(WAIT_SECONDS,))
        holding.start()
        wait_until(lambda: not replica._calm.is_set())
        digesting.end_chunk()
        holding.join()
        assert digesting.answers == [], "the pause waited for all of them"
        for parameter in model.parameters():
            flip(parameter)
        replica.release()
    (answer,) = digesting.answers
    assert answer == replica.info()


def test_an_operators_resume_does_not_end_an_updates_pause(replica: Replica) -> None:
    replica.pause()
    replica.hold(timeout_seconds=WAIT_SECONDS)
    replica.resume()
    assert replica.engine.paused
    replica.release()
    assert num_tokens(replica) == 3


def test_an_updates_end_does_not_end_an_operators_pause(replica: Replica) -> None:
    replica.hold(timeout_seconds=WAIT_SECONDS)
    replica.pause()
    replica.release()
    assert replica.engine.paused
    assert replica.state == "paused"
    replica.resume()
    assert num_tokens(replica) == 3


def test_a_torn_replica_serves_nothing_until_its_weights_are_whole(replica: Replica) -> None:
    replica.hold(timeout_seconds=WAIT_SECONDS)
    replica.tear("the way back failed")
    assert replica.state == "torn"
    replica.resume()
    assert replica.engine.paused, "an operator cannot resume weights of no version"
    replica.hold(timeout_seconds=WAIT_SECONDS)
    replica.release()
    assert replica.state == "serving"
    assert num_tokens(replica) == 3
