"""Per-token log-probs of responses under a causal language model, and its KL divergence to another one there: the
one forward pass of every stage.

Knows the shape of a batch and how to read a model's head at the scored positions only; it knows nothing of
pairs, losses, files or devices. Legend: R rows, T positions, N scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# Logits that two distributions may hold at once, each: 32 MiB in float32. Matrix products keep 64 rows at least.
_CHUNK_LOGITS, _CHUNK_ROWS = 2**23, 64


@dataclass(frozen=True)
class Batch:
    """Rows of prompt + response, padded on the right, and the response tokens to score.

    Attributes:
        input_ids: [R, T] int64.
        positions: [N] int64 into the flattened [R · T] rows: the position that predicts each scored token.
        targets: [N] int64, the scored tokens.
        owner: [N] int64, the row of each.
        real_tokens: tokens that are not padding, for throughput.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    real_tokens: int

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        return Batch(
            self.input_ids.to(device, non_blocking=True),
            self.positions.to(device, non_blocking=True),
            self.targets.to(device, non_blocking=True),
            self.owner.to(device, non_blocking=True),
            self.real_tokens,
        )


def collate(rows: Sequence[tuple[Sequence[int], Sequence[int]]], pad_id: int) -> Batch:
    """Make a batch of (prompt ids, response ids) rows; padding is known by length, never by id.

    Raises:
        ValueError: a prompt without a token: its response's first token would have nothing to be predicted from.
    """
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions, targets, owner = [], [], []
    for r, (prompt, response) in enumerate(rows):
        if not prompt:
            raise ValueError("a response can be scored only after at least one prompt token")
        length = len(prompt) + len(response)
        input_ids[r, :length] = torch.tensor([*prompt, *response])
        first = r * width + len(prompt) - 1
        positions.append(torch.arange(first, first + len(response)))
        targets.append(torch.tensor(response, dtype=torch.int64))
        owner.append(torch.full((len(response),), r))
    real = sum(len(prompt) + len(response) for prompt, response in rows)
    return Batch(input_ids, torch.cat(positions), torch.cat(targets), torch.cat(owner), real)


class Compared(NamedTuple):
    """Log-probs of tokens under a model and a reference, and the KL divergence at their positions; all [N] float32."""

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor | None


class TokenScorer(nn.Module):
    """A causal language model that returns per-token log-probs; this is what DDP wraps.

    The model's own forward runs unchanged, but its head sees only the N positions that predict a scored token:
    a hook narrows the hidden states on their way in. Bias, scaling and soft-capping of the family's head so
    stay the model's business.

    No attention mask is passed: rows are padded on the right, where causal attention never looks.

    Args:
        model: a transformers causal LM.
        autocast: the dtype to compute in (torch.bfloat16), or None for the weights' own.
    """

    def __init__(self, model: nn.Module, autocast: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.autocast_dtype = autocast

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor,
        reference: TokenScorer | None = None,
        divergence: str | None = None,
    ) -> Tensor | Compared:
        """Log-probs [N] float32 of `targets`; with a reference, what `compare` gives. Shapes as in `Batch`."""
        with self._autocast(input_ids.device):
            if reference is not None and divergence is not None:
                return self._compared(input_ids, positions, targets, reference, divergence)
            logits = self._logits(input_ids, positions)
        return -F.cross_entropy(logits.float(), targets, reduction="none")

    def _logits(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """Logits [N, V] at the scored positions."""
        head, narrowed = self._head(), False

        def narrow(hidden: Tensor) -> Tensor:
            nonlocal narrowed
            narrowed = True
            return _at(hidden, positions).unsqueeze(0)

        with _input_replaced(head, narrow):
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        return logits.squeeze(0) if narrowed else _at(logits, positions)

    def _compared(
        self, input_ids: Tensor, positions: Tensor, targets: Tensor, reference: TokenScorer, divergence: str
    ) -> Compared:
        """Both distributions, some positions at a time; their logits are made again in the backward pass.

        What is held is one hidden state per position and model, never [N, V] logits.
        """
        hidden = self._hidden(input_ids, positions)
        with torch.no_grad():
            ref_hidden = reference._hidden(input_ids, positions)

        def of_chunk(h: Tensor, ref_h: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logps = self._from_hidden(h).float().log_softmax(-1)
            with torch.no_grad():
                ref_logps = reference._from_hidden(ref_h).float().log_softmax(-1)
            ours, theirs = (logps, ref_logps) if divergence == "policy||reference" else (ref_logps, logps)
            # expm1(−d) + d is never negative, and keeps its digits where the two are close; Σ p expm1(−d) is 0 in
            # value and in gradient, for both sum to 1.
            d = ours - theirs
            kl = (ours.exp() * (torch.expm1(-d) + d)).sum(-1)
            own, other = (of.gather(1, chosen[:, None])[:, 0] for of in (logps, ref_logps))
            return own, other, kl

        vocabulary = self.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        rows = max(_CHUNK_ROWS, _CHUNK_LOGITS // vocabulary)
        chunks = zip(hidden.split(rows), ref_hidden.split(rows), targets.split(rows), strict=True)
        made = [checkpoint(of_chunk, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks]
        return Compared(*(torch.cat(column) for column in zip(*made, strict=True)))

    def _hidden(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        """What the head is applied to at the scored positions, [N, H]."""
        kept: list[Tensor] = []

        def keep(hidden: Tensor) -> Tensor:
            kept.append(_at(hidden, positions))
            return hidden[:1, :1]

        with _input_replaced(self._head(), keep):
            logits = self.model(input_ids=input_ids, use_cache=False).logits
        return kept[0] if kept else _at(logits, positions)

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


def _at(hidden: Tensor, positions: Tensor) -> Tensor:
    # index_select, not indexing: the backward of indexing is not deterministic on several threads.
    return hidden.flatten(0, 1).index_select(0, positions)


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


def score(scorer: nn.Module, batch: Batch) -> Tensor:
    """Log-probs [N] of a batch; `scorer` is a `TokenScorer` or what wraps it."""
    return scorer(batch.input_ids, batch.positions, batch.targets)


def compare(scorer: nn.Module, reference: TokenScorer, batch: Batch, divergence: str | None) -> Compared:
    """Log-probs of a batch under a model and, without gradient, under its reference.

    Args:
        scorer: a `TokenScorer` or what wraps it.
        reference: the reference.
        batch: the rows.
        divergence: `policy||reference` or `reference||policy` for that KL divergence over the whole vocabulary at
            each scored position, in nats, with gradient through the model; None for none.
    """
    if divergence is not None:
        return scorer(batch.input_ids, batch.positions, batch.targets, reference, divergence)
    logps = score(scorer, batch)
    with torch.no_grad():
        return Compared(logps, score(reference, batch), None)
