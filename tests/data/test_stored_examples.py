"""Examples on disk read back as they were written, in any order, and none of them is in memory."""

from __future__ import annotations

import random

import numpy as np
import pytest

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.stored_examples import (
    EncodedExample,
    EncodedExamples,
    Example,
    StoredExamples,
    example_lengths,
    holds_conversations,
    keep_encoded,
    keep_examples,
)

COUNTS = ((3, 2), (0, 1), (1, 1), (1204, 2), (1101, 1))


def example(name: str, chat: bool) -> Example:
    answer = {"role": "assistant", "content": f"{name} ‘é’\n"}
    conversation = Conversation([{"role": "user", "content": name}], (answer,), None, {"thinking": False})
    return Example(f"{name}:1", name, f" {name}", conversation if chat else None)


def parts(chat: bool) -> list[list[list[Example]]]:
    """The examples of every row of parts, most of which give two for a row."""
    return [
        [[example(f"{part}-{row}-{i}", chat) for i in range(each)] for row in range(count)]
        for part, (count, each) in enumerate(COUNTS)
    ]


def kept(of: list[list[list[Example]]], rows: list[int]) -> StoredExamples:
    store = RowStore()
    files = [
        keep_examples(lambda part=part: (one for row in part for one in row), each, store)
        for part, (_, each) in zip(of, COUNTS, strict=True)
    ]
    assert [len(file) for file in files] == [len(part) for part in of]
    assert [list(file.prompts()) for file in files] == [[row[0].prompt for row in part] for part in of]
    return StoredExamples(files, np.array(rows, np.int64))


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("order", ["all", "shuffled", "few", "none"])
def test_examples_come_in_the_order_of_their_rows(order: str, chat: bool) -> None:
    of = parts(chat)
    rows = list(range(sum(map(len, of))))
    if order != "all":
        random.Random(0).shuffle(rows)
    rows = rows[: {"few": 7, "none": 0}.get(order)]
    every = [row for part in of for row in part]
    expected = [one for row in rows for one in every[row]]
    found = kept(of, rows)
    assert list(found) == expected
    assert len(found) == len(expected)
    assert found[3:9] == expected[3:9]
    assert found[::-2] == expected[::-2]
    assert [found[i] for i in (0, -1)] == [expected[i] for i in (0, -1)] if expected else not found
    assert holds_conversations(found) == chat
    with pytest.raises(IndexError):
        found[len(expected)]


def encoded() -> list[EncodedExample]:
    draw = random.Random(1)
    return [
        EncodedExample(
            f"f:{i}",
            draw.choices(range(90_000), k=i % 5),
            draw.choices(range(90_000), k=1 + i % 7),
            i % 3 > 0,
            i % 2,
            i,
        )
        for i in range(2100)
    ]


def test_tokens_read_back() -> None:
    expected = encoded()
    found = keep_encoded(lambda: iter(expected), RowStore())
    assert isinstance(found, EncodedExamples)
    assert list(found) == expected
    assert found[-1] == expected[-1]
    assert found[5:2:-1] == expected[5:2:-1]
    assert example_lengths(found).tolist() == example_lengths(expected).tolist()
    with pytest.raises(IndexError):
        found[len(expected)]


def test_no_example_is_none() -> None:
    found = keep_encoded(lambda: iter(()), RowStore())
    assert list(found) == []
    assert example_lengths(found).shape == example_lengths([]).shape == (0, 2)


def test_an_error_of_reading_passes() -> None:
    def broken():
        yield example("a", False)
        raise ValueError("row 2")

    with pytest.raises(ValueError, match="row 2"):
        keep_examples(broken, 1, RowStore())
