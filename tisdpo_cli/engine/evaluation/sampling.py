"""Responses sampled from a causal language model, in batches with left padding and a cache.

Chance comes from outside: what is drawn for a response depends on the seed, its prompt and its number alone, so that
the batch it lies in changes nothing. It knows no rewards, no files and no settings. Legend: R rows, T positions,
N new tokens at most, V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Ids = Sequence[int]


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        ids: its tokens, without the EOS.
        ended: whether the model ended it, and not the limit of new tokens.
    """

    ids: list[int]
    ended: bool

    def scored(self, eos: int) -> list[int]:
        """The tokens that the model chose: with the EOS where it ended the response."""
        return [*self.ids, eos] if self.ended else self.ids


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        eos: the token that ends a response.
        pad: what fills rows up; it may be the EOS, for rows are known by length.
        new_tokens: N, the EOS included.
        temperature: of the softmax; 0 takes the most probable token.
        autocast: the dtype to compute in, or None for the weights' own.
    """

    eos: int
    pad: int
    new_tokens: int
    temperature: float = 1.0
    autocast: torch.dtype | None = None


def uniform_draws(seed: int, keys: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Uniform numbers [R, count] in float64, each row by the seed, a prompt and the number of a response to it."""
    return torch.stack([torch.rand(count, generator=_generator(seed, *key), dtype=torch.float64) for key in keys])


def _generator(seed: int, prompt: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"sample/{seed}/{prompt}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_all(
    model: nn.Module,
    prompts: Sequence[Ids],
    draws: Tensor,
    how: Sampling,
    batch_size: int,
    done: Callable[[int], None] = lambda _rows: None,
) -> list[Sample]:
    """A response to each prompt; batches are made of prompts of like length.

    Args:
        model: a transformers causal LM.
        prompts: R prompts of one token or more.
        drawn: [R, N], from `uniform_draws`.
        how: when to end, and the temperature.
        batch_size: rows at a time.
        done: is told how many rows are ready.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Sample] = {}
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        found |= zip(rows, sample(model, [prompts[i] for i in rows], draws[rows], how), strict=True)
        done(len(rows))
    return [found[i] for i in range(len(prompts))]


@torch.inference_mode()
def sample(model: nn.Module, prompts: Sequence[Ids], draws: Tensor, how: Sampling) -> list[Sample]:
    """A response to each prompt of one batch; arguments as in `sample_all`."""
    device = next(model.parameters()).device
    input_ids, mask = (made.to(device) for made in left_padded(prompts, how.pad))
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    step, chosen = _Step(model, mask, how.autocast), []
    going = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for t in range(how.new_tokens):
        tokens = pick(step(input_ids), draws[:, t], how.temperature)
        chosen.append(tokens)
        going &= tokens != how.eos
        if not going.any():
            break
        input_ids = tokens[:, None]
    return [_until(row, how.eos) for row in torch.stack(chosen, 1).tolist()]


def left_padded(prompts: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts [R, T] filled up on the left, and the mask [R, T] that is 1 on their tokens.

    >>> left_padded([[5, 6], [7]], pad=7)[1].tolist()
    [[1, 1], [0, 1]]
    """
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask[row, width - len(prompt) :] = 1
    return ids, mask


class _Step:
    """The logits [R, V] of the next tokens, from those that are new since the last call."""

    def __init__(self, model: nn.Module, mask: Tensor, autocast: torch.dtype | None) -> None:
        self.model, self.mask, self.autocast = model, mask, autocast
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.taken = set(inspect.signature(model.forward).parameters)
        # What the cache is called depends on the version of transformers.
        self.cached = "cache" if "cache" in self.taken else "past_key_values"
        self.cache: Any = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        if self.cache is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            self.positions = self.positions[:, -1:] + 1
        # Families without a place for positions count them by the mask.
        offered = {"position_ids": self.positions, "logits_to_keep": 1}
        more = {name: value for name, value in offered.items() if name in self.taken} | {self.cached: self.cache}
        device = input_ids.device.type
        with torch.autocast(device, dtype=self.autocast, enabled=self.autocast is not None):
            made = self.model(input_ids=input_ids, attention_mask=self.mask, use_cache=True, **more)
        self.cache = getattr(made, self.cached)
        return made.logits[:, -1]


def pick(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Tokens [R] where the cumulated probabilities of logits [R, V] pass the numbers drawn [R]."""
    if temperature == 0:
        return logits.argmax(-1)
    cumulated = (logits.to(draws.dtype) / temperature).softmax(-1).cumsum(-1)
    # On the right: a token of probability 0 is never reached.
    found = torch.searchsorted(cumulated, (draws * cumulated[:, -1])[:, None], right=True)[:, 0]
    return found.clamp(max=logits.shape[-1] - 1)


def _until(ids: list[int], eos: int) -> Sample:
    return Sample(ids[: ids.index(eos)], True) if eos in ids else Sample(ids, False)
