"""The language model's head at the scored positions, in chunks: logits of all of them are never held at once.

Pure torch. Legend: N scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

# Logits made at once, and the fewest rows of a chunk: each one costs a pass over the weights' gradient. With a small
# vocabulary they take 24 MiB in float32: from 32 MiB on, C libraries ask the system for fresh pages every time.
_CHUNK_LOGITS, _CHUNK_ROWS = 3 * 2**21, 256
# Logits of all chunks that are kept for the backward pass instead of being made again.
_KEPT_LOGITS = 2**24


@dataclass(frozen=True)
class PlainHead:
    """A head that is a linear layer, and what the family does to its logits after.

    Attributes:
        linear: weights [V, H], and a bias [V] or None.
        scale: the logits are multiplied by it.
        softcap: c, where logits z become c · tanh(z / c).
    """

    linear: nn.Linear
    scale: float = 1.0
    softcap: float | None = None

    def logps(self, hidden: Tensor, targets: Tensor, dtype: torch.dtype | None) -> Tensor:
        """Log-probs [N] float32 of targets [N] from hidden states [N, H].

        Args:
            hidden: what the head is applied to.
            targets: the tokens.
            dtype: what the matrix products are computed in; that of the weights where None.
        """
        dtype = dtype or self.linear.weight.dtype
        weight, bias = self.linear.weight, self.linear.bias
        backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _HeadLogps.apply(hidden, weight, bias, targets, self, dtype, backward)


class _HeadLogps(torch.autograd.Function):
    """Keeps the hidden states and one number a token; logits are made again in the backward pass, unless there are so
    few that they can stay.
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
        kept: list[Tensor] = []
        stay = backward and len(targets) * len(weight) <= _KEPT_LOGITS
        with torch.autocast(hidden.device.type, enabled=False):
            used = _Used(hidden, weight, bias, head, dtype)
            logps = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
            normalisers = torch.empty_like(logps)
            for rows in used.chunks():
                logits = used.logits(rows, used.fresh(rows) if stay else used.room(rows))
                of_targets = logits.gather(1, targets[rows, None])[:, 0]
                if stay:
                    kept.append(logits)
                _logsumexp(logits, used.room(rows), normalisers[rows])
                torch.sub(of_targets, normalisers[rows], out=logps[rows])
        ctx.save_for_backward(hidden, weight, bias, targets, normalisers)
        ctx.head, ctx.dtype, ctx.kept = head, dtype, kept
        return logps

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        # They are changed in place: a second backward pass makes them again.
        kept, ctx.kept = ctx.kept, []
        with torch.autocast(hidden.device.type, enabled=False):
            used = _Used(hidden, weight, bias, ctx.head, ctx.dtype)
            of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
            of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
            of_bias = torch.zeros_like(bias, dtype=torch.float32) if bias is not None else None
            of_chunk = None if of_weight is None or ctx.dtype == of_weight.dtype else torch.empty_like(used.weight)
            for rows in used.chunks():
                logits = kept.pop(0) if kept else used.logits(rows, used.room(rows))
                of_logits = used.gradient(logits, targets[rows], normalisers[rows], grads[0][rows])
                if of_bias is not None:
                    of_bias += of_logits.sum(0)
                low = of_logits if of_logits.dtype == ctx.dtype else used.room(rows, ctx.dtype).copy_(of_logits)
                if of_hidden is not None:
                    of_hidden[rows] = (low @ used.weight).to(hidden.dtype)
                if of_weight is not None and of_chunk is not None:
                    of_weight += torch.mm(low.t(), used.hidden[rows], out=of_chunk)
                elif of_weight is not None:
                    of_weight.addmm_(low.t(), used.hidden[rows])
        cast = (None if g is None else g.to(w.dtype) for g, w in ((of_weight, weight), (of_bias, bias)))
        return of_hidden, *cast, None, None, None, None


class _Used:
    """Hidden states and weights in the dtype of the products, and room for the numbers of one chunk, which all chunks
    share: memory fresh from the system costs more than what is computed in it.
    """

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, head: PlainHead, dtype: torch.dtype
    ) -> None:
        self.hidden, self.weight, self.bias, self.head = hidden.to(dtype), weight.to(dtype), bias, head
        self._rooms: dict[torch.dtype, Tensor] = {}

    def fresh(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory [n, V] for a chunk."""
        return self.hidden.new_empty(rows.stop - rows.start, len(self.weight), dtype=dtype)

    def room(self, rows: slice, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory [n, V] for a chunk: that of the chunk before it."""
        if dtype not in self._rooms:
            self._rooms[dtype] = self.fresh(max(self.chunks(), key=lambda some: some.stop - some.start), dtype)
        return self._rooms[dtype][: rows.stop - rows.start]

    def chunks(self) -> list[slice]:
        total, rows = len(self.hidden), max(_CHUNK_ROWS, _CHUNK_LOGITS // len(self.weight))
        # Of like size: a matrix product of few rows takes another path, and other rounding.
        count = max(1, -(-total // rows))
        cuts = [total * i // count for i in range(count + 1)]
        return [slice(a, b) for a, b in pairwise(cuts)]

    def logits(self, rows: slice, out: Tensor) -> Tensor:
        """Logits [n, V] float32."""
        hidden = self.hidden[rows]
        if hidden.dtype == out.dtype:
            logits = torch.mm(hidden, self.weight.t(), out=out)
        else:
            logits = out.copy_(torch.mm(hidden, self.weight.t(), out=self.room(rows, hidden.dtype)))
        if self.bias is not None:
            logits += self.bias
        if self.head.scale != 1.0:
            logits *= self.head.scale
        if self.head.softcap is not None:
            logits.div_(self.head.softcap).tanh_().mul_(self.head.softcap)
        return logits

    def gradient(self, logits: Tensor, targets: Tensor, normalisers: Tensor, grad: Tensor) -> Tensor:
        """Gradient [n, V] of what the linear layer gives, from that of the log-probs [n]; in place of the logits."""
        softcap = self.head.softcap
        slope = None if softcap is None else 1 - (logits / softcap).square_()
        # d log p(target) / d logits = onehot − softmax.
        made = logits.sub_(normalisers[:, None]).exp_().mul_(-grad[:, None])
        made.scatter_add_(1, targets[:, None], grad[:, None])
        if slope is not None:
            made *= slope
        return made.mul_(self.head.scale) if self.head.scale != 1.0 else made


def _logsumexp(logits: Tensor, room: Tensor, out: Tensor) -> None:
    """Of logits [n, V] into [n]; the room, of their size, may be their own."""
    largest = logits.amax(-1, keepdim=True)
    torch.sum(torch.sub(logits, largest, out=room).exp_(), -1, out=out).log_().add_(largest[:, 0])


def candidates(model: nn.Module) -> Iterator[PlainHead]:
    """What the head of a causal LM may be, by its parts and configuration; numbers must decide which it is.

    Families give one name to a factor and to a divisor, so both are among them.
    """
    linear = model.get_output_embeddings()  # type: ignore[operator]
    if type(linear) is not nn.Linear:
        return
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    named = (getattr(config, name, None) for name in ("logit_scale", "logits_scaling", "lm_head_multiplier"))
    scales = [scale for given in named if given for scale in (float(given), 1.0 / float(given))]
    softcap = getattr(config, "final_logit_softcapping", None)
    for cap in dict.fromkeys([softcap, None]):
        yield from (PlainHead(linear, scale, cap) for scale in dict.fromkeys([*scales, 1.0]))
