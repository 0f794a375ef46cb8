"""Attention in a row that holds many prompts, each with its responses behind it: every response sees its own prompt
and itself, and nothing else.

Pure torch: it knows no model and no transformers. Legend: A heads, G key heads, T positions, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The keyword under which the groups of a packed row travel through a model to its attention.
GROUPS = "tisdpo_groups"
# Queries of a block: its scores stay in the cache, and what lies after it is never multiplied.
_BLOCK = 128


class Segment(NamedTuple):
    """Consecutive positions of a packed row that attend: (begin, end) of the queries, and of the keys in parts."""

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


@dataclass(eq=False)
class PackedLayout:
    """What stands in a packed row, group after group: a prompt and its responses.

    Attributes:
        lengths: of each group, the tokens of its prompt and of each response.
        calls: how often attention was computed by it; once per layer, or the model goes around it.
    """

    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    calls: int = 0
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)

    def branches(self) -> Iterator[Segment]:
        """Of each response, and of each prompt, whose queries go with its first response; in the order of the row."""
        begin = 0
        for prompt, responses in self.lengths:
            shared, end = (begin, begin + prompt), begin + prompt
            for number, length in enumerate(responses):
                own = (end, end + length)
                # The first response follows its prompt at once.
                yield Segment((begin, own[1]), ((begin, own[1]),)) if number == 0 else Segment(own, (shared, own))
                end += length
            begin = end

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """The additive mask [queries, keys] of the last `queries` of `keys` consecutive positions."""
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(queries, keys).masked_fill_(~seen, torch.finfo(torch.float32).min)
            self._masks[key] = mask.to(like)
        return self._masks[key]


@dataclass(frozen=True)
class AttentionSpec:
    """What a layer does with the products of queries and keys.

    Attributes:
        scaling: they are multiplied by it; 1/√D where None.
        window: positions that a token sees, itself included; all before it where None.
        softcap: scores s become c · tanh(s / c), where given.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec) -> Tensor:
    """Causal attention of a packed row, group by group.

    By torch's fused kernel; in blocks of our own where scores are capped, which it cannot. On CPUs the kernel computes
    in float32 also under autocast, where it takes a third of the time that it takes in bf16.

    Args:
        query: [1, A, T, D].
        key: [1, G, T, D], A a multiple of G.
        value: [1, G, T, D'].
        groups: what stands where in the row.
        rule: of the layer.

    Returns:
        [1, A, T, D'].
    """
    groups.calls += 1
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Rotary positions leave queries and keys in float32, values in what autocast asks for.
        fused_on_cpu = kind == "cpu" and rule.softcap is None
        dtype = torch.float32 if fused_on_cpu else torch.get_autocast_dtype(kind)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if rule.softcap is not None:
        return _InBlocks.apply(query, key, value, groups, rule)
    with torch.autocast(kind, enabled=False):
        return _fused(query, key, value, groups, rule)


def _fused(query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec) -> Tensor:
    # The first response follows its prompt at once: both are one piece.
    pieces = [length for p, (first, *others) in groups.lengths for length in (p + first, *others)]
    # [1, T, A, D], as models make them: pieces of that are in one place, and are copied as one.
    columns = [iter(tensor.transpose(1, 2).split(pieces, dim=1)) for tensor in (query, key, value)]
    made = []
    for prompt, (_first, *others) in groups.lengths:
        q, k, v = (next(column) for column in columns)
        made.append(_attend(q, k, v, groups, rule))
        for _ in others:
            own_q, own_k, own_v = (next(column) for column in columns)
            seen_k, seen_v = (torch.cat([shared[:, :prompt], own], dim=1) for shared, own in ((k, own_k), (v, own_v)))
            made.append(_attend(own_q, seen_k, seen_v, groups, rule))
    return torch.cat(made, dim=1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec) -> Tensor:
    """Of the last positions [1, n, A, D] of [1, m, G, D]: [1, n, A, D']."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    queries, keys = q.shape[2], k.shape[2]
    window = None if rule.window is None or rule.window >= keys else rule.window
    causal = window is None and queries == keys
    mask = None if causal else groups.mask(queries, keys, window, q)
    made = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=rule.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return made.transpose(1, 2)


class _InBlocks(torch.autograd.Function):
    """Keeps queries, keys and values; probabilities are made again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec
    ) -> Tensor:
        heads, total = query.shape[1:3]
        # In the order in which the model goes on with it.
        made = query.new_empty(1, total, heads, value.shape[-1]).transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query, key, value, groups, rule):
                p, _ = block.probabilities()
                made[0, :, block.begin : block.end] = (p.to(value.dtype) @ block.v).view(heads, -1, value.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.groups, ctx.rule = groups, rule
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        of_query = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        # A prompt gets its gradient from each of its responses.
        of_key, of_value = (tensor[0].to(_wide(tensor)).zero_() for tensor in (key.clone(), value.clone()))
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query, key, value, ctx.groups, ctx.rule):
                p, slope = block.probabilities()
                g = _by_key_head(grads[0][0, :, block.begin : block.end], len(block.k))
                of_p = (g @ block.v.transpose(1, 2)).to(p.dtype)
                of_scores = of_p.sub_((of_p * p).sum(-1, keepdim=True)).mul_(p)
                if slope is not None:
                    of_scores *= slope
                low = of_scores.mul_(block.scaling).to(query.dtype)
                of_query[0, :, block.begin : block.end] = (low @ block.k).view(query.shape[1], -1, query.shape[3])
                _add(of_key, block.keys, low.transpose(1, 2) @ block.q)
                _add(of_value, block.keys, p.to(value.dtype).transpose(1, 2) @ g)
        return of_query, of_key[None].to(key.dtype), of_value[None].to(value.dtype), None, None


