"""Pairs and tokens read from files: the same as read and tokenized directly, once, and in little memory."""

from __future__ import annotations

import json
import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import nullcontext
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import pair_rows, read_jsonl, write_jsonl

from tisdpo_cli.data import pairs as pairs_module
from tisdpo_cli.data import tokenizing
from tisdpo_cli.data.chat_tokens import ChatOptions, ChatStats, encode_chat
from tisdpo_cli.data.dataset import Columns, DatasetSplit, Part
from tisdpo_cli.data.messages import preference_conversation
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.rows import BadRow, Row
from tisdpo_cli.data.splits import ReadOptions, Split, drop_untrainable, pairs_behind, read_split
from tisdpo_cli.data.stored_pairs import StoredPairs, rows_with
from tisdpo_cli.data.stored_tokens import EncodedPairs, pair_lengths, select_pairs, swapped_pairs
from tisdpo_cli.data.tokens import EncodedPair, Limits, Vocabulary, encode_pairs
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.errors import DataError
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ '\n\n' + m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
)
CHAT = ChatOptions(TEMPLATE, {}, date(2025, 1, 1))
LIMITS = Limits(40, 20)


@pytest.fixture(scope="module")
def tokenizer(world: Path) -> Tokenizer:
    return load_tokenizer(world / "sft")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several batches and chunks, of rows that do not divide evenly."""
    monkeypatch.setattr("tisdpo_cli.data.stored_pairs._BATCH_ROWS", 7)
    monkeypatch.setattr(tokenizing, "_CHUNK", 4)
    monkeypatch.setattr("tisdpo_cli.data.arrow_files._ROWS_KEPT", 5)


def split_of(*paths: Path, **how: Any) -> DatasetSplit:
    columns = how.pop("columns", Columns())
    shares = how.pop("shares", [None] * len(paths))
    parts = tuple(Part(path.stem, path, columns, share=share) for path, share in zip(paths, shares, strict=True))
    return DatasetSplit(parts, **how)


def vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    return vocabulary_of(tokenizer, ChatEncoder(tokenizer, CHAT))


def read(tmp_path: Path, tokenizer: Tokenizer, split: DatasetSplit, first: int | None = None, **how: Any) -> Split:
    store = how.pop("store", None) or RowStore(tmp_path / "cache")
    options = ReadOptions(**{"on_bad_row": "error", "limits": LIMITS, "chat": CHAT, **how}, store=store)
    return read_split(split, options, how.pop("vocabulary", None) or vocabulary(tokenizer), first)


def odd_rows(count: int) -> list[dict[str, Any]]:
    """Pairs with every kind of value in other columns, which not all of them have."""
    more: list[dict[str, Any]] = [
        {},
        {"n": 2**70, "x": -0.0, "tiny": 1e-300, "é": ["ü", None, True, {"a": {}}]},
        {"empty": "", "list": [], "none": None, "chosen_weight": [0.25, None, 1.5]},
    ]
    return [{**row, **more[i % 3]} for i, row in enumerate(pair_rows(count))]


def direct(rows: Sequence[tuple[str, dict[str, Any]]], tokenizer: Tokenizer) -> list[EncodedPair]:
    """The oracle: all rows at once, in memory."""
    texts = [[columns[name] for _, columns in rows] for name in ("prompt", "chosen", "rejected")]
    return encode_pairs(*texts, [where for where, _ in rows], vocabulary(tokenizer), LIMITS)[0]


def placed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{path}:{number}", row) for number, row in enumerate(read_jsonl(path), 1)]


def test_texts_are_those_of_the_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", odd_rows(30))
    rows = placed(path)
    split = read(tmp_path, tokenizer, split_of(path))
    assert list(split.encoded) == direct(rows, tokenizer)
    for pairs in (list(split.pairs), [split.pairs[i] for i in range(30)]):
        assert [pair.row for pair in pairs] == [Row(*row) for row in rows]
        assert [list(pair.row.columns) for pair in pairs] == [list(columns) for _, columns in rows]
        assert [pair.index for pair in pairs] == list(range(30))
        assert [[p.prompt, p.chosen, p.rejected] for p in pairs] == [
            [columns[name] for name in ("prompt", "chosen", "rejected")] for _, columns in rows
        ]
    assert json.dumps(split.pairs[1].row.columns) == json.dumps(rows[1][1]), "numbers to the last bit, and their kind"


def test_pairs_behave_as_a_list(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", odd_rows(30))
    split = read(tmp_path, tokenizer, split_of(path))
    for lazy in (split.pairs, split.encoded):
        known = list(lazy)
        assert len(lazy) == 30
        assert lazy[-1] == known[-1]
        assert lazy[3:17:4] == known[3:17:4]
        assert list(reversed(lazy)) == known[::-1]
        with pytest.raises(IndexError):
            lazy[30]
    assert isinstance(split.encoded, EncodedPairs)
    known = list(split.encoded)
    chosen = np.array([5, 2, 29])
    assert list(select_pairs(split.encoded, chosen)) == select_pairs(known, chosen)
    assert list(swapped_pairs(split.encoded)) == swapped_pairs(known)
    for pairs in (split.encoded, split.encoded.swapped(), split.encoded.select(chosen).swapped()):
        assert np.array_equal(pair_lengths(pairs), pair_lengths(list(pairs)))
    assert pairs_behind(split, split.encoded.select(chosen))[0].row == split.pairs[5].row
    assert [pair.row for pair in pairs_behind(split, known[4:6])] == [pair.row for pair in split.pairs[4:6]]


@pytest.mark.parametrize("first", [None, 1, 9])
def test_limits_and_first_rows(tmp_path: Path, tokenizer: Tokenizer, first: int | None) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    split = read(tmp_path, tokenizer, split_of(path, limit=20), first)
    assert list(split.encoded) == direct(placed(path)[: first or 20], tokenizer)


def test_rows_that_are_held_out(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    rows = placed(path)
    sides = []
    for for_test in (False, True):
        split = read(tmp_path, tokenizer, split_of(path, hold_out=8.0, for_test=for_test))
        places = [pair.row.where for pair in split.pairs]
        assert list(split.encoded) == direct([row for row in rows if row[0] in places], tokenizer)
        sides.append(places)
    assert sorted([*sides[0], *sides[1]]) == sorted(where for where, _ in rows)
    assert len(sides[1]) == 8


@pytest.mark.parametrize(("shares", "for_test"), [([0.7, 0.3], False), ([None, None], False), ([None, None], True)])
def test_mixtures(tmp_path: Path, tokenizer: Tokenizer, shares: list[float | None], for_test: bool) -> None:
    files = [write_jsonl(tmp_path / f"{name}.jsonl", odd_rows(count)) for name, count in (("a", 23), ("b", 11))]
    rows = {where: columns for path in files for where, columns in placed(path)}
    split = read(tmp_path, tokenizer, split_of(*files, shares=shares, for_test=for_test))
    found = [(pair.row.where, rows[pair.row.where]) for pair in split.pairs]
    assert len({where for where, _ in found}) == len(found) >= 30
    assert list(split.encoded) == direct(found, tokenizer)
    for pair, (where, columns) in zip(split.pairs, found, strict=True):
        assert pair.row.columns == {**columns, "mixture_source": Path(where.rpartition(":")[0]).stem}
    assert [split.pairs[i].row for i in range(len(found))] == [pair.row for pair in split.pairs]


def chat_rows(count: int) -> list[dict[str, Any]]:
    def say(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    return [
        {
            "prompt": [say("user", "forbidden" if i % 5 == 3 else f"{row['prompt']} {'long ' * (9 * (i % 3))}")],
            "chosen": [say("assistant", row["chosen"].strip())],
            "rejected": [say("assistant", row["rejected"].strip())],
            "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}] if i % 4 == 1 else None,
        }
        for i, row in enumerate(pair_rows(count))
    ]


@pytest.mark.parametrize("templates", [(), (("Be kind: ", ""), ("", " (be rude)"))])
def test_conversations(tmp_path: Path, tokenizer: Tokenizer, templates: tuple[tuple[str, str], ...]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", chat_rows(22))
    encoder, known, bad = ChatEncoder(tokenizer, CHAT), [], []
    stats = ChatStats()
    for where, columns in placed(path):
        conversation = preference_conversation(columns)
        row = encode_chat(conversation, where, encoder, tokenizer.bos, LIMITS, stats, templates)
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            known.append(
                EncodedPair(len(known), where, row.prompt, *row.responses, opening=row.opening, framed=row.framed)
            )
    assert len(bad) == 4
    for _ in range(2):
        vocabulary_ = vocabulary(tokenizer)
        options = ReadOptions("skip", LIMITS, chat=CHAT, templates=templates, store=RowStore(tmp_path / "cache"))
        split = read_split(split_of(path), options, vocabulary_)
        assert list(split.encoded) == known
        assert [pair.row.where for pair in split.pairs] == [pair.where for pair in known]
        assert [pair.index for pair in split.pairs] == list(range(len(known)))
        assert [pair.conversation for pair in split.pairs] == [
            preference_conversation(pair.row.columns) for pair in split.pairs
        ]
        assert split.stops == stats.stops
        assert "skipped 4 of 22 rows (invalid):" in split.notices
        # What is said of the template does not depend on whether it was used by this process.
        assert isinstance(vocabulary_.chat, ChatEncoder)
        assert (vocabulary_.chat.used, vocabulary_.chat.observed) == (True, encoder.observed)
        assert vocabulary_.chat.notices() == encoder.notices()
        assert vocabulary_.chat.record() == encoder.record()
    with pytest.raises(DataError, match="not this") as caught:
        read(tmp_path, tokenizer, split_of(path))
    assert caught.value.details == tuple(map(str, bad))


def test_pairs_that_cannot_be_trained(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = pair_rows(12)
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[7] = {"prompt": "word " * 30, "chosen": "c", "rejected": "d"}
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    for limits in (LIMITS, Limits(30, 30)):
        split = read(tmp_path, tokenizer, split_of(path), limits=limits)
        in_memory = Split(split.source, list(split.pairs), list(split.encoded))
        kept, messages = drop_untrainable(split)
        assert (list(kept), messages) == drop_untrainable(in_memory)
        assert 3 not in [pair.index for pair in kept]
        assert messages


def test_columns_that_no_row_has_need_no_walk(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", odd_rows(9))
    pairs = read(tmp_path, tokenizer, split_of(path)).pairs
    assert isinstance(pairs, StoredPairs)
    assert list(rows_with(pairs, ("rejected_weight",))) == []
    assert len(list(rows_with(pairs, ("rejected_weight", "chosen_weight")))) == 9
    assert len(list(rows_with(list(pairs), ("rejected_weight",)))) == 9


# Once -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was done: `read` for each file that was read, `tokenize` for each chunk."""
    done: list[str] = []

    def counting(module: Any, name: str, label: str) -> None:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: done.append(label) or function(*given))

    counting(pairs_module, "read_rows", "read")
    counting(tokenizing, "_encode", "tokenize")
    return done


