"""The scored dataset: its sign, its precision, its checks, and what training and inspection make of a bad one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import read_jsonl, write_jsonl

from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.scored import (
    Scores,
    has_eos_scores,
    missing_eos_column,
    missing_score,
    read_scores,
    scored_columns,
    write_rows,
)
from tisdpo_cli.errors import DataError, TisdpoError
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

TEXTS = {"prompt": "p", "chosen": "c", "rejected": "r"}
SIDES = ("chosen", "rejected")


def row(**columns: object) -> Row:
    """A row at x.jsonl:7."""
    return Row("x.jsonl:7", {**TEXTS, **columns})


def again(path: Path, rows: list[dict]) -> list[Row]:
    """Rows written and read back."""
    write_rows(path, rows)
    return list(read_rows(path))


# ---------------------------------------------------------------- precision and sign


def awkward_floats() -> list[float]:
    """Float32 numbers of every size: random bit patterns, the extremes, and neighbours of round numbers."""
    bits = np.random.default_rng(0).integers(0, 2**32, 4000, dtype=np.uint32)
    edges = np.float32([0.0, -0.0, 1.0, 0.1, 1e-45, -1e-45, 1.1754944e-38, 3.4028235e38, -3.4028235e38, 16777217.0])
    near = np.nextafter(np.float32([0.1, 1.0, -2.5, 1e-7, 8192]), np.float32(9))
    values = np.concatenate([bits.view(np.float32), edges, near])
    return [float(value) for value in values[np.isfinite(values)]]


def test_scores_read_back_as_the_same_float32(tmp_path: Path) -> None:
    values = awkward_floats()
    scores = Scores(list(values), values[0]), Scores(values[::-1], values[1])
    (back,) = again(tmp_path / "x.jsonl", [scored_columns(row(), *scores)])
    for side, expected in zip(SIDES, scores, strict=True):
        got = read_scores(back, side, len(values), "t")
        assert np.array_equal(np.float32(got.tokens), np.float32(expected.tokens))
        assert np.float32(got.eos) == np.float32(expected.eos)


def test_files_hold_no_more_digits_than_a_float32_needs() -> None:
    columns = scored_columns(row(), Scores([float(np.float32(0.1))], None), Scores([float(np.float32(1 / 3))], None))
    assert columns["chosen_weight"] == [-0.1]
    assert columns["rejected_weight"] == [-0.33333334]


def test_files_hold_minus_r_on_both_sides() -> None:
    """The reference's sign: log π⁻ − log π⁺, for the chosen and for the rejected response."""
    columns = scored_columns(row(), Scores([1.5, -2.0], 0.25), Scores([0.5], -4.0))
    assert (columns["chosen_weight"], columns["chosen_eos_weight"]) == ([-1.5, 2.0], -0.25)
    assert (columns["rejected_weight"], columns["rejected_eos_weight"]) == ([-0.5], 4.0)
    made = row(**columns)
    assert read_scores(made, "chosen", 2, "t") == Scores([1.5, -2.0], 0.25)
    assert read_scores(made, "rejected", 1, "t") == Scores([0.5], -4.0)


def test_a_score_of_zero_is_written_without_a_sign() -> None:
    columns = scored_columns(row(), Scores([0.0], 0.0), Scores([-0.0], -0.0))
    assert json.dumps([columns[f"{side}{kind}"] for side in SIDES for kind in ("_weight", "_eos_weight")]) == (
        "[[0.0], 0.0, [0.0], 0.0]"
    )


def test_what_was_not_scored_is_null(tmp_path: Path) -> None:
    (back,) = again(tmp_path / "x.jsonl", [scored_columns(row(), Scores([1.0, None], None), Scores([], 2.0))])
    assert back.columns["chosen_weight"] == [-1.0, None]
    assert back.columns["chosen_eos_weight"] is None
    assert read_scores(back, "chosen", 2, "t") == Scores([1.0, None], None)
    assert read_scores(back, "rejected", 0, "t") == Scores([], 2.0)
    assert has_eos_scores([back])


