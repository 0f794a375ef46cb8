"""Curves while a training runs: true to the values, small, on terminals only, and with what an earlier run did."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from conftest import Listener
from rich.cells import cell_len
from rich.console import Console

from tisdpo_cli.cli.console import TerminalReporter
from tisdpo_cli.cli.sparkline import Sparkline
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

BLOCKS = "▁▂▃▄▅▆▇█"


def curve(values: list[float], width: int = 8) -> str:
    line = Sparkline(width)
    for value in values:
        line.add(value)
    return str(line)


def test_few_values_are_shown_one_by_one() -> None:
    assert curve([]) == ""
    assert curve([3.0]) == "▄"
    assert curve([2.0, 2.0]) == "▄▄"
    assert curve([0.0, 1.0, 0.0]) == "▁█▁"
    assert curve([float(i) for i in range(7)]) == "▁▂▃▅▆▇█"
    assert curve([0.0, float("nan"), 1.0, float("inf")]) == "▁█"


@pytest.mark.parametrize("count", [8, 9, 16, 17, 1000, 4096])
def test_many_values_are_means_of_as_many(count: int) -> None:
    """A rising line stays one, and so does its mirror; nothing grows."""
    rising = curve([i * 0.5 - 7 for i in range(count)])
    assert 4 <= len(rising) <= 8
    assert (rising[0], rising[-1]) == ("▁", "█")
    levels = [BLOCKS.index(character) for character in rising]
    assert levels == sorted(levels)
    falling = [BLOCKS.index(character) for character in curve([-i * 0.5 for i in range(count)])]
    assert falling == [7 - level for level in levels]
    # The last half of a step function is the last half of its curve.
    halves = curve([0.0] * 2048 + [1.0] * 2048)
    assert halves == "▁" * (len(halves) // 2) + "█" * (len(halves) // 2)


def shown(width: int, terminal: bool, history: int = 0, steps: int = 5) -> str:
    """What a training of some steps writes, after an earlier one of `history` steps."""
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=width, color_system=None)
    total = history + steps
    with TerminalReporter(console).progress("training", total, history, "steps") as progress:
        for i in range(total):
            figures = {"loss": 0.7 - i / 100, "rewards/margins": i / 10, "rewards/accuracies": 0.5}
            progress.advance(int(i >= history), figures)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.getvalue())


@pytest.mark.parametrize("width", [30, 40, 80, 120])
def test_the_curves_of_loss_and_margin_stand_beneath_the_bar(width: int) -> None:
    lines = re.split(r"[\r\n]", shown(width, terminal=True))
    curves = [line for line in lines if set(line) & set(BLOCKS)]
    assert "loss █▆▅▃▁" in curves[-1].replace("▄", "▅")
    assert "margin ▁▃▅▆█" in curves[-1].replace("▄", "▅")
    assert max(map(cell_len, lines[:-2])) <= width
    # When it is done the figures stay, and the curves go.
    assert lines[-2].startswith("training 5/5 steps  loss 0.6600")


def test_a_resumed_training_shows_its_whole_course() -> None:
    curves = [line for line in re.split(r"[\r\n]", shown(120, True, history=15)) if set(line) & set(BLOCKS)]
    assert len(re.search(f"loss ([{BLOCKS}]+)", curves[-1])[1]) == 20  # type: ignore[index]


def test_without_a_terminal_there_are_no_curves_and_no_lines_of_the_past() -> None:
    text = shown(120, terminal=False, history=15)
    assert not set(text) & set(BLOCKS)
    assert [line.split("  ")[0] for line in text.splitlines()] == ["training 16/20 steps", "training 20/20 steps"]


class Remembering(Listener):
    """Keeps the losses that a progress display is told, with the units."""

    def __init__(self, stop_after: int | None = None) -> None:
        super().__init__(stop_after)
        self.told: list[tuple[int, float]] = []

    def advance(self, units: int, figures: object) -> None:
        if isinstance(figures, dict) and "loss" in figures:
            self.told.append((units, figures["loss"]))
            super().advance(units, figures)


def test_the_metrics_of_an_interrupted_training_are_told_again(world: Path, tmp_path: Path) -> None:
    flags = {"model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(tmp_path / "out"),
             "max_steps": "4", "batch_size": "8", "warmup_steps": "0"}  # fmt: skip
    settings = load(COMMANDS["train-dpo"].settings, flags, environ={}).settings
    first, second = Remembering(stop_after=2), Remembering()
    with pytest.raises(Interrupted):
        train_pairs(settings, first)
    train_pairs(settings, second)
    assert [units for units, _ in first.told] == [0, 1, 1]
    assert [units for units, _ in second.told] == [0, 0, 0, 1, 1]
    assert [loss for _, loss in second.told[:3]] == [loss for _, loss in first.told]
