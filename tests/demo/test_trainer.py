from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from checkpoint_engine.demo.tasks import (
    corpus,
    openings,
    score_words,
    token_rewards,
    vocabulary,
)
from checkpoint_engine.demo.trainer import Rollout, Trainer
from checkpoint_engine.errors import UsageError

NUM_PROMPTS = 2
NUM_ROLLOUTS_PER_PROMPT = 16
NUM_TOKENS = 16


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    trainer = Trainer(seed=3)
    trainer.pretrain(seconds=1)
    return trainer


def sample(trainer: Trainer) -> list[Rollout]:
    """Rollouts at temperature 1, as the replicas of the demo sample them."""
    rollouts = []
    for prompt_ids in trainer.prompts(NUM_PROMPTS):
        input_ids = torch.tensor([prompt_ids] * NUM_ROLLOUTS_PER_PROMPT)
        output = trainer.model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=True,
            top_k=0,
        )
        generated = output[:, len(prompt_ids) :].tolist()
        rollouts += [Rollout(prompt_ids, tuple(token_ids)) for token_ids in generated]
    return rollouts


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_loss_falls_and_then_the_reward_rises(seed: int) -> None:
    torch.manual_seed(seed)
    trainer = Trainer(seed)
    losses: list[float] = []
    last = trainer.pretrain(seconds=1.5, on_progress=lambda step, loss: losses.append(loss))
    assert last == losses[-1] < losses[0] - 0.5

    rewards = [trainer.policy_step(sample(trainer)) for _ in range(6)]
    assert rewards[-1] > rewards[0] + 0.15


def test_a_saved_folder_generates_the_same_tokens(trainer: Trainer, tmp_path: Path) -> None:
    trainer.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)

    assert tokenizer.encode(corpus()) == trainer.tokenizer.encode(corpus())
    for prompt_ids in trainer.prompts(4):
        input_ids = torch.tensor([prompt_ids])
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=24,
            do_sample=False,
        )
        token_ids = tuple(output[0, len(prompt_ids) :].tolist())
        assert trainer.greedy(prompt_ids, 24) == token_ids
        assert tokenizer.decode(token_ids) == trainer.decode(token_ids)


def test_the_state_dict_is_live_and_shows_tied_tensors_under_both_names(trainer: Trainer) -> None:
    weights = trainer.state_dict()
    embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
    assert embedding.data_ptr() == head.data_ptr()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert not any(tensor.requires_grad for tensor in weights.values())

    before = head.clone()
    trainer.policy_step(sample(trainer))
    assert not torch.equal(head, before)
    assert torch.equal(head, trainer.state_dict()["lm_head.weight"])


def test_the_seed_governs_weights_and_prompts_and_leaves_the_global_generator_alone() -> None:
    state = torch.random.get_rng_state()
    same, again, other = Trainer(seed=0), Trainer(seed=0), Trainer(seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)

    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert same.prompts(8) == again.prompts(8) == same.prompts(100)[:8]
    assert same.prompts(8) != other.prompts(8)


@pytest.mark.parametrize("text", ["", ".", " sea ships", " the old"])
def test_a_step_without_any_difference_in_reward_is_harmless(trainer: Trainer, text: str) -> None:
    rollout = Rollout(trainer.prompts(1)[0], tuple(trainer.tokenizer.encode(text)))
    assert trainer.policy_step([rollout, rollout]) == trainer.reward(rollout)
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


def test_rollouts_may_differ_in_length(trainer: Trainer) -> None:
    long, short = trainer.prompts(2)
    rollouts = [Rollout(long, trainer.greedy(long, 12)), Rollout(short, trainer.greedy(short, 3))]
    trainer.policy_step(rollouts)
    assert all(tensor.isfinite().all() for tensor in trainer.state_dict().values())


def test_pretraining_needs_time(trainer: Trainer) -> None:
    with pytest.raises(UsageError, match="positive"):
        trainer.pretrain(seconds=0)


def test_a_word_pays_once_if_it_is_known_and_starts_with_s() -> None:
    known = vocabulary("She says: the sun!")
    words = score_words("She says, she sxx the sun", known)
    assert [word.reward for word in words] == [1, 1, 0, 0, 0, 1]


def test_each_token_is_credited_with_the_word_it_is_part_of() -> None:
    rewards = token_rewards([" s", "un", ",", " the", " ", "s", "un", ""], vocabulary("the sun"))
    assert rewards == pytest.approx(
        [1, 1, float("nan"), 0, float("nan"), 0, 0, float("nan")], nan_ok=True
    )


def test_the_corpus_is_one_line_of_sentences() -> None:
    text = corpus()
    assert text.isascii()
    assert "\n" not in text
    assert "The harbour" in openings(text)
    assert len(set(openings(text))) == len(openings(text)) > 100
