"""Files of other shapes, encodings and sources: recognized, or refused in one line with the way to convert them."""

from __future__ import annotations

import gzip
import io
import json
import random
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import pair_rows

from tisdpo_cli.data.dataset import Columns
from tisdpo_cli.data.hints import suggest, words
from tisdpo_cli.data.locate import find_splits, training_splits
from tisdpo_cli.data.pairs import read_pairs
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import BadRow
from tisdpo_cli.data.stdin import spooled_stdin
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import sha256

Write = Callable[..., Path]
ROWS = [{"prompt": f"p {i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(6)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def run(content: str | bytes, name: str = "x.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return run


def texts(path: Path) -> list[dict[str, str]]:
    pairs = read_pairs(path, Columns(), "error").pairs
    return [{"prompt": p.prompt, "chosen": p.chosen, "rejected": p.rejected} for p in pairs]


def refusal(path: Path, on_bad_row: str = "error") -> DataError:
    with pytest.raises(DataError) as caught:
        read_pairs(path, Columns(), on_bad_row)
    assert caught.value.exit_code == 1
    return caught.value


def fault_of(path: Path) -> str:
    """The error of a file, or its name if it reads well."""
    try:
        read_pairs(path, Columns(), "error")
    except DataError as error:
        return str(error)
    return str(path)


# ---------------------------------------------------------------- column hints


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("Prompt Chosen Rejected", "Prompt Chosen Rejected"),
        ("user_prompt chosen_response rejected_response", "user_prompt chosen_response rejected_response"),
        ("userPrompt chosenResponse rejectedResponse", "userPrompt chosenResponse rejectedResponse"),
        ("QUESTION PREFERRED-ANSWER DISPREFERRED-ANSWER", "QUESTION PREFERRED-ANSWER DISPREFERRED-ANSWER"),
        ("question good bad", "question good bad"),
        ("question bad good", "question good bad"),
        ("query better_answer worse_answer", "query better_answer worse_answer"),
        ("instruction winner loser", "instruction winner loser"),
        ("question response_a response_b", "question - -"),
        ("question good other", "question - -"),
        ("question response_j response_k", "question - -"),
        ("question not_chosen chosen", "question chosen -"),
        ("question unchosen unrejected", "question - -"),
        ("question chosen_by rejected_score", "question - -"),
        ("question chosen_model rejected_model chosen rejected", "question chosen rejected"),
        ("question chosen_or_rejected", "question - -"),
        ("goodness badly questionable", "- - -"),
        ("question query chosen rejected", "- chosen rejected"),
        ("question user_question chosen rejected", "question chosen rejected"),
        ("chosen_prompt rejected_prompt", "- chosen_prompt rejected_prompt"),
        ("input_prompt prompt_id chosen rejected", "input_prompt chosen rejected"),
    ],
)
def test_roles_are_suggested_by_whole_words_alone(names: str, expected: str) -> None:
    roles = ("prompt", "chosen", "rejected")
    suggested = suggest(names.split(), roles)
    assert [suggested.get(role, "-") for role in roles] == expected.split()


def test_names_are_split_into_words() -> None:
    assert words("HTMLPrompt-v2_ré") == ["html", "prompt", "v", "2", "ré"]


def test_all_three_roles_come_in_one_message(write: Write) -> None:
    rows = [{"id": i, "user_prompt": "p", "good": "c", "bad": "r", "score": 1.0} for i in range(3)]
    message = str(refusal(write("\n".join(map(json.dumps, rows)))))
    assert "found bad, good, id, score, user_prompt; " in message
    assert message.endswith("try --prompt-column user_prompt --chosen-column good --rejected-column bad")


@pytest.mark.parametrize(
    ("row", "end"),
    [
        ({"prompt": "p", "answers": [{"a": 1}], "turns": 1}, "each row needs 'chosen' and 'rejected'"),
        ({"question": "p", "chosen": ["c"], "good": 1}, "try --prompt-column question, and name the rejected column "
         "with --rejected-column"),
        ({"question": "p", "a": "c", "b": "r", "winner": "model_a", "model_a": "x", "model_b": "y"},
         "try --prompt-column question, and name the chosen and rejected column with --chosen-column and "
         "--rejected-column"),
        ({"text": "p", "a": "c", "b": "r"},
         "name the columns with --prompt-column, --chosen-column, --rejected-column"),
        ({"prompt": "p", "preferred": "response_a", "response_a": "x", "response_b": "y", "rejected": "r"},
         "name the columns with --chosen-column"),
    ],
)  # fmt: skip
def test_nothing_is_guessed_where_nothing_fits(write: Write, row: dict, end: str) -> None:
    assert str(refusal(write(json.dumps(row)))).endswith(end)


