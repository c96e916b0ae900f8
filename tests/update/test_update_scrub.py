"""A bit that flips in live parameters is found, and nothing is served from them any more."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from toy_adapter import EPOCH, Memory, Scene
from transformers import PreTrainedModel
from typer.testing import CliRunner
from update_models import (
    bytes_of,
    flip,
    make_qwen3,
    running_replica,
    save_folder,
    wait_until,
)

from checkpoint_engine.cli.app import app
from checkpoint_engine.manifest import Version
from checkpoint_engine.replica.engine import NotAccepting
from checkpoint_engine.replica.replica import Replica
from checkpoint_engine.replica.scrub import scrubbing
from checkpoint_engine.replica.sequence import Generation, GenerationRequest
from checkpoint_engine.update.protocol import FromRank, Offer, Proceed, Stop

APPLY, PUBLISH, STOP = Proceed(step="apply"), Proceed(step="publish"), Stop(reason="no")
DAMAGED = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model() -> PreTrainedModel:
    return make_qwen3(seed=1, tie_word_embeddings=True)


@pytest.fixture
def replica(model: PreTrainedModel) -> Iterator[Replica]:
    with running_replica(model) as replica:
        yield replica


def scrub_all(replica: Replica) -> None:
    """More than one pass, wherever it is."""
    for _ in range(2 * replica.num_chunks + 2):
        replica.scrub()


def submit(replica: Replica, max_tokens: int = 3) -> Generation:
    request = GenerationRequest(prompt_token_ids=(1, 2), max_tokens=max_tokens, temperature=0.0)
    return replica.engine.submit(request)


class Updates:
    """The transaction's other side."""

    def __init__(self, replica: Replica) -> None:
        self._replica, self._memory, self._number = replica, Memory(), 0

    def scene(self, seed: int, dtype: torch.dtype = torch.float32) -> Scene:
        self._number += 1
        label = f"step-{self._number}"
        tensors = make_qwen3(seed, tie_word_embeddings=True).to(dtype).state_dict()
        shard = self._memory.register(label, dict(tensors))
        offer = Offer(
            update=label,
            epoch=EPOCH + self._number,
            version=Version(label=label, digest=shard.manifest.digest),
            manifest=shard.manifest.to_msgpack(),
            parts=self._memory.parts(shard),
            deadlines=Scene.make().offer.deadlines,
        )
        return Scene(self._memory, self._replica._adapter, offer, b"", b"")  # type: ignore[arg-type]

    def bring(self, seed: int, *replies: FromRank, dtype: torch.dtype = torch.float32) -> str:
        """What the session ended as."""
        scene = self.scene(seed, dtype)
        return scene.play(scene.offer, *replies).state


@pytest.fixture
def updates(replica: Replica) -> Updates:
    return Updates(replica)


def test_a_flipped_bit_is_found_while_serving_and_mended_by_the_next_update(
    replica: Replica, model: PreTrainedModel, updates: Updates
) -> None:
    assert updates.bring(2, APPLY, PUBLISH) == "published"
    with scrubbing(replica, pass_seconds=0.05):
        assert len(list(submit(replica).tokens(timeout_seconds=30))) == 3
        flip(model.get_parameter(DAMAGED), index=1001)
        wait_until(lambda: replica.state == "torn")
        info = replica.info()
        assert (info["state"], info["weight_version"]) == ("torn", "step-1")
        assert repr(DAMAGED) in info["reason"]
        with pytest.raises(NotAccepting, match="torn"):
            submit(replica)
        replica.resume()
        with pytest.raises(NotAccepting, match="torn"):
            submit(replica)
        assert replica._adapter.base() is None, "it greets with a version that it does not serve"
        assert updates.bring(3, APPLY, PUBLISH) == "published"
        assert bytes_of(model) == bytes_of(make_qwen3(3, tie_word_embeddings=True))
        assert replica.info()["reason"] is None
        assert len(list(submit(replica).tokens(timeout_seconds=30))) == 3
    assert replica.state == "serving"


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
def test_every_parameter_is_looked_at_in_each_pass(
    replica: Replica, model: PreTrainedModel, name: str
) -> None:
    scrub_all(replica)
    assert replica.state == "serving"
    flip(model.get_parameter(name), index=3)
    for _ in range(replica.num_chunks + 1):
        replica.scrub()
    assert replica.state == "torn"


