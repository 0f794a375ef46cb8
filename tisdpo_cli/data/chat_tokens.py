"""Encodes and truncates conversations: whole old turns go first, then tokens. Knows a template only as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from tisdpo_cli.data.messages import Conversation, with_other_text, with_template, without_oldest
from tisdpo_cli.data.rows import BadRow
from tisdpo_cli.data.tokens import Limits, Response, cut
from tisdpo_cli.data.vocabulary import ChatIds, EncodeChat
from tisdpo_cli.errors import DataError


@dataclass(frozen=True)
class ChatOptions:
    """How conversations are rendered.

    Attributes:
        template: text of the template, or None for the tokenizer's own.
        kwargs: variables for the template.
        day: what the template's clock says.
    """

    template: str | None
    kwargs: dict[str, Any]
    day: date


@dataclass(frozen=True)
class EncodedChat:
    """An encoded and truncated conversation.

    Attributes:
        prompt: ids of the prompt.
        responses: the answers after truncation, each with the stop if it was not truncated.
        whole_prompt: number of ids of the prompt before truncation.
        stop: id that ends each answer.
        framed: ids of the prompt under each prompt template.
        opening: number of ids at the end of the prompt that the template writes before every answer.
    """

    prompt: list[int]
    responses: list[Response]
    whole_prompt: int
    stop: int
    opening: int
    framed: tuple[list[int], ...] = ()


@dataclass
class ChatStats:
    """Counts what was left out of the prompts of a split."""

    shortened: int = 0
    messages: int = 0
    stops: set[int] = field(default_factory=set)

    def add(self, other: ChatStats) -> None:
        """Add what was counted over further rows."""
        self.shortened += other.shortened
        self.messages += other.messages
        self.stops |= other.stops

    def notices(self, limits: Limits) -> list[str]:
        """Return messages for the user."""
        if not self.shortened:
            return []
        return [
            f"left the {self.messages} oldest messages out of {self.shortened} conversations (prompts to "
            f"{limits.max_prompt_length} tokens)"
        ]


def encode_chat(
    conversation: Conversation,
    where: str,
    encode: EncodeChat,
    bos: int | None,
    limits: Limits,
    stats: ChatStats,
    templates: Sequence[tuple[str, str]] = (),
) -> EncodedChat | BadRow:
    """Encode a conversation, and truncate it if prompt and longest answer exceed `max_length`.

    Prompt templates are added to what is left, so that they change nothing about which tokens are kept.

    Args:
        conversation: prompt and answers.
        where: its place.
        encode: chat template.
        bos: id that is never cut off where the template begins with it.
        limits: maximum lengths.
        stats: counts what is left out.
        templates: prompt templates, each the text before and after the prompt; see `with_template`.

    Returns:
        The conversation, or the reason why the template cannot show it.
    """
    try:
        ids, dropped = encode(conversation, None)
        whole_prompt, stop = len(ids.prompt), ids.stop
        longest = max(len(answer) for answer in ids.answers) + 1
        if whole_prompt + longest > limits.max_length and whole_prompt > limits.max_prompt_length:
            ids, dropped = encode(conversation, limits.max_prompt_length)
        head = ids.prompt[:1] if bos is not None and ids.prompt[:1] == [bos] else []
        prompt, responses = cut(ids.prompt[len(head) :], list(ids.answers), head[0] if head else None, stop, limits)
        kept = _kept(len(head), len(prompt), len(ids.prompt), limits)
        shown = without_oldest(conversation, dropped)
        framed = tuple(_framed(shown, template, ids, head, kept, encode) for template in templates)
    except DataError as error:
        return BadRow(where, error.what)
    stats.shortened += dropped > 0
    stats.messages += dropped
    stats.stops.add(stop)
    return EncodedChat(prompt, responses, whole_prompt, stop, ids.opening, framed)


def _kept(head: int, kept: int, whole: int, limits: Limits) -> range:
    """The positions of a prompt of `whole` ids that are left after truncation to `kept`, without its BOS."""
    return range(head + whole - kept, whole) if limits.keep_prompt == "end" else range(head, kept)


def _framed(
    conversation: Conversation,
    template: tuple[str, str],
    ids: ChatIds,
    head: list[int],
    kept: range,
    encode: EncodeChat,
) -> list[int]:
    """Ids of a prompt under a prompt template, truncated as without it.

    Args:
        conversation: without the messages that were left out.
        template: text before and after the prompt.
        ids: the conversation without the template, not truncated.
        head: the BOS that truncation spares, if any.
        kept: positions of its prompt that truncation leaves, beside the BOS.
        encode: chat template.

    Raises:
        DataError: the chat template cannot show it, or changes an answer.
    """
    plain, before = ids.prompt, _templated(conversation, (template[0], ""), ids, encode)
    both = _templated(conversation, template, ids, encode) if template[1] else before
    if len(head) + len(kept) == len(plain):
        return both
    # What the template adds stays whole, with its turn, and the frame of the turn whose text follows.
    opening, begin = head, 0
    if before != plain:
        other = with_other_text(conversation)
        begin, _ = _difference(plain, _templated(other, ("", ""), ids, encode))
        length, _ = _difference(before, _templated(other, (template[0], ""), ids, encode))
        opening = before[:length]
    start, end = max(kept.start, begin), max(kept.stop, begin)
    rest = plain[start:end]
    at, behind = _difference(before, both)
    added = both[at : len(both) - (len(before) - behind)]
    at, behind = (min(max(i - len(before) + len(plain) - start, 0), len(rest)) for i in (at, behind))
    return [*opening, *rest[:at], *added, *rest[behind:]]


def _templated(conversation: Conversation, template: tuple[str, str], ids: ChatIds, encode: EncodeChat) -> list[int]:
    framed, _ = encode(with_template(conversation, *template), None)
    if (tuple(framed.answers), framed.stop) != (tuple(ids.answers), ids.stop):
        raise DataError("the chat template shows an answer in another way under the prompt template")
    return framed.prompt


def _difference(plain: list[int], changed: list[int]) -> tuple[int, int]:
    """Where ids differ from others, as (begin, end) in the first.

    >>> _difference([1, 2, 3], [1, 9, 9, 2, 3])
    (1, 1)
    """
    shortest = min(len(plain), len(changed))
    begin = next((i for i in range(shortest) if plain[i] != changed[i]), shortest)
    same = next((i for i in range(shortest - begin) if plain[-1 - i] != changed[-1 - i]), shortest - begin)
    return begin, len(plain) - same


def response_ids(
    conversations: Sequence[Conversation], wheres: Sequence[str], encode: EncodeChat
) -> list[tuple[tuple[list[int], ...], int]]:
    """Return the ids of the untruncated answers of each conversation, without the stop, and the stop.

    Raises:
        DataError: the template cannot show a conversation.
    """
    found = []
    for conversation, where in zip(conversations, wheres, strict=True):
        try:
            ids, _ = encode(conversation, None)
        except DataError as error:
            raise DataError(error.what, where=where) from error
        found.append((ids.answers, ids.stop))
    return found
