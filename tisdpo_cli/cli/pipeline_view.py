"""Terminal view of a pipeline: its stages with their main metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.table import Table

from tisdpo_cli.text import visible

if TYPE_CHECKING:
    from tisdpo_cli.engine.pipeline import PipelineResult

# Column, key of the final metrics, format.
_METRICS = (
    ("loss", "loss", ".4f"),
    ("held-out loss", "eval/loss", ".4f"),
    ("held-out accuracy", "eval/rewards/accuracies", ".1%"),
    ("held-out margin", "eval/rewards/margins", "+.4f"),
)
_TEXT_COLUMNS = ("stage", "output")


def stage_table(result: PipelineResult) -> Table:
    """The stages of a pipeline with their main metrics, as a table for a terminal."""
    table, rows = Table(title_justify="left"), stage_rows(result)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", no_wrap=name == "stage")
    for row in rows:
        table.add_row(*row.values())
    return table


def stage_rows(result: PipelineResult) -> list[dict[str, str]]:
    """The stages of a pipeline, each as column to text."""
    rows = []
    for name, stage in result.stages.items():
        metrics = stage.record.get("final_metrics", {})
        row = {
            "stage": name.replace("_", "-"),
            "output": visible(stage.path.name),
            "time": f"{stage.record.get('seconds', 0):.0f} s" if stage.fresh else "skipped",
        }
        rows.append(row | {label: _metric(metrics, key, form) for label, key, form in _METRICS})
    return rows


def _metric(metrics: Mapping[str, Any], key: str, form: str) -> str:
    return format(metrics[key], form) if key in metrics else "–"
