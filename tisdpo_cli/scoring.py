"""Per-token log-probs of responses under a causal language model, and its KL divergence to another one there: the
one forward pass of every stage.

Knows the shape of a batch and how to read a model's head at the scored positions only; it knows nothing of
pairs, losses, files or devices. Legend: R rows, T positions, N scored tokens, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tisdpo_cli.attention import GROUPS, Groups, packed_positions
from tisdpo_cli.head import PlainHead, candidates
from tisdpo_cli.last_layer import LastLayer, at_positions

# Part of the key of kept log-probs: raise it with every change of this file, `attention`, `flash`, `last_layer` or
# `head` that moves log-probs, if only by their last bits.
REVISION = 3
# Logits that two distributions may hold at once, each: 32 MiB in float32. Matrix products keep 64 rows at least.
_CHUNK_LOGITS, _CHUNK_ROWS = 2**23, 64


@dataclass(frozen=True)
class Batch:
    """Prompts and responses as the model reads them, and the response tokens to score.

    The scored tokens come response after response: all first responses in the order of their prompts, then all second
    ones; `owner` numbers the responses in that order.

    Attributes:
        input_ids: [R, T] int64, padded on the right; [1, T] where packed.
        positions: [N] int64 into the flattened [R · T] rows: the position that predicts each scored token.
        targets: [N] int64, the scored tokens.
        owner: [N] int64, the response of each.
        real_tokens: tokens that are not padding, for throughput.
        position_ids: [1, T] int64 where packed.
        groups: what stands where in a packed row.
    """

    input_ids: Tensor
    positions: Tensor
    targets: Tensor
    owner: Tensor
    real_tokens: int
    position_ids: Tensor | None = None
    groups: Groups | None = None

    def to(self, device: torch.device) -> Batch:
        """The same on another device."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
        return replace(self, **moved)


# A prompt and its responses.
Group = tuple[Sequence[int], Sequence[Sequence[int]]]


def collate(groups: Sequence[Group], pad_id: int, packed: bool) -> Batch:
    """Make a batch of prompts with equally many responses each.

    Args:
        groups: (prompt ids, ids of its responses).
        pad_id: fills rows of their own; padding is known by length, never by id.
        packed: whether all stand in one row without padding, each prompt once; else every response has a row of its
            own, behind its prompt.

    Raises:
        ValueError: a prompt without a token: its response's first token would have nothing to be predicted from.
    """
    if not all(prompt for prompt, _ in groups):
        raise ValueError("a response can be scored only after at least one prompt token")
    return _packed(groups) if packed else _rows(groups, pad_id)


def _rows(groups: Sequence[Group], pad_id: int) -> Batch:
    rows = [(prompt, response) for column in _columns(groups) for prompt, response in column]
    width = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    positions = []
    for r, (prompt, response) in enumerate(rows):
        length = len(prompt) + len(response)
        input_ids[r, :length] = torch.tensor([*prompt, *response])
        first = r * width + len(prompt) - 1
        positions.append(torch.arange(first, first + len(response)))
    real = sum(len(prompt) + len(response) for prompt, response in rows)
    return Batch(input_ids, torch.cat(positions), *_targets(groups), real)


def _packed(groups: Sequence[Group]) -> Batch:
    lengths = tuple((len(prompt), tuple(map(len, responses))) for prompt, responses in groups)
    ids = [at for prompt, responses in groups for part in (prompt, *responses) for at in part]
    # By place among the responses of its prompt: the positions that predict a response's tokens.
    predicting: list[list[Tensor]] = [[] for _ in lengths[0][1]]
    begin = 0
    for prompt, responses in lengths:
        last, begin = begin + prompt - 1, begin + prompt
        for column, length in zip(predicting, responses, strict=True):
            before = torch.arange(begin - 1, begin + length - 1)
            before[:1] = last
            column.append(before)
            begin += length
    return Batch(
        torch.tensor([ids]),
        torch.cat([positions for column in predicting for positions in column]),
        *_targets(groups),
        len(ids),
        packed_positions(lengths)[None],
        Groups(lengths),
    )


def _columns(groups: Sequence[Group]) -> list[list[tuple[Sequence[int], Sequence[int]]]]:
    """(prompt, response) of all first responses, of all second ones, and so on."""
    return [[(prompt, responses[k]) for prompt, responses in groups] for k in range(len(groups[0][1]))]


def _targets(groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    responses = [response for column in _columns(groups) for _, response in column]
    targets = torch.tensor([at for response in responses for at in response], dtype=torch.int64)
    lengths = torch.tensor([len(response) for response in responses])
    return targets, torch.arange(len(responses)).repeat_interleave(lengths)


class Compared(NamedTuple):
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
    their groups, which the attention of the model must know (`models.attend_in_groups`).

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
    ) -> Tensor | Compared:
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

        return torch.cat([_made_again(of_chunk, *part) for part in parts])

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

    def _compared(self, batch: Batch, reference: TokenScorer, divergence: str) -> Compared:
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
        made = [_made_again(of_chunk, *chunk) for chunk in chunks]
        return Compared(*(torch.cat(column) for column in zip(*made, strict=True)))

    def _hidden(self, batch: Batch) -> Tensor:
        """What the head is applied to at the scored positions, [N, H]."""
        kept: list[Tensor] = []
        last = self._last if self._last is not None and not self._last.made_again else None

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


def _made_again(function: Callable[..., Any], *inputs: Tensor) -> Any:
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


def lay_out(scorer: nn.Module, groups: Sequence[Group], pad_id: int) -> Batch:
    """Make a batch in the layout that a `TokenScorer`, or what wraps it, reads, on its device. See `collate`."""
    inner = scorer if isinstance(scorer, TokenScorer) else scorer.module
    assert isinstance(inner, TokenScorer)
    return collate(groups, pad_id, inner.packed).to(next(inner.parameters()).device)


def score(scorer: nn.Module, batch: Batch) -> Tensor:
    """Log-probs [N] of a batch; `scorer` is a `TokenScorer` or what wraps it."""
    return scorer(batch)


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
        return scorer(batch, reference, divergence)
    logps = score(scorer, batch)
    with torch.no_grad():
        return Compared(logps, score(reference, batch), None)
