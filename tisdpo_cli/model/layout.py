"""Chooses the row layout of a model: packed rows with shared prompts if it computes the same with them, else separate
rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError, is_out_of_memory
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.exact import in_float32
from tisdpo_cli.model.last_layer import LastLayer
from tisdpo_cli.model.loading import restore_attention, take_notes, use_packed_attention
from tisdpo_cli.model.logprobs import ScorerTraits, TokenScorer, score
from tisdpo_cli.model.lookahead import refuse_lookahead
from tisdpo_cli.model.row_lengths import EQUAL_LENGTHS, LengthRule, length_rule

_Groups = list[tuple[list[int], list[list[int]]]]
# In nats per token: in float32 two layouts of the same tokens differ by rounding only.
_TOLERANCE = 1e-4
# Tokens of the rows to compare by, unless the model depends on length: at least and at most.
_SHORTEST, _SHORT = 8, 32
# Configuration entries with a length from which attention or positions change: windows, chunks, some rope scalings.
_LENGTH_LIMITS = ("sliding_window", "attention_chunk_size", "original_max_position_embeddings")


def make_scorer(
    model: nn.Module, layout: str, autocast: torch.dtype | None, longest: int, note: Callable[[str], None], name: str
) -> TokenScorer:
    """Create a scorer of a model in a layout that the model supports.

    Args:
        model: model on its device.
        layout: `auto`, `shared-prefix` or `separate`.
        autocast: dtype to compute in, or None.
        longest: tokens of the longest row that the model will get.
        note: called with what was found while loading the model, and if `auto` falls back to separate rows.
        name: name of the model in messages.

    Raises:
        ModelError: the model is not causal, its rows depend on each other, or the layout is `shared-prefix` and the
            model computes something else with it.
    """
    for text in take_notes(model):
        note(f"{name}: {text}")
    restore_attention(model)
    with in_float32(model):
        refuse_lookahead(model, name)
        groups = _probe(model, longest)
        alone = _logps_alone(model, groups)
        rule = _length_rule(model, groups, alone, name)
        last, problem = _try_sharing(model, groups, alone, rule) if layout != "separate" else (None, None)
    if problem is not None:
        message = f"cannot share prompts between responses ({problem})"
        if layout == "shared-prefix":
            raise ModelError(message, where=name, fix="use --layout auto")
        note(f"{name}: {message}; encoding each response separately")
    shared = layout != "separate" and problem is None
    if shared:
        use_packed_attention(model)
    return TokenScorer(model, autocast, packed=shared, last=last, rule=rule)


def scorer_with(model: nn.Module, traits: ScorerTraits, autocast: torch.dtype | None) -> TokenScorer:
    """A scorer like one that another process has made of the same model."""
    restore_attention(model)
    if traits.packed:
        use_packed_attention(model)
    last = LastLayer(model) if traits.last else None
    return TokenScorer(model, autocast, traits.packed, last, traits.rule, traits.plain)


@torch.inference_mode()
def probe_logps(model: nn.Module) -> Tensor:
    """Log-probs [N] float32 of a few random tokens, to tell whether two models are the same."""
    return _logps_alone(model, _probe(model, _SHORT))


def recompute_activations(scorer: TokenScorer) -> None:
    """Switch on gradient checkpointing; more than once changes nothing.

    Only modules that checkpoint get into training mode: everything else stays in evaluation mode, where routers and
    other parts of a model are not random.

    Raises:
        ModelError: two forward passes differ even so.
    """
    model = scorer.model
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
    groups = _probe(model, _SHORT)
    with torch.no_grad():
        first, second = (_logps(scorer, groups, scorer.packed) for _ in range(2))
    if first.isfinite().all() and float((first - second).abs().max()) > _TOLERANCE:
        raise ModelError(
            "log-probs are random with gradient checkpointing", where="--gradient-checkpointing", fix="leave it out"
        )


@torch.inference_mode()
def _logps_alone(model: nn.Module, groups: _Groups) -> Tensor:
    """Log-probs [N] with one row per forward pass: what no layout may change."""
    scorer = TokenScorer(model)
    rows = [(prompt, [responses[k]]) for k in range(2) for prompt, responses in groups]
    return torch.cat([_logps(scorer, [row], packed=False) for row in rows])


@torch.inference_mode()
def _length_rule(model: nn.Module, groups: _Groups, alone: Tensor, name: str) -> LengthRule:
    """Which rows of a model may share a forward pass, found by numbers.

    Raises:
        ModelError: no rows may.
    """
    for rule in (length_rule(model), EQUAL_LENGTHS):
        together = _logps(TokenScorer(model, rule=rule), groups, packed=False)
        if not alone.isfinite().all() or float((together - alone).abs().max()) <= _TOLERANCE:
            return rule
    raise ModelError(
        "the log-probs of a row depend on the other rows of its batch", where=name, fix="use another model"
    )


@torch.inference_mode()
def _try_sharing(
    model: nn.Module, groups: _Groups, alone: Tensor, rule: LengthRule
) -> tuple[LastLayer | None, str | None]:
    """The model's last layer if it can be cut short, and why its rows cannot be packed, or None."""
    try:
        last = LastLayer(model)
    except ValueError:
        last = None
    if last is not None and _sharing_problem(model, groups, alone, last, rule) is None:
        return last, None
    return None, _sharing_problem(model, groups, alone, None, rule)


