"""An interrupted training whose files were damaged: it resumes from what verifies, and ends in the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener, read_jsonl

from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SHORT: dict[str, object] = {
    "max_steps": 6, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0, "eval_pairs": 0, "save_every": 2,
}  # fmt: skip


def train(world: Path, out: Path, reporter: Silent) -> dict[str, Any]:
    """train-dpo in this process; its `run.json`."""
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": out, **SHORT}
    flags = {name: str(value) for name, value in given.items()}
    return train_pairs(load(COMMANDS["train-dpo"].settings, flags).settings, reporter).record


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that was not interrupted."""
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("whole") / "out"
    train(world, out, Silent())
    return out


@pytest.fixture
def stopped(world: Path, tmp_path: Path) -> Path:
    """The same, interrupted after step 5: checkpoints of steps 4 and 5."""
    with pytest.raises(Interrupted):
        train(world, tmp_path / "out", Listener(5))
    return tmp_path / "out"


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def newest(out: Path) -> Path:
    return out / "checkpoints" / "step-00000005"


def another_step(out: Path) -> None:
    edit(newest(out) / "checkpoint.json", lambda content: content.update(step=4))


def absurd_step(out: Path) -> None:
    edit(newest(out) / "checkpoint.json", lambda content: content.update(step=10**6))


def absurd_step_and_name(out: Path) -> None:
    absurd_step(out)
    newest(out).rename(out / "checkpoints" / "step-01000000")


def another_name(out: Path) -> None:
    newest(out).rename(out / "checkpoints" / "step-00000006")


def another_state(out: Path) -> None:
    edit(newest(out) / "checkpoint.json", lambda content: content["state"]["made_from"].update(seed=9))


def earlier_version(out: Path) -> None:
    edit(newest(out) / "checkpoint.json", lambda content: content.pop("sha256"))


@pytest.mark.parametrize(
    "damage", [another_step, absurd_step, absurd_step_and_name, another_name, another_state, earlier_version]
)
def test_a_damaged_manifest_falls_back_to_the_checkpoint_before(
    world: Path, whole: Path, stopped: Path, damage: Callable[[Path], None]
) -> None:
    damage(stopped)
    listener = Listener()
    train(world, stopped, listener)
    (warning,) = listener.warned
    assert "damaged checkpoint" in warning
    assert any("step-00000004" in note and "4 of 6 steps done" in note for note in listener.said)
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


@pytest.mark.parametrize("line", [b'{"step": 2, "lo', b"}", b'{"loss": 1.0}', b"\xff\xfe{}"], ids=str)
def test_a_bad_line_of_metrics_does_not_stop_a_resume(world: Path, whole: Path, stopped: Path, line: bytes) -> None:
    path = stopped / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:2], line, *lines[2:]]) + b"\n")
    listener = Listener()
    train(world, stopped, listener)
    assert listener.warned == [f"{path}:3: damaged, dropped from the metrics"]
    assert [row["step"] for row in read_jsonl(path)] == list(range(7))
    assert (stopped / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
