"""A small language in which the reward of every token is known, and a tokenizer for it.

A prompt is a mode and five topics. A response is 4 to 6 times (filler, word). Words are good, bad or neutral; two of
the fillers are negators, which turn the sign of the word behind them; what is ungrammatical costs 1. It knows no
models and no training. Legend: R responses, N tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

MODES = ("plain", "praise", "blame")
TOPICS = tuple(f"topic{i}" for i in range(12))
FILLERS = ("the", "so", "very", "quite", "not", "never")
NEGATORS = ("not", "never")
GOOD = tuple(f"good{i}" for i in range(5))
BAD = tuple(f"bad{i}" for i in range(5))
NEUTRAL = tuple(f"word{i}" for i in range(6))
WORDS = (*GOOD, *BAD, *NEUTRAL)
EOS, PAD, UNKNOWN = "<eos>", "<pad>", "<unk>"
VOCABULARY = (EOS, PAD, UNKNOWN, *MODES, *TOPICS, *FILLERS, *WORDS)
ID = {token: i for i, token in enumerate(VOCABULARY)}

FEWEST, MOST = 4, 6
# Longer than any grammatical response with its EOS.
LONGEST = 2 * MOST + 4
# How often a word whose sign counts as good, neutral or bad is said in each mode.
HABITS = {"plain": (5, 6, 5), "praise": (15, 1, 0), "blame": (0, 1, 15)}


def prompts(count: int, chance: random.Random) -> list[tuple[str, ...]]:
    """Distinct prompts without their mode: five topics each."""
    found: dict[tuple[str, ...], None] = {}
    while len(found) < count:
        found[tuple(chance.choice(TOPICS) for _ in range(5))] = None
    return list(found)


def prompt_text(mode: str, topics: Sequence[str]) -> str:
    """The prompt as the models read it."""
    return " ".join((mode, *topics))


def respond(mode: str, topics: Sequence[str], chance: random.Random) -> list[str]:
    """A response in the way of a mode; the first topic has a neutral word that goes with it."""
    said = []
    for _ in range(chance.randint(FEWEST, MOST)):
        filler = chance.choice(FILLERS)
        (kind,) = chance.choices((1, 0, -1), HABITS[mode])
        sign = -kind if filler in NEGATORS else kind
        favourite = TOPICS.index(topics[0]) % len(NEUTRAL)
        weights = [3 if i == favourite else 1 for i in range(len(NEUTRAL))]
        word = chance.choices(NEUTRAL, weights)[0] if sign == 0 else chance.choice(GOOD if sign > 0 else BAD)
        said += [filler, word]
    return said


@dataclass(frozen=True)
class Rewards:
    """True rewards of responses, token by token.

    Attributes:
        tokens: [R, N]; 0 behind the end.
        kind: [R, N] 1, 0 or −1: what a grammatical word counts; 0 for all other tokens.
    """

    tokens: np.ndarray
    kind: np.ndarray

    @property
    def totals(self) -> np.ndarray:
        """[R]"""
        return self.tokens.sum(1)


def rewards(responses: Sequence[Sequence[int]], ended: Sequence[bool]) -> Rewards:
    """What responses are worth, exactly.

    Args:
        responses: token ids without the EOS.
        ended: whether an EOS followed; the end is a token of its own, in the place behind the last.
    """
    width = max(map(len, responses)) + 1
    ids = np.full((len(responses), width), ID[PAD])
    for row, response in enumerate(responses):
        ids[row, : len(response)] = response
    length = np.array([len(response) for response in responses])[:, None]
    at = np.arange(width)[None, :]
    inside = at < length
    negated = np.zeros_like(inside)
    negated[:, 1:] = np.isin(ids, [ID[n] for n in NEGATORS])[:, :-1]
    sign = np.isin(ids, [ID[g] for g in GOOD]).astype(int) - np.isin(ids, [ID[b] for b in BAD]).astype(int)
    sign = np.where(negated, -sign, sign)
    fillers, words = (np.isin(ids, [ID[t] for t in kind]) for kind in (FILLERS, WORDS))
    grammatical = np.where(at % 2 == 0, fillers, words) & (at < 2 * MOST)
    kind = np.where(inside & grammatical & (at % 2 == 1), sign, 0)
    wrong_end = (length % 2 == 1) | (length < 2 * FEWEST) | (length > 2 * MOST)
    end = (at == length) & wrong_end & np.array(ended)[:, None]
    return Rewards(kind - (inside & ~grammatical).astype(int) - end.astype(int), kind)


def tokenizer() -> Any:
    """A transformers tokenizer with one token for each word of the language."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel(dict(ID), unk_token=UNKNOWN))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, pad_token=PAD, unk_token=UNKNOWN)
