"""Nothing of value goes away before it is certain that something takes its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import write_jsonl

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.errors import ModelError, TisdpoError, TrainingError, UsageError
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.checkpoints import newest_checkpoint, save_checkpoint
from tisdpo_cli.runs.outputs import MetricsFile, claim, last_metrics
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.train_pairs import TrainDpo, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft


def dpo(world: Path, out: Path, kind: type = TrainDpo, **flat: Any) -> StageResult:
    """A training of two updates."""
    given = {"model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(out), **flat}
    optim = {"max_steps": 2, "batch_size": 4, "warmup_steps": 0, **given.pop("optim", {})}
    return train_pairs(kind(**given, optim=optim), Silent())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_fault_leaves_the_output_that_was_to_be_replaced(world: Path, tmp_path: Path) -> None:
    out, bad = tmp_path / "out", write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "", "rejected": "r"}])
    dpo(world, out)
    before = contents(out)
    with pytest.raises(TisdpoError):
        dpo(world, out, dataset=str(bad), overwrite=True)
    with pytest.raises(UsageError):
        dpo(world, out, data={"max_length": 10**6}, overwrite=True)
    assert contents(out) == before
    dpo(world, out, method={"beta": 0.3}, overwrite=True)
    assert contents(out) != before


@pytest.mark.parametrize("output", ["dpo", "."])
def test_an_output_is_never_what_the_command_reads(contrast: Path, output: str) -> None:
    before = contents(contrast / "dpo")
    with pytest.raises(UsageError, match="an input of this command"):
        dpo(contrast, contrast / output, model=str(contrast / "dpo"), overwrite=True)
    settings = Estimate(
        forward=str(contrast / "dpo"), reverse=str(contrast / "reverse"), dataset=str(contrast / "scored"),
        output_dir=str(contrast / "scored"), overwrite=True,
    )  # fmt: skip
    with pytest.raises(UsageError, match="an input of this command"):
        estimate(settings, Silent())
    assert contents(contrast / "dpo") == before


def test_a_checkpoint_belongs_to_its_command(world: Path, tmp_path: Path) -> None:
    dpo(world, tmp_path / "dpo", checkpoints={"save_every": 1})
    saved = tmp_path / "dpo" / "checkpoints" / "step-00000001"
    with pytest.raises(UsageError, match="train-dpo → train-reverse"):
        dpo(world, tmp_path / "reverse", TrainReverse, checkpoints={"resume": str(saved)})
    whole = (tmp_path / "dpo" / "model.safetensors").read_bytes()
    dpo(world, tmp_path / "again", checkpoints={"resume": str(saved)})
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == whole


def test_a_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, 3, {}, {}, keep=2)
    real = Path.read_text

    def unreadable(path: Path, *args: Any, **kwargs: Any) -> str:
        if path.name == "checkpoint.json":
            raise OSError(5, "Input/output error")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", unreadable)
    with pytest.raises(TrainingError, match="Input/output error"):
        newest_checkpoint(tmp_path, lambda _text: None)
    assert (tmp_path / "step-00000003").is_dir()


def test_what_is_in_force_is_recorded_and_feeds_back(world: Path, tmp_path: Path) -> None:
    memory = {"micro_batch_size": 2, "gradient_accumulation": 3}
    made = dpo(world, tmp_path / "out", memory=memory, optim={"batch_size": None})
    assert made.record["batch_size"] == made.record["made_from"]["optim.batch_size"] == 6
    assert made.record["made_from"]["memory.dtype"] == "float32"
    assert "batch_size: 6" in (tmp_path / "out" / "config.yaml").read_text()
    again = dpo(world, tmp_path / "out", memory={**memory, "dtype": "float32"}, optim={"batch_size": 6})
    assert not again.fresh


def test_a_reference_must_read_the_same_ids(world: Path, tmp_path: Path) -> None:
    other = write_jsonl(
        tmp_path / "other.jsonl", [{"prompt": "zebra " * 5, "chosen": " quagga " * 9, "rejected": " okapi"}]
    )
    shape = {"vocab_size": 300, "hidden_size": 32, "layers": 1, "heads": 2}
    sft = TrainSft(init=True, dataset=str(other), output_dir=str(tmp_path / "other"), **shape, optim={"max_steps": 1})
    train_sft(sft, Silent())
    with pytest.raises(ModelError, match="the tokenizer differs"):
        dpo(world, tmp_path / "out", ref_model=str(tmp_path / "other"))


def test_a_damaged_marker_is_told_and_the_directory_given_free(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("[]")
    for _ in range(2):
        with pytest.raises(UsageError, match=r"run\.json is damaged"):
            claim(tmp_path, "train", {}, overwrite=False)


def test_a_fault_of_another_kind_is_one_line() -> None:
    told = explain(KeyError("x"))
    assert told.exit_code == 1
    assert "a bug in tisdpo" in str(told)


@pytest.mark.parametrize(
    ("choice", "logarithmic"), [({"transform": "exp"}, True), ({"transform": "binary", "top_percent": 30}, False)]
)
def test_the_colour_scale_fits_the_weights(contrast: Path, choice: dict[str, Any], logarithmic: bool) -> None:
    weights = {**choice, "eos_weight": "zero"}
    inspection = inspect_weights(InspectWeights(scored=str(contrast / "scored"), weights=weights))
    assert inspection.scale.logarithmic == logarithmic
    assert inspection.scale.width < 5
    assert json.loads(json.dumps(inspection.as_dict()))["scales"]["weights"]["logarithmic"] == logarithmic


def test_what_shapes_a_new_model_needs_init(world: Path) -> None:
    with pytest.raises(ValueError, match="need --init"):
        TrainSft(model=str(world / "sft"), dataset="d", output_dir="o", layers=3)


def test_instruction_rows_have_no_rejected_side(world: Path, tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "Say hi", "input": "", "output": "hi"}])
    settings = TrainSft(
        model=str(world / "sft"), dataset=str(rows), output_dir=str(tmp_path / "o"), target="rejected", dry_run=True
    )
    with pytest.raises(UsageError, match="no rejected response"):
        train_sft(settings, Silent())


# ---------------------------------------------------------------- metrics


GOOD_LINES = [json.dumps({"step": step, "loss": 0.5}) for step in range(4)]
BAD_LINES = {
    "torn": b'{"step": 2, "lo',
    "torn, but closed": b'{"step": 2, "a": {}',
    "no JSON": b"}",
    "no step": b'{"loss": 0.5}',
    "a list": b"[]",
    "a number": b"2",
    "empty": b"",
    "a step that is a word": b'{"step": "2"}',
    "a step that is nothing": b'{"step": null}',
    "a step without end": b'{"step": Infinity}',
    "not UTF-8": b'{"step": 2, "\xff": 1}',
    "NUL": b"\0" * 40,
    "nested too deeply": b"[" * 100_000,
}


@pytest.mark.parametrize("place", [1, 4], ids=["inside", "last"])
@pytest.mark.parametrize("bad", BAD_LINES.values(), ids=BAD_LINES.keys())
def test_a_bad_line_of_metrics_is_dropped_with_a_warning(tmp_path: Path, bad: bytes, place: int) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [line.encode() for line in GOOD_LINES]
    path.write_bytes(b"\n".join([*lines[:place], bad, *lines[place:]]) + b"\n")
    warnings: list[str] = []
    MetricsFile(path, 2, warnings.append).write({"step": 3})
    assert path.read_text().splitlines() == [*GOOD_LINES[:3], '{"step": 3}']
    assert warnings == [f"{path}:{place + 1}: damaged, dropped from the metrics"]


def test_the_last_line_of_metrics_is_that_of_the_step_or_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert last_metrics(path, 3) == {}
    path.write_text("\n".join(GOOD_LINES) + "\n")
    assert last_metrics(path, 3) == {"step": 3, "loss": 0.5}
    path.write_text("\n".join(GOOD_LINES[:3]) + '\n{"st')
    assert last_metrics(path, 3) == {}
