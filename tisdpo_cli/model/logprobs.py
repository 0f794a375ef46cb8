"""Per-token log-probs of responses under a causal language model, and the KL divergence to a second model: the one
forward pass of all stages.

Knows the shape of a batch and how to apply a model's head at the scored positions only. Knows no pairs, losses, files
or devices. Legend: R rows, T positions, N scored tokens, n tokens of a chunk, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tisdpo_cli.model.adapters import adapters_of
from tisdpo_cli.model.batch import Batch, Group, collate
from tisdpo_cli.model.exact import in_float32
from tisdpo_cli.model.forward_parts import bypassing_body, replacing_input
from tisdpo_cli.model.head import candidates
from tisdpo_cli.model.last_layer import LastLayer, at_positions
from tisdpo_cli.model.packed_attention import LAYOUT
from tisdpo_cli.model.row_lengths import LengthRule, forget_lengths, length_rule

# Part of the key of cached log-probs: increase it with every change of this file, `packed_attention`,
# `varlen_attention`, `last_layer` or `head` that changes log-probs, even if only in their last bits.
REVISION = 4
# Logits of a chunk for each of two distributions: 32 MiB in float32. Matrix products get at least 64 rows.
_CHUNK_LOGITS, _CHUNK_ROWS = 2**23, 64


class ComparedLogps(NamedTuple):
    """Log-probs of tokens under a model and a reference, and the KL divergence at each; all [N] float32."""

    logps: Tensor
    ref_logps: Tensor
    kl: Tensor | None


class ScorerTraits(NamedTuple):
    """What a `TokenScorer` does because the numbers of its model allow it.

    Attributes:
        packed: whether batches are packed rows.
        last: whether the last layer is cut short.
        rule: which rows may share a forward pass.
        plain: number of the head's candidate that is used, or None.
    """

    packed: bool
    last: bool
    rule: LengthRule
    plain: int | None


class TokenScorer(nn.Module):
    """A causal language model that returns per-token log-probs; this is the module that DDP wraps, and what the root of
    FSDP2 holds.

    The model's own forward runs unchanged, but its head gets only the N positions that predict a scored token, in
    chunks: a hook takes the hidden states from its input. They go through `PlainHead` if the head is a linear layer
    with known scaling that reproduces the model's own logits, otherwise through the model's own head.

    There is no attention mask: rows are padded on the right, where causal attention never looks. Packed rows come with
    their `PackedLayout`, which the model's attention must support (`loading.use_packed_attention`).

    Args:
        model: transformers causal LM.
        autocast: dtype to compute in (torch.bfloat16), or None for that of the weights.
        packed: whether batches are packed rows.
        last: the model's last layer if it can run at the scored positions only, or None.
        rule: which rows may share a forward pass; by default that of the model's positions.
        plain: which of the head's `candidates` reproduces the model's logits, or None for none of them, if known.

    Attributes:
        adapter: the adapter of the model that is active when the scorer is made, or None: the one that it scores with,
            whatever is active later.
    """

    def __init__(
        self,
        model: nn.Module,
        autocast: torch.dtype | None = None,
        packed: bool = False,
        last: LastLayer | None = None,
        rule: LengthRule | None = None,
        plain: int | Literal["unknown"] | None = "unknown",
    ) -> None:
        super().__init__()
        self.rule = length_rule(model) if rule is None else rule
        self.model = model
        self.autocast_dtype = autocast
        self.packed = packed
        adapters = adapters_of(model)
        self.adapter = None if adapters is None else adapters.active
        self._last = last
        self._plain_number = self._find_plain_head() if plain == "unknown" else plain
        heads = () if self._plain_number is None else candidates(model)
        self._plain = next(islice(heads, self._plain_number, None), None)
        # In a tuple: the root holds the scorer, not the other way round.
        self._root: tuple[nn.Module, ...] = ()
        self._device: torch.device | None = None

    @property
    def root(self) -> nn.Module | None:
        """What a forward pass must go through if the weights are sharded, or None."""
        return self._root[0] if self._root else None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self._device or next(self.parameters()).device

    def run_in(self, root: nn.Module, device: torch.device) -> None:
        """Run in a root from now on, which calls it with what it is called with, and compute on a device."""
        self._root, self._device = (root,), device

    @property
    def traits(self) -> ScorerTraits:
        """What it does because the numbers allow it."""
        return ScorerTraits(self.packed, self._last is not None, self.rule, self._plain_number)

    def using_adapter(self) -> AbstractContextManager[object]:
        """Within this context, the adapter of this scorer is active."""
        adapters = adapters_of(self.model)
        return nullcontext() if adapters is None else adapters.using(self.adapter)

    @property
    def cut_short(self) -> dict[str, bool]:
        """Which parts of the model are computed in another way than its own code does, which changes the last bits."""
        return {"last_layer": self._last is not None, "plain_head": self._plain is not None}

    def forward(
        self, batch: Batch, reference: TokenScorer | None = None, divergence: str | None = None
    ) -> Tensor | ComparedLogps:
        """Return log-probs [N] float32 of the targets, or with a reference the result of `compare`."""
        with self._autocast(batch.input_ids.device):
            if reference is not None and divergence is not None:
                return self._compared(batch, reference, divergence)
            return self._logps(self._hidden(batch), batch.targets)

    def _logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        if self._plain is not None:
            return self._plain.logps(hidden, targets, self.autocast_dtype)
        chunks = zip(hidden.split(_CHUNK_ROWS), targets.split(_CHUNK_ROWS), strict=True)

        def chunk_logps(h: Tensor, target: Tensor) -> Tensor:
            return -F.cross_entropy(self._logits(h).float(), target, reduction="none")

        return torch.cat([_recomputed(chunk_logps, *chunk) for chunk in chunks])

    def _find_plain_head(self) -> int | None:
        """The number of the candidate that reproduces the model's own logits, or None."""
        for number, head in enumerate(candidates(self.model)):
            width, weight = head.linear.weight.shape[1], head.linear.weight
            probe = torch.linspace(-2, 2, 4 * width, device=weight.device).view(4, width).sin()
            with torch.no_grad(), in_float32(self.model):
                expected = self._logits(probe).float().log_softmax(-1)
                logps = head.logps(probe, expected.argmin(-1), None)
            if torch.allclose(logps, expected.min(-1).values, rtol=1e-5, atol=1e-5):
                return number
        return None

    def _compared(self, batch: Batch, reference: TokenScorer, divergence: str) -> ComparedLogps:
        """Compare both distributions in chunks, whose logits are recomputed in the backward pass.

        Memory holds one hidden state per position and model, never [N, V] logits.
        """
        assert reference.packed == self.packed, "a batch has one layout"
        hidden = self._hidden(batch)
        with torch.no_grad():
            ref_hidden = reference._hidden(batch)

        def compare_chunk(h: Tensor, ref_h: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logps = self._logits(h).float().log_softmax(-1)
            with torch.no_grad():
                ref_logps = reference._logits(ref_h).float().log_softmax(-1)
            kl = _kl(logps, ref_logps) if divergence == "policy||reference" else _kl(ref_logps, logps)
            own, other = (values.gather(1, target[:, None])[:, 0] for values in (logps, ref_logps))
            return own, other, kl

        vocabulary = self.model.config.get_text_config().vocab_size  # type: ignore[operator, union-attr]
        rows = max(_CHUNK_ROWS, _CHUNK_LOGITS // vocabulary)
        chunks = zip(hidden.split(rows), ref_hidden.split(rows), batch.targets.split(rows), strict=True)
        compared = [_recomputed(compare_chunk, *chunk) for chunk in chunks]
        return ComparedLogps(*(torch.cat(column) for column in zip(*compared, strict=True)))

    def _hidden(self, batch: Batch) -> Tensor:
        """Run the model up to its head and return the head's inputs [N, H] at the scored positions.

        Rows that must not share a forward pass get one each.
        """
        parts = self.rule.parts(batch) if self.rule.limits else []
        if not parts:
            return self._pass(batch)
        hidden = torch.cat([self._pass(part) for part, _ in parts])
        if batch.layout is not None:
            batch.layout.calls = min(part.layout.calls for part, _ in parts if part.layout is not None)
        return hidden.index_select(0, torch.cat([places for _, places in parts]).argsort())

    def _pass(self, batch: Batch) -> Tensor:
        if self.rule.limits:
            forget_lengths(self.model)
        captured: list[Tensor] = []
        last = self._last if self._last is not None and not self._last.recomputed else None

        def capture(hidden: Tensor) -> Tensor:
            captured.append(at_positions(hidden, batch.positions) if last is None else hidden[0])
            return hidden[:1, :1]

        kwargs = {} if batch.layout is None else {"position_ids": batch.position_ids, LAYOUT: batch.layout}
        scored_only = nullcontext() if last is None else last.at(batch.positions)
        with self.using_adapter(), scored_only, replacing_input(self._head(), capture):
            logits = self.model(input_ids=batch.input_ids, use_cache=False, **kwargs).logits
        return captured[0] if captured else at_positions(logits, batch.positions)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, V] by the model's own forward without its body: the head, and what the family does after it.

        If the body cannot be bypassed it runs on one token, and its output is not used.
        """
        if self._head() is None:
            return hidden  # `_hidden` could only capture the logits
        one_token = torch.zeros(1, 1, dtype=torch.int64, device=hidden.device)
        replaced = replacing_input(self._head(), lambda _: hidden[None])
        with self.using_adapter(), bypassing_body(self.model, hidden[None]), replaced:
            return self.model(input_ids=one_token, use_cache=False).logits.squeeze(0)

    def _head(self) -> nn.Module | None:
        return self.model.get_output_embeddings()  # type: ignore[operator]

    def _autocast(self, device: torch.device) -> AbstractContextManager[object]:
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(device.type, dtype=self.autocast_dtype)


# For a log-ratio d below this, expm1(−d) is useless: it overflows from 88 on.
_FAR = -30.0


def _kl(ours: Tensor, theirs: Tensor) -> Tensor:
    """KL(ours ‖ theirs) [n] in nats, from log-probs [n, V]."""
    p = ours.exp()
    d = (ours - theirs).masked_fill(p == 0, 0.0)
    # Σ (q − p) is 0 in value and in gradient, since both sum to 1: adding it keeps every term nonnegative, and accurate
    # where the two are close.
    close = d.clamp(min=_FAR)
    near, far = p * (torch.expm1(-close) + close), theirs.exp() - p + p * d
    return torch.where((d > _FAR) & (p > 0), near, far).sum(-1)


def _recomputed(function: Callable[..., Any], *inputs: Tensor) -> Any:
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def batch_for(scorer: nn.Module, groups: Sequence[Group], pad_id: int) -> Batch:
    """Collate a batch for a `TokenScorer`, or a module that wraps one, in its layout and on its device."""
    return collated_for(scorer, groups, pad_id).to(device_of(scorer))


def collated_for(scorer: nn.Module, groups: Sequence[Group], pad_id: int) -> Batch:
    """The same, in the memory of the CPU, from where a GPU can copy it without waiting."""
    batch = collate(groups, pad_id, _inner(scorer).packed)
    return batch.pinned() if device_of(scorer).type == "cuda" else batch


def device_of(scorer: nn.Module) -> torch.device:
    """Where a `TokenScorer`, or a module that wraps one, computes."""
    return _inner(scorer).device


def _inner(scorer: nn.Module) -> TokenScorer:
    inner = scorer if isinstance(scorer, TokenScorer) else scorer.module
    assert isinstance(inner, TokenScorer)
    return inner


def score(scorer: nn.Module, batch: Batch) -> Tensor:
    """Return log-probs [N] of a batch; `scorer` is a `TokenScorer` or a module that wraps one."""
    return _call(scorer, batch)


def _call(scorer: nn.Module, *args: Any) -> Any:
    root = scorer.root if isinstance(scorer, TokenScorer) else None
    if root is None:
        return scorer(*args)
    result = root(scorer, *args)
    if not torch.is_grad_enabled():
        # The backward pass gives gathered weights up. Without one they would stay: plain tensors without gradients,
        # of which updates take no notice, and which hide those of later updates from forward passes.
        for module in root.modules():
            getattr(module, "reshard", lambda: None)()
    return result


def compare(scorer: nn.Module, reference: TokenScorer, batch: Batch, divergence: str | None) -> ComparedLogps:
    """Compute log-probs of a batch under a model and, without gradient, under its reference.

    Args:
        scorer: a `TokenScorer` or a module that wraps one.
        reference: scorer of the reference model.
        batch: rows and scored tokens.
        divergence: `policy||reference` or `reference||policy` to compute that KL divergence over the whole vocabulary
            at each scored position, in nats, with gradient through the model; None for none.
    """
    if divergence is not None:
        return _call(scorer, batch, reference, divergence)
    logps = score(scorer, batch)
    with torch.no_grad():
        return ComparedLogps(logps, score(reference, batch), None)
