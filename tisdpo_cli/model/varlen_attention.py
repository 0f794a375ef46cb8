"""Attention in packed rows by a kernel of FlashAttention for many lengths, on GPUs where there is one that gives the
right numbers; by groups everywhere else.

Pure torch: it knows no model and no transformers. Legend: A heads, G key heads, T positions, M keys, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo_cli.model.packed_attention import AttentionSpec, PackedLayout, segment_attention

# Of values and gradients, by their norm, in bf16.
_TOLERANCE = 0.02
# What a kernel must agree on with the plain computation: groups of unlike lengths, and windows and a cap that matter
# there, for those of a model may lie far beyond.
_CHECKED, _CHECKED_WINDOWS, _CHECKED_CAP = ((70, (9, 150)), (3, (1, 5))), (4, 50, 4096), 1.0


class Lengths(NamedTuple):
    """Where consecutive queries and their keys begin and end; every query sees the keys up to its own.

    In the order in which kernels take them.

    Attributes:
        queries: [B + 1] int32, the first query of each sequence, and the end.
        keys: [B + 1] int32, the same of its keys, the last of which is that of the last query.
        most_queries: of a sequence.
        most_keys: of a sequence.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


# query [T, A, D], key [M, G, D], value [M, G, D] → [T, A, D].
Kernel = Callable[[Tensor, Tensor, Tensor, Lengths, AttentionSpec], Tensor]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec) -> Tensor:
    """What `segment_attention` gives for the same arguments, by the fastest kernel that computes the same."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind == "cuda" and dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1]:
        shape = (query.shape[1], key.shape[1], query.shape[-1])
        for kernel in (_by_flash_attn, _by_torch):
            if agrees(kernel, shape, rule, dtype, query.device):
                query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
                return varlen_attention(query, key, value, groups, rule, kernel)
    return segment_attention(query, key, value, groups, rule)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, groups: PackedLayout, rule: AttentionSpec, kernel: Kernel
) -> Tensor:
    """`packed_attention` by one call of a kernel: keys and values of a prompt stand before each of its responses."""
    groups.calls += 1
    parts = [part for prompt, responses in groups.lengths for part in (prompt, *responses)]

    def repeated(tensor: Tensor) -> Tensor:
        # By pieces: summing the gradients of an index takes atomic additions, in another order every time.
        pieces = iter(tensor[0].transpose(0, 1).split(parts))
        order = []
        for _, responses in groups.lengths:
            prompt = next(pieces)
            for _ in responses:
                order += [prompt, next(pieces)]
        return torch.cat(order)

    with torch.autocast(query.device.type, enabled=False):
        lengths = _lengths(groups.lengths, query.device)
        found = kernel(query[0].transpose(0, 1), repeated(key), repeated(value), lengths, rule)
    return found.transpose(0, 1)[None]


# All layers of a pass ask for the same, and every copy to a GPU makes this process wait.
@lru_cache(maxsize=4)
def _lengths(lengths: tuple[tuple[int, tuple[int, ...]], ...], device: torch.device) -> Lengths:
    branches = list(PackedLayout(lengths).branches())
    queries = [branch.queries[1] - branch.queries[0] for branch in branches]
    keys = [sum(end - begin for begin, end in branch.keys) for branch in branches]

    def ends(counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    # A tensor made in inference mode could not be kept for a backward pass.
    with torch.inference_mode(False):
        return Lengths(ends(queries), ends(keys), max(queries), max(keys))


@lru_cache(maxsize=64)
def agrees(
    kernel: Kernel, shape: tuple[int, int, int], rule: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether a kernel is there, takes such tensors, and gives what `segment_attention` gives, its gradients included.

    Args:
        kernel: to try.
        shape: heads, key heads, head width.
        rule: of the layer.
        dtype: of the tensors.
        device: where they are.
    """
    softcap = None if rule.softcap is None else _CHECKED_CAP
    # Scores of size 1, or neither window nor cap would show.
    scaling = None if rule.scaling is None else 1.5 * shape[-1] ** -0.5
    windows = (None,) if rule.window is None else _CHECKED_WINDOWS
    # Layers run under autocast, inference mode and checkpointing too, which would change what is compared here, or take
    # its tensors for the layer's own.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        return all(_agrees(kernel, shape, AttentionSpec(scaling, window, softcap), dtype, device) for window in windows)


def _agrees(
    kernel: Kernel, shape: tuple[int, int, int], rule: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    heads, key_heads, width = shape
    total = sum(prompt + sum(responses) for prompt, responses in _CHECKED)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, count, total, width, generator=generator).to(device, dtype)
        for count in (heads, key_heads, key_heads, heads)
    ]

    def found(of: Callable[..., Tensor], kind: torch.dtype, *more: Kernel) -> list[Tensor]:
        *given, at = (tensor.to(kind).requires_grad_() for tensor in tensors)
        made = of(*given, PackedLayout(_CHECKED), rule, *more)
        return [tensor.float() for tensor in (made.detach(), *torch.autograd.grad(made, given, at.detach()))]

    try:
        both = list(zip(found(varlen_attention, dtype, kernel), found(segment_attention, torch.float32), strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # A package that is not there, an architecture or a head width that it does not know: groups do.
        return False
    return all(float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in both)


def _window(rule: AttentionSpec) -> tuple[int, int]:
    """Keys before and after its own that a query sees; −1 for all."""
    return (-1 if rule.window is None else rule.window - 1, 0)


def _by_flash_attn(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, rule: AttentionSpec) -> Tensor:
    """The package flash-attn, from 2.6 on."""
    return import_module("flash_attn").flash_attn_varlen_func(
        query,
        key,
        value,
        *lengths,
        softmax_scale=rule.scaling,
        causal=True,
        window_size=_window(rule) if rule.window is not None else (-1, -1),
        softcap=rule.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _by_torch(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, rule: AttentionSpec) -> Tensor:
    """Torch's own, where it is new enough."""
    if rule.softcap is not None:
        raise ValueError("it cannot cap scores")
    return import_module("torch.nn.attention.varlen").varlen_attn(
        query,
        key,
        value,
        *lengths,
        scale=rule.scaling,
        window_size=_window(rule),
        enable_gqa=query.shape[1] != key.shape[1],
    )
