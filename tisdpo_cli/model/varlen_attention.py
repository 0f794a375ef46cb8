"""Attention in packed rows by a variable-length FlashAttention kernel, on GPUs that have one with the right numbers;
segment by segment everywhere else.

Pure torch. Knows no model and no transformers. Legend: A heads, G key heads, T positions, M keys, D head width, B
sequences.
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

# Relative error of values and gradients by norm, in bf16.
_TOLERANCE = 0.02
# Where a kernel must agree with `segment_attention`: different lengths, and windows and a cap that have an effect at
# these lengths, since a model's own may be far larger.
_CHECKED, _CHECKED_WINDOWS, _CHECKED_CAP = ((70, (9, 150)), (3, (1, 5))), (4, 50, 4096), 1.0


class Lengths(NamedTuple):
    """Boundaries of sequences of queries and keys, in the order of the kernels' arguments.

    Every query sees the keys up to its own; the last key of a sequence is that of its last query.

    Attributes:
        queries: [B + 1] int32, the first query of each sequence, and the end.
        keys: [B + 1] int32, the first key of each sequence, and the end.
        most_queries: most queries of a sequence.
        most_keys: most keys of a sequence.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


# query [T, A, D], key [M, G, D], value [M, G, D] → [T, A, D].
Kernel = Callable[[Tensor, Tensor, Tensor, Lengths, AttentionSpec], Tensor]


def packed_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec) -> Tensor:
    """Compute `segment_attention` by the fastest kernel that agrees with it."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if kind == "cuda" and dtype in (torch.bfloat16, torch.float16) and query.shape[-1] == value.shape[-1]:
        shape = (query.shape[1], key.shape[1], query.shape[-1])
        for kernel in (_by_flash_attn, _by_torch):
            if agrees(kernel, shape, spec, dtype, query.device):
                query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
                return varlen_attention(query, key, value, layout, spec, kernel)
    return segment_attention(query, key, value, layout, spec)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackedLayout, spec: AttentionSpec, kernel: Kernel
) -> Tensor:
    """Compute `packed_attention` in one kernel call: keys and values of a prompt are repeated before each response."""
    layout.calls += 1
    parts = [part for prompt, responses in layout.lengths for part in (prompt, *responses)]

    def repeated(tensor: Tensor) -> Tensor:
        # In pieces: the backward of indexing uses atomic additions, in a different order every time.
        pieces = iter(tensor[0].transpose(0, 1).split(parts))
        sequences = []
        for _, responses in layout.lengths:
            prompt = next(pieces)
            for _ in responses:
                sequences += [prompt, next(pieces)]
        return torch.cat(sequences)

    with torch.autocast(query.device.type, enabled=False):
        lengths = _lengths(layout.lengths, query.device)
        output = kernel(query[0].transpose(0, 1), repeated(key), repeated(value), lengths, spec)
    return output.transpose(0, 1)[None]


# Cached because all layers of a pass need the same, and every copy to a GPU blocks this process.
@lru_cache(maxsize=4)
def _lengths(lengths: tuple[tuple[int, tuple[int, ...]], ...], device: torch.device) -> Lengths:
    segments = list(PackedLayout(lengths).segments())
    queries = [segment.queries[1] - segment.queries[0] for segment in segments]
    keys = [sum(end - begin for begin, end in segment.keys) for segment in segments]

    def ends(counts: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=device)

    # Tensors created in inference mode cannot be saved for a backward pass.
    with torch.inference_mode(False):
        return Lengths(ends(queries), ends(keys), max(queries), max(keys))


@lru_cache(maxsize=64)
def agrees(
    kernel: Kernel, shape: tuple[int, int, int], spec: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    """Return whether a kernel is available, supports such tensors, and agrees with `segment_attention`.

    Values and gradients are compared.

    Args:
        kernel: kernel to try.
        shape: heads, key heads, head width.
        spec: how the layer computes scores.
        dtype: dtype of queries, keys and values.
        device: their device.
    """
    softcap = None if spec.softcap is None else _CHECKED_CAP
    # Scores of size 1; otherwise neither window nor cap would have an effect.
    scaling = None if spec.scaling is None else 1.5 * shape[-1] ** -0.5
    windows = (None,) if spec.window is None else _CHECKED_WINDOWS
    # Layers may run under autocast, inference mode and checkpointing, which would change what is compared here or take
    # its tensors for those of the layer.
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        return all(_agrees(kernel, shape, AttentionSpec(scaling, window, softcap), dtype, device) for window in windows)


def _agrees(
    kernel: Kernel, shape: tuple[int, int, int], spec: AttentionSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    heads, key_heads, width = shape
    total = sum(prompt + sum(responses) for prompt, responses in _CHECKED)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, count, total, width, generator=generator).to(device, dtype)
        for count in (heads, key_heads, key_heads, heads)
    ]

    def results(attention: Callable[..., Tensor], kind: torch.dtype, *kernels: Kernel) -> list[Tensor]:
        *inputs, gradient = (tensor.to(kind).requires_grad_() for tensor in tensors)
        output = attention(*inputs, PackedLayout(_CHECKED), spec, *kernels)
        gradients = torch.autograd.grad(output, inputs, gradient.detach())
        return [tensor.float() for tensor in (output.detach(), *gradients)]

    try:
        pairs = list(
            zip(results(varlen_attention, dtype, kernel), results(segment_attention, torch.float32), strict=True)
        )
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # A missing package, or an unsupported architecture or head width: `segment_attention` works everywhere.
        return False
    return all(float((a - b).norm()) <= _TOLERANCE * float(b.norm()) for a, b in pairs)


def _window(spec: AttentionSpec) -> tuple[int, int]:
    """How many keys before and after its own a query sees; −1 for all."""
    return (-1 if spec.window is None else spec.window - 1, 0)


def _by_flash_attn(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, spec: AttentionSpec) -> Tensor:
    """Kernel of the package flash-attn, 2.6 or later."""
    return import_module("flash_attn").flash_attn_varlen_func(
        query,
        key,
        value,
        *lengths,
        softmax_scale=spec.scaling,
        causal=True,
        window_size=_window(spec) if spec.window is not None else (-1, -1),
        softcap=spec.softcap or 0.0,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _by_torch(query: Tensor, key: Tensor, value: Tensor, lengths: Lengths, spec: AttentionSpec) -> Tensor:
    """Kernel of torch, in recent versions."""
    if spec.softcap is not None:
        raise ValueError("the kernel cannot cap scores")
    return import_module("torch.nn.attention.varlen").varlen_attn(
        query,
        key,
        value,
        *lengths,
        scale=spec.scaling,
        window_size=_window(spec),
        enable_gqa=query.shape[1] != key.shape[1],
    )