class _Block(NamedTuple):
    """Some consecutive queries of a branch, and the keys up to the last of them.

    Attributes:
        begin: of the queries in the row.
        end: of the queries in the row.
        keys: (begin, end) of the keys in the row, in parts.
        q: [G, A/G · n, D], the queries of the heads that share a key head one after the other.
        k: [G, m, D].
        v: [G, m, D'].
        mask: of the last columns of the scores [n, m].
    """

    begin: int
    end: int
    keys: tuple[tuple[int, int], ...]
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor
    scaling: float
    softcap: float | None

    def probabilities(self) -> tuple[Tensor, Tensor | None]:
        """[G, A/G · n, m], and the slope of the cap there."""
        scores = self.q @ self.k.transpose(1, 2)
        scores = scores.to(_wide(scores)).mul_(self.scaling)
        slope = None
        if self.softcap is not None:
            bent = scores.div_(self.softcap).tanh_()
            slope, scores = 1 - bent.square(), bent * self.softcap
        count, width = self.mask.shape
        scores.view(len(scores), -1, count, scores.shape[-1])[..., -width:] += self.mask
        return scores.softmax(-1), slope


def _blocks(query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec) -> Iterator[_Block]:
    # Head after head once, or every product would copy its part.
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if rule.scaling is None else rule.scaling
    like = query.new_empty(0, dtype=_wide(query))
    for branch in groups.branches():
        k, v = (_joined(tensor[0], branch.keys) for tensor in (key, value))
        first, last = branch.queries
        before = k.shape[1] - (last - first)
        for begin in range(first, last, _BLOCK):
            end = min(begin + _BLOCK, last)
            seen = before + end - first
            bounded = rule.window is not None and rule.window < seen
            # Without a window only the block's own positions can lie ahead of its queries.
            mask = groups.mask(end - begin, seen if bounded else end - begin, rule.window if bounded else None, like)
            q = _by_key_head(query[0, :, begin:end], len(k))
            keys = _first(branch.keys, seen)
            yield _Block(begin, end, keys, q, k[:, :seen], v[:, :seen], mask, scaling, rule.softcap)


def _joined(tensor: Tensor, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """The positions of these parts of [G, T, D]."""
    pieces = [tensor[:, begin:end] for begin, end in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """[A, n, D] as [G, A/G · n, D]."""
    return tensor.reshape(key_heads, -1, tensor.shape[-1])


def _first(parts: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[int, int], ...]:
    """The first positions of these parts."""
    made = []
    for begin, end in parts:
        made.append((begin, min(end, begin + count)))
        count -= made[-1][1] - begin
    return tuple(made)


def _add(total: Tensor, parts: tuple[tuple[int, int], ...], values: Tensor) -> None:
    """Add values [G, m, D] to the positions of these parts of a total [G, T, D]."""
    done = 0
    for begin, end in parts:
        total[:, begin:end] += values[:, done : done + end - begin]
        done += end - begin


def _wide(tensor: Tensor) -> torch.dtype:
    """What sums and exponentials are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def packed_positions(lengths: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Position ids [T] of a packed row: those of every response go on from its prompt."""
    parts = []
    for prompt, responses in lengths:
        parts.append(torch.arange(prompt))
        parts += [torch.arange(prompt, prompt + length) for length in responses]
    return torch.cat(parts)
