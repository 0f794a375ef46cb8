"""Responses sampled from a causal language model, in batches with left padding and a KV cache.

Random numbers come from outside: those of a response depend only on the seed, its prompt and its number, so the batch
has no influence. It knows no rewards, files or settings. Legend: R rows, T positions, N maximum new tokens,
V vocabulary.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.model.row_lengths import forget_lengths

Ids = Sequence[int]


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        ids: token ids without the token that ended it.
        end: id of the token that ended it, or None if it reached the limit of new tokens.
    """

    ids: list[int]
    end: int | None

    @property
    def ended(self) -> bool:
        """Whether a token ended it."""
        return self.end is not None

    @property
    def scored(self) -> list[int]:
        """All sampled tokens: the response, with the token that ended it if there is one."""
        return self.ids if self.end is None else [*self.ids, self.end]


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Attributes:
        eos: ids of the tokens that end a response.
        pad: id that pads rows; may be one of these, because padding is known by length.
        new_tokens: N, including the token that ends a response.
        temperature: 0 is greedy.
        autocast: dtype to compute in, or None for the dtype of the weights.
    """

    eos: Set[int]
    pad: int
    new_tokens: int
    temperature: float = 1.0
    autocast: torch.dtype | None = None


def uniform_draws(seed: int, keys: Sequence[tuple[int, int]], count: int) -> Tensor:
    """Uniform random numbers [R, count] in float64.

    Args:
        seed: of the run.
        keys: prompt and response number of each row; a row depends only on its key and the seed.
        count: numbers per row.
    """
    return torch.stack([torch.rand(count, generator=_generator(seed, *key), dtype=torch.float64) for key in keys])


def _generator(seed: int, prompt: int, number: int) -> torch.Generator:
    digest = hashlib.sha256(f"sample/{seed}/{prompt}/{number}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_all(
    model: nn.Module, prompts: Sequence[Ids], draws: Tensor, sampling: Sampling, batch_size: int
) -> list[Sample]:
    """Sample one response to each prompt, in batches of prompts of similar length.

    Args:
        model: a transformers causal LM.
        prompts: R prompts of at least one token.
        draws: [R, N], from `uniform_draws`.
        sampling: limit, temperature and special tokens.
        batch_size: rows per batch.
    """
    samples: dict[int, Sample] = {}
    for rows in batches_by_length(list(map(len, prompts)), batch_size):
        samples |= zip(rows, sample(model, [prompts[i] for i in rows], draws[rows], sampling), strict=True)
    return [samples[i] for i in range(len(prompts))]


def batches_by_length(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Batches of rows of similar length, longest first.

    >>> batches_by_length([1, 3, 2], 2)
    [[1, 2], [0]]
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


@torch.inference_mode()
def sample(model: nn.Module, prompts: Sequence[Ids], draws: Tensor, sampling: Sampling) -> list[Sample]:
    """Sample one response to each prompt of one batch; arguments as in `sample_all`."""
    device = next(model.parameters()).device
    input_ids, mask = (tensor.to(device) for tensor in left_padded(prompts, sampling.pad))
    draws = draws.to(device, torch.float32 if device.type == "mps" else torch.float64)
    ends = torch.tensor(sorted(sampling.eos), device=device)
    forget_lengths(model)
    decoder = _Decoder(model, mask, sampling.autocast)
    columns: list[Tensor] = []
    unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for t in range(sampling.new_tokens):
        tokens = pick(decoder.next_logits(input_ids), draws[:, t], sampling.temperature)
        columns.append(tokens)
        unfinished &= ~torch.isin(tokens, ends)
        if not unfinished.any():
            break
        input_ids = tokens[:, None]
    return [_until_end(row, sampling.eos) for row in torch.stack(columns, 1).tolist()]


def left_padded(prompts: Sequence[Ids], pad: int) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left [R, T], and the mask [R, T] that is 1 on their tokens.

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


class _Decoder:
    """A model with its KV cache during the generation of one batch."""

    def __init__(self, model: nn.Module, mask: Tensor, autocast: torch.dtype | None) -> None:
        self.model, self.mask, self.autocast = model, mask, autocast
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.parameters = set(inspect.signature(model.forward).parameters)
        # The name of the cache depends on the version of transformers.
        self.cache_name = "cache" if "cache" in self.parameters else "past_key_values"
        self.cache: Any = None

    def next_logits(self, input_ids: Tensor) -> Tensor:
        """Logits [R, V] of the next token, from the token ids [R, …] since the last call."""
        if self.cache is not None:
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            self.positions = self.positions[:, -1:] + 1
        # Model families without position_ids derive positions from the mask.
        optional = {"position_ids": self.positions, "logits_to_keep": 1}
        kwargs = {name: value for name, value in optional.items() if name in self.parameters}
        kwargs[self.cache_name] = self.cache
        with torch.autocast(input_ids.device.type, dtype=self.autocast, enabled=self.autocast is not None):
            outputs = self.model(input_ids=input_ids, attention_mask=self.mask, use_cache=True, **kwargs)
        self.cache = getattr(outputs, self.cache_name)
        return outputs.logits[:, -1]


def pick(logits: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Tokens [R] by inverse transform sampling.

    Args:
        logits: [R, V].
        draws: [R] uniform random numbers.
        temperature: 0 picks the most likely token.
    """
    if temperature == 0:
        return logits.argmax(-1)
    cumulative = (logits.to(draws.dtype) / temperature).softmax(-1).cumsum(-1)
    # right=True never reaches a token of probability 0.
    tokens = torch.searchsorted(cumulative, (draws * cumulative[:, -1])[:, None], right=True)[:, 0]
    return tokens.clamp(max=logits.shape[-1] - 1)


def _until_end(ids: list[int], eos: Set[int]) -> Sample:
    end = next((i for i, token in enumerate(ids) if token in eos), None)
    return Sample(ids, None) if end is None else Sample(ids[:end], ids[end])
