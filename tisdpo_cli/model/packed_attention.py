"""Attention in a packed row of prompts, each followed by its responses: every response attends to its prompt and
itself only.

Pure torch. Knows no model and no transformers. Legend: A heads, G key heads, T positions, D head width, n queries and
m keys of a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The keyword argument that carries the layout of a packed row through a model to its attention.
LAYOUT = "tisdpo_layout"
# Queries per block: its scores stay in the CPU's cache, and keys after it are never multiplied.
_BLOCK = 128


class Segment(NamedTuple):
    """Consecutive queries of a packed row, as (begin, end), and the parts (begin, end) that hold their keys."""

    queries: tuple[int, int]
    keys: tuple[tuple[int, int], ...]


@dataclass(eq=False)
class PackedLayout:
    """Lengths of the prompts and responses in a packed row.

    Attributes:
        lengths: for each prompt, its tokens and the tokens of each of its responses.
        calls: how often attention was computed with this layout; not once per layer if a model bypasses it.
    """

    lengths: tuple[tuple[int, tuple[int, ...]], ...]
    calls: int = 0
    _masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)

    def segments(self) -> Iterator[Segment]:
        """Yield one segment per response in the order of the row; a prompt's queries belong to its first response."""
        begin = 0
        for prompt, responses in self.lengths:
            shared, end = (begin, begin + prompt), begin + prompt
            for number, length in enumerate(responses):
                own = (end, end + length)
                # The first response directly follows its prompt.
                yield Segment((begin, own[1]), ((begin, own[1]),)) if number == 0 else Segment(own, (shared, own))
                end += length
            begin = end

    def mask(self, queries: int, keys: int, window: int | None, like: Tensor) -> Tensor:
        """Return the additive mask [queries, keys] of the last `queries` of `keys` consecutive positions."""
        key = (queries, keys, window, like.dtype, like.device)
        if key not in self._masks:
            distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
            visible = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(queries, keys).masked_fill_(~visible, torch.finfo(torch.float32).min)
            self._masks[key] = mask.to(like)
        return self._masks[key]


@dataclass(frozen=True)
class AttentionSpec:
    """How a layer computes attention scores.

    Attributes:
        scaling: factor of the products of queries and keys; 1/√D where None.
        window: number of positions that a token sees, itself included; all earlier ones where None.
        softcap: c, where scores s become c · tanh(s / c); None for no cap.
    """

    scaling: float | None = None
    window: int | None = None
    softcap: float | None = None


def segment_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec) -> Tensor:
    """Compute causal attention of a packed row, segment by segment.

    Uses torch's fused kernel, or blocks if scores are capped, which the kernel cannot do. On CPUs the kernel computes
    in float32 even under autocast, where that takes a third of the time of bf16.

    Args:
        query: [1, A, T, D].
        key: [1, G, T, D], A a multiple of G.
        value: [1, G, T, D'].
        layout: prompts and responses in the row.
        spec: how the layer computes scores.

    Returns:
        [1, A, T, D'].
    """
    layout.calls += 1
    kind = query.device.type
    if torch.is_autocast_enabled(kind):
        # Rotary embeddings leave queries and keys in float32, but values in the dtype of autocast.
        fused_on_cpu = kind == "cpu" and spec.softcap is None
        dtype = torch.float32 if fused_on_cpu else torch.get_autocast_dtype(kind)
        query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
    if spec.softcap is not None:
        return _InBlocks.apply(query, key, value, layout, spec)
    with torch.autocast(kind, enabled=False):
        return _fused(query, key, value, layout, spec)


def _fused(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec) -> Tensor:
    # The first response directly follows its prompt, so both are one piece.
    pieces = [length for p, (first, *others) in layout.lengths for length in (p + first, *others)]
    # Split along T of [1, T, A, D], the memory order of models: such pieces are contiguous and copied at once.
    columns = [iter(tensor.transpose(1, 2).split(pieces, dim=1)) for tensor in (query, key, value)]
    outputs = []
    for prompt, (_first, *others) in layout.lengths:
        q, k, v = (next(column) for column in columns)
        outputs.append(_attend(q, k, v, layout, spec))
        for _ in others:
            own_q, own_k, own_v = (next(column) for column in columns)
            all_k, all_v = (torch.cat([shared[:, :prompt], own], dim=1) for shared, own in ((k, own_k), (v, own_v)))
            outputs.append(_attend(own_q, all_k, all_v, layout, spec))
    return torch.cat(outputs, dim=1).transpose(1, 2)


