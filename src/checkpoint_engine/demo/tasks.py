"""What the demo's model learns: first English words, then to begin as many as it can with s.

The corpus ships with the package, so nothing is downloaded. The reward is a rule that anyone can
check by eye: the share of a text's words that are new words starting with s. A word counts once,
and only if the corpus knows it, so neither repetition nor gibberish pays.

    text = corpus()
    known = vocabulary(text)
    share([word.reward for word in score_words("She said she sails", known)])  # 0.75
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

__all__ = ["RULE", "Word", "corpus", "openings", "score_words", "token_rewards", "vocabulary"]

RULE = "share of new words with s"

_WORD = re.compile(r"[a-z]+", re.IGNORECASE)
_WORDS_IN_OPENING = 2


@dataclass(frozen=True)
class Word:
    """A word of a text: its characters `start:end`, and its reward, 0.0 or 1.0."""

    start: int
    end: int
    reward: float


def corpus() -> str:
    """The whole training text as one line of ASCII."""
    text = resources.files(__package__).joinpath("corpus.txt").read_text("ascii")
    return " ".join(text.split())


def openings(text: str) -> list[str]:
    """The first two words of each sentence, without duplicates, in the order of the text."""
    sentences = (sentence.split() for sentence in text.split(". "))
    return list(
        dict.fromkeys(
            " ".join(words[:_WORDS_IN_OPENING])
            for words in sentences
            if len(words) > _WORDS_IN_OPENING
        )
    )


def vocabulary(text: str) -> frozenset[str]:
    """The words of a text in lower case."""
    return frozenset(match[0].lower() for match in _WORD.finditer(text))


def score_words(text: str, known: frozenset[str]) -> list[Word]:
    """Each word of `text` with its reward: 1 if it starts with s, is known and was not said yet."""
    said: set[str] = set()
    words = []
    for match in _WORD.finditer(text):
        word = match[0].lower()
        counts = word.startswith("s") and word in known and word not in said
        said.add(word)
        words.append(Word(match.start(), match.end(), float(counts)))
    return words


def token_rewards(pieces: Sequence[str], known: frozenset[str]) -> list[float]:
    """The reward of the word that each token is part of; NaN for a token outside of words.

    `pieces` are the texts of the tokens. The rule is a sum over words, so each token can be
    credited with its own word alone, which is far less noisy than the whole text's reward.
    """
    words = score_words("".join(pieces), known)
    ends = itertools.accumulate(len(piece) for piece in pieces)
    return [
        next((word.reward for word in words if piece and word.start < end <= word.end), math.nan)
        for piece, end in zip(pieces, ends, strict=True)
    ]