@pytest.mark.parametrize("column", ["system", "System_Prompt", "history", "context"])
def test_text_that_is_left_out_is_named(write: Write, column: str) -> None:
    rows = [{**ROWS[0], column: "You are a pirate."}, {**ROWS[1], column: ""}, ROWS[2]]
    notices = read_pairs(write("\n".join(map(json.dumps, rows))), Columns(), "error").notices
    assert any(f"not used: column {column!r} (in 1 of 3 rows)" in notice for notice in notices)
    assert read_pairs(write(LINES), Columns(), "error").notices == []


# ---------------------------------------------------------------- JSON of another shape


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (json.dumps({"data": ROWS}), "below 'data'"),
        (json.dumps({"version": "1", "my rows": ROWS}, indent=2), "below 'my rows'"),
        (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}), "one list per column"),
        (json.dumps({key: [row[key] for row in ROWS] for key in ROWS[0]}, indent=1), "one list per column"),
        (json.dumps({key: {str(i): row[key] for i, row in enumerate(ROWS)} for key in ROWS[0]}), "object per column"),
        (json.dumps({str(i): row for i, row in enumerate(ROWS)}), "values of one object"),
        ("\n".join(json.dumps(row, indent=2) for row in ROWS), "over several lines"),
        (json.dumps(ROWS[0], indent=2), "over several lines"),
        (LINES.replace("\n", "\r"), "old Mac line ends"),
    ],
)
@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
@pytest.mark.parametrize("name", ["x.json", "a file.jsonl", "x.jsonl.gz"])
def test_json_of_another_shape_is_named_with_a_command_that_works(
    write: Write, tmp_path: Path, content: str, what: str, on_bad_row: str, name: str
) -> None:
    path = write(gzip.compress(content.encode()) if name.endswith("gz") else content, name)
    error = refusal(path, on_bad_row)
    assert what in str(error)
    assert error.details == ()
    command = error.fix.removeprefix("convert it: ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    rows = ROWS[:1] if content == json.dumps(ROWS[0], indent=2) else ROWS
    assert texts(tmp_path / shlex.split(command)[-1]) == rows


def test_a_list_in_the_first_line_is_one_bad_row(write: Write) -> None:
    path = write('\n["a", "b"]\n\n' + LINES)
    first, *others = read_rows(path)
    assert isinstance(first, BadRow)
    assert str(first) == f"{path}:2: a row must be a JSON object, not a list"
    assert [row.where for row in others] == [f"{path}:{number}" for number in range(4, 10)]
    assert len(read_pairs(path, Columns(), "skip").pairs) == 6


@pytest.mark.parametrize("separators", [(",", ":"), (",\n  ", ": ")])
def test_a_long_array_is_read_in_pieces(write: Write, separators: tuple[str, str]) -> None:
    rows = [{"n": i, "é": "é\u2028😀" * (i % 50), "x": [i, 1.5, {"y": None}]} for i in range(30_000)]
    path = write(json.dumps(rows, ensure_ascii=False, separators=separators), "x.json")
    started = time.process_time()
    assert [row.columns for row in read_rows(path)] == rows
    assert time.process_time() - started < 5
    whole = path.read_text()
    at = len(whole) - 2000
    line, column = whole.count("\n", 0, at) + 1, at - whole.rfind("\n", 0, at)
    broken = write(whole[:at] + "\x01" + whole[at:], "y.json")
    with pytest.raises(DataError) as caught:
        list(read_rows(broken))
    place = str(caught.value).removeprefix(f"{broken}:").split(": ")[0].split(":")
    assert abs(int(place[0]) - line) <= 20 * (line > 1)
    assert line > 1 or column - 2000 < int(place[1]) <= column


@pytest.mark.parametrize("name", ["x.json", "x.csv", "x.jsonl"])
def test_one_value_has_a_limit_in_every_format(write: Write, name: str) -> None:
    for size, fits in ((7 * 2**20, True), (9 * 2**20, False)):
        row = {**ROWS[0], "chosen": "x" * size}
        content = {
            "x.json": json.dumps([ROWS[0], row]),
            "x.jsonl": json.dumps(row),
            "x.csv": f"prompt,chosen,rejected\np,{'x' * size},r\n",
        }[name]
        path = write(content, name)
        if fits:
            assert read_pairs(path, Columns(), "error").pairs[-1].chosen == "x" * size
        else:
            assert "limit of 8 MiB" in str(refusal(path))


# ---------------------------------------------------------------- CSV


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_separators_and_line_ends_are_recognized(write: Write, separator: str, end: str, mark: str) -> None:
    rows = [{"prompt": f'say "hi", {i}; a|b\tc', "chosen": f" yes {i}", "rejected": "no,\nno"} for i in range(4)]
    quoted = [[f'"{value.replace(chr(34), 2 * chr(34))}"' for value in row.values()] for row in rows]
    lines = [list(rows[0]), *quoted]
    path = write(mark + "".join(separator.join(line) + end for line in lines), "x.csv")
    expected = [{**row, "rejected": "no,\nno"} for row in rows]
    if end == "\r":
        # A newline inside quotes makes it a file of ordinary line ends.
        path = write(path.read_bytes().replace(b"\n", b" "), "x.csv")
        expected = [{**row, "rejected": "no, no"} for row in rows]
    assert texts(path) == expected
    notices = read_pairs(path, Columns(), "error").notices
    assert any("separated by" in notice for notice in notices) == (separator != ",")
    assert any("old Mac" in notice for notice in notices) == (end == "\r")


def test_commas_win_where_they_fit(write: Write) -> None:
    path = write("prompt,chosen,rejected\na;b;c,d;e,f;g\nh;i;j,k;l,m;n\n", "x.csv")
    assert texts(path)[0] == {"prompt": "a;b;c", "chosen": "d;e", "rejected": "f;g"}
    assert read_pairs(path, Columns(), "error").notices == []


def test_blanks_around_names_are_ignored_and_named(write: Write) -> None:
    path = write("prompt, chosen , rejected\np,  c,r\n", "x.csv")
    assert texts(path) == [{"prompt": "p", "chosen": "  c", "rejected": "r"}]
    assert "blanks around the column names" in read_pairs(path, Columns(), "error").notices[0]
    path = write('prompt, chosen, rejected\np, "c, d", r\n', "x.csv")
    assert texts(path) == [{"prompt": "p", "chosen": "c, d", "rejected": "r"}]
    assert "blank behind each separator" in read_pairs(path, Columns(), "error").notices[0]


@pytest.mark.parametrize(("encoding", "shown"), [("latin-1", "Latin-1"), ("cp1252", "Windows-1252")])
@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz"])
def test_an_encoding_is_named_with_a_command_that_works(
    write: Write, tmp_path: Path, encoding: str, shown: str, name: str
) -> None:
    word = "café" if encoding == "latin-1" else "“café”"
    content = f"prompt,chosen,rejected\np,{word},r\n".encode(encoding)
    path = write(gzip.compress(content) if name.endswith("gz") else content, name)
    error = refusal(path)
    assert f"{path}:2: invalid UTF-8 (probably {shown})" in str(error)
    command = error.fix.removeprefix("convert it: ")
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert texts(tmp_path / "x-utf8.csv")[0]["chosen"] == word


@pytest.mark.parametrize(
    "content",
    ['a,b\n"x"y,z\n', 'a,b\n"open,1\n', "a,b\nx\ry,z\n", "a;b\n1;2;3\n", "\n\n", '"', ",", "a\0b,c\nd,e\n"],
)
def test_no_words_of_python_reach_the_user(write: Write, content: str) -> None:
    message = str(refusal(write(content, "x.csv")))
    assert not any(word in message for word in ("delimiter", "newline=", "new-line", "_csv", "codec", "expected after"))


# ---------------------------------------------------------------- splits and sources


@pytest.mark.parametrize("name", ["validation.jsonl", "valid.csv", "val.jsonl.gz", "dev.json", "eval.ndjson"])
def test_other_names_count_as_the_test_split(write: Write, tmp_path: Path, name: str) -> None:
    write(LINES, "train.jsonl")
    path = write(b"", name)
    splits = training_splits(str(tmp_path))
    assert splits == {"train": tmp_path / "train.jsonl", "test": path}
    assert splits.notices == [f"{tmp_path}: {name} is the test split"]
    test = write(LINES, "test.jsonl")
    splits = training_splits(str(tmp_path))
    assert splits["test"] == test
    assert splits.notices == [f"{tmp_path}: test.jsonl is the test split; {name} not used"]


def test_compressed_files_are_read_and_give_the_same_rows(write: Write, tmp_path: Path) -> None:
    table = "prompt,chosen,rejected\n" + "".join(",".join(row.values()) + "\n" for row in ROWS)
    for name, content in (("x.jsonl.gz", LINES), ("x.JSON.GZ", json.dumps(ROWS)), ("x.csv.gz", table)):
        path = write(gzip.compress(content.encode()), name)
        assert find_splits(str(path)) == {"train": path}
        assert texts(path) == ROWS
    assert next(iter(read_rows(tmp_path / "x.jsonl.gz"))).where == f"{tmp_path / 'x.jsonl.gz'}:1"
    write(gzip.compress(LINES.encode()), "d/train.jsonl.gz")
    assert texts(find_splits(str(tmp_path / "d"))["train"]) == ROWS


def test_a_damaged_compressed_file_is_named(write: Write) -> None:
    whole = gzip.compress(LINES.encode() * 50)
    draw = random.Random(0)
    for number in range(60):
        damaged = bytearray(whole)
        damaged[draw.randrange(len(damaged))] ^= 1 << draw.randrange(8)
        content = bytes(damaged) if number else whole[:-20]
        path = write(content, "x.jsonl.gz")
        assert str(path) in fault_of(path)
    assert "cannot be decompressed" in str(refusal(write(b"no gzip", "x.jsonl.gz")))
    with pytest.raises(DataError, match="decompress it"):
        find_splits(str(write(b"", "x.parquet.gz")))


@pytest.mark.parametrize("unit", [b"\n", b'{"prompt":"p","chosen":"c","rejected":"r"}\n', b"x"])
def test_a_compressed_file_that_expands_without_end_is_refused(
    write: Write, unit: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tisdpo_cli.data.source._ALWAYS_ALLOWED", 8 * 2**20)
    # Members of a gzip file follow each other: 20 MiB in a few KiB.
    block = gzip.compress(unit * (2**22 // len(unit)))
    path = write(block * 5, "x.jsonl.gz")
    started = time.process_time()
    with pytest.raises(DataError, match=r"expands to more than 200 times|limit of 8 MiB"):
        for _ in read_rows(path):
            pass
    assert time.process_time() - started < 60


def test_a_glob_is_read_in_sorted_order_with_the_right_places(write: Write, tmp_path: Path) -> None:
    names = ["b.jsonl", "a.jsonl", "c.csv", "d.txt"]
    for name, content in zip(names, (LINES, LINES, "prompt,chosen,rejected\np,c,\n", ""), strict=True):
        write(content, f"parts/{name}")
    pattern = str(tmp_path / "parts" / "*.jsonl")
    splits = find_splits(pattern)
    assert texts(splits["train"]) == ROWS * 2
    places = [row.where for row in read_rows(splits["train"])]
    parts = tmp_path / "parts"
    assert places == [f"{parts / name}:{line}" for name in ("a.jsonl", "b.jsonl") for line in range(1, 7)]
    everything = find_splits(str(parts / "[abc].*"))["train"]
    assert str(refusal(everything)).startswith(f"{parts / 'c.csv'}:2: 'rejected' is empty")
    before = sha256(splits["train"], named=True)
    (parts / "b.jsonl").write_text(LINES + LINES)
    assert sha256(splits["train"], named=True) != before
    with pytest.raises(UsageError, match="no file matches"):
        find_splits(str(tmp_path / "nothing" / "*.jsonl"))
    with pytest.raises(DataError, match=r"d\.txt"):
        find_splits(str(parts / "*"))
    with pytest.raises(DataError, match="or a glob such as"):
        training_splits(str(parts))


@pytest.mark.parametrize("kind", ["jsonl", "array", "csv", "gz", "parquet"])
def test_stdin_is_read_twice_and_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(ROWS), buffer)
    content = {
        "jsonl": LINES.encode(),
        "array": json.dumps(ROWS, indent=1).encode(),
        "csv": ("prompt;chosen;rejected\n" + "".join(";".join(r.values()) + "\n" for r in ROWS)).encode(),
        "gz": gzip.compress(LINES.encode()),
        "parquet": buffer.getvalue(),
    }[kind]
    spooled_stdin.cache_clear()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    for _ in range(2):
        path = find_splits("-")["train"]
        assert texts(path) == ROWS
    assert next(iter(read_rows(path))).where.startswith("stdin:")
    spooled_stdin.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="several processes"):
        find_splits("-")


# ---------------------------------------------------------------- Parquet and Arrow, damaged or hostile


def parquet(path: Path, table, **options) -> Path:
    import pyarrow.parquet as pq

    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_damaged_tables_are_one_line(tmp_path: Path, kind: str) -> None:
    import datasets
    import pyarrow as pa

    rows = pair_rows(40)
    if kind == "parquet":
        path = inner = parquet(tmp_path / "x.parquet", pa.Table.from_pylist(rows))
    else:
        datasets.disable_progress_bars()
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
        path, (inner,) = tmp_path / "saved", (tmp_path / "saved").glob("*.arrow")
    whole, draw, refused = inner.read_bytes(), random.Random(1), 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(draw.randint(1, 8)):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        inner.write_bytes(damaged)
        fault = fault_of(path)
        refused += fault != str(path)
        assert fault.startswith(str(path))
        assert "\n" not in fault
    assert refused > 20


def test_a_parquet_file_of_repetition_is_refused_before_it_is_read(tmp_path: Path) -> None:
    import pyarrow as pa

    texts_ = pa.array(["p"]).take(pa.array([0] * 1_200_000))
    table = pa.table({"prompt": texts_, "chosen": texts_, "rejected": texts_})
    path = parquet(tmp_path / "x.parquet", table, compression="zstd")
    started = time.process_time()
    assert "announces 1200000 rows" in str(refusal(path))
    assert time.process_time() - started < 2


@pytest.mark.parametrize("number", [1, 40])
def test_a_parquet_cell_has_a_limit(tmp_path: Path, number: int) -> None:
    import pyarrow as pa

    rows = [dict(ROWS[0]) for _ in range(number)]
    rows[-1]["chosen"] = "x" * (100 * 2**20)
    path = parquet(tmp_path / "x.parquet", pa.Table.from_pylist(rows), compression="zstd", use_dictionary=False)
    message = str(refusal(path))
    assert "limit of 8 MiB" in message or "expands to more than 200 times" in message
    rows[-1]["chosen"] = "x" * (9 * 2**20)
    path = parquet(tmp_path / "x.parquet", pa.Table.from_pylist(rows), compression="none", use_dictionary=False)
    message = str(refusal(path))
    assert "limit of 8 MiB" in message
    if number > 1:
        assert len(read_pairs(path, Columns(), "skip").pairs) == number - 1


def test_dictionary_columns_are_read(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS * 300)
    table = pa.table({name: table[name].dictionary_encode() for name in table.column_names})
    assert texts(parquet(tmp_path / "x.parquet", table)) == ROWS * 300


def test_nul_is_refused_in_every_format(write: Write, tmp_path: Path) -> None:
    import pyarrow as pa

    for column in ("prompt", "other"):
        row = {**ROWS[0], column: "a\0b"}
        for path in (
            write(json.dumps(row) + "\n"),
            write(json.dumps([row]), "x.json"),
            write(json.dumps({**ROWS[0], "deep": [{"x": "\0"}]})),
            parquet(tmp_path / "x.parquet", pa.Table.from_pylist([row])),
        ):
            assert "a NUL character" in str(refusal(path))


# ---------------------------------------------------------------- blank text and equal faults


@pytest.mark.parametrize(
    "text", ["\u200b", "\u200d\ufeff \u2060", "\u00ad", "\u3164", "\u034f\ufe0f", "\u202e", "\x07"]
)
def test_invisible_text_is_blank(write: Write, text: str) -> None:
    assert "is empty (only invisible characters)" in str(refusal(write(json.dumps({**ROWS[0], "chosen": text}))))
    assert texts(write(json.dumps({**ROWS[0], "chosen": f"{text}a"})))[0]["chosen"] == f"{text}a"


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_equal_faults_of_all_rows_are_one_line(write: Write, on_bad_row: str) -> None:
    error = refusal(write("".join(json.dumps({**ROWS[0], "chosen": None}) + "\n" for _ in range(30))), on_bad_row)
    assert "(30 of 30 rows are invalid)" in str(error)
    assert error.details == ()
    assert "skip" not in str(error)
    mixed = [{**ROWS[0], "chosen": None}] * 9 + [{**ROWS[0], "prompt": ""}]
    error = refusal(write("\n".join(map(json.dumps, mixed))), on_bad_row)
    assert len(error.details) == 2
    assert error.details[0].endswith("(9 rows)")
    assert "skip" not in str(error)