def _attend(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec) -> Tensor:
    """Attention [1, n, A, D'] of the last positions [1, n, A, D] of [1, m, G, D]."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (query, key, value))
    queries, keys = q.shape[2], k.shape[2]
    window = None if spec.window is None or spec.window >= keys else spec.window
    causal = window is None and queries == keys
    mask = None if causal else layout.mask(queries, keys, window, q)
    output = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=spec.scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return output.transpose(1, 2)


class _InBlocks(torch.autograd.Function):
    """Saves queries, keys and values; the backward pass recomputes the probabilities."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec
    ) -> Tensor:
        heads, total = query.shape[1:3]
        # Contiguous in the order that the model needs next.
        output = query.new_empty(1, total, heads, value.shape[-1]).transpose(1, 2)
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query, key, value, layout, spec):
                p, _ = block.probabilities()
                output[0, :, block.begin : block.end] = (p.to(value.dtype) @ block.v).view(heads, -1, value.shape[-1])
        ctx.save_for_backward(query, key, value)
        ctx.layout, ctx.spec = layout, spec
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        query, key, value = ctx.saved_tensors
        grad_query = query.new_empty(1, query.shape[2], query.shape[1], query.shape[3]).transpose(1, 2)
        # Accumulated: a prompt gets gradient from each of its responses.
        grad_key, grad_value = (tensor[0].to(_wide(tensor)).zero_() for tensor in (key.clone(), value.clone()))
        with torch.autocast(query.device.type, enabled=False):
            for block in _blocks(query, key, value, ctx.layout, ctx.spec):
                p, slope = block.probabilities()
                g = _by_key_head(grads[0][0, :, block.begin : block.end], len(block.k))
                grad_p = (g @ block.v.transpose(1, 2)).to(p.dtype)
                grad_scores = grad_p.sub_((grad_p * p).sum(-1, keepdim=True)).mul_(p)
                if slope is not None:
                    grad_scores *= slope
                cast = grad_scores.mul_(block.scaling).to(query.dtype)
                grad_query[0, :, block.begin : block.end] = (cast @ block.k).view(query.shape[1], -1, query.shape[3])
                _add(grad_key, block.keys, cast.transpose(1, 2) @ block.q)
                _add(grad_value, block.keys, p.to(value.dtype).transpose(1, 2) @ g)
        return grad_query, grad_key[None].to(key.dtype), grad_value[None].to(value.dtype), None, None


class _Block(NamedTuple):
    """Consecutive queries of a segment, and the keys up to the last of them.

    Attributes:
        begin: first query in the row.
        end: end of the queries in the row.
        keys: parts (begin, end) of the keys in the row.
        q: [G, A/G · n, D], the queries of heads that share a key head, concatenated.
        k: [G, m, D].
        v: [G, m, D'].
        mask: additive mask of the last columns of the scores [n, m].
        scaling: factor of the products of queries and keys.
        softcap: cap of the scores, or None.
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
        """Return attention probabilities [G, A/G · n, m], and the derivative of the cap there or None."""
        scores = self.q @ self.k.transpose(1, 2)
        scores = scores.to(_wide(scores)).mul_(self.scaling)
        slope = None
        if self.softcap is not None:
            capped = scores.div_(self.softcap).tanh_()
            slope, scores = 1 - capped.square(), capped * self.softcap
        count, width = self.mask.shape
        scores.view(len(scores), -1, count, scores.shape[-1])[..., -width:] += self.mask
        return scores.softmax(-1), slope


def _blocks(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec) -> Iterator[_Block]:
    # Contiguous per head, or every product would copy its part.
    query, key, value = (tensor.contiguous() for tensor in (query, key, value))
    scaling = query.shape[-1] ** -0.5 if spec.scaling is None else spec.scaling
    like = query.new_empty(0, dtype=_wide(query))
    for segment in layout.segments():
        k, v = (_gather(tensor[0], segment.keys) for tensor in (key, value))
        first, last = segment.queries
        before = k.shape[1] - (last - first)
        for begin in range(first, last, _BLOCK):
            end = min(begin + _BLOCK, last)
            visible = before + end - first
            bounded = spec.window is not None and spec.window < visible
            # Without a window only the block's own positions can come after its queries.
            mask = layout.mask(end - begin, visible if bounded else end - begin, spec.window if bounded else None, like)
            q = _by_key_head(query[0, :, begin:end], len(k))
            keys = _first(segment.keys, visible)
            yield _Block(begin, end, keys, q, k[:, :visible], v[:, :visible], mask, scaling, spec.softcap)


def _gather(tensor: Tensor, parts: tuple[tuple[int, int], ...]) -> Tensor:
    """Concatenate parts of the positions of [G, T, D]."""
    pieces = [tensor[:, begin:end] for begin, end in parts]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def _by_key_head(tensor: Tensor, key_heads: int) -> Tensor:
    """Reshape [A, n, D] to [G, A/G · n, D]."""
    return tensor.reshape(key_heads, -1, tensor.shape[-1])


def _first(parts: tuple[tuple[int, int], ...], count: int) -> tuple[tuple[int, int], ...]:
    """The parts cut to their first `count` positions."""
    cut = []
    for begin, end in parts:
        cut.append((begin, min(end, begin + count)))
        count -= cut[-1][1] - begin
    return tuple(cut)


def _add(total: Tensor, parts: tuple[tuple[int, int], ...], values: Tensor) -> None:
    """Add values [G, m, D] to parts of the positions of a total [G, T, D]."""
    done = 0
    for begin, end in parts:
        total[:, begin:end] += values[:, done : done + end - begin]
        done += end - begin


def _wide(tensor: Tensor) -> torch.dtype:
    """The dtype for sums and exponentials."""
    return torch.promote_types(tensor.dtype, torch.float32)


def packed_positions(lengths: Sequence[tuple[int, Sequence[int]]]) -> Tensor:
    """Return position ids [T] of a packed row: those of every response continue from its prompt."""
    parts = []
    for prompt, responses in lengths:
        parts.append(torch.arange(prompt))
        parts += [torch.arange(prompt, prompt + length) for length in responses]
    return torch.cat(parts)