def test_the_second_start_neither_reads_nor_tokenizes(tmp_path: Path, tokenizer: Tokenizer, work: list[str]) -> None:
    rows = pair_rows(30)
    rows[4]["rejected"], rows[5]["prompt"] = rows[4]["chosen"], "a</s>b<|endoftext|>"
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    one = read(tmp_path, tokenizer, split_of(path))
    assert work == ["read", *["tokenize"] * 8]
    work.clear()
    two = read(tmp_path, tokenizer, split_of(path))
    assert work == []
    assert list(one.encoded) == list(two.encoded)
    assert list(one.pairs) == list(two.pairs)
    assert (one.notices, one.warnings, one.stops) == (two.notices, two.warnings, two.stops)
    assert one.warnings


Change = Callable[[DatasetSplit, Tokenizer], tuple[DatasetSplit, Tokenizer, dict[str, Any]]]
CHANGES: dict[str, tuple[str, Change]] = {
    "max_length": ("tokenize", lambda split, tok: (split, tok, {"limits": Limits(39, 20)})),
    "max_prompt_length": ("tokenize", lambda split, tok: (split, tok, {"limits": Limits(40, 19)})),
    "keep_prompt": ("tokenize", lambda split, tok: (split, tok, {"limits": replace(LIMITS, keep_prompt="start")})),
    "tokenizer": ("tokenize", lambda split, tok: (split, replace(tok, digest="another"), {})),
    "special tokens": ("tokenize", lambda split, tok: (split, replace(tok, parses_data=True), {})),
    "limit": ("read tokenize", lambda split, tok: (replace(split, limit=12), tok, {})),
    "hold-out": ("tokenize", lambda split, tok: (replace(split, hold_out=3.0), tok, {})),
    "columns": (
        "read tokenize",
        lambda split, tok: (replace(split, parts=(replace(split.parts[0], columns=Columns("chosen")),)), tok, {}),
    ),
    "bad rows": ("read tokenize", lambda split, tok: (split, tok, {"on_bad_row": "skip"})),
    "at_start": (
        "tokenize",
        lambda split, tok: (split, tok, {"vocabulary": vocabulary_of(tok, ChatEncoder(tok, CHAT), at_start=True)}),
    ),
}


