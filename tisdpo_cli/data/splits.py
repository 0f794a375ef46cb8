"""Reads and tokenizes the splits of a preference dataset, and drops the pairs that cannot be trained."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tisdpo_cli.data.chat_tokens import ChatOptions, ChatStats, encode_chat
from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.pairs import Pair, read_split_pairs
from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.tokens import EncodedPair, Limits, TruncationStats, Vocabulary, encode_pairs
from tisdpo_cli.errors import DataError, naming_out_of_memory


@dataclass
class Split:
    """One split: its pairs as text and as tokens, in the same order, and notices and warnings for the user.

    Attributes:
        source: where it was read.
        stops: ids that end the answers of conversations.
    """

    source: DatasetSplit
    pairs: list[Pair]
    encoded: list[EncodedPair]
    notices: list[str] = field(default_factory=list)
    stops: set[int] = field(default_factory=set)
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ReadOptions:
    """How to read and truncate rows.

    Attributes:
        on_bad_row: `error` or `skip`.
        limits: maximum lengths.
        parse_data: whether special tokens spelled out in rows become these tokens.
        chat: how conversations are rendered.
        templates: prompt templates to put around the prompts of conversations, each the text before and after.
    """

    on_bad_row: str
    limits: Limits
    parse_data: bool = False
    chat: ChatOptions | None = None
    templates: tuple[tuple[str, str], ...] = ()


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
    rows = read_split_pairs(source, options.on_bad_row)
    pairs = rows.pairs[:first] if first is not None else rows.pairs
    if any(pair.conversation is not None for pair in pairs):
        return _read_conversations(source, pairs, rows.notices, options, vocabulary)
    encoded, stats = encode_pairs(
        [pair.prompt for pair in pairs],
        [pair.chosen for pair in pairs],
        [pair.rejected for pair in pairs],
        [pair.row.where for pair in pairs],
        vocabulary,
        options.limits,
    )
    unprompted = next((pair for pair in encoded if not pair.prompt), None)
    if unprompted is not None:
        raise DataError(
            "the prompt has no tokens, so nothing predicts the first response token", where=unprompted.where
        )
    messages = [f"{source.name}: {message}" for message in stats.messages(options.limits)]
    marked = stats.marked.warning(stats.rows)
    warnings = [f"{source.name}: {marked}"] if marked else []
    return Split(source, pairs, encoded, [*rows.notices, *messages], warnings=warnings)


def _read_conversations(
    source: DatasetSplit, pairs: list[Pair], notices: list[str], options: ReadOptions, vocabulary: Vocabulary
) -> Split:
    stats, chat_stats = TruncationStats(), ChatStats()
    kept: list[Pair] = []
    encoded: list[EncodedPair] = []
    bad: list[BadRow] = []
    for pair in pairs:
        assert pair.conversation is not None
        encode, bos, templates = vocabulary.chat, vocabulary.bos, options.templates
        chat = encode_chat(pair.conversation, pair.row.where, encode, bos, options.limits, chat_stats, templates)
        if isinstance(chat, BadRow):
            bad.append(chat)
            continue
        chosen, rejected = chat.responses
        kept.append(replace(pair, index=len(kept)))
        encoded.append(
            EncodedPair(len(encoded), pair.row.where, chat.prompt, chosen, rejected, chat.opening, chat.framed)
        )
        stats.count(encoded[-1], chat.whole_prompt, chat.whole_prompt)
    skipped = handle_bad_rows(bad, len(pairs), options.on_bad_row)
    messages = [*stats.messages(options.limits), *chat_stats.notices(options.limits)]
    named = [f"{source.name}: {message}" for message in messages]
    return Split(source, kept, encoded, [*notices, *skipped, *named], chat_stats.stops)


def drop_untrainable(split: Split) -> tuple[list[EncodedPair], list[str]]:
    """Drop pairs with equal responses or without response tokens.

    Returns:
        The remaining pairs, and messages that count the dropped ones.

    Raises:
        DataError: no pair remains.
    """
    equal = [p for p in split.encoded if p.chosen.ids == p.rejected.ids]
    empty = [p for p in split.encoded if p.chosen.ids != p.rejected.ids and not (p.chosen.kept and p.rejected.kept)]
    dropped = {p.index for p in equal} | {p.index for p in empty}
    kept = [p for p in split.encoded if p.index not in dropped]
    messages = []
    if equal:
        messages.append(f"{split.source.name}: {len(equal)} pairs dropped: equal responses (tokenized and truncated)")
    if empty:
        messages.append(f"{split.source.name}: {len(empty)} pairs dropped: no response token after truncation")
    if not kept:
        raise DataError(
            f"none of {len(split.encoded)} pairs can be trained: {len(equal)} have equal responses, {len(empty)} have "
            "no response token after truncation",
            where=split.source.where,
            fix="check the data, or raise --max-length",
        )
    return kept, messages
