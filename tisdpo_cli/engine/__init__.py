"""What the commands do: the entry points, each loaded when it is first used.

Settings come in at an entry point and stop there; nothing in the engine writes to a terminal.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tisdpo_cli.engine.curves.report import report
    from tisdpo_cli.engine.evaluation.evaluate import evaluate
    from tisdpo_cli.engine.exporting import export
    from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights
    from tisdpo_cli.engine.merging import merge
    from tisdpo_cli.engine.pipeline import run
    from tisdpo_cli.engine.scoring.estimate import estimate
    from tisdpo_cli.engine.training.preference import train_pairs
    from tisdpo_cli.engine.training.sft import train_sft

_ENTRY_POINTS = {
    "train_sft": "training.sft",
    "train_pairs": "training.preference",
    "estimate": "scoring.estimate",
    "inspect_weights": "inspection.inspect_weights",
    "evaluate": "evaluation.evaluate",
    "export": "exporting",
    "merge": "merging",
    "report": "curves.report",
    "run": "pipeline",
}

__all__ = ["estimate", "evaluate", "export", "inspect_weights", "merge", "report", "run", "train_pairs", "train_sft"]


def __getattr__(name: str) -> Any:
    """Load an entry point."""
    if name not in _ENTRY_POINTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_ENTRY_POINTS[name]}"), name)