def test_columns_of_the_row_stay_and_keep_their_order(tmp_path: Path) -> None:
    original = {"id": 7, "chosen": "c\u2028\x01", "meta": {"b": [1, None], "a": "é😀"}, "prompt": " p", "rejected": "r"}
    (back,) = again(tmp_path / "x.jsonl", [scored_columns(Row("w", original), Scores([1.0], 1.0), Scores([], None))])
    assert {name: back.columns[name] for name in original} == original
    assert list(back.columns)[: len(original)] == list(original)
    assert set(back.columns) - set(original) == {f"{side}{k}" for side in SIDES for k in ("_weight", "_eos_weight")}


def test_scoring_again_replaces_the_scores() -> None:
    first = scored_columns(row(), Scores([1.0], 1.0), Scores([1.0], 1.0))
    second = scored_columns(row(**first), Scores([2.0], None), Scores([3.0], 4.0))
    assert list(second) == list(first)
    assert (second["chosen_weight"], second["chosen_eos_weight"], second["rejected_weight"]) == ([-2.0], None, [-3.0])


def test_rows_stay_apart_and_in_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"line\u2028{i}\n\r\u0085"} for i in range(5)]
    assert [r.columns for r in again(tmp_path / "x.jsonl", rows)] == rows


# ---------------------------------------------------------------- reading one side


def test_files_of_the_reference_have_no_eos_scores() -> None:
    plain = row(chosen_weight=[1, -0.5], rejected_weight=[0])
    assert read_scores(plain, "chosen", 2, "t") == Scores([-1.0, 0.5], None)
    assert not has_eos_scores([plain])
    scored = row(chosen_weight=[1.0], rejected_weight=[0.0], chosen_eos_weight=1.0)
    assert has_eos_scores([plain, scored]), "one row that has them is enough"
    assert missing_eos_column(scored, "chosen") is None
    bad = missing_eos_column(scored, "rejected")
    assert "x.jsonl:7: no column 'rejected_eos_weight', which other rows or the other side have" in str(bad)
    whole = row(**scored.columns, rejected_eos_weight=None)
    assert missing_eos_column(whole, "rejected") is None, "null is a response that was cut"
    assert has_eos_scores([whole, row()]), "a row without scores says nothing about the file"
    assert not has_eos_scores([row(chosen_eos_weight=1.0)])
    assert not has_eos_scores([row()])


@pytest.mark.parametrize(("values", "tokens"), [([1.0, 2.0], 3), ([1.0, 2.0], 1), ([], 1), ([None], 2)])
def test_a_wrong_count_is_told_with_both_numbers(values: list, tokens: int) -> None:
    bad = read_scores(row(chosen_weight=values), "chosen", tokens, "its tokenizer")
    assert isinstance(bad, BadRow)
    assert bad.where == "x.jsonl:7"
    assert f"'chosen_weight' has {len(values)} values, but the response has {tokens} tokens" in bad.why
    assert "its tokenizer" in bad.why


NO_NUMBERS = [
    float("nan"),
    float("inf"),
    -float("inf"),
    "1.0",
    "NaN",
    True,
    False,
    [1.0],
    {},
    10**400,
    1e300,
    -1e39,
]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:8])
def test_what_is_no_float32_is_told(value: object) -> None:
    for bad in (
        read_scores(row(chosen_weight=[0.5, value]), "chosen", 2, "t"),
        read_scores(row(chosen_weight=[0.5, 0.5], chosen_eos_weight=value), "chosen", 2, "t"),
    ):
        assert isinstance(bad, BadRow)
        assert bad.where == "x.jsonl:7"
        assert "chosen" in bad.why
    assert "position 1" in str(read_scores(row(chosen_weight=[0.5, value]), "chosen", 2, "t"))


