"""How an evaluation looks on a terminal: one column for each policy, and what follows from their comparison."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tisdpo_cli.text import visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.evaluation.results import (
        Evaluation,
        Interval,
        MeanWithError,
        PairMetrics,
        PolicyMetrics,
        SampleMetrics,
        WinRate,
    )


def render(found: Evaluation) -> str:
    """The whole view as text for stdout."""
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(Group(_header(found), _table(found), *_verdicts(found)))
    return captured.get().rstrip("\n")


def _header(found: Evaluation) -> Text:
    told = f"{visible(found.dataset)} · {found.split} · {found.pairs} pairs, {found.prompts} prompts answered"
    return Text(told, style="bold")


def _estimated(of: MeanWithError | None, form: str = ".4f") -> str:
    if of is None:
        return "–"
    return f"{of.value:{form}}" + (f" ± {of.standard_error:.4f}" if of.standard_error is not None else "")


def _interval(of: Interval | None) -> str:
    return "–" if of is None else f"{of.mean:.3f} ({of.low:.3f} to {of.high:.3f})"


_ON_PAIRS: tuple[tuple[str, Callable[[PairMetrics], str]], ...] = (
    ("accuracy of the implicit reward", lambda of: f"{of.accuracy:.1%}"),
    ("pairs with equal rewards", lambda of: f"{of.ties:.1%}"),
    ("margin", lambda of: _estimated(of.margin, "+.4f")),
    ("reward of chosen", lambda of: f"{of.reward_chosen:+.4f}"),
    ("reward of rejected", lambda of: f"{of.reward_rejected:+.4f}"),
    ("KL per token, chosen (exact)", lambda of: f"{of.kl_chosen:.4f}"),
    ("KL per token, rejected (exact)", lambda of: f"{of.kl_rejected:.4f}"),
    ("perplexity, chosen", lambda of: f"{of.perplexity_chosen:.2f}"),
    ("perplexity, rejected", lambda of: f"{of.perplexity_rejected:.2f}"),
)
_ON_SAMPLES: tuple[tuple[str, Callable[[SampleMetrics], str]], ...] = (
    ("KL per token, own samples (estimated)", lambda of: _estimated(of.kl_per_token)),
    ("KL per response, own samples (estimated)", lambda of: _estimated(of.kl_per_response)),
    ("tokens of a response", lambda of: f"{of.length:.1f}"),
    ("ended by the model", lambda of: f"{of.ended:.1%}"),
    ("repeated 4-grams", lambda of: f"{of.repetition:.1%}"),
    ("reward (95 % interval)", lambda of: _interval(of.reward)),
)


def _table(found: Evaluation) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for policy in found.policies:
        table.add_column(f"{policy.role}\n{visible(policy.path)}", justify="right", overflow="fold")
    for label, pairs_cell in _ON_PAIRS:
        table.add_row(label, *("–" if p.pairs is None else pairs_cell(p.pairs) for p in found.policies))
    for label, samples_cell in _ON_SAMPLES:
        cells = ["–" if p.samples is None else samples_cell(p.samples) for p in found.policies]
        if set(cells) != {"–"}:
            table.add_row(label, *cells)
    return table


def _verdicts(found: Evaluation) -> list[RenderableType]:
    perplexities = ", ".join(f"{side} {value:.2f}" for side, value in found.reference_perplexity.items())
    lines = [f"perplexity of the reference: {perplexities}"]
    lines += [_won(policy, policy.against_baseline) for policy in found.policies if policy.against_baseline is not None]
    if found.reward_at_baseline_kl is not None:
        baseline = next(p.samples for p in found.policies if p.role == "baseline")
        assert baseline is not None
        assert baseline.reward is not None
        told = f"reward at the KL of the baseline: {found.reward_at_baseline_kl:.3f} against {baseline.reward.mean:.3f}"
        lines.append(f"{told} (between the two checkpoints around it)")
    return [Text(""), *map(Text, lines)]


def _won(policy: PolicyMetrics, win_rate: WinRate) -> str:
    counts = (
        f"{win_rate.wins} wins, {win_rate.ties} ties, {win_rate.losses} losses; sign test p = {win_rate.p_value:.2g}"
    )
    return f"{visible(policy.path)} against the baseline: win rate {win_rate.win_rate:.3f} ({counts})"
