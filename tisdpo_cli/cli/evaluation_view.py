"""Terminal view of an evaluation: one column per policy, then the comparisons between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from tisdpo_cli.cli.widths import print_whole
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


def render(evaluation: Evaluation) -> str:
    """Render the whole view as text for stdout, as wide as the terminal; without a terminal, as wide as its content."""
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        print_whole(console, Group(_header(evaluation), _table(evaluation), *_comparisons(evaluation)))
    return captured.get().rstrip("\n")


def _header(evaluation: Evaluation) -> Text:
    counts = f"{evaluation.pairs} pairs, responses to {evaluation.prompts} prompts"
    return Text(f"{visible(evaluation.dataset)} · {evaluation.split} · {counts}", style="bold")


def _estimate(mean: MeanWithError | None, form: str = ".4f") -> str:
    if mean is None:
        return "–"
    return f"{mean.value:{form}}" + (f" ± {mean.standard_error:.4f}" if mean.standard_error is not None else "")


def _interval(interval: Interval | None) -> str:
    return "–" if interval is None else f"{interval.mean:.3f} ({interval.low:.3f} to {interval.high:.3f})"


_PAIR_ROWS: tuple[tuple[str, Callable[[PairMetrics], str]], ...] = (
    ("implicit reward accuracy", lambda metrics: f"{metrics.accuracy:.1%}"),
    ("ties (equal rewards)", lambda metrics: f"{metrics.ties:.1%}"),
    ("implicit reward margin", lambda metrics: _estimate(metrics.margin, "+.4f")),
    ("implicit reward, chosen", lambda metrics: f"{metrics.reward_chosen:+.4f}"),
    ("implicit reward, rejected", lambda metrics: f"{metrics.reward_rejected:+.4f}"),
    ("KL per token, chosen (exact)", lambda metrics: f"{metrics.kl_chosen:.4f}"),
    ("KL per token, rejected (exact)", lambda metrics: f"{metrics.kl_rejected:.4f}"),
    ("perplexity, chosen", lambda metrics: f"{metrics.perplexity_chosen:.2f}"),
    ("perplexity, rejected", lambda metrics: f"{metrics.perplexity_rejected:.2f}"),
)
_SAMPLE_ROWS: tuple[tuple[str, Callable[[SampleMetrics], str]], ...] = (
    ("KL per token, samples (estimated)", lambda metrics: _estimate(metrics.kl_per_token)),
    ("KL per response, samples (estimated)", lambda metrics: _estimate(metrics.kl_per_response)),
    ("tokens per response", lambda metrics: f"{metrics.length:.1f}"),
    ("ended with EOS", lambda metrics: f"{metrics.ended:.1%}"),
    ("repeated 4-grams", lambda metrics: f"{metrics.repetition:.1%}"),
    ("reward (95 % interval)", lambda metrics: _interval(metrics.reward)),
)


def _table(evaluation: Evaluation) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", no_wrap=True)
    for policy in evaluation.policies:
        table.add_column(f"{policy.role}\n{visible(policy.path)}", justify="right", overflow="fold")
    for label, pair_cell in _PAIR_ROWS:
        table.add_row(label, *("–" if p.pairs is None else pair_cell(p.pairs) for p in evaluation.policies))
    for label, sample_cell in _SAMPLE_ROWS:
        cells = ["–" if p.samples is None else sample_cell(p.samples) for p in evaluation.policies]
        if set(cells) != {"–"}:
            table.add_row(label, *cells)
    return table


def _comparisons(evaluation: Evaluation) -> list[RenderableType]:
    perplexities = ", ".join(f"{side} {value:.2f}" for side, value in evaluation.reference_perplexity.items())
    lines = [f"perplexity of the reference: {perplexities}"]
    lines += [_win_rate(p, p.against_baseline) for p in evaluation.policies if p.against_baseline is not None]
    if evaluation.reward_at_baseline_kl is not None:
        baseline = next(p.samples for p in evaluation.policies if p.role == "baseline")
        assert baseline is not None
        assert baseline.reward is not None
        rewards = f"{evaluation.reward_at_baseline_kl:.3f}, baseline {baseline.reward.mean:.3f}"
        lines.append(f"reward at the KL of the baseline: {rewards} (interpolated between the two closest checkpoints)")
    return [Text(""), *map(Text, lines)]


def _win_rate(policy: PolicyMetrics, win_rate: WinRate) -> str:
    counts = (
        f"{win_rate.wins} wins, {win_rate.ties} ties, {win_rate.losses} losses; sign test p = {win_rate.p_value:.2g}"
    )
    return f"{visible(policy.path)} against the baseline: win rate {win_rate.win_rate:.3f} ({counts})"