def test_requests_in_flight_end_with_an_error(replica: Replica, model: PreTrainedModel) -> None:
    replica.pause()
    generation = submit(replica, max_tokens=100)
    flip(model.get_parameter(DAMAGED))
    scrub_all(replica)
    with pytest.raises(NotAccepting, match="torn"):
        list(generation.tokens(timeout_seconds=30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_record_is_of_the_version_that_is_served(
    replica: Replica, updates: Updates, dtype: torch.dtype
) -> None:
    """In the middle of a pass, after casts, and after a rollback."""
    for seed, replies in [(2, (APPLY, PUBLISH)), (3, (APPLY, STOP)), (4, (STOP,))]:
        replica.scrub()
        updates.bring(seed, *replies, dtype=dtype)
        scrub_all(replica)
        assert replica.state == "serving"


def test_weights_that_an_update_is_changing_are_left_alone(
    replica: Replica, model: PreTrainedModel
) -> None:
    replica.hold(timeout_seconds=30)
    flip(model.get_parameter("model.embed_tokens.weight"))
    replica.scrub()
    assert replica.state == "serving"
    flip(model.get_parameter("model.embed_tokens.weight"))
    replica.release()
    scrub_all(replica)
    assert replica.state == "serving"


def test_an_update_that_is_prepared_already_mends_what_is_found(
    replica: Replica, model: PreTrainedModel, updates: Updates
) -> None:
    scene = updates.scene(2)
    adapter = replica._adapter
    prepare = adapter.prepare

    def prepare_and_find(*arguments: object) -> str:
        way_back = prepare(*arguments)  # type: ignore[arg-type]
        flip(model.get_parameter(DAMAGED))
        scrub_all(replica)
        assert replica.state == "torn"
        return way_back

    adapter.prepare = prepare_and_find  # type: ignore[method-assign]
    assert scene.play(scene.offer, APPLY, PUBLISH).state == "published"
    assert bytes_of(model) == bytes_of(make_qwen3(2, tie_word_embeddings=True))
    scrub_all(replica)
    assert replica.state == "serving"


@pytest.mark.parametrize("replies", [(STOP,), (APPLY, STOP)], ids=["refused", "rolled back"])
def test_a_failed_update_does_not_bless_damaged_weights(
    replica: Replica, model: PreTrainedModel, updates: Updates, replies: tuple[FromRank, ...]
) -> None:
    """The way back is a snapshot of the damage, since there was no update before."""
    flip(model.get_parameter(DAMAGED))
    scrub_all(replica)
    updates.bring(2, *replies)
    replica.quarantine("the update failed here")
    assert replica.state == "torn"
    with pytest.raises(NotAccepting, match="torn"):
        submit(replica)
    assert updates.bring(3, APPLY, PUBLISH) == "published"
    assert replica.state == "serving"


def test_it_can_be_turned_off(replica: Replica, model: PreTrainedModel) -> None:
    flip(model.get_parameter(DAMAGED))
    with scrubbing(replica, pass_seconds=0):
        assert len(list(submit(replica).tokens(timeout_seconds=30))) == 3
    assert replica.state == "serving"


@pytest.mark.parametrize(("seconds", "scrubs"), [("600", True), ("0", False)])
def test_the_command_line_scrubs_while_it_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: str, scrubs: bool
) -> None:
    save_folder(make_qwen3(1), tmp_path)
    threads: list[str] = []

    def serve(*_: object, **__: object) -> None:
        threads.extend(thread.name for thread in threading.enumerate())

    monkeypatch.setattr("checkpoint_engine.replica.server.serve", serve)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        arguments = ["replica", "--model", str(tmp_path), "--scrub-seconds", seconds]
        result = CliRunner().invoke(app, arguments)
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert result.exit_code == 0, result.output
    assert "engine" in threads
    assert ("scrub" in threads) == scrubs
    assert "scrub" not in [thread.name for thread in threading.enumerate()]
