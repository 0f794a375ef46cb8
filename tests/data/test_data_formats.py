"""Rows of well-known datasets as pairs: the best answer against the worst, ties dropped, faults with their place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import pair_rows, read_jsonl, run_here, write_jsonl

from tisdpo_cli.data.data_formats import CONVERTERS, recognize
from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.pairs import read_pairs
from tisdpo_cli.errors import DataError
from tisdpo_cli.formats import DataFormat

CONTEXT = [{"role": "user", "content": "p"}]


def rated(*scores: Any) -> list[dict[str, Any]]:
    """Answers a0, a1, … with these ratings."""
    return [{"response": f"a{i}", "overall_score": score, "model": "m"} for i, score in enumerate(scores)]


def ranked(*ranks: float) -> list[dict[str, Any]]:
    return [{"answer": f"a{i}", "rank": rank} for i, rank in enumerate(ranks)]


def pku(better: Any, safer: Any) -> dict[str, Any]:
    answers = {"response_0": "a0", "response_1": "a1"}
    return {"prompt": "p", **answers, "better_response_id": better, "safer_response_id": safer}


def helpsteer(preference: Any) -> dict[str, Any]:
    return {"context": CONTEXT, "response1": "a1", "response2": "a2", "overall_preference": preference}


def shp(label: Any) -> dict[str, Any]:
    return {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": label}


# Format, row, chosen and rejected; None for a tie.
PAIRS = [
    ("ultrafeedback", {"instruction": "p", "completions": rated(3, 5.0, 1, 1)}, ("a1", "a2")),
    ("ultrafeedback", {"instruction": "p", "completions": rated(2, 2)}, None),
    ("rated-responses", {"prompt": "p", "responses": ["a0", "a1"], "ratings": [1, 2]}, ("a1", "a0")),
    ("rated-responses", {"prompt": "p", "completions": [*rated("4"), {"text": "b", "score": 3}]}, ("a0", "b")),
    ("nectar", {"prompt": "p", "answers": ranked(2, 1, 7, 3)}, ("a1", "a2")),
    ("nectar", {"prompt": "p", "answers": ranked(1, 1)}, None),
    ("pku-saferlhf", pku(1, 0), ("a1", "a0")),
    ("pku-saferlhf-safer", pku(1, 0), ("a0", "a1")),
    ("helpsteer3", helpsteer(-2), ("a1", "a2")),
    ("helpsteer3", helpsteer(1), ("a2", "a1")),
    ("helpsteer3", helpsteer(0), None),
    ("shp", shp(1), ("a", "b")),
    ("shp", shp(0), ("b", "a")),
]  # fmt: skip


@pytest.mark.parametrize(("name", "row", "expected"), PAIRS)
def test_the_best_answer_is_chosen_and_the_worst_rejected(name: str, row: dict, expected: tuple | None) -> None:
    pair = CONVERTERS[name].apply({**row, "id": 7})
    if expected is None:
        assert pair is None
    else:
        assert pair is not None
        assert (pair["chosen"], pair["rejected"]) == expected
        assert pair["prompt"] in ("p", CONTEXT)
        assert pair["id"] == 7
        assert not {"completions", "answers", "response_0", "history", "context"} & set(pair)
    assert recognize([row]) == name.removesuffix("-safer")


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("ultrafeedback", {"instruction": "p"}, "column 'completions' is missing"),
        ("ultrafeedback", {"instruction": "p", "completions": "x"}, "'completions' is not a list of objects"),
        ("ultrafeedback", {"instruction": "p", "completions": rated(1)}, "1 rated answers; a pair needs two"),
        ("ultrafeedback", {"instruction": "p", "completions": rated(1, None)}, "completions[1] has no 'overall_score'"),
        ("ultrafeedback", {"instruction": "p", "completions": rated(1, "N/A")}, "the rating of completions[1]"),
        ("ultrafeedback", {"instruction": "p", "completions": rated(1, True)}, "the rating of completions[1]"),
        ("rated-responses", {"prompt": "p", "responses": ["a", "b"], "scores": [1]}, "'scores' does not hold one"),
        ("nectar", {"prompt": "p", "answers": ranked(1, float("nan"))}, "the rank of answers[1] is not a number"),
        ("pku-saferlhf", pku(2, 0), "'better_response_id' is 2; it must be from 0 to 1"),
        ("helpsteer3", helpsteer(-4), "'overall_preference' is -4; it must be from -3 to 3"),
        ("shp", shp(None), "column 'labels' is missing"),
        ("scored-pairs", {"score_chosen": 1}, "column 'score_rejected' is missing"),
        ("scored-pairs", {"score_chosen": 1, "score_rejected": 2.5}, "'score_chosen' (1) is below"),
    ],
)  # fmt: skip
def test_a_row_of_another_shape_is_told_with_its_place(tmp_path: Path, name: str, row: dict, said: str) -> None:
    good = next(
        (good for other, good, made in PAIRS if other == name and made), {"score_chosen": 2, "score_rejected": 1}
    )
    path = tmp_path / "x.jsonl"
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r", **values} for values in (good, row)]
    path.write_text("".join(json.dumps(values).replace("NaN", '"nan"') + "\n" for values in rows))
    columns = Columns(data_format=name)  # type: ignore[arg-type]
    with pytest.raises(DataError) as caught:
        read_pairs(path, columns, "error")
    assert str(caught.value).startswith(f"{path}:2: {said}")
    assert len(read_pairs(path, columns, "skip").pairs) == 1


def test_ties_are_dropped_and_counted(tmp_path: Path) -> None:
    rows = [{**row, "score_chosen": 5 - i % 2, "score_rejected": 4} for i, row in enumerate(pair_rows(5))]
    path, columns = write_jsonl(tmp_path / "x.jsonl", rows), Columns(data_format="scored-pairs")
    read = read_pairs(path, columns, "error")
    assert [pair.row.where for pair in read.pairs] == [f"{path}:{line}" for line in (1, 3, 5)]
    assert read.notices == ["x.jsonl: 2 rows dropped: their answers are rated the same"]
    with pytest.raises(DataError, match="all 1 rows are ties"):
        read_pairs(write_jsonl(path, rows[1:2]), columns, "error")


def test_every_format_has_a_converter() -> None:
    assert {"pairs", "scored-pairs", *CONVERTERS} == set(get_args(DataFormat))


def test_a_scored_dataset_holds_pairs(contrast: Path, tmp_path: Path) -> None:
    rows = [
        {
            "instruction": row["prompt"],
            "completions": [
                {"response": row["rejected"], "overall_score": 1},
                {"response": row["chosen"], "overall_score": 5},
            ],
            "source": "here",
        }
        for row in pair_rows(6)
    ]
    data, options = write_jsonl(tmp_path / "raw.jsonl", rows), ("--data-format", "ultrafeedback")
    done = run_here(
        "estimate", "--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", data, *options,
        "-o", tmp_path / "scored",
    )  # fmt: skip
    assert done.code == 0, done.err
    names = ("prompt", "chosen", "rejected")
    scored = read_jsonl(tmp_path / "scored" / "train.jsonl")
    assert [{name: row[name] for name in names} for row in scored] == pair_rows(6)
    assert all(row["source"] == "here" and "completions" not in row for row in scored)
    training = ("train", "-m", contrast / "sft", "-d", tmp_path / "scored", "-o", tmp_path / "out", "--dry-run")
    assert run_here(*training).code == 0
    # A config that all commands share may give the format here too.
    assert run_here(*training, *options).code == 0
    assert run_here("inspect-weights", tmp_path / "scored").code == 0


def test_columns_of_pairs_go_with_pairs_only(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", pair_rows(1))
    done = run_here(
        "train-sft", "--init", "-d", path, "-o", tmp_path / "o", "--data-format", "shp", "--prompt-column", "q"
    )
    assert done.code == 2
    assert "prompt_column is for pairs" in done.error
