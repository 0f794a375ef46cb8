"""Encodes and truncates conversations: whole old turns go first, then tokens. Knows a template only as a function."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.rows import BadRow
from tisdpo_cli.data.tokens import EncodeChat, Limits, Response, cut
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
        dropped: number of old messages left out.
        stop: id that ends each answer.
    """

    prompt: list[int]
    responses: list[Response]
    whole_prompt: int
    dropped: int
    stop: int


@dataclass
class ChatStats:
    """Counts what was left out of the prompts of a split."""

    shortened: int = 0
    messages: int = 0
    stops: set[int] = field(default_factory=set)

    def notices(self, limits: Limits) -> list[str]:
        """Return messages for the user."""
        if not self.shortened:
            return []
        return [
            f"left the {self.messages} oldest messages out of {self.shortened} conversations (prompts to "
            f"{limits.max_prompt_length} tokens)"
        ]


def encode_chat(
    conversation: Conversation, where: str, encode: EncodeChat, bos: int | None, limits: Limits, stats: ChatStats
) -> EncodedChat | BadRow:
    """Encode a conversation, and truncate it if prompt and longest answer exceed `max_length`.

    Args:
        conversation: prompt and answers.
        where: its place.
        encode: chat template.
        bos: id that is never cut off where the template begins with it.
        limits: maximum lengths.
        stats: counts what is left out.

    Returns:
        The conversation, or the reason why the template cannot show it.
    """
    try:
        ids, dropped = encode(conversation, None)
        whole_prompt, stop = len(ids.prompt), ids.stop
        longest = max(len(answer) for answer in ids.answers) + 1
        if whole_prompt + longest > limits.max_length and whole_prompt > limits.max_prompt_length:
            ids, dropped = encode(conversation, limits.max_prompt_length)
    except DataError as error:
        return BadRow(where, error.what)
    stats.shortened += dropped > 0
    stats.messages += dropped
    stats.stops.add(stop)
    has_bos = bos is not None and ids.prompt[:1] == [bos]
    prompt, responses = cut(ids.prompt[has_bos:], list(ids.answers), bos if has_bos else None, stop, limits)
    return EncodedChat(prompt, responses, whole_prompt, dropped, stop)


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
