"""Rows as Parquet: what is read back is what was written, or the column is refused by name before anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tisdpo_cli.data import parquet_output
from tisdpo_cli.data.messages import preference_conversation
from tisdpo_cli.data.parquet_output import parquet_columns, write_parquet
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import Row
from tisdpo_cli.errors import DataError

USER = {"role": "user", "content": "Hi"}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}


def named(*columns: dict[str, Any]) -> list[Row]:
    return [Row(f"x.jsonl:{number}", values) for number, values in enumerate(columns, start=1)]


def again(path: Path, *columns: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows written and read back."""
    types = parquet_columns(lambda: iter(named(*columns)), "do this")
    write_parquet(path, columns, types)
    return [row.columns for row in read_rows(path) if isinstance(row, Row)]


def refusal(*columns: dict[str, Any]) -> DataError:
    with pytest.raises(DataError) as caught:
        parquet_columns(lambda: iter(named(*columns)), "do this")
    assert caught.value.fix == "do this"
    return caught.value


def test_texts_numbers_and_lists_are_read_back(tmp_path: Path) -> None:
    rows = [
        {"prompt": "é\n\u2028", "n": 1, "x": 0.1, "flag": True, "tags": [], "none": None},
        {"prompt": "", "n": -(2**63), "x": 1e-310, "flag": False, "tags": ["a", "b"], "none": None},
        {"prompt": "日本", "n": 2**63 - 1, "x": 5e307, "flag": True, "tags": [None, "c"], "none": None},
    ]
    assert again(tmp_path / "x.parquet", *rows) == rows


def test_a_missing_key_is_null(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "source": "x"}, {"prompt": "b"}, {"prompt": "c", "late": [1.5]}]
    late = {"source": None, "late": None}
    assert again(tmp_path / "x.parquet", *rows) == [{**late, **row} for row in rows]


def test_conversations_are_read_as_before(tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "Hello", "reasoning_content": "polite"}
    rows = [
        {"prompt": [USER], "chosen": [answer], "rejected": [{"role": "assistant", "content": "No"}], "system": "Be"},
        {
            "chosen": [USER, {"content": "Hi", "role": "assistant"}],
            "rejected": [USER, {"role": "assistant", "content": "Go"}],
            "chat_template_kwargs": {"enable_thinking": False},
        },
        {
            "prompt": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
                {"role": "tool", "name": "weather", "content": "Rain"},
            ],
            "chosen": {"role": "assistant", "content": "It rains."},
            "rejected": {"role": "assistant", "content": "Sun."},
            "tools": [TOOL],
        },
    ]
    for own in ([rows[0]], rows[:1] + rows[1:2] * 70, [rows[2]] * 3):
        back = again(tmp_path / "x.parquet", *own)
        assert [preference_conversation(row) for row in back] == [preference_conversation(row) for row in own]


@pytest.mark.parametrize(
    ("values", "line", "word"),
    [
        (["a", 1], 2, "int does not fit the rows before (string)"),
        ([*[1] * 70, *["a"] * 3], 71, "str does not fit the rows before (int64)"),
        ([[USER], "Hi"], 2, "str does not fit"),
        ([{"a": 1}, {"a": "b"}], 2, "dict does not fit"),
        ([[{"content": "Hi"}, {"content": [{"type": "text", "text": "Hi"}]}]], 1, "list of several"),
        ([1, 2**64], 2, "int does not fit"),
        ([{}, {}], 1, "an object without keys"),
        ([[{"tool_calls": [{"arguments": {"a": 1}}]}], [{"tool_calls": [{"arguments": {"b": 1}}]}]], 1, "would change"),
        ([[{"a": {"x": 1, "y": 2}}], [{"a": {"y": 1, "x": 2}}]], 2, "would change"),
        ([[{"a": [1]}], [{"a": [1.5]}]], 1, "would change"),
    ],
)  # fmt: skip
def test_a_column_without_one_type_is_refused_by_name_and_row(values: list[Any], line: int, word: str) -> None:
    fault = refusal(*({"prompt": "p", "extra": value} for value in values))
    assert "column 'extra'" in fault.what
    assert word in fault.what
    assert fault.where == f"x.jsonl:{line}"
    assert len(fault.what) < 300


def test_tools_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    assert again(tmp_path / "x.parquet", {"tools": [TOOL]}, {"tools": [TOOL, TOOL]})[1] == {"tools": [TOOL, TOOL]}
    assert "'tools'" in refusal({"tools": [TOOL]}, {"tools": [{**TOOL, "strict": True}]}).what


def test_rows_are_written_in_groups_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet_output, "_GROUP_BYTES", 2000)
    rows = [{"prompt": f"{i}" * 10, "w": [i / 7] * (i % 5)} for i in range(500)]
    assert again(tmp_path / "x.parquet", *rows) == rows
    file = pq.ParquetFile(tmp_path / "x.parquet")
    assert file.num_row_groups > 3
    assert max(file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)) <= 128


@pytest.mark.parametrize("apart", [0, 100], ids=["in one batch", "in two"])
@pytest.mark.parametrize("value", [lambda number: number, lambda number: [number]], ids=["a number", "a list"])
def test_an_integer_that_floats_would_round_is_refused(apart: int, value: Any) -> None:
    rows = [{"n": value(2**53 + 1)}, *[{"n": value(1)}] * apart, {"n": value(0.5)}]
    assert "column 'n' has numbers that Parquet would round" in str(refusal(*rows))


def test_small_integers_among_floats_are_the_same_numbers(tmp_path: Path) -> None:
    rows = [{"n": 1, "m": [1, 0.5]}, {"n": 0.5, "m": [2]}]
    assert again(tmp_path / "x.parquet", *rows) == rows