@pytest.mark.parametrize("value", [None, 1.0, "[1.0]", {"0": 1.0}])
def test_weights_that_are_no_list_are_told(value: object) -> None:
    assert "must be a list" in str(read_scores(row(chosen_weight=value), "chosen", 1, "t"))


def test_a_row_that_was_not_scored_is_told() -> None:
    assert "tisdpo estimate" in str(read_scores(row(), "rejected", 1, "t"))


@pytest.mark.parametrize(
    ("scores", "kept", "needs_eos", "missing"),
    [
        (Scores([1.0, None], None), 1, False, False),
        (Scores([1.0, None], None), 2, False, True),
        (Scores([1.0], None), 1, True, True),
        (Scores([1.0], 0.5), 1, True, False),
        (Scores([], None), 0, False, False),
    ],
)
def test_a_score_is_missing_only_where_it_is_needed(scores: Scores, kept: int, needs_eos: bool, missing: bool) -> None:
    assert (missing_score(scores, kept, needs_eos) is not None) == missing


# ---------------------------------------------------------------- what estimate writes

Change = Callable[[list[dict]], object]


def test_estimate_keeps_rows_columns_and_order(contrast: Path) -> None:
    for split in ("train", "test"):
        original = read_jsonl(contrast / "data" / f"{split}.jsonl")
        scored = read_jsonl(contrast / "scored" / f"{split}.jsonl")
        assert [{name: s[name] for name in o} for o, s in zip(original, scored, strict=True)] == original
        assert [list(s)[:3] for s in scored] == [list(o) for o in original]


def test_estimate_scores_every_token_and_the_eos(contrast: Path) -> None:
    from tisdpo_cli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(contrast / "scored")
    for made in read_rows(contrast / "scored" / "train.jsonl"):
        for side in SIDES:
            (ids,) = tokenizer.texts.encode([made.columns[side]])
            scores = read_scores(made, side, len(ids), "t")
            assert isinstance(scores, Scores)
            assert None not in (*scores.tokens, scores.eos)


@pytest.fixture
def scored(contrast: Path, tmp_path: Path):
    """A copy of the scored dataset with its train rows changed."""

    def make(change: Change) -> Path:
        copy = tmp_path / "scored"
        shutil.copytree(contrast / "scored", copy, dirs_exist_ok=True)
        rows = read_jsonl(contrast / "scored" / "train.jsonl")
        changed = change(rows)
        write_jsonl(copy / "train.jsonl", changed if isinstance(changed, list) else rows)
        return copy

    return make


class Listener:
    """A reporter that remembers what was said."""

    def __init__(self) -> None:
        from tisdpo_cli.reporter import Silent

        self.said: list[str] = []
        self.progress = Silent().progress
        self.note = self.warn = self.stage = self.said.append

    def show(self, view: object) -> None:
        """Views are not remembered."""


@pytest.fixture
def train(contrast: Path, tmp_path: Path):
    """Prepare a training on a scored dataset, and give back what was said; nothing is trained."""
    from tisdpo_cli.engine.training.preference import train_pairs

    def run(dataset: Path, *sets: str, model: Path | None = None) -> str:
        flags = {"model": str(model or contrast / "sft"), "dataset": str(dataset), "output_dir": str(tmp_path / "out")}
        settings = load(COMMANDS["train"].settings, flags, sets=["dry_run=true", *sets]).settings
        listener = Listener()
        train_pairs(settings, listener)
        return "\n".join(listener.said)

    return run


def inspect(dataset: Path, *sets: str):
    """Inspect a scored dataset."""
    from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights

    return inspect_weights(load(COMMANDS["inspect-weights"].settings, {"scored": str(dataset)}, sets=sets).settings)


def fault(run: Callable, *args, **options) -> str:
    """What a run is stopped by, as a fault in the data."""
    with pytest.raises(TisdpoError) as caught:
        run(*args, **options)
    assert isinstance(caught.value, DataError)
    assert caught.value.exit_code == 1
    return str(caught.value)


