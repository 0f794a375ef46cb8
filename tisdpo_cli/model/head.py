"""The head of a language model at the scored positions, in chunks, so that all their logits never exist at once.

Pure torch. Legend: N scored tokens, n tokens of a chunk, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Logits per chunk, and the fewest rows of a chunk: each chunk costs a pass over the gradient of the weights. With a
# small vocabulary a chunk takes 24 MiB in float32: from 32 MiB on, C libraries map fresh pages on every allocation.
_CHUNK_LOGITS, _CHUNK_ROWS = 3 * 2**21, 256
# Logits of all chunks that are saved for the backward pass instead of being recomputed.
_SAVED_LOGITS = 2**24


@dataclass(frozen=True)
class PlainHead:
    """A linear head with the model family's scaling and capping of its logits.

    Attributes:
        linear: weights [V, H], and a bias [V] or None.
        scale: factor of the logits.
        softcap: c, where logits z become c · tanh(z / c); None for no cap.
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logps(self, hidden: Tensor, targets: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Compute log-probs [N] float32 of targets [N] from hidden states [N, H].

        Args:
            hidden: input of the head.
            targets: token ids.
            dtype: dtype of the matrix products; that of the hidden states where None.
        """
        dtype = dtype or hidden.dtype
        weight, bias = self.linear.weight, self.linear.bias
        backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _HeadLogps.apply(hidden, weight, bias, targets, self, dtype, backward)


def head_bytes(scored: int, vocabulary: int, width: int, trained: bool, low: bool) -> int:
    """Memory in bytes of the head in a forward and backward pass, at its peak.

    Args:
        scored: tokens of the pass that are scored.
        vocabulary: rows of its weights.
        width: columns of its weights.
        trained: whether its weights get gradients.
        low: whether it computes in 16 bits.
    """
    logits = scored * vocabulary
    chunk = min(logits, _chunk_rows(vocabulary) * vocabulary)
    saved = logits if logits <= _SAVED_LOGITS else 0
    # Gradients and, in 16 bits, products and copies of weights and of logits.
    of_weights = vocabulary * width * (4 * trained + (2 * (1 + trained) if low else 0))
    return 4 * (saved + chunk) + 2 * low * chunk + of_weights + 8 * scored * width


def _chunk_rows(vocabulary: int) -> int:
    return max(_CHUNK_ROWS, _CHUNK_LOGITS // vocabulary)


class _HeadLogps(torch.autograd.Function):
    """Saves the hidden states and one number per token; the backward pass recomputes the logits, unless they are few
    enough to be saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: PlainHead,
        dtype: Any,
        backward: bool,
    ) -> Tensor:
        saved: list[Tensor] = []
        save = backward and len(targets) * len(weight) <= _SAVED_LOGITS
        with torch.autocast(hidden.device.type, enabled=False):
            buffers = _Buffers(hidden, weight, bias, head, dtype)
            logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            normalizers = torch.empty_like(logps)
            for rows in buffers.chunks():
                logits = buffers.logits(rows, buffers.new(rows) if save else buffers.scratch(rows))
                target_logits = logits.gather(1, targets[rows, None])[:, 0]
                if save:
                    saved.append(logits)
                _logsumexp(logits, buffers.scratch(rows), normalizers[rows])
                torch.sub(target_logits, normalizers[rows], out=logps[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, normalizers)
        ctx.head, ctx.dtype, ctx.saved = head, dtype, saved
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, bias, targets, normalizers = ctx.saved_tensors
        # Saved logits are changed in place: a second backward pass recomputes them.
        saved, ctx.saved = ctx.saved, []
        with torch.autocast(hidden.device.type, enabled=False):
            buffers = _Buffers(hidden, weight, bias, ctx.head, ctx.dtype)
            grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            grad_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            grad_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
            # Receives the product of a chunk, where it is not in float32 and cannot be accumulated in place.
            product = (
                None if grad_weight is None or ctx.dtype == grad_weight.dtype else torch.empty_like(buffers.weight)
            )
            for rows in buffers.chunks():
                logits = saved.pop(0) if saved else buffers.logits(rows, buffers.scratch(rows))
                grad_logits = buffers.gradient(logits, targets[rows], normalizers[rows], grads[0][rows])
                if grad_bias is not None:
                    grad_bias += grad_logits.sum(0)
                cast = buffers.cast(grad_logits, rows)
                if grad_hidden is not None:
                    grad_hidden[rows] = (cast @ buffers.weight).to(hidden.dtype)
                if grad_weight is not None and product is not None:
                    grad_weight += torch.mm(cast.t(), buffers.hidden[rows], out=product)
                elif grad_weight is not None:
                    grad_weight.addmm_(cast.t(), buffers.hidden[rows])
        params = (None if g is None else g.to(w.dtype) for g, w in ((grad_weight, weight), (grad_bias, bias)))
        return grad_hidden, *params, None, None, None, None


class _Buffers:
    """Hidden states and weights in the dtype of the matrix products, and scratch memory that all chunks share: memory
    fresh from the system costs more time than the computation in it.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: PlainHead, dtype: torch.dtype
    ) -> None:
        self.hidden, self.weight, self.bias, self.head = hidden.to(dtype), weight.to(dtype), bias, head
        self._scratch: dict[torch.dtype, Tensor] = {}

    def new(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Allocate memory [n, V] for a chunk."""
        return self.hidden.new_empty(rows.stop - rows.start, len(self.weight), dtype=dtype)

    def scratch(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return memory [n, V] for a chunk, reused from the previous chunk."""
        if dtype not in self._scratch:
            self._scratch[dtype] = self.new(max(self.chunks(), key=lambda chunk: chunk.stop - chunk.start), dtype)
        return self._scratch[dtype][: rows.stop - rows.start]

    def chunks(self) -> list[slice]:
        total, rows = len(self.hidden), _chunk_rows(len(self.weight))
        # Of similar size: a matrix product of few rows takes another code path, with other rounding.
        count = max(1, -(-total // rows))
        cuts = [total * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Compute logits [n, V] float32 into `out`."""
        hidden = self.hidden[rows]
        if hidden.dtype == out.dtype:
            logits = torch.mm(hidden, self.weight.t(), out=out)
        else:
            logits = out.copy_(torch.mm(hidden, self.weight.t(), out=self.scratch(rows, hidden.dtype)))
        if self.bias is not None:
            logits += self.bias
        if self.head.scale != 1.0:
            logits *= self.head.scale
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def gradient(self, logits: Tensor, targets: Tensor, normalizers: Tensor, grad: Tensor) -> Tensor:
        """Gradient [n, V] of the linear layer's output, from that of the log-probs [n]; overwrites the logits."""
        softcap = self.head.softcap
        slope = None if softcap is None else 1 - (logits / softcap).square_()
        # d log p(target) / d logits = onehot − softmax.
        result = logits.sub_(normalizers[:, None]).exp_().mul_(-grad[:, None])
        result.scatter_add_(1, targets[:, None], grad[:, None])
        if slope is not None:
            result *= slope
        return result.mul_(self.head.scale) if self.head.scale != 1.0 else result

    def cast(self, values: Tensor, rows: slice) -> Tensor:
        """Values [n, V] of a chunk in the dtype of the matrix products."""
        dtype = self.hidden.dtype
        return values if values.dtype == dtype else self.scratch(rows, dtype).copy_(values)


def _logsumexp(logits: Tensor, scratch: Tensor, out: Tensor) -> None:
    """Of logits [n, V] into `out` [n]; the scratch memory [n, V] may be the logits themselves."""
    largest = logits.amax(-1, keepdim=True)
    torch.sum(torch.sub(logits, largest, out=scratch).exp_(), -1, out=out).log_().add_(largest[:, 0])


def candidates(model: nn.Module) -> Iterator[PlainHead]:
    """Yield what the head of a causal LM may be, by its parts and configuration; the caller compares numbers.

    Model families use the same configuration name for a factor and for a divisor, so both are among them.
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if type(linear) is not nn.Linear:
        return
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    factors = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    scales = [scale for factor in factors if factor for scale in (float(factor), 1.0 / float(factor))]
    softcap = getattr(config, "final_logit_softcapping", None)
    for cap in dict.fromkeys([softcap, None]):
        yield from (PlainHead(linear, scale, cap) for scale in dict.fromkeys([*scales, 1.0]))
