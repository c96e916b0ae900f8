"""The training half of the demo: a small language model, made on the spot and trained for real.

A causal language model of half a million float32 parameters and its tokenizer are built from
nothing. Some seconds of next-token training on the corpus teach it words; policy-gradient steps
on rollouts from the replicas then raise the reward of `checkpoint_engine.demo.tasks`. The
weights live in this process and change in place, as they do in an RL trainer.

    trainer = Trainer(seed=0)
    trainer.pretrain(seconds=8)
    trainer.save(folder)                              # replicas load this folder
    for _ in range(10):
        rollouts = ...                                # sampled by the replicas at temperature 1
        mean_reward = trainer.policy_step(rollouts)
        ...                                           # send trainer.state_dict() to the replicas
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from checkpoint_engine.demo import tasks
from checkpoint_engine.errors import UsageError

__all__ = ["Rollout", "Trainer"]

_VOCAB_SIZE = 1024
_EOS = "<eos>"
_EOS_ID = 0
_MAX_GRAD_NORM = 1.0

_PRETRAIN_LR = 1e-2
_PRETRAIN_WARMUP_STEPS = 40
_PRETRAIN_BATCH_SIZE = 6
_PRETRAIN_LENGTH = 48

_POLICY_LR = 3e-3
_POLICY_EPOCHS = 4
_POLICY_CLIP = 0.2


@dataclass(frozen=True)
class Rollout:
    """A prompt and what a replica generated after it."""

    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]


class Trainer:
    """Owns the tokenizer, the model and its optimizer. Everything random follows from `seed`.

    The number of pretraining steps depends on the machine's speed, so two runs with one seed are
    alike but not identical. Not safe for use by several threads.
    """

    def __init__(self, seed: int = 0) -> None:
        text = tasks.corpus()
        self.tokenizer = _train_tokenizer(text)
        self.model = _init_model(seed)
        self._generator = torch.Generator().manual_seed(seed)
        self._corpus_ids = torch.tensor(self.tokenizer.encode(text))
        self._known_words = tasks.vocabulary(text)
        self._pieces = self.tokenizer.batch_decode(
            [[token_id] for token_id in range(_VOCAB_SIZE)], skip_special_tokens=True
        )
        openings = tasks.openings(text)
        random.Random(seed).shuffle(openings)  # noqa: S311  no secret hangs on it
        self._prompts = [tuple(self.tokenizer.encode(opening)) for opening in openings]
        self._policy_optimizer = _adamw(self.model, _POLICY_LR, weight_decay=0.0)

    def pretrain(
        self, seconds: float, on_progress: Callable[[int, float], None] | None = None
    ) -> float:
        """Next-token training on the corpus for about `seconds`; the last batch's loss in nats.

        The learning rate falls to zero over the time, not over steps: a slow machine takes fewer
        steps and still ends on settled weights. `on_progress(step, loss)` is called after each.

        Raises:
            UsageError: `seconds` is not positive.
        """
        if seconds <= 0:
            raise UsageError(f"pretraining needs a positive time, not {seconds} s")
        optimizer = _adamw(self.model, _PRETRAIN_LR, weight_decay=0.1)
        started = time.monotonic()
        for step in itertools.count(1):
            time_left = max(0.0, 1 - (time.monotonic() - started) / seconds)
            warmup = min(1.0, step / _PRETRAIN_WARMUP_STEPS)
            optimizer.param_groups[0]["lr"] = _PRETRAIN_LR * warmup * time_left
            batch = self._corpus_batch()
            logits = self.model(batch, use_cache=False).logits[:, :-1]
            loss = cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
            self._descend(optimizer, loss)
            if on_progress is not None:
                on_progress(step, loss.item())
            if time_left == 0:
                break
        return loss.item()

    def prompts(self, num: int) -> list[tuple[int, ...]]:
        """`num` openings of sentences as token ids: always the same, and repeated past the last."""
        return list(itertools.islice(itertools.cycle(self._prompts), num))

    def reward(self, rollout: Rollout) -> float:
        """The rule `tasks.RULE`, between 0 and 1, applied to what was generated."""
        words = tasks.score_words(self.decode(rollout.token_ids), self._known_words)
        return sum(word.reward for word in words) / max(1, len(words))

    def policy_step(self, rollouts: Sequence[Rollout]) -> float:
        """One policy-gradient step; the mean reward of `rollouts`, which are from before it.

        REINFORCE (Williams 1992) with the rewards of words, normalised over the batch, as
        advantages. A few inner epochs get more out of each rollout, and the clipped ratio of PPO
        (Schulman et al. 2017) keeps them from overshooting: without it the text repeats itself.
        """
        token_ids = pad_sequence(
            [torch.tensor(rollout.prompt_ids + rollout.token_ids) for rollout in rollouts],
            batch_first=True,
            padding_value=_EOS_ID,
        )
        advantages = self._advantages(rollouts)
        num_credited = (advantages != 0).sum().clamp(min=1)
        with torch.no_grad():
            sampled_logprobs = self._logprobs(token_ids)
        for _ in range(_POLICY_EPOCHS):
            ratio = (self._logprobs(token_ids) - sampled_logprobs).exp()
            clipped = ratio.clamp(1 - _POLICY_CLIP, 1 + _POLICY_CLIP)
            gain = torch.minimum(ratio * advantages, clipped * advantages).sum() / num_credited
            self._descend(self._policy_optimizer, -gain)
        return sum(map(self.reward, rollouts)) / len(rollouts)

    def greedy(self, prompt_ids: Sequence[int], num_tokens: int) -> tuple[int, ...]:
        """The likeliest next token, `num_tokens` times or until the end-of-sequence token.

        A replica that decodes one sequence at a time computes the same tokens at temperature 0.
        """
        prompt = torch.tensor([list(prompt_ids)])
        (token_ids,) = self.model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=num_tokens,
            do_sample=False,
            eos_token_id=_EOS_ID,
            pad_token_id=_EOS_ID,
        )
        return tuple(token_ids.tolist()[len(prompt_ids) :])

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of `token_ids`."""
        return "".join(self._pieces[token_id] for token_id in token_ids)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The live weights, float32 and detached, under every name, tied ones sharing storage.

        They belong to the trainer and change with the next step: copy what must outlive it.
        """
        return dict(self.model.state_dict())

    def save(self, folder: Path) -> None:
        """Write model and tokenizer as a Hugging Face folder, which loads without a network."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _corpus_batch(self) -> torch.Tensor:
        """Random windows of the corpus: int64 of shape [batch size, length]."""
        starts = torch.randint(
            len(self._corpus_ids) - _PRETRAIN_LENGTH,
            (_PRETRAIN_BATCH_SIZE, 1),
            generator=self._generator,
        )
        return self._corpus_ids[starts + torch.arange(_PRETRAIN_LENGTH)]

    def _advantages(self, rollouts: Sequence[Rollout]) -> torch.Tensor:
        """One advantage per predicted token, float32 of shape [num rollouts, longest - 1].

        Zero where there is nothing to credit: in prompts, in padding and between words.
        """
        rewards = pad_sequence(
            [
                torch.tensor(
                    [torch.nan] * (len(rollout.prompt_ids) - 1)
                    + tasks.token_rewards(
                        [self._pieces[token_id] for token_id in rollout.token_ids],
                        self._known_words,
                    )
                )
                for rollout in rollouts
            ],
            batch_first=True,
            padding_value=torch.nan,
        )
        centred = rewards - rewards.nanmean()
        return (centred / (centred.square().nanmean().sqrt() + 1e-6)).nan_to_num(0.0)

    def _logprobs(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The log probability of each token but the first: [num, length] to [num, length - 1]."""
        logits: torch.Tensor = self.model(token_ids, use_cache=False).logits[:, :-1]
        return logits.log_softmax(-1).gather(-1, token_ids[:, 1:, None]).squeeze(-1)

    def _descend(self, optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        clip_grad_norm_(self.model.parameters(), _MAX_GRAD_NORM)
        optimizer.step()


def _train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of the corpus. Characters that are not in it are dropped."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE, special_tokens=[_EOS], show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    assert tokenizer.get_vocab_size() == _VOCAB_SIZE
    assert tokenizer.token_to_id(_EOS) == _EOS_ID
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, eos_token=_EOS, pad_token=_EOS
    )


def _init_model(seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of two layers with tied embeddings, in float32.

    Its initial weights are six times as wide as usual: a model this narrow learns faster so.
    """
    config = Qwen3Config(
        vocab_size=_VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.12,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=_EOS_ID,
        pad_token_id=_EOS_ID,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)


def _adamw(model: torch.nn.Module, lr: float, *, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay, fused=True
    )
