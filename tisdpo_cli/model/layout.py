"""How rows are laid out for a model: packed with shared prompts where it provably computes the same, else apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.last_layer import LastLayer
from tisdpo_cli.model.loading import restore_attention, use_packed_attention
from tisdpo_cli.model.logprobs import TokenScorer

_Groups = list[tuple[list[int], list[list[int]]]]
# In float32 two layouts of the same tokens differ by rounding alone, in nats per token.
_TOLERANCE = 1e-4
_SHORTEST, _SHORT = 8, 32
# Where a configuration says from which length on attention or positions are others: windows, chunks, some ropes.
_LIMITS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")


def make_scorer(
    model: nn.Module, layout: str, autocast: torch.dtype | None, longest: int, note: Callable[[str], None], name: str
) -> TokenScorer:
    """A scorer in the layout that is asked for, or in the one that the model can do.

    Args:
        model: on its device.
        layout: `auto`, `shared-prefix` or `separate`.
        autocast: the dtype to compute in, or None.
        longest: tokens of the longest row that it will read.
        note: is called with the reason where rows are separate.
        name: what to call the model.

    Raises:
        ModelError: `shared-prefix` is asked for and the model computes something else there.
    """
    restore_attention(model)
    last, why = _sharing(model, longest) if layout != "separate" else (None, None)
    if why is not None:
        if layout == "shared-prefix":
            raise ModelError(f"cannot share prompts: {why}", where=name, fix="use --layout auto")
        note(f"{name}: every response is read in a row of its own, for {why}")
    shared = layout != "separate" and why is None
    if shared:
        use_packed_attention(model)
    return TokenScorer(model, autocast, packed=shared, last=last)


@torch.inference_mode()
def _sharing(model: nn.Module, longest: int) -> tuple[LastLayer | None, str | None]:
    """The last layer of a model where it can be cut short, and why its rows cannot be packed, or None."""
    groups = _probe(model.config.get_text_config(), longest)  # type: ignore[operator, union-attr]
    apart = _logps(TokenScorer(model), groups, packed=False)
    try:
        last = LastLayer(model)
    except ValueError:
        last = None
    if last is not None and _cannot_share(model, groups, apart, last) is None:
        return last, None
    return None, _cannot_share(model, groups, apart, None)


def _cannot_share(model: nn.Module, groups: _Groups, apart: Tensor, last: LastLayer | None) -> str | None:
    """Why packed rows give something else than rows of their own under a model, or None. By numbers, not by name.

    Args:
        model: the model.
        groups: to compare by.
        apart: log-probs [N] of their responses in rows of their own.
        last: its last layer, to be cut short, or None.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    try:
        use_packed_attention(model)
        scorer = TokenScorer(model, packed=True, last=last)
        batch = collate(groups, 0, packed=True).to(_device(model))
        shared = scorer(batch)
        assert batch.groups is not None
        calls = batch.groups.calls
        # Other tokens of the chosen response, of both: no rejected response may see them.
        flipped = [
            (prompt, [[(t + 1) % _ids(config) for t in chosen], rejected]) for prompt, (chosen, rejected) in groups
        ]
        others = _logps(scorer, flipped, packed=True)
    except Exception as fault:
        return f"its code cannot read packed rows ({type(fault).__name__})"
    finally:
        restore_attention(model)
    if calls != config.num_hidden_layers:
        return "not every layer of it attends by groups"
    rejected = batch.response_ids >= len(groups)
    if not torch.equal(shared[rejected], others[rejected]):
        return "a response would see another one"
    worst = float((shared - apart).abs().max())
    return None if worst <= _TOLERANCE else f"packed rows would be off by {worst:.1e} nats"


def _probe(config: Any, longest: int) -> _Groups:
    """Two pairs of arbitrary tokens, as long as real rows are where a model changes its ways with the length."""
    ropes = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, name, None) for name in _LIMITS] + [ropes.get(name) for name in _LIMITS]
    late = any(isinstance(limit, int) and limit < longest for limit in limits)
    length = max(_SHORTEST, longest if late else min(longest, _SHORT))
    generator = torch.Generator().manual_seed(0)

    def some(count: int) -> list[int]:
        return torch.randint(_ids(config), (count,), generator=generator).tolist()

    half = length // 2
    return [(some(half), [some(length - half), some(3)]), (some(2), [some(3), some(length - 2)])]


def _ids(config: Any) -> int:
    return int(config.vocab_size)


def _logps(scorer: TokenScorer, groups: _Groups, packed: bool) -> Tensor:
    return scorer(collate(groups, 0, packed).to(_device(scorer.model)))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