def set_weight(value: object) -> Change:
    """Put a value among the weights of row 3."""

    def change(rows: list[dict]) -> None:
        rows[2]["chosen_weight"][1] = value

    return change


def drop_weight(rows: list[dict]) -> None:
    """Take one weight of row 2 away."""
    rows[1]["rejected_weight"].pop()


@pytest.mark.parametrize(
    ("change", "line", "said"),
    [
        (drop_weight, 2, "values, but the response has"),
        (set_weight("0.5"), 3, "position 1"),
        (set_weight(True), 3, "position 1"),
        (set_weight(10**400), 3, "position 1"),
        (set_weight(float("nan")), 3, "NaN"),
        (set_weight(float("inf")), 3, "Infinity"),
    ],
    ids=["count", "string", "boolean", "huge", "nan", "infinity"],
)
def test_bad_weights_stop_training_and_inspection(train, scored, change: Change, line: int, said: str) -> None:
    dataset = scored(change)
    for run in (train, inspect):
        message = fault(run, dataset)
        assert message.startswith(f"{dataset / 'train.jsonl'}:{line}: ")
        assert said in message


def test_null_where_a_weight_is_needed_stops_training(train, scored) -> None:
    dataset = scored(set_weight(None))
    assert fault(train, dataset).startswith(f"{dataset / 'train.jsonl'}:3: chosen: token 1 ")


def test_bad_weights_can_be_skipped(train, scored) -> None:
    dataset = scored(set_weight("0.5"))
    said = train(dataset, "on_bad_row=skip")
    assert "skipped 1 of 24 rows" in said
    assert f"{dataset / 'train.jsonl'}:3: " in said
    assert "step of 23 pairs" in said


def test_bad_weights_can_be_skipped_in_an_inspection(scored) -> None:
    assert inspect(scored(set_weight("0.5")), "on_bad_row=skip").pairs == 23


BEYOND = [
    (("mu=100",), "exp (k 1, mu 100, L -0.5, U 1.5), EOS score gives the weight inf"),
    (
        ("mu=200", "L=-1", "U=-0.5", "normalize=mean"),
        "exp (k 1, mu 200, L -1, U -0.5), mean 1, EOS score gives the weight nan",
    ),
]


@pytest.mark.parametrize(("sets", "said"), BEYOND, ids=["overflow", "underflow"])
def test_weights_beyond_float32_are_found_before_a_model_is_loaded(
    train, scored, monkeypatch: pytest.MonkeyPatch, sets: tuple[str, ...], said: str
) -> None:
    """e^150 is too large; e^-100 is 0 in every token, and no mean divides it. The row and the parameters are named."""

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    def strong(rows: list[dict]) -> None:
        rows[2]["chosen_weight"] = [-9.0] * len(rows[2]["chosen_weight"])

    dataset = scored(strong)
    monkeypatch.setattr("tisdpo_cli.engine.training.policy.load_model", no_model)
    for run in (train, inspect):
        message = fault(run, dataset, *sets)
        assert re.search(r"train\.jsonl:\d+: (chosen|rejected): ", message)
        assert said in message


def forget_weights(rows: list[dict]) -> None:
    """Let row 1 be a row that was never scored, with the prompt of row 2."""
    rows[0] = {**{name: rows[0][name] for name in TEXTS}, "prompt": rows[1]["prompt"]}


def test_rows_without_weights_leave_the_others_alone(train, scored) -> None:
    """FAULTS 13: rows are independent, also where they share a prompt."""
    dataset = scored(forget_weights)
    assert fault(train, dataset).startswith(f"{dataset / 'train.jsonl'}:1: ")
    said = train(dataset, "on_bad_row=skip")
    assert "step of 23 pairs" in said
    train_line = next(line for line in said.splitlines() if line.startswith("train.jsonl: weights"))
    assert "EOS zero" not in train_line, "the EOS of the other rows is weighed as before"