@pytest.mark.parametrize(("again", "change"), CHANGES.values(), ids=CHANGES.keys())
def test_what_the_tokens_depend_on_is_part_of_the_key(
    tmp_path: Path, tokenizer: Tokenizer, work: list[str], again: str, change: Change
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(15))
    read(tmp_path, tokenizer, split_of(path))
    work.clear()
    split, changed, how = change(split_of(path), tokenizer)
    store = RowStore(tmp_path / "cache")
    vocabulary_ = how.pop("vocabulary", None) or vocabulary(changed)
    options = ReadOptions(**{"on_bad_row": "error", "limits": LIMITS, "chat": CHAT, **how}, store=store)
    read_split(split, options, vocabulary_)
    assert " ".join(dict.fromkeys(work)) == again


def test_content_names_and_code_are_part_of_the_key(
    tmp_path: Path, tokenizer: Tokenizer, work: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(15))
    read(tmp_path, tokenizer, split_of(path))
    everything = ["read", *["tokenize"] * 4]
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    path.write_text(path.read_text().replace("bread", "beard"))
    for changed in (path, copy):
        work.clear()
        assert all(pair.where.startswith(str(changed)) for pair in read(tmp_path, tokenizer, split_of(changed)).encoded)
        assert work == everything
    work.clear()
    monkeypatch.setattr("tisdpo_cli.data.row_store.REVISION", -1)
    read(tmp_path, tokenizer, split_of(path))
    assert work == everything


