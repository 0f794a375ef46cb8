"""The rows of a split from those of its parts: mixed by shares, held out, limited. Knows no columns and no files.

Nothing here is random: the same rows are chosen, in the same order, in every run and on every machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.errors import DataError, UsageError

# Positions of rows, [n] int64.
Positions = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Rows:
    """The usable rows of a part: how many, and whether they hold messages."""

    count: int
    chat: bool


def combine(
    split: DatasetSplit, parts: Sequence[Rows], prompts: Callable[[], Iterable[str]]
) -> tuple[Positions, list[str]]:
    """Return the rows in use in their order, as positions in all parts one after the other, and messages for the user.

    Args:
        split: says how.
        parts: the usable rows of each part.
        prompts: gives the prompt of every row of all parts.

    Raises:
        DataError: some parts hold messages and others texts.
        UsageError: a share leaves no row, or holding out does.
    """
    kinds = [rows.chat for rows in parts]
    if len({rows.chat for rows in parts if rows.count}) > 1:
        chat, text = split.parts[kinds.index(True)].dataset, split.parts[kinds.index(False)].dataset
        what = f"{chat} holds messages and {text} texts, which cannot be mixed"
        raise DataError(what, where="--dataset", fix="render the messages to text, or turn the texts into messages")
    rows, notices = mix(split, [rows.count for rows in parts])
    rest, held = hold_out(rows, split.hold_out, split.where)
    if split.for_test and split.hold_out is not None:
        return held, notices
    if len(held):
        hashes = np.fromiter((short_hash(prompt.encode()) for prompt in prompts()), np.uint64)
        shared = int(np.isin(hashes[held], hashes[rest]).sum())
        known = f"; {shared} of them have a prompt that training rows have too" if shared else ""
        notices.append(f"{split.name}: {len(held)} rows held out for evaluation{known}")
    return rest[: split.limit], notices


def mix(split: DatasetSplit, counts: Sequence[int]) -> tuple[Positions, list[str]]:
    """Return the rows of a mixture, and a message that counts them.

    With shares, it is the largest mixture in which no row is used twice, evenly interleaved. Without, training rows
    follow part by part; test rows are interleaved, since an evaluation may stop early.

    Raises:
        UsageError: a share is too small for one row.
    """
    if len(counts) == 1:
        return np.arange(counts[0]), []
    shares = [part.share for part in split.parts if part.share is not None]
    chosen = [np.arange(count) for count in counts]
    if shares:
        size = min(count / share for count, share in zip(counts, shares, strict=True))
        # Room for the rounding of the division.
        samples = [int(size * share + 1e-6) for share in shares]
        if not all(samples):
            what = f"{split.parts[samples.index(0)].dataset} has no row in a mixture with these shares"
            raise UsageError(what, where="--dataset")
        chosen = [np.sort(_positions(count, sample, "mix")) for count, sample in zip(counts, samples, strict=True)]
    total = sum(map(len, chosen))
    listed = ", ".join(
        f"{len(used)} of {count} rows of {part.dataset} ({len(used) / total:.1%})"
        for part, used, count in zip(split.parts, chosen, counts, strict=True)
    )
    begins = np.cumsum([0, *counts])
    rows = np.concatenate([used + begin for used, begin in zip(chosen, begins, strict=False)])
    if shares or split.for_test:
        # A stable sort keeps parts, and rows within them, in order.
        fractions = np.concatenate([(np.arange(len(used)) + 0.5) / max(1, len(used)) for used in chosen])
        rows = rows[np.argsort(fractions, kind="stable")]
    return rows, [f"{split.name}: {listed}"]


def hold_out(rows: Positions, size: float | None, where: str) -> tuple[Positions, Positions]:
    """Return the rows that are not held out and those that are, both in order.

    Args:
        rows: all rows.
        size: how many are held out, or which share of them if below 1; none where None.
        where: the files, for messages.

    Raises:
        UsageError: no row is left on one side.
    """
    if size is None:
        return rows, rows[:0]
    count = round(size * len(rows)) if size < 1 else int(size)
    if not 0 < count < len(rows):
        what = f"holds out {count} of {len(rows)} rows of {where}"
        raise UsageError(what, where="--eval-size", fix="leave rows for both training and evaluation")
    held = np.zeros(len(rows), bool)
    held[_positions(len(rows), count, "hold out")] = True
    return rows[~held], rows[held]


def _positions(total: int, count: int, purpose: str) -> Positions:
    """So many positions, drawn the same in every run."""
    drawn = np.fromiter((short_hash(f"{purpose} {position}".encode()) for position in range(total)), np.uint64, total)
    return np.argsort(drawn, kind="stable")[:count]


def short_hash(*texts: bytes) -> int:
    """A hash of 8 bytes, never 0: two of 100 million different texts share one with a probability of 3 in 10,000.

    Several texts hash by their lengths too.
    """
    digest = hashlib.blake2b(digest_size=8)
    for text in texts:
        digest.update(len(text).to_bytes(8, "big") + text if len(texts) > 1 else text)
    return int.from_bytes(digest.digest(), "big") or 1