def _sharing_problem(
    model: nn.Module, groups: _Groups, alone: Tensor, last: LastLayer | None, rule: LengthRule
) -> str | None:
    """Why packed rows give other numbers than separate rows, or None. Decides by the numbers, not by model family.

    Args:
        model: model to check.
        groups: prompts and responses to compare by.
        alone: log-probs [N] of the responses, one row per forward pass.
        last: its last layer, to be cut short, or None.
        rule: which rows may share a forward pass.
    """
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    try:
        use_packed_attention(model)
        scorer = TokenScorer(model, packed=True, last=last, rule=rule)
        batch = collate(groups, 0, packed=True).to(scorer.device)
        packed = scorer(batch)
        assert batch.layout is not None
        calls = batch.layout.calls
        # Other tokens in both chosen responses must not change the log-probs of the rejected ones.
        vocabulary = int(config.vocab_size)
        changed = [
            (prompt, [[(t + 1) % vocabulary for t in chosen], rejected]) for prompt, (chosen, rejected) in groups
        ]
        packed_changed = _logps(scorer, changed, packed=True)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return f"its code does not accept packed rows: {type(error).__name__}"
    finally:
        restore_attention(model)
    if calls != config.num_hidden_layers:
        return "some attention layers bypass the packed kernel"
    rejected = batch.response_ids >= len(groups)
    # Not bitwise: experts multiply the tokens of all responses in groups whose shape changes with these tokens.
    if not float((packed[rejected] - packed_changed[rejected]).abs().max()) <= _TOLERANCE:
        return "responses would attend to each other"
    worst = float((packed - alone).abs().max())
    return None if worst <= _TOLERANCE else f"log-probs would differ by {worst:.1e} nats"


def _probe(model: nn.Module, longest: int) -> _Groups:
    """Two pairs of random tokens, as long as real rows if the model depends on length."""
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    ropes = getattr(config, "rope_parameters", None) or {}
    limits = [getattr(config, name, None) for name in _LENGTH_LIMITS] + [ropes.get(name) for name in _LENGTH_LIMITS]
    limits += [limit for limit, _ in length_rule(model).limits]
    depends_on_length = any(isinstance(limit, int) and limit < longest for limit in limits)
    length = max(_SHORTEST, longest if depends_on_length else min(longest, _SHORT))
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(int(config.vocab_size), (count,), generator=generator).tolist()

    half = length // 2
    return [(tokens(half), [tokens(length - half), tokens(3)]), (tokens(2), [tokens(3), tokens(length - 2)])]


def _logps(scorer: TokenScorer, groups: _Groups, packed: bool) -> Tensor:
    return score(scorer, collate(groups, 0, packed).to(scorer.device))