def test_the_chat_template_is_part_of_the_key(tmp_path: Path, tokenizer: Tokenizer, work: list[str]) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", [row for i, row in enumerate(chat_rows(15)) if i % 5 != 3])
    dated = "{{ strftime_now('%Y') }}" + TEMPLATE
    options = [
        (CHAT, ()),
        (replace(CHAT, template=dated), ()),
        (replace(CHAT, template=dated, day=date(2024, 1, 1)), ()),
        (replace(CHAT, kwargs={"tone": "kind"}), ()),
        (CHAT, (("Be kind: ", ""),)),
    ]
    for known in (False, True):
        for chat, templates in options:
            work.clear()
            store = RowStore(tmp_path / "cache")
            how = ReadOptions("error", LIMITS, chat=chat, templates=templates, store=store)
            read_split(split_of(path), how, vocabulary_of(tokenizer, ChatEncoder(tokenizer, chat)))
            assert ("tokenize" in work) != known
            work.clear()


def test_a_tokenizer_of_which_not_everything_is_known_is_used_each_time(
    tmp_path: Path, tokenizer: Tokenizer, work: list[str]
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(6))
    plain = vocabulary(tokenizer)
    unknown = Vocabulary(plain.prompts, plain.responses, plain.bos, plain.eos)
    store = RowStore(tmp_path / "cache")
    for _ in range(2):
        split = read_split(split_of(path), ReadOptions("error", LIMITS, store=store), unknown)
        assert list(split.encoded) == direct(placed(path), tokenizer)
    assert work == ["read", *["tokenize"] * 4]


# Many -------------------------------------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the numbers that are kept of each: its lengths, its hashes, its place."""
    monkeypatch.setattr("tisdpo_cli.data.stored_pairs._BATCH_ROWS", 100)
    monkeypatch.setattr(tokenizing, "_CHUNK", 50)
    letters = Vocabulary(lambda texts: [list(t.encode()) for t in texts], lambda t: [list(x.encode()) for x in t], 1, 2)
    peaks, kept = [], []
    for count in (300, 1500):
        path = write_jsonl(tmp_path / f"{count}.jsonl", [{**row, "more": "x" * 300} for row in pair_rows(count)])
        options = ReadOptions("error", LIMITS, store=RowStore(tmp_path / "cache"))
        tracemalloc.start()
        split = read_split(split_of(path), options, letters)
        tokens, _ = drop_untrainable(split)
        assert sum(len(pair.prompt) for pair in tokens) > 0
        assert sum(len(pair.row.columns["more"]) for pair in split.pairs) == 300 * count
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        peaks.append(peak)
        kept.append(held)
        del split, tokens
    assert (kept[1] - kept[0]) / 1200 < 250, "bytes per pair; as objects they took thousands"
    assert (peaks[1] - peaks[0]) / 1200 < 500