def test_a_file_without_eos_scores_gives_the_eos_no_weight(train, scored) -> None:
    def forget_eos(rows: list[dict]) -> list[dict]:
        return [{k: v for k, v in r.items() if not k.endswith("eos_weight")} for r in rows]

    assert "EOS zero (auto: the file has no EOS scores)" in train(scored(forget_eos))
    assert "cut away" not in train(scored(forget_eos), "eos_weight=one")


def test_rows_without_an_eos_column_are_bad_rows_where_others_have_it(train, scored) -> None:
    """Two of them, one on one side alone: all are listed, counted, and skipped where that is asked for."""

    def forget(rows: list[dict]) -> None:
        del rows[1]["rejected_eos_weight"]
        del rows[4]["chosen_eos_weight"], rows[4]["rejected_eos_weight"]

    dataset = scored(forget)
    for run in (train, inspect):
        message = fault(run, dataset)
        assert message.startswith(f"{dataset / 'train.jsonl'}:2: no column 'rejected_eos_weight', which other rows")
        assert "2 of 24 rows are invalid" in message
    assert "step of 24 pairs" in train(dataset, "eos_weight=one"), "set by hand, it need not be there"
    assert inspect(dataset, "eos_weight=one").pairs == 24
    said = train(dataset, "on_bad_row=skip")
    assert "skipped 2 of 24 rows" in said
    assert f"{dataset / 'train.jsonl'}:5: no column 'chosen_eos_weight'" in said
    assert "step of 22 pairs" in said
    assert inspect(dataset, "on_bad_row=skip").pairs == 22


def test_longer_limits_than_those_of_the_scores_stop_training(train, scored) -> None:
    def cut_away(rows: list[dict]) -> None:
        for r in rows:
            r["chosen_weight"][5:] = [None] * (len(r["chosen_weight"]) - 5)
            r["chosen_eos_weight"] = None

    dataset = scored(cut_away)
    message = fault(train, dataset)
    assert f"{dataset / 'train.jsonl'}:1: chosen: token 5 " in message
    assert "--max-length" in message
    assert "dry run" in train(dataset, "max_length=15", "max_prompt_length=10")


def test_the_tokenizer_must_be_the_one_that_scored(train, scored, contrast: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(contrast / "sft", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["z"] = vocabulary["z"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer" in fault(train, contrast / "scored", model=other)
    assert "dry run" in train(contrast / "scored", model=contrast / "dpo"), "another model is the user's right"


@pytest.mark.parametrize(
    "change", [lambda rows: rows[::2], lambda rows: rows[::-1]], ids=["rows filtered", "rows reordered"]
)
def test_a_dataset_changed_since_it_was_scored_is_used_with_a_notice(train, scored, change: Change) -> None:
    """FAULTS 21: the user's right, and a notice."""
    usual = set(train(scored(lambda rows: rows)).splitlines())
    new = [line for line in train(scored(change)).splitlines() if line not in usual]
    assert any(re.search(r"estimate\.json|scored|changed", line) for line in new), new


@pytest.mark.parametrize("content", ["{", "[]", '"x"', "null", "\udcff"])
def test_a_damaged_manifest_is_told(train, scored, content: str) -> None:
    dataset = scored(lambda rows: rows)
    (dataset / "estimate.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert str(dataset / "estimate.json") in fault(train, dataset)


def test_steps_that_a_preset_makes_idle_are_told_once(train, contrast: Path) -> None:
    said = train(contrast / "scored", "preset=default", "spans=word")
    assert said.count("spans would change nothing: binary (top_percent 100) does not read the scores") == 1
    assert "would change nothing" not in train(contrast / "scored", "preset=aggressive", "spans=word")


def test_a_dataset_without_a_manifest_is_used(train, scored) -> None:
    dataset = scored(lambda rows: rows)
    (dataset / "estimate.json").unlink()
    assert "dry run" in train(dataset)
