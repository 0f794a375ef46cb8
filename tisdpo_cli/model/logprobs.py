"""Per-token log-probs of responses under a causal language model, and its KL divergence to another one there: the
one forward pass of every stage.

Knows the shape of a batch and how to read a model's head at the scored positions only; it knows nothing of
pairs, losses, files or devices. Legend: R rows, T positions, N scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tisdpo_cli.model.batch import Batch, Group, collate
from tisdpo_cli.model.head import PlainHead, candidates
from tisdpo_cli.model.last_layer import LastLayer, at_positions
from tisdpo_cli.model.packed_attention import GROUPS

# Part of the key of kept log-probs: raise it with every change of this file, `attention`, `flash`, `last_layer` or
# `head` that moves log-probs, if only by their last bits.
REVISION = 3
# Logits that two distributions may hold at once, each: 32 MiB in float32. Matrix products keep 64 rows at least.
_CHUNK_LOGITS, _CHUNK_ROWS = 2**23, 64


class ComparedLogps(NamedTuple):
    """Log-probs of tokens under a model and a reference, and the KL divergence at their positions; all [N] float32."""

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor | None


class TokenScorer(nn.Module):
    """A causal language model that returns per-token log-probs; this is what DDP wraps.

    The model's own forward runs unchanged, but its head sees only the N positions that predict a scored token, some
    at a time: a hook takes the hidden states on their way in. Where the head is a linear layer and what follows it is
    known and agrees with the model's own logits, they go through `PlainHead`; otherwise through the model's own head.

    No attention mask is passed: rows are padded on the right, where causal attention never looks; packed rows come with
    their groups, which the attention of the model must know (`models.use_packed_attention`).

    Args:
        model: a transformers causal LM.
        autocast: the dtype to compute in (torch.bfloat16), or None for the weights' own.
        packed: whether the model reads packed rows.
        last: the last layer of the model where it may go on with the scored positions alone, or None.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        packed: bool = False,
        last: LastLayer | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast
        self.packed = packed
        self._last = last
        self._plain = self._plain_head()

    def forward(
        self, batch: Batch, reference: TokenScorer | None = None, divergence: str | None = None
    ) -> Tensor | ComparedLogps:
        """Log-probs [N] float32 of the targets; with a reference, what `compare` gives."""
        with self._autocast(batch.input_ids.device):
            if reference is not None and divergence is not None:
                return self._compared(batch, reference, divergence)
            return self._logps(self._hidden(batch), batch.targets)

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self._plain is not None:
            return self._plain.logps(hidden, targets, self.autocast_dtype)
        parts = zip(hidden.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True)

        def of_chunk(h: Tensor, chosen: Tensor) -> Tensor:
            return -F.cross_entropy(self._from_hidden(h).float(), chosen, reduction="none")

        return torch.cat([_recomputed(of_chunk, *part) for part in parts])

    def _plain_head(self) -> PlainHead | None:
        """The head by its parts, where these give the model's own logits."""
        for head in candidates(self.model):
            width, weight = head.linear.weight.shape[1], head.linear.weight
            probe = torch.linspace(-2, 2, 4 * width, device=weight.device, dtype=weight.dtype).view(4, width).sin()
            with torch.no_grad():
                wanted = self._from_hidden(probe).float().log_softmax(-1)
                found = head.logps(probe, wanted.argmin(-1), None)
            if torch.allclose(found, wanted.min(-1).values, rtol=1e-5, atol=1e-5):
                return head
        return None

    def _compared(self, batch: Batch, reference: TokenScorer, divergence: str) -> ComparedLogps:
        """Both distributions, some positions at a time; their logits are made again in the backward pass.

        What is held is one hidden state per position and model, never [N, V] logits.
        """
        assert reference.packed == self.packed, "a batch has one layout"
        hidden = self._hidden(batch)
        with torch.no_grad():
            ref_hidden = reference._hidden(batch)

        def of_chunk(h: Tensor, ref_h: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logps = self._from_hidden(h).float().log_softmax(-1)
            with torch.no_grad():
                ref_logps = reference._from_hidden(ref_h).float().log_softmax(-1)
            kl = _kl(logps, ref_logps) if divergence == "policy||reference" else _kl(ref_logps, logps)
            own, other = (of.gather(1, chosen[:, None])[:, 0] for of in (logps, ref_logps))
            return own, other, kl

        vocabulary = self.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        rows = max(_CHUNK_ROWS, _CHUNK_LOGITS // vocabulary)
        chunks = zip(hidden.split(rows), ref_hidden.split(rows), batch.targets.split(rows), strict=True)
        made = [_recomputed(of_chunk, *chunk) for chunk in chunks]
        return ComparedLogps(*(torch.cat(column) for column in zip(*made, strict=True)))

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head is applied to at the scored positions, [N, H]."""
        kept: list[Tensor] = []
        last = self._last if self._last is not None and not self._last.recomputed else None

        def keep(hidden: Tensor) -> Tensor:
            kept.append(at_positions(hidden, batch.positions) if last is None else hidden[0])
            return hidden[:1, :1]

        more = {} if batch.groups is None else {"position_ids": batch.position_ids, GROUPS: batch.groups}
        chosen = nullcontext() if last is None else last.at(batch.positions)
        with chosen, _input_replaced(self._head(), keep):
            logits = self.model(input_ids=batch.input_ids, use_cache=False, **more).logits
        return kept[0] if kept else at_positions(logits, batch.positions)

    def _from_hidden(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] by the model's own forward with its body left out: the head, and what the family does after.

        Where the body cannot be left out it runs on one token, and nothing of it is used.
        """
        if self._head() is None:
            return hidden  # `_hidden` could only take the logits
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        with _body_left_out(self.model, hidden[None]), _input_replaced(self._head(), lambda _: hidden[None]):
            return self.model(input_ids=one_token, use_cache=False).logits.squeeze(0)

    def _head(self) -> nn.Module | None:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


# Beyond this ratio of log-probs, expm1 of it is no use: it ends at 88.
_FAR = -30.0


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours ‖ theirs) [n] in nats, of log-probs [n, V]."""
    p = ours.exp()
    d = (ours - theirs).masked_fill(p == 0, 0.0)
    # Σ (q − p) is 0 in value and in gradient, for both sum to 1: with it every term stays above 0, and keeps its digits
    # where the two are close.
    close = d.clamp(min=_FAR)
    near, far = p * (torch.expm1(-close) + close), theirs.exp() - p + p * d
    return torch.where((d > _FAR) & (p > 0), near, far).sum(-1)


def _recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


@contextmanager
def _input_replaced(head: nn.Module | None, by: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While this lasts, the head is given something else than what the model hands to it."""
    if head is None:
        yield
        return
    handle = head.register_forward_pre_hook(lambda _head, inputs: (by(inputs[0]), *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


class _BodyOutput:
    """What a transformers body returns, with nothing in it but the last hidden state."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, _name: str) -> None:
        return None

    def __getitem__(self, index: int | slice) -> object:
        return (self.last_hidden_state,)[index]


@contextmanager
def _body_left_out(model: nn.Module, hidden: Tensor) -> Iterator[None]:
    """While this lasts, the model's body gives `hidden` [1, n, H] at once."""
    body = model.get_decoder()  # type: ignore[operator]
    if body is model:
        yield
        return
    of_its_own = body.__dict__.get("forward")  # accelerate and others put one on the instance
    body.forward = lambda *_args, **_kwargs: _BodyOutput(hidden)
    try:
        yield
    finally:
        del body.forward
        if of_its_own is not None:
            body.forward = of_its_own


def batch_for(scorer: nn.Module, groups: Sequence[Group], pad_id: int) -> Batch:
    """Make a batch in the layout that a `TokenScorer`, or what wraps it, reads, on its device. See `collate`."""
    inner = scorer if isinstance(scorer, TokenScorer) else scorer.module
    assert isinstance(inner, TokenScorer)
    return collate(groups, pad_id, inner.packed).to(next(inner.parameters()).device)


def score(scorer: nn.Module, batch: Batch) -> Tensor:
    """Log-probs [N] of a batch; `scorer` is a `TokenScorer` or what wraps it."""
    return scorer(batch)


def compare(scorer: nn.Module, reference: TokenScorer, batch: Batch, divergence: str | None) -> ComparedLogps:
    """Log-probs of a batch under a model and, without gradient, under its reference.

    Args:
        scorer: a `TokenScorer` or what wraps it.
        reference: the reference.
        batch: the rows.
        divergence: `policy||reference` or `reference||policy` for that KL divergence over the whole vocabulary at
            each scored position, in nats, with gradient through the model; None for none.
    """
    if divergence is not None:
        return scorer(batch, reference, divergence)
    logps = score(scorer, batch)
    with torch.no_grad():
        return ComparedLogps(logps, score(reference, batch), None)
