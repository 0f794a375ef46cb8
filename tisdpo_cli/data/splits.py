"""Reads and tokenizes the splits of a preference dataset, and drops the pairs that cannot be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tisdpo_cli.data.chat_tokens import ChatOptions
from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.pairs import Pair, read_split_pairs
from tisdpo_cli.data.row_store import RowStore
from tisdpo_cli.data.stored_pairs import StoredPairs
from tisdpo_cli.data.stored_tokens import EncodedPairs, select_pairs, untrainable
from tisdpo_cli.data.tokenizing import TokenOptions, tokenize
from tisdpo_cli.data.tokens import EncodedPair, Limits
from tisdpo_cli.data.vocabulary import Vocabulary
from tisdpo_cli.errors import DataError, naming_out_of_memory


@dataclass
class Split:
    """One split: its pairs as text and as tokens, in the same order, and notices and warnings for the user.

    Attributes:
        source: where it was read.
        pairs: its pairs, which may be read from a file as they are asked for, again each time.
        encoded: likewise.
        stops: ids that end the answers of conversations.
        sizes: counts and lengths; see `TruncationStats.sizes`.
    """

    source: DatasetSplit
    pairs: Sequence[Pair]
    encoded: Sequence[EncodedPair]
    notices: list[str] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)
    sizes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ReadOptions:
    """How to read and truncate rows.

    Attributes:
        on_bad_row: `error` or `skip`.
        limits: maximum lengths.
        parse_data: whether special tokens spelled out in rows become these tokens.
        chat: how conversations are rendered.
        templates: prompt templates to put around the prompts of conversations, each the text before and after.
        store: where rows and tokens are kept.
    """

    on_bad_row: str
    limits: Limits
    parse_data: bool = False
    chat: ChatOptions | None = None
    templates: tuple[tuple[str, str], ...] = ()
    store: RowStore = field(default_factory=RowStore, compare=False)


@naming_out_of_memory("reading")
def read_split(source: DatasetSplit, options: ReadOptions, vocabulary: Vocabulary, first: int | None = None) -> Split:
    """Read and tokenize the valid rows of a split.

    Args:
        source: the split.
        options: limits, and what to do with invalid rows.
        vocabulary: tokenizer of the model in use.
        first: how many rows to use from the start; all where None.

    Raises:
        DataError: rows are invalid, or a prompt has no tokens.
    """
    rows = read_split_pairs(source, options.on_bad_row, options.store)
    pairs = rows.pairs.first(first)
    how = TokenOptions(options.limits, options.templates, options.on_bad_row)
    tokens = tokenize(pairs, how, vocabulary, options.store)
    if len(tokens.encoded) < len(pairs):
        pairs = pairs.select(tokens.encoded.column("row"))
    named = [f"{source.name}: {message}" for message in tokens.notices]
    warnings = [f"{source.name}: {tokens.warning}"] if tokens.warning else []
    notices = [*rows.notices, *tokens.skipped, *named]
    return Split(source, pairs, tokens.encoded, notices, tokens.stops, warnings, tokens.sizes)


def pairs_behind(split: Split, encoded: Sequence[EncodedPair]) -> Sequence[Pair]:
    """The pairs of a split whose tokens these are, in the same order."""
    if isinstance(encoded, EncodedPairs) and isinstance(split.pairs, StoredPairs):
        return split.pairs.select(encoded.places)
    return [split.pairs[pair.index] for pair in encoded]


def drop_untrainable(split: Split) -> tuple[Sequence[EncodedPair], list[str]]:
    """Drop pairs with equal responses or without response tokens.

    Returns:
        The remaining pairs, and messages that count the dropped ones.

    Raises:
        DataError: no pair remains.
    """
    are_equal, are_empty = untrainable(split.encoded)
    equal, empty = int(are_equal.sum()), int(are_empty.sum())
    kept = np.flatnonzero(~are_equal & ~are_empty)
    messages = []
    if equal:
        messages.append(f"{split.source.name}: {equal} pairs dropped: equal responses (tokenized and truncated)")
    if empty:
        messages.append(f"{split.source.name}: {empty} pairs dropped: no response token after truncation")
    if not len(kept):
        raise DataError(
            f"none of {len(split.encoded)} pairs can be trained: {equal} have equal responses, {empty} have "
            "no response token after truncation",
            where=split.source.where,
            fix="check the data, or raise --max-length",
        )
    return select_pairs(split.encoded, kept) if equal or empty else split.encoded, messages
