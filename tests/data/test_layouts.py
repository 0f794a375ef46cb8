"""Well-known layouts are named in a note, or in the error with the option that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import pair_rows, write_jsonl

from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.pairs import read_pairs
from tisdpo_cli.errors import DataError

Row = dict[str, Any]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def answer(text: str) -> Row:
    return {"role": "assistant", "content": text}


def notices(path: Path, rows: list[Row], columns: Columns | None = None) -> list[str]:
    return read_pairs(write_jsonl(path / "x.jsonl", rows), columns or Columns(), "error").notices


@pytest.mark.parametrize(
    ("row", "option"),
    [
        (
            {"instruction": "p", "completions": [{"response": str(i), "overall_score": i} for i in (1, 2)]},
            "--data-format ultrafeedback",
        ),
        ({"prompt": "p", "answers": [{"answer": str(i), "rank": i} for i in (1, 2)]}, "--data-format nectar"),
        ({"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 0}, "--data-format pku-saferlhf"),
        (
            {"context": [user("p")], "response1": "a", "response2": "b", "overall_preference": 1},
            "--data-format helpsteer3",
        ),
        ({"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, "--data-format shp"),
        ({"prompt": "p", "responses": ["a", "b"], "ratings": [1, 2]}, "--data-format rated-responses"),
        ({side: f"\n\nHuman: p\n\nAssistant: {side}" for side in ("chosen", "rejected")}, "--dialogue hh"),
        ({"system": "s", "question": "p", "chosen": "a", "rejected": "b"}, "--prompt-column question"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_the_option_that_reads_a_layout_is_named(tmp_path: Path, row: Row, option: str, on_bad_row: str) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row, row])
    with pytest.raises(DataError) as caught:
        read_pairs(path, Columns(), on_bad_row)
    assert str(caught.value).startswith(f"{path}: expected columns prompt, chosen, rejected; found ")
    assert caught.value.fix == f"try {option}"
    if "format" in option:
        with pytest.raises(DataError) as caught:
            read_pairs(path, Columns(data_format="scored-pairs"), on_bad_row)
        assert "no row is read as scored-pairs: column 'score_chosen' is missing" in str(caught.value)
        assert caught.value.fix == f"try {option}"


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"prompt": "p", "chosen": [user("p"), answer("a")], "rejected": [user("p"), answer("b")]},
            "prompt text beside whole conversations (UltraFeedback binarized), read as messages",
        ),
        ({"prompt": [user("p")], "chosen": [answer("a")], "rejected": "b"}, "conversations with an explicit prompt"),
        (
            {"chosen": [user("p"), answer("a")], "rejected": [user("p"), answer("b")]},
            "conversations with an implicit prompt: the messages that both answers share",
        ),
        (
            {"conversations": [{"from": "human", "value": "p"}], "chosen": answer("a"), "rejected": answer("b")},
            "conversations with their prompt in 'conversations' (ShareGPT)",
        ),
        (
            {"prompt": "p", "chosen": "p a", "rejected": "p b"},
            "the answers repeat the prompt, which is thus read twice; remove it from them",
        ),
    ],
)  # fmt: skip
def test_a_layout_is_named_once(tmp_path: Path, row: Row, said: str) -> None:
    assert notices(tmp_path, [row] * 3) == [f"x.jsonl: {said}"]


def test_scores_that_prefer_neither_answer_are_counted(tmp_path: Path) -> None:
    rows = [{**row, "score_chosen": 3 + i, "score_rejected": 4} for i, row in enumerate(pair_rows(4))]
    (said,) = notices(tmp_path, rows)
    assert said.startswith("x.jsonl: 2 of 4 rows do not prefer the chosen answer by its score; --data-format scored-pa")
    assert notices(tmp_path, rows[2:]) == []
    assert notices(tmp_path, [{**row, "chosen_weight": [1.0]} for row in rows]) == []


def test_plain_texts_are_left_alone(tmp_path: Path) -> None:
    assert notices(tmp_path, pair_rows(4)) == []
