"""The strict reader: every kind of bad input of FAULTS.md told with file, line and column, and good input unharmed."""

from __future__ import annotations

import csv
import datetime
import io
import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import pair_rows

from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.examples import read_examples
from tisdpo_cli.data.locate import find_splits, training_splits
from tisdpo_cli.data.pairs import Pairs, read_pairs
from tisdpo_cli.data.parsers import PARSERS
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.tokens import Limits, Vocabulary, encode_pairs
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import sha256
from tisdpo_cli.formats import FORMAT_NAMES, FORMAT_OF_SUFFIX, FORMATS

GOOD = {"prompt": "p", "chosen": "c", "rejected": "r"}
GOOD_LINE = json.dumps(GOOD)
TEMPLATE = "Q: {instruction} A:"

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file from text, bytes or rows."""

    def run(content: str | bytes | list, name: str = "x.jsonl") -> Path:
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return run


def read(path: Path, on_bad_row: str = "error", columns: Columns | None = None) -> Pairs:
    """Read pairs; the columns have their usual names."""
    return read_pairs(path, columns or Columns(), on_bad_row)


def fault(path: Path, **options) -> DataError:
    """The fault that stops the reading of a file."""
    with pytest.raises(DataError) as caught:
        read(path, **options)
    assert caught.value.exit_code == 1
    return caught.value


# ---------------------------------------------------------------- one bad line (rows 1, 2, 4, 5, 7)

NESTED = ("list", "dict")


def nested(kind: str, depth: int) -> str:
    """A row whose column `extra` is nested `depth` deep."""
    inner = "[" * depth + "]" * depth if kind == "list" else '{"a":' * depth + "1" + "}" * depth
    return f'{{"prompt":"p","chosen":"c","rejected":"r","extra":{inner}}}'


@pytest.mark.parametrize(
    ("line", "column", "said"),
    [
        (b'{"prompt": "p", "chosen"', 25, "JSON"),
        (b'{"prompt": "p" "chosen": "c"}', 16, "JSON"),
        (b"{'prompt': 'p'}", 2, "JSON"),
        (GOOD_LINE.encode() + b" {}", len(GOOD_LINE) + 2, "JSON"),
        (b'{"prompt": "a\tb"}', 14, "JSON"),
        (b'{"prompt": "\xff"}', 13, "UTF-8"),
        (b'{"prompt": "\xed\xa0\x80"}', 13, "UTF-8"),
        (b'{"prompt": "\xc3', 13, "UTF-8"),
        (b'{"prompt": "a\x00b"}', None, "NUL"),
        ('{"prompt": "p"}'.encode("utf-16-le"), None, "NUL"),
        (rb'{"prompt": "\ud83d", "chosen": "c", "rejected": "r"}', None, "surrogate"),
        (rb'{"prompt": "p", "x": ["\udc00"]}', None, "surrogate"),
        (rb'{"prompt": "p", "\ud800": 1}', None, "surrogate"),
        (b'{"prompt": "a", "prompt": "b"}', None, "duplicate key 'prompt'"),
        (b'{"prompt": "a", "x": {"y": 1, "y": 1}}', None, "duplicate key 'y'"),
        (b'{"x": NaN}', None, "NaN"),
        (b'{"x": [Infinity]}', None, "Infinity"),
        (b'{"x": -Infinity}', None, "Infinity"),
        (b'{"x": 1e999}', None, "1e999"),
        (b'{"x": -1e999}', None, "1e999"),
        (b'{"x": ' + b"9" * 5000 + b"}", None, "5000 digits"),
        (b'["p", "c", "r"]', None, "list"),
        (b'"text"', None, "string"),
        (b"17", None, "number"),
        (b"true", None, "boolean"),
        (b"null", None, "null"),
        (nested("list", 100_000).encode(), None, "deep"),
        (nested("dict", 100_000).encode(), None, "deep"),
    ],
    ids=lambda value: ascii(value)[:32],
)
def test_a_bad_line_is_told_with_its_place(write: Write, line: bytes, column: int | None, said: str) -> None:
    path = write(GOOD_LINE.encode() + b"\n\n" + line + b"\n" + GOOD_LINE.encode() + b"\n")
    place = f"{path}:3" + (f":{column}" if column else "")
    message = str(fault(path))
    assert message.startswith(f"{place}: ")
    assert said in message
    first, bad, last = read_rows(path)
    assert isinstance(bad, BadRow)
    assert bad.where == place
    assert (first.where, last.where) == (f"{path}:1", f"{path}:4")
    assert len(read(path, "skip").pairs) == 2


@pytest.mark.parametrize("kind", NESTED)
@pytest.mark.parametrize("depth", [100, 300, 400, 700, 950, 1_000, 10_000])
def test_any_depth_of_nesting_is_read_or_told(write: Write, kind: str, depth: int) -> None:
    path = write(nested(kind, depth) + "\n" + GOOD_LINE + "\n")
    rows = list(read_rows(path))
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:2"]
    assert depth > 100 or isinstance(rows[0], Row)


def test_a_torn_last_line_is_told(write: Write) -> None:
    path = write(GOOD_LINE + "\n" + GOOD_LINE[:-5])
    assert str(fault(path)).startswith(f"{path}:2:")


# ---------------------------------------------------------------- the file as a whole (rows 2, 3, 6, 7, 15)

PLAIN = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [GOOD, {**GOOD, "prompt": "é\u2028\u0085"}, GOOD])


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + PLAIN,
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("\n", "\n\n \n\t\n"),
        "\n\n" + PLAIN,
        PLAIN.removesuffix("\n"),
        "\ufeff" + PLAIN.replace("\n", "\r\n\r\n").rstrip(),
        PLAIN.replace("{", " {"),
    ],
    ids=["bom", "crlf", "blank-lines", "blank-start", "no-final-newline", "all", "indented"],
)
def test_harmless_differences_change_nothing(write: Write, content: str) -> None:
    plain = [row.columns for row in read_rows(write(PLAIN, "plain.jsonl"))]
    assert len(plain) == 3
    assert [row.columns for row in read_rows(write(content))] == plain


def test_columns_and_values_come_as_they_are(write: Write) -> None:
    row = {"z": 1, "prompt": " p\n", "a": None, "n": 1.5, "l": [1, {"x": "é"}], "bell": "a\x07b", "half": "😀"}
    (read_row,) = read_rows(write([row]))
    assert read_row.columns == row
    assert list(read_row.columns) == list(row)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(write: Write, encoding: str) -> None:
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    message = str(fault(write(mark + PLAIN.encode(encoding))))
    assert "x.jsonl:1: UTF-16" in message
    assert "UTF-8" in message


# ---------------------------------------------------------------- other formats than JSON Lines

ROWS = [
    {"prompt": "p, \u00e9\n", "chosen": 'said "c"', "rejected": "r\u2028", "note": "x"},
    {"prompt": "p2", "chosen": "c2", "rejected": "r2\r\nmore", "note": ""},
]


def parquet(tmp_path: Path, rows: list, name: str = "x.parquet") -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    return tmp_path / name


def saved(folder: Path, rows: list) -> Path:
    import datasets

    datasets.Dataset.from_list(rows).save_to_disk(folder)
    return folder


def as_csv(rows: list, end: str = "\r\n") -> str:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, rows[0], lineterminator=end)
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


@pytest.fixture(
    params=["array", "array on one line", "array, BOM", "array as .json", "csv", "csv, BOM, LF", "parquet", "saved"],
)
def other_format(request: pytest.FixtureRequest, write: Write, tmp_path: Path) -> Path:
    """`ROWS` in a file of another format."""
    made = {
        "array": lambda: write(json.dumps(ROWS, indent=2)),
        "array on one line": lambda: write(json.dumps(ROWS, ensure_ascii=False) + "\n\n"),
        "array, BOM": lambda: write("\ufeff [ " + ",\r\n".join(map(json.dumps, ROWS)) + "]"),
        "array as .json": lambda: write(json.dumps(ROWS), "x.json"),
        "csv": lambda: write(as_csv(ROWS), "x.csv"),
        "csv, BOM, LF": lambda: write("\ufeff" + as_csv(ROWS, "\n").removesuffix("\n"), "x.CSV"),
        "parquet": lambda: parquet(tmp_path, ROWS),
        "saved": lambda: saved(tmp_path / "saved", ROWS),
    }
    return made[request.param]()


def test_every_format_gives_the_same_rows(other_format: Path) -> None:
    assert find_splits(str(other_format)) == {"train": other_format}
    assert [row.columns for row in read_rows(other_format)] == ROWS
    assert [pair.prompt for pair in read(other_format).pairs] == [row["prompt"] for row in ROWS]


def test_a_directory_holds_splits_of_any_format(write: Write, tmp_path: Path) -> None:
    write(as_csv(ROWS), "train.csv")
    parquet(tmp_path, ROWS, "test.parquet")
    assert {split: file.name for split, file in find_splits(str(tmp_path)).items()} == {
        "train": "train.csv",
        "test": "test.parquet",
    }
    write([GOOD], "train.jsonl")
    with pytest.raises(DataError, match=r"has train.csv and train.jsonl; keep one of them"):
        training_splits(str(tmp_path))


def test_a_saved_dataset_of_splits_is_read(tmp_path: Path) -> None:
    import datasets

    both = {split: datasets.Dataset.from_list(ROWS) for split in ("train", "test")}
    datasets.DatasetDict(both).save_to_disk(tmp_path / "saved")
    splits = find_splits(str(tmp_path / "saved"))
    assert splits == {split: tmp_path / "saved" / split for split in ("train", "test")}
    assert [row.columns for row in read_rows(splits["test"])] == ROWS
    whole = sha256(*splits.values())
    (inside,) = (tmp_path / "saved" / "test").glob("*.arrow")
    inside.write_bytes(inside.read_bytes()[:-200])
    assert sha256(*splits.values()) != whole
    assert f"{tmp_path / 'saved' / 'test'}: cannot be read as a saved dataset" in str(fault(splits["test"]))


def test_where_a_row_of_another_format_begins(write: Write, tmp_path: Path) -> None:
    array = write('\n [\n {"prompt": 1},\n\n {"prompt":\n 2}, {}\n]')
    assert [row.where for row in read_rows(array)] == [f"{array}:{line}" for line in (3, 5, 6)]
    table = write('prompt,chosen\n"two\nlines",c\n\np,c\n', "x.csv")
    assert [row.where for row in read_rows(table)] == [f"{table}:{line}" for line in (2, 5)]
    table = parquet(tmp_path, ROWS)
    assert [row.where for row in read_rows(table)] == [f"{table}:{number}" for number in (1, 2)]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[1]", "x.jsonl:1: a row must be a JSON object, not a number"),
        ('[{"a": 1,\n "a": 2}]', "x.jsonl:1:2: duplicate key 'a'"),
        ('[{}, {"a": NaN}]', "x.jsonl:1:6: NaN is not JSON"),
        ('[{"a": "\\ud800"}]', "x.jsonl:1: a lone surrogate"),
        ('[{"a": ' + "1" * 5000 + "}]", "x.jsonl:1:2: "),
    ],
)
def test_an_element_that_is_no_row_is_told_and_the_others_are_read(write: Write, content: str, told: str) -> None:
    rows = list(read_rows(write(content.removesuffix("]") + f", {GOOD_LINE}]")))
    assert told in str(next(row for row in rows if isinstance(row, BadRow)))
    assert isinstance(rows[-1], Row)
    assert rows[-1].columns == GOOD


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("[\n{} {}]", "x.jsonl:2:4: malformed JSON: Expecting ',' delimiter"),
        ("[{},\n]", "x.jsonl:2:1: malformed JSON: Illegal trailing comma"),
        ("[{}", "x.jsonl:1:4: malformed JSON"),
        ("[", "x.jsonl:1:2: malformed JSON"),
        ("[\n{}]\n{}", "x.jsonl:3:1: malformed JSON: Extra data"),
        ("[{}, {'a'}]", "x.jsonl:1:7: malformed JSON"),
        (b"[{},\n\xff]", "x.jsonl:2:1: invalid UTF-8"),
        (b"[{},\n\0]", "x.jsonl:2: a NUL byte"),
        ("[" + "[" * 100_000, "x.jsonl: JSON nested too deeply"),
    ],
)
def test_a_malformed_array_is_told_with_its_place(write: Write, content: str | bytes, told: str) -> None:
    assert told in str(fault(write(content)))


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("prompt,prompt\na,b\n", "x.csv:1: duplicate column 'prompt'"),
        ('prompt\nfine\n"open\n', "x.csv:3: malformed CSV"),
        ('prompt\n"a"b\n', "x.csv:2: malformed CSV"),
        (b"prompt\n\xff\n", "x.csv:2: invalid UTF-8"),
        ("prompt,chosen,rejected\n", "x.csv: the file has no rows"),
        ("prompt,chosen,rejected\na,b\nc,d,e\n", "x.csv:2: 2 values for 3 columns"),
        ("prompt,chosen,rejected\na,\0,c\n", "x.csv:2: a NUL byte"),
        ("prompt,chosen,rejected\na,,c\n", "x.csv:2: 'chosen' is empty"),
        ("PROMPT,chosen,rejected\na,b,c\n", "--prompt-column PROMPT"),
    ],
)
def test_a_table_that_cannot_be_used_is_told_with_its_place(write: Write, content: str | bytes, told: str) -> None:
    assert told in str(fault(write(content, "x.csv")))


def test_a_damaged_parquet_file_is_told(write: Write, tmp_path: Path) -> None:
    whole = parquet(tmp_path, ROWS, "whole.parquet").read_bytes()
    for content in (b"", b"PAR1", whole[:-20]):
        assert "x.parquet: cannot be read as Parquet" in str(fault(write(content, "x.parquet")))


def test_values_of_a_parquet_file_are_those_of_json(tmp_path: Path) -> None:
    when = datetime.date(2024, 5, 6)
    (row,) = read_rows(parquet(tmp_path, [{**GOOD, "day": when, "list": [1.5, None], "inner": {"a": True}}]))
    assert row.columns == {**GOOD, "day": "2024-05-06", "list": [1.5, None], "inner": {"a": True}}
    for value, told in ((float("nan"), "out of range"), (b"x", "bytes")):
        assert told in str(fault(parquet(tmp_path, [{**GOOD, "other": value}])))


def test_a_line_beyond_the_limit_is_told_and_one_below_is_read(write: Write) -> None:
    long = json.dumps({**GOOD, "prompt": "x" * 12_000_000})
    message = str(fault(write(GOOD_LINE + "\n" + long + "\n")))
    assert "x.jsonl:2: " in message
    assert "MiB" in message
    assert len(read(write(json.dumps({**GOOD, "prompt": "x" * 5_000_000}))).pairs) == 1


@pytest.mark.parametrize("content", ["", "\n\n", "\ufeff", "\r\n"])
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_a_file_without_rows_is_told(write: Write, content: str, on_bad_row: str) -> None:
    path = write(content)
    assert str(fault(path, on_bad_row=on_bad_row)).startswith(f"{path}: the file has no rows")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        list(read_rows(tmp_path / "absent.jsonl"))


# ---------------------------------------------------------------- columns (rows 8 to 11)


@pytest.mark.parametrize("column", GOOD)
def test_a_column_missing_in_one_row_is_told(write: Write, column: str) -> None:
    row = {k: v for k, v in GOOD.items() if k != column}
    path = write([GOOD, row, GOOD])
    assert str(fault(path)).startswith(f"{path}:2: column '{column}' is missing")


@pytest.mark.parametrize("value", [None, 1, 1.5, True, {}, [], ["a"], [{"role": "user", "content": "x"}]])
@pytest.mark.parametrize("column", GOOD)
def test_a_value_that_is_no_text_is_told(write: Write, column: str, value: object) -> None:
    path = write([GOOD, {**GOOD, column: value}])
    message = str(fault(path))
    assert message.startswith(f"{path}:2: '{column}' is ")
    assert "a string is needed" in message


@pytest.mark.parametrize("text", ["", " ", "\n\t ", "\u00a0\u3000"])
@pytest.mark.parametrize("column", GOOD)
def test_an_empty_text_is_told(write: Write, column: str, text: str) -> None:
    path = write([GOOD, {**GOOD, column: text}])
    assert str(fault(path)).startswith(f"{path}:2: '{column}' is empty")


@pytest.mark.parametrize(
    ("row", "hint"),
    [
        ({"instruction": "p", "chosen": "c", "rejected": "r"}, "--prompt-column instruction"),
        (
            {"instruction": "p", "chosen_response": "c", "rejected": "r"},
            "try --prompt-column instruction --chosen-column chosen_response",
        ),
        ({"id": 1, "question": "p", "chosen": "c", "rejected": "r"}, "--prompt-column question"),
        ({"prompt": "p", "preferred": "c", "rejected": "r"}, "--chosen-column preferred"),
        ({"prompt": "p", "chosen": "c", "rejected_response": "r"}, "--rejected-column rejected_response"),
        ({"prompt": "p", "chosen": "c"}, "each row needs 'rejected'"),
    ],
)
def test_a_column_missing_everywhere_comes_with_the_option(write: Write, row: dict, hint: str) -> None:
    for on_bad_row in ("error", "skip"):
        message = str(fault(write([row, row]), on_bad_row=on_bad_row))
        assert message.endswith(hint)
        assert "expected columns prompt, chosen, rejected; found " + ", ".join(sorted(row)) in message


def test_columns_may_have_other_names(write: Write) -> None:
    path = write([{"q": "p", "good": "c", "bad": "r", "prompt": 5}])
    (pair,) = read(path, columns=Columns("q", "good", "bad")).pairs
    assert (pair.prompt, pair.chosen, pair.rejected) == ("p", "c", "r")
    assert pair.row.columns["prompt"] == 5


def test_text_is_kept_to_the_letter(write: Write) -> None:
    row = {"prompt": "\n\n Human: é ", "chosen": " c\r\n", "rejected": "\tr"}
    (pair,) = read(write([row])).pairs
    assert {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} == row


# ---------------------------------------------------------------- many bad rows


def test_the_first_twenty_bad_rows_and_a_count_are_told(write: Write) -> None:
    path = write([GOOD if i % 2 else {**GOOD, "chosen": ""} for i in range(60)])
    stopped = fault(path)
    assert str(stopped).startswith(f"{path}:1: 'chosen' is empty (30 of 60 rows are invalid)")
    assert "--on-bad-row skip" in str(stopped)
    assert list(stopped.details[:20]) == [f"{path}:{2 * i + 1}: 'chosen' is empty" for i in range(20)]
    assert len(stopped.details) == 21
    assert "10 more" in stopped.details[20]


def test_bad_rows_of_all_kinds_are_listed_in_order(write: Write) -> None:
    path = write(f'{{\n{GOOD_LINE}\n[1]\n{{"prompt": 1}}\n')
    assert [line.split(": ")[0] for line in fault(path).details] == [f"{path}:1:2", f"{path}:3", f"{path}:4"]


def test_skipped_rows_are_counted_and_listed(write: Write) -> None:
    path = write(GOOD_LINE + "\n{\n" + json.dumps({**GOOD, "prompt": None}) + "\n" + GOOD_LINE + "\n")
    kept = read(path, "skip")
    assert [pair.row.where for pair in kept.pairs] == [f"{path}:1", f"{path}:4"]
    assert [pair.index for pair in kept.pairs] == [0, 1]
    assert "skipped 2 of 4 rows" in kept.notices[0]
    assert kept.notices[1].startswith(f"{path}:2:")
    assert kept.notices[2].startswith(f"{path}:3:")


def test_skipping_every_row_is_a_fault(write: Write) -> None:
    assert "(2 of 2 rows" in str(fault(write("{\n{\n"), on_bad_row="skip"))


# ---------------------------------------------------------------- pairs that say little (rows 12 to 14, 16, 17)


def test_contradicting_rows_are_counted(write: Write) -> None:
    other = {**GOOD, "chosen": "r", "rejected": "c"}
    notices = read(write([GOOD, other, other, {**other, "prompt": "q"}, {**GOOD, "rejected": "s"}])).notices
    assert len(notices) == 1
    assert "3 rows contradict" in notices[0]


def test_equal_responses_are_no_contradiction(write: Write) -> None:
    same = {**GOOD, "rejected": "c"}
    assert read(write([same, same, GOOD, GOOD])).notices == []


def test_rows_with_the_same_prompt_are_independent(write: Write) -> None:
    rows = [GOOD, {**GOOD, "chosen": "d"}, {**GOOD, "chosen": None}, {**GOOD, "extra": 1}]
    assert [pair.chosen for pair in read(write(rows), "skip").pairs] == ["c", "d", "c"]


def dataset_split(path: Path) -> DatasetSplit:
    return DatasetSplit((Part(str(path), path, Columns()),))


def by_character(texts) -> list[list[int]]:
    """A tokenizer in which a capital letter has the id of its small letter."""
    return [[ord(ch.lower()) for ch in text] for text in texts]


CHARACTERS = Vocabulary(by_character, by_character, None, 1)


def sorted_out(path: Path, limits: Limits):
    """What of a file can be trained, and what is said of the rest."""
    from tisdpo_cli.data.splits import Split, drop_untrainable

    pairs = read(path).pairs
    texts = zip(*((p.prompt, p.chosen, p.rejected, p.row.where) for p in pairs), strict=True)
    encoded, cuts = encode_pairs(*texts, CHARACTERS, limits)
    kept, said = drop_untrainable(Split(dataset_split(path), pairs, encoded))
    return [pair.index for pair in kept], said, cuts


def test_pairs_with_equal_responses_are_dropped_and_counted(write: Write) -> None:
    rows = [
        GOOD,
        {**GOOD, "rejected": "c"},
        {**GOOD, "rejected": "C"},
        {"prompt": "p", "chosen": "123456789a", "rejected": "123456789b"},
        {"prompt": "p", "chosen": "12345678", "rejected": "12345678x"},
    ]
    kept, said, _ = sorted_out(write(rows), Limits(10, 5))
    assert kept == [0, 4]
    assert len(said) == 1
    assert "3 pairs dropped" in said[0]
    assert "equal" in said[0]


def test_a_file_of_nothing_but_equal_responses_is_a_fault(write: Write) -> None:
    path = write([{**GOOD, "rejected": "c"}, {**GOOD, "rejected": "C"}])
    with pytest.raises(DataError, match=r"none of 2 pairs can be trained: 2 have equal responses") as caught:
        sorted_out(path, Limits())
    assert str(path) in str(caught.value)


def test_cut_prompts_and_responses_are_counted(write: Write) -> None:
    limits = Limits(12, 4)
    rows = [GOOD, {**GOOD, "prompt": "p" * 30}, {**GOOD, "prompt": "p" * 3, "chosen": "c" * 30}]
    kept, _, cuts = sorted_out(write(rows), limits)
    assert kept == [0, 1, 2]
    assert (cuts.cut_prompts, cuts.cut_responses) == (1, 1)
    assert any("truncated to 12 tokens: 1 prompts" in line and "1 responses" in line for line in cuts.messages(limits))


@pytest.mark.parametrize("text", ["a<|endoftext|>b", "<|pad|>", "x</s><|im_end|>[INST]"])
def test_text_that_spells_a_special_token_stays_text(world: Path, text: str) -> None:
    from tisdpo_cli.model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(world / "sft")
    (ids,) = tokenizer.texts.encode([text])
    assert not {tokenizer.eos, tokenizer.pad} & set(ids)
    assert "".join(tokenizer.pieces(ids)) == text


# ---------------------------------------------------------------- files and directories


def test_a_file_is_the_train_split_and_a_directory_holds_its_splits(write: Write, tmp_path: Path) -> None:
    path = write([GOOD], "train.jsonl")
    assert find_splits(str(path)) == {"train": path}
    assert find_splits(str(tmp_path)) == {"train": path}
    test = write([GOOD], "test.jsonl")
    assert find_splits(str(tmp_path)) == {"train": path, "test": test}


def test_a_directory_without_a_train_split_is_told(write: Write, tmp_path: Path) -> None:
    write([GOOD], "notes.json")
    with pytest.raises(DataError, match="no train file"):
        training_splits(str(tmp_path))
    write([GOOD], "test.jsonl")
    with pytest.raises(UsageError, match="has no split 'train'; available: test"):
        training_splits(str(tmp_path))


def test_a_mistyped_path_names_its_neighbour(write: Write, tmp_path: Path) -> None:
    path = write([GOOD], "pairs.jsonl")
    with pytest.raises(UsageError, match="did you mean") as caught:
        find_splits(str(tmp_path / "pair.jsonl"))
    assert caught.value.exit_code == 2
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["nothing", "a/b/c", "./x", "/nowhere/x.jsonl", "nobody-owns/this-dataset"])
def test_what_is_no_dataset_anywhere_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(UsageError, match="no such file or directory") as caught:
        find_splits(name)
    assert f"--dataset {name}" in str(caught.value)


def test_a_dataset_of_the_hub_is_fetched_once_and_read_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    rows = [{**GOOD, "prompt": "é\u2028\n", "n": 1.5, "extra": None}, {**GOOD, "prompt": "q", "n": 2.0, "extra": ["x"]}]
    made = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in ("train", "test", "other")})
    asked: list[str] = []

    class Hub:
        def dataset_info(self, name: str, timeout: float):
            asked.append(name)
            return type("Info", (), {"sha": "abc"})

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: made)
    splits = find_splits("owner/pairs")
    assert list(splits) == ["train", "test", "other"]
    assert [row.columns for row in read_rows(splits["train"])] == rows
    assert [file.stem for file in splits["train"].parent.glob("*.jsonl")] == ["train"]
    assert [row.columns for row in read_rows(splits["other"])] == rows
    monkeypatch.setattr(datasets, "load_dataset", None)
    again = find_splits("owner/pairs")
    assert list(again) == list(splits)
    assert all(again[name] == splits[name] for name in ("train", "other"))
    assert asked == ["owner/pairs"] * 2


def test_configurations_and_revisions_of_the_hub_are_cached_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import huggingface_hub

    class Hub:
        def dataset_info(self, name: str, timeout: float, revision: str = "main"):
            return type("Info", (), {"sha": f"sha-of-{revision}"})

    def load(name: str, config: str | None, revision: str):
        if config == "none":
            raise ValueError("BuilderConfig 'none' not found. Available: ['a', 'b']\nmore")
        row = {**GOOD, "prompt": f"{name} {config} {revision}"}
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([row])})

    def prompt(name: str) -> str:
        (row,) = read_rows(find_splits(name)["train"])
        assert isinstance(row, Row)
        return row.columns["prompt"]

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load)
    expected = {
        "o/n": "o/n None sha-of-main",
        "o/n:a": "o/n a sha-of-main",
        "o/n@refs/convert/parquet": "o/n None sha-of-refs/convert/parquet",
        "o/n:a@v1.0": "o/n a sha-of-v1.0",
    }
    assert {name: prompt(name) for name in expected} == expected
    with pytest.raises(DataError, match=r"Available: \['a', 'b'\]; name its configuration, as in o/n:CONFIG"):
        find_splits("o/n:none")
    # Without the hub, what was fetched by each name is used, and nothing else.
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert {name: prompt(name) for name in reversed(expected)} == expected
    for name in ("o/n:b", "o/n@v2", "o/n:a@", "o/n:"):
        with pytest.raises(UsageError, match="no such file or directory"):
            find_splits(name)


@pytest.mark.parametrize("name", ["x.xlsx", "x.arrow", "x.txt"])
def test_a_file_of_another_kind_is_named(write: Write, name: str) -> None:
    with pytest.raises(DataError, match="convert it to JSONL, JSON, CSV or Parquet"):
        find_splits(str(write([GOOD], name)))


# ---------------------------------------------------------------- examples for supervised fine-tuning


def examples(path: Path, target: str = "chosen", on_bad_row: str = "error"):
    """Read examples with the template of these tests."""
    return read_examples(dataset_split(path), target, TEMPLATE, on_bad_row)


@pytest.mark.parametrize(
    ("target", "responses"),
    [("chosen", ["c", "c2"]), ("rejected", ["r", "r2"]), ("both", ["c", "r", "c2", "r2"])],
)
def test_pairs_give_the_responses_that_are_wanted(write: Write, target: str, responses: list[str]) -> None:
    made, notices = examples(write([GOOD, {"prompt": "p2", "chosen": "c2", "rejected": "r2"}]), target)
    assert [example.response for example in made] == responses
    assert {example.prompt for example in made} == {"p", "p2"}
    assert notices == []


def test_instruction_rows_become_prompt_and_response(write: Write) -> None:
    rows = [
        {"instruction": "add", "input": "1 2", "output": "3"},
        {"instruction": "sing", "input": "", "output": " la"},
        {"instruction": "curly {instruction} {x}", "output": "\nok", "chosen_by": 1},
        {"instruction": "null", "input": None, "output": "x"},
    ]
    path = write(rows)
    made, _ = examples(path)
    assert [(e.prompt, e.response) for e in made] == [
        ("Q: add\n1 2 A:", " 3"),
        ("Q: sing A:", " la"),
        ("Q: curly {instruction} {x} A:", "\nok"),
        ("Q: null A:", " x"),
    ]
    assert [e.where for e in made] == [f"{path}:{n}" for n in (1, 2, 3, 4)]


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "a"},
        {"output": "a"},
        {"instruction": "a", "output": ""},
        {"instruction": None, "output": "a"},
        {"instruction": ["a"], "output": "a"},
        {"instruction": "a", "input": 5, "output": "a"},
        "{",
    ],
)
def test_bad_instruction_rows_are_told_or_skipped(write: Write, row) -> None:
    good = json.dumps({"instruction": "a", "output": "b"})
    path = write(f"{good}\n{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(DataError) as caught:
        examples(path)
    assert str(caught.value).startswith(f"{path}:2")
    made, notices = examples(path, on_bad_row="skip")
    assert len(made) == 1
    assert "skipped 1 of 2 rows" in notices[0]


def test_pairs_with_an_instruction_column_are_pairs(write: Write) -> None:
    made, _ = examples(write([{**GOOD, "instruction": "i"}]))
    assert [(e.prompt, e.response) for e in made] == [("p", "c")]


def test_an_empty_file_gives_no_examples(write: Write) -> None:
    with pytest.raises(DataError, match="no rows"):
        examples(write(""))


def test_the_worlds_rows_are_good(write: Write) -> None:
    assert len(read(write(pair_rows(8))).pairs) == 8


# ---------------------------------------------------------------- the registry of formats


def test_every_format_has_a_parser_and_is_named_in_help_and_errors(tmp_path: Path) -> None:
    assert list(PARSERS) == list(FORMATS)
    assert all(name in FORMAT_NAMES for name in FORMATS)
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in FORMAT_OF_SUFFIX)
    with pytest.raises(DataError) as caught:
        training_splits(str(tmp_path))
    assert all(suffix in str(caught.value) for suffix in FORMAT_OF_SUFFIX)


def test_a_file_that_cannot_be_read_to_its_end_is_named(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write([GOOD])

    class Failing(io.BytesIO):
        def failing(self, *_given: object) -> bytes:
            raise OSError(5, "Input/output error")

        read = read1 = readline = readinto = failing

    monkeypatch.setattr("tisdpo_cli.data.source.Source.open", lambda self: Failing(b""))
    error = fault(path)
    assert error.where == str(path)
    assert error.what == "cannot be read: Input/output error"


def test_a_file_that_changes_while_it_is_read_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows must not be kept as those of what it held before."""
    path = write([GOOD])
    before = path.read_bytes()

    def late(*given: object) -> object:
        path.write_bytes(before + before)
        return read_rows(*given)

    with monkeypatch.context() as patched:
        patched.setattr("tisdpo_cli.data.pairs.read_rows", late)
        error = fault(path)
    assert (error.what, error.where) == ("changed while it was read", str(path))
    path.write_bytes(before)
    assert len(read(path).pairs) == 1


@pytest.mark.parametrize(
    ("name", "first", "expected"),
    [
        ("rows.jsonl", None, ("reading", 1203, 1203)),
        ("rows.jsonl", 700, ("reading", 700, 700)),
        ("rows.json", None, None),
    ],
)
def test_reading_many_rows_shows_its_progress(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, first: int | None, expected: tuple[str, int, int] | None
) -> None:
    monkeypatch.setattr("tisdpo_cli.data.pairs._SHOWN_FROM", 1000)
    rows = [{"prompt": f"{i}", "chosen": " a", "rejected": " b"} for i in range(1203)]
    lines = [json.dumps(row) for row in rows]
    (tmp_path / name).write_text("\n".join(lines) + "\n" if name.endswith("l") else json.dumps(rows))
    shown: list[tuple[str, int]] = []
    done: list[int] = []

    class Counting:
        def advance(self, units: int, _figures: object) -> None:
            done.append(units)

    def progress(title: str, total: int, _done: int, _unit: str) -> Any:
        shown.append((title, total))
        return nullcontext(Counting())

    read_pairs(tmp_path / name, Columns(), "error", first, RowStore(tmp_path / "cache", progress=progress))
    assert [(*begun, sum(done)) for begun in shown] == ([expected] if expected else [])
