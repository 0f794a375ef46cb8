"""What tokenization needs of a tokenizer, as functions. Knows no rows and no lengths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.errors import DataError

Encode = Callable[[Sequence[str]], list[list[int]]]


class ChatIds(Protocol):
    """A conversation as ids: the prompt, each answer without its stop, and the stop."""

    @property
    def prompt(self) -> list[int]:
        """Ids of the prompt, with the generation prompt."""

    @property
    def answers(self) -> tuple[list[int], ...]:
        """Ids of each answer."""

    @property
    def stop(self) -> int:
        """Id that ends each answer."""

    @property
    def opening(self) -> int:
        """Number of ids at the end of the prompt that stand before every answer."""


# From a conversation and the number of ids that its prompt should have at most (None: all), to its ids and how many old
# messages were left out.
EncodeChat = Callable[[Conversation, int | None], tuple[ChatIds, int]]
# Conversations of which the boundary of prompt and answers is observed.
CHAT_OBSERVED = 100


class ChatCoder(Protocol):
    """Encodes conversations, and observes of the first ones whether prompt and answers joined have the same ids."""

    @property
    def observed(self) -> list[bool]:
        """What was observed, at most of `CHAT_OBSERVED` conversations."""

    def __call__(self, conversation: Conversation, limit: int | None) -> tuple[ChatIds, int]:
        """See `EncodeChat`."""

    def copy(self) -> ChatCoder:
        """The same, with nothing observed."""

    def observe(self, observed: Sequence[bool]) -> None:
        """Count what was observed elsewhere; conversations were encoded."""


class NoChat:
    """Where there is no chat template."""

    def __init__(self) -> None:
        self.observed: list[bool] = []

    def __call__(self, conversation: Conversation, limit: int | None) -> tuple[ChatIds, int]:
        """Refuse a conversation."""
        raise DataError("conversations need a chat template")

    def copy(self) -> ChatCoder:
        """The same."""
        return self

    def observe(self, observed: Sequence[bool]) -> None:
        """Nothing is encoded."""


def _no_marker(_text: str) -> str | None:
    return None


def _unknown(_chat: bool) -> Mapping[str, Any] | None:
    return None


@dataclass(frozen=True)
class Vocabulary:
    """What tokenization needs of a tokenizer.

    Attributes:
        prompts: encodes prompts to ids without BOS and EOS.
        responses: encodes responses, which continue a prompt, to ids without EOS.
        bos: id before each prompt, or None.
        eos: id behind each response.
        chat: encodes conversations.
        marker: returns the first special token that a text spells out and that stays text, or None.
        depends_on: returns, as JSON-able values, everything that the ids of a text (or of a conversation) depend on
            beside it, or None if that is not known.
    """

    prompts: Encode
    responses: Encode
    bos: int | None
    eos: int
    marker: Callable[[str], str | None] = _no_marker
    chat: ChatCoder = field(default_factory=NoChat)
    depends_on: Callable[[bool], Mapping[str, Any] | None] = _unknown
