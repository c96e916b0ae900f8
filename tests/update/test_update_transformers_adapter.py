"""A transformers model that is updated in place, step by step and as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from toy_adapter import EPOCH, Memory, Scene
from transformers import PreTrainedTokenizerFast
from update_models import Server, bytes_of, flip, make_qwen3, recompute

from checkpoint_engine.adapters.base import Identity
from checkpoint_engine.adapters.transformers import TransformersAdapter
from checkpoint_engine.errors import DeadlineExceeded, UpdateRefused
from checkpoint_engine.manifest import Version
from checkpoint_engine.replica.replica import Replica
from checkpoint_engine.update.protocol import Applied, Offer, Proceed, Ready, Stop, Withdrawn

APPLY, PUBLISH, STOP = Proceed(step="apply"), Proceed(step="publish"), Stop(reason="no")


@dataclass
class Stage:
    """A model with its adapter, versions of it, and the sessions that bring them."""

    model: nn.Module
    server: Server
    memory: Memory
    adapter: TransformersAdapter
    number: int = 0

    @classmethod
    def make(cls, model: nn.Module | None = None) -> Stage:
        model = model or make_qwen3(seed=1)
        server = Server()
        adapter = TransformersAdapter(model, Identity(replica="r", engine="e"), server)
        return cls(model, server, Memory(), adapter)

    def scene(self, tensors: dict[str, torch.Tensor]) -> Scene:
        """A session that offers these tensors to the adapter."""
        self.number += 1
        label = f"step-{self.number}"
        shard = self.memory.register(label, tensors)
        offer = Offer(
            update=label,
            epoch=EPOCH + self.number,
            version=Version(label=label, digest=shard.manifest.digest),
            manifest=shard.manifest.to_msgpack(),
            parts=self.memory.parts(shard),
            deadlines=Scene.make().offer.deadlines,
        )
        return Scene(self.memory, self.adapter, offer, b"", b"")  # type: ignore[arg-type]

    def update(self, tensors: dict[str, torch.Tensor], *replies: Any) -> tuple[str, Scene]:
        """What the session ended as, and what was said."""
        scene = self.scene(tensors)
        return scene.play(scene.offer, *replies).state, scene


def weights(seed: int, **options: bool) -> dict[str, torch.Tensor]:
    return dict(make_qwen3(seed, **options).state_dict())


def test_a_published_update_is_the_new_model_under_its_digest() -> None:
    stage = Stage.make()
    state, scene = stage.update(weights(2), APPLY, PUBLISH)
    assert state == "published"
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=2))
    digest = scene.offer.version.digest
    applied = next(message for message in scene.sent if isinstance(message, Applied))
    assert (applied.digest, applied.served_digest) == (digest, digest)
    served = recompute(stage.adapter)
    assert (served.digest, served.served_digest) == (digest, digest)
    assert (stage.server.label, stage.server.served) == ("step-1", served)
    assert stage.adapter.base() == digest
    assert not stage.server.held


def test_the_first_way_back_is_a_snapshot_and_every_later_one_the_version_before() -> None:
    stage = Stage.make()
    ways = []
    for seed in (2, 3, 4):
        _, scene = stage.update(weights(seed), APPLY, PUBLISH)
        ways += [message.way_back for message in scene.sent if isinstance(message, Ready)]
    assert ways == ["snapshot", "staged", "staged"]
    assert len(stage.memory.held) == 2, "the version that is served and the one before, no more"


@pytest.mark.parametrize("way_back", ["snapshot", "staged"])
@pytest.mark.parametrize("verdict", [STOP, DeadlineExceeded("silent")], ids=["stop", "silence"])
def test_a_rollback_is_exact_to_the_byte(way_back: str, verdict: Any) -> None:
    stage = Stage.make()
    if way_back == "staged":
        stage.update(weights(2), APPLY, PUBLISH)
    before, label = bytes_of(stage.model), stage.server.label
    base = recompute(stage.adapter)
    state, scene = stage.update(weights(3), APPLY, verdict)
    assert state == "kept"
    ready = next(message for message in scene.sent if isinstance(message, Ready))
    assert ready.way_back == way_back
    assert bytes_of(stage.model) == before
    assert recompute(stage.adapter) == base
    assert (stage.adapter.base(), stage.server.label) == (base.digest, label)
    assert not stage.server.held
    assert len(stage.memory.held) == (1 if way_back == "staged" else 0)
    state, _ = stage.update(weights(3), APPLY, PUBLISH)
    assert state == "published"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rollback_is_exact_although_both_versions_were_cast(dtype: torch.dtype) -> None:
    stage = Stage.make()

    def cast(seed: int) -> dict[str, torch.Tensor]:
        return {name: tensor.to(dtype) for name, tensor in weights(seed).items()}

    stage.update(cast(2), APPLY, PUBLISH)
    before = bytes_of(stage.model)
    assert before == bytes_of(make_qwen3(2).to(dtype).to(torch.float32))
    state, _ = stage.update(cast(3), APPLY, STOP)
    assert (state, bytes_of(stage.model)) == ("kept", before)


def test_a_cast_version_is_not_called_by_the_digest_of_what_was_sent() -> None:
    stage = Stage.make()
    sent = {name: tensor.to(torch.bfloat16) for name, tensor in weights(2).items()}
    _, scene = stage.update(sent, APPLY, PUBLISH)
    assert stage.adapter.base() == recompute(stage.adapter).digest
    assert stage.adapter.base() != scene.offer.version.digest


def test_tied_embeddings_may_come_under_one_name() -> None:
    stage = Stage.make(make_qwen3(1, tie_word_embeddings=True))
    tensors = weights(2, tie_word_embeddings=True)
    del tensors["lm_head.weight"]
    state, scene = stage.update(tensors, APPLY, PUBLISH)
    assert state == "published"
    assert bytes_of(stage.model) == bytes_of(make_qwen3(2, tie_word_embeddings=True))
    served = recompute(stage.adapter)
    assert served.digest == scene.offer.version.digest, "of the names that were sent"
    assert served.served_digest != served.digest, "of all names"


# What is refused changes nothing


def test_a_version_that_does_not_fit_is_refused() -> None:
    stage = Stage.make()
    before = bytes_of(stage.model)
    tensors = weights(2)
    del tensors["model.norm.weight"]
    state, scene = stage.update(tensors, STOP)
    assert (state, bytes_of(stage.model)) == ("kept", before)
    withdrawn = scene.sent[-1]
    assert isinstance(withdrawn, Withdrawn)
    assert "lacks 'model.norm.weight'" in withdrawn.error.message
    assert stage.memory.held == []


def test_a_version_that_was_not_asked_for_is_refused() -> None:
    stage = Stage.make()
    stage.server.refusal = UpdateRefused("another version was asked for")
    state, _ = stage.update(weights(2), STOP)
    assert state == "kept"
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=1))
    assert stage.memory.held == []


def test_a_bit_flipped_in_staged_memory_is_found_and_named_before_anything_changes() -> None:
    stage = Stage.make()
    scene = stage.scene(weights(2))
    shard = stage.memory.store["step-1"]
    meta = next(m for m in shard.manifest.tensors if m.name == "model.layers.1.mlp.up_proj.weight")
    shard.memory[meta.end - 1] ^= 1
    outcome = scene.play(scene.offer, STOP)
    assert outcome.state == "kept"
    assert outcome.error is not None
    assert outcome.error.type == "VerificationError"
    assert "'model.layers.1.mlp.up_proj.weight'" in outcome.error.message
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=1))


def test_a_bit_flipped_in_staged_memory_after_the_check_is_found_where_it_landed() -> None:
    """And the way back, which was fixed before, does not depend on that memory."""
    stage = Stage.make()
    scene = stage.scene(weights(2))
    shard = stage.memory.store["step-1"]
    prepare = stage.adapter.prepare

    def prepare_then_flip(*arguments: Any) -> str:
        way_back = prepare(*arguments)
        shard.memory[shard.manifest.tensors[3].offset] ^= 1
        return way_back

    stage.adapter.prepare = prepare_then_flip  # type: ignore[method-assign]
    outcome = scene.play(scene.offer, APPLY, STOP)
    assert outcome.state == "kept"
    assert outcome.error is not None
    assert outcome.error.type == "VerificationError"
    assert f"'{shard.manifest.tensors[3].name}'" in outcome.error.message
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=1))


def test_a_way_back_that_is_damaged_is_noticed() -> None:
    """A replica whose base cannot be restored says so, rather than serve something else."""
    stage = Stage.make()
    stage.update(weights(2), APPLY, PUBLISH)
    base = stage.memory.store["step-1"]
    base.memory[base.manifest.tensors[0].offset] ^= 1
    state, scene = stage.update(weights(3), APPLY, STOP)
    assert state == "torn"
    assert stage.server.torn is not None
    assert stage.server.held, "requests go on with weights of no version"
    withdrawn = scene.sent[-1]
    assert isinstance(withdrawn, Withdrawn)
    assert withdrawn.torn
    assert stage.adapter.base() is None, "it greets with a version that it does not serve"


def test_a_torn_replica_is_mended_by_the_next_complete_update() -> None:
    stage = Stage.make()
    stage.update(weights(2), APPLY, PUBLISH)
    base = stage.memory.store["step-1"]
    base.memory[base.manifest.tensors[0].offset] ^= 1
    assert stage.update(weights(3), APPLY, STOP)[0] == "torn"
    state, scene = stage.update(weights(4), APPLY, PUBLISH)
    assert state == "published"
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=4))
    assert stage.adapter.base() == scene.offer.version.digest
    assert (stage.server.held, stage.server.torn) == (False, None)


def test_a_failure_to_mend_a_torn_replica_leaves_it_torn() -> None:
    stage = Stage.make()
    stage.update(weights(2), APPLY, PUBLISH)
    base = stage.memory.store["step-1"]
    base.memory[base.manifest.tensors[0].offset] ^= 1
    assert stage.update(weights(3), APPLY, STOP)[0] == "torn"
    assert stage.update(weights(4), STOP)[0] == "kept"
    assert stage.server.held, "requests go on with weights of no version"
    assert stage.update(weights(4), APPLY, STOP)[0] == "torn"
    assert stage.server.held


# Digests are recomputed from what is live


def test_one_bit_of_a_live_parameter_changes_what_is_reported() -> None:
    stage = Stage.make()
    before = recompute(stage.adapter)
    parameter = stage.model.get_parameter("model.layers.0.mlp.down_proj.weight")
    flip(parameter, index=17)
    after = recompute(stage.adapter)
    assert (after.digest, after.served_digest) != (before.digest, before.served_digest)
    assert after.digest != before.digest
    flip(parameter, index=17)
    assert recompute(stage.adapter) == before


def test_weight_info_digests_the_live_parameters_each_time() -> None:
    model = make_qwen3(seed=1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, "a")))
    replica = Replica(model, tokenizer, name="r", label="initial")
    before = replica.info()
    assert replica.info() == before
    assert (before["weight_version"], before["state"]) == ("initial", "serving")
    flip(model.get_parameter("model.norm.weight"))
    after = replica.info()
    assert after["digest"] != before["digest"]
    assert after["served_digest"] != before["served_digest"]
    assert after["weight_version"] == "initial"


def test_a_parameter_that_changed_behind_the_adapters_back_is_not_blessed_by_a_rollback() -> None:
    stage = Stage.make()
    flip(stage.model.get_parameter("model.norm.weight"))
    assert stage.update(weights(2), APPLY, STOP)[0] == "torn"
    assert stage.update(weights(2), APPLY, PUBLISH)[0] == "published"
    assert bytes_of(stage.model) == bytes_of(make_qwen3(seed=2))