@pytest.mark.slow
@pytest.mark.parametrize("chat", [False, True])
def test_several_processes_give_the_same_file(
    tmp_path: Path, tokenizer: Tokenizer, chat: bool, monkeypatch: pytest.MonkeyPatch, work: list[str]
) -> None:
    rows = chat_rows(122) if chat else pair_rows(122)
    path = write_jsonl(tmp_path / "train.jsonl", rows)
    read(tmp_path / "one", tokenizer, split_of(path), on_bad_row="skip")
    work.clear()
    monkeypatch.setattr(tokenizing, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenizing, "_cores", lambda: 2)
    read(tmp_path / "two", tokenizer, split_of(path), on_bad_row="skip")
    assert work == ["read"]
    files = [{file.name: file.read_bytes() for file in (tmp_path / name).rglob("*.arrow")} for name in ("one", "two")]
    assert len(files[0]) == 2
    assert files[0] == files[1]


@pytest.mark.slow
def test_what_other_processes_cannot_do_is_done_here(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    monkeypatch.setattr(tokenizing, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenizing, "_cores", lambda: 2)
    known = direct(placed(path), tokenizer)
    # Sent, it cannot be opened there.
    monkeypatch.setattr(tokenizing.pickle, "dumps", lambda _job: b"no pickle")
    assert list(read(tmp_path / "one", tokenizer, split_of(path)).encoded) == known

    def refuse(_job: object) -> bytes:
        raise TypeError("cannot be sent")

    monkeypatch.setattr(tokenizing.pickle, "dumps", refuse)
    assert list(read(tmp_path / "two", tokenizer, split_of(path)).encoded) == known


@pytest.mark.parametrize("fault", [PermissionError(13, "Permission denied"), ImportError("no sem_open"), "child"])
def test_without_processes_pairs_are_tokenized_here(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, fault: Exception | str, work: list[str]
) -> None:
    """As without a writable `/dev/shm`; and a process that was started for some work starts none."""
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    monkeypatch.setattr(tokenizing, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenizing, "_cores", lambda: 2)
    warned: list[str] = []

    def no_pool(*_given: object) -> object:
        assert isinstance(fault, Exception), "no pool in a child"
        raise fault

    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", no_pool)
    if fault == "child":
        monkeypatch.setattr(tokenizing.multiprocessing, "parent_process", lambda: object())
    known = direct(placed(path), tokenizer)
    split = read(tmp_path, tokenizer, split_of(path), store=RowStore(tmp_path / "cache", warned.append))
    assert list(split.encoded) == known
    assert warned == []
    assert work.count("read") == 1


def test_where_no_process_can_start_the_rest_is_tokenized_here(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    monkeypatch.setattr(tokenizing, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenizing, "_cores", lambda: 2)

    def no_room(_process: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.context.SpawnProcess.start", no_room)
    known = direct(placed(path), tokenizer)
    assert list(read(tmp_path, tokenizer, split_of(path)).encoded) == known


def test_processes_end_when_the_work_is_given_up(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks that are under way would be finished first."""
    path = write_jsonl(tmp_path / "train.jsonl", pair_rows(30))
    monkeypatch.setattr(tokenizing, "_BYTES_PER_PROCESS", 1)
    monkeypatch.setattr(tokenizing, "_cores", lambda: 2)
    monkeypatch.setattr(tokenizing, "_SHOWN_FROM", 0)
    monkeypatch.setattr(tokenizing, "_job", [])
    ended: list[str] = []
    monkeypatch.setattr(tokenizing.Spawning, "terminate", lambda _self: ended.append("ended"))

    class Here:
        def __init__(self, _processes: int, _context: object, _start: object, job: tuple[bytes]) -> None:
            tokenizing._job.append(pickle.loads(job[0]))

        def submit(self, work: Callable[..., Any], *given: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(work(*given))
            return future

        def shutdown(self, **_how: object) -> None:
            """Nothing is left."""

    monkeypatch.setattr(tokenizing, "ProcessPoolExecutor", Here)

    class Stopped:
        def advance(self, _units: int, _figures: object) -> None:
            raise KeyboardInterrupt

    def progress(*_given: object) -> Any:
        return nullcontext(Stopped())

    with pytest.raises(KeyboardInterrupt):
        read(tmp_path, tokenizer, split_of(path), store=RowStore(tmp_path / "cache", progress=progress))
    assert ended == ["ended"]
    assert len(read(tmp_path, tokenizer, split_of(path)).encoded) == 30
    assert ended == ["ended"]
