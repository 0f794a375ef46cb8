"""The rows of a split from those of its parts: mixed by shares, held out, limited. Knows no columns and no files.

Nothing here is random: the same rows are chosen, in the same order, in every run and on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.errors import DataError, UsageError

T = TypeVar("T")


def combine(
    split: DatasetSplit, parts: Sequence[Sequence[T]], prompt: Callable[[T], str], is_chat: Callable[[T], bool]
) -> tuple[list[T], list[str]]:
    """Return the rows in use in their order, and messages for the user.

    Args:
        split: says how.
        parts: the usable rows of each part.
        prompt: gives the prompt of a row.
        is_chat: whether a row holds messages.

    Raises:
        DataError: some parts hold messages and others texts.
        UsageError: a share leaves no row, or holding out does.
    """
    kinds = [rows and is_chat(rows[0]) for rows in parts]
    if len({kind for kind, rows in zip(kinds, parts, strict=True) if rows}) > 1:
        chat, text = split.parts[kinds.index(True)].dataset, split.parts[kinds.index(False)].dataset
        what = f"{chat} holds messages and {text} texts, which cannot be mixed"
        raise DataError(what, where="--dataset", fix="render the messages to text, or turn the texts into messages")
    rows, notices = mix(split, parts)
    rest, held = hold_out(rows, split.hold_out, split.where)
    if split.for_test and split.hold_out is not None:
        return held, notices
    if held:
        prompts = {prompt(row) for row in rest}
        shared = sum(prompt(row) in prompts for row in held)
        known = f"; {shared} of them have a prompt that training rows have too" if shared else ""
        notices.append(f"{split.name}: {len(held)} rows held out for evaluation{known}")
    return rest[: split.limit], notices


def mix(split: DatasetSplit, parts: Sequence[Sequence[T]]) -> tuple[list[T], list[str]]:
    """Return the rows of a mixture, and a message that counts them.

    With shares, it is the largest mixture in which no row is used twice, evenly interleaved. Without, training rows
    follow part by part; test rows are interleaved, since an evaluation may stop early.

    Raises:
        UsageError: a share is too small for one row.
    """
    if len(parts) == 1:
        return list(parts[0]), []
    shares = [part.share for part in split.parts if part.share is not None]
    chosen = [list(rows) for rows in parts]
    if shares:
        size = min(len(rows) / share for rows, share in zip(parts, shares, strict=True))
        # Room for the rounding of the division.
        counts = [int(size * share + 1e-6) for share in shares]
        if not all(counts):
            what = f"{split.parts[counts.index(0)].dataset} has no row in a mixture with these shares"
            raise UsageError(what, where="--dataset")
        chosen = [_sample(rows, count) for rows, count in zip(parts, counts, strict=True)]
    total = sum(map(len, chosen))
    listed = ", ".join(
        f"{len(used)} of {len(rows)} rows of {part.dataset} ({len(used) / total:.1%})"
        for part, used, rows in zip(split.parts, chosen, parts, strict=True)
    )
    in_turn = [
        ((i + 0.5) / len(rows) if shares or split.for_test else 0.0, number, i, row)
        for number, rows in enumerate(chosen)
        for i, row in enumerate(rows)
    ]
    return [row for *_, row in sorted(in_turn, key=lambda entry: entry[:3])], [f"{split.name}: {listed}"]


def hold_out(rows: Sequence[T], size: float | None, where: str) -> tuple[list[T], list[T]]:
    """Return the rows that are not held out and those that are, both in order.

    Args:
        rows: all rows.
        size: how many are held out, or which share of them if below 1; none where None.
        where: the files, for messages.

    Raises:
        UsageError: no row is left on one side.
    """
    if size is None:
        return list(rows), []
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        what = f"holds out {count} of {len(rows)} rows of {where}"
        raise UsageError(what, where="--eval-size", fix="leave rows for both training and evaluation")
    held = set(_positions(len(rows), count, "hold out"))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def _sample(rows: Sequence[T], count: int) -> list[T]:
    return [rows[i] for i in sorted(_positions(len(rows), count, "mix"))]


def _positions(total: int, count: int, purpose: str) -> list[int]:
    """So many positions, drawn the same in every run."""

    def draw(position: int) -> bytes:
        return hashlib.blake2b(f"{purpose} {position}".encode(), digest_size=8).digest()

    return sorted(range(total), key=draw)[:count]
