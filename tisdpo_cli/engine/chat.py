"""Conversations under the chat template of a model, which is compiled when the first one comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property
from typing import Any

from tisdpo_cli.data.chat_tokens import ChatOptions
from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.tokens import Vocabulary
from tisdpo_cli.errors import DataError, ModelError, UsageError
from tisdpo_cli.model.chat_template import ChatTemplate, EncodedConversation
from tisdpo_cli.model.tokenizer import Tokenizer

# What a template's clock says unless the user names a day: results must not change overnight.
DEFAULT_DAY = date(2025, 1, 1)


def vocabulary_of(tokenizer: Tokenizer, chat: ChatEncoder | None = None, at_start: bool = False) -> Vocabulary:
    """What tokenization needs of a tokenizer.

    Args:
        tokenizer: of the model in use.
        chat: encodes conversations; by the tokenizer's own template where None.
        at_start: whether responses are encoded as at the start of a text; see `Tokenizer.encode_responses`.
    """

    def responses(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer.encode_responses(texts, at_start)

    def marker(text: str) -> str | None:
        return None if tokenizer.parses_data else tokenizer.texts.marker(text)

    encoder = chat or ChatEncoder(tokenizer)
    return Vocabulary(tokenizer.encode_prompts, responses, tokenizer.bos, tokenizer.eos, marker, encoder)


# Conversations whose boundary of prompt and answer is looked at.
_CHECKED = 100


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Attributes:
        used: whether any conversation was encoded.
    """

    def __init__(self, tokenizer: Tokenizer, options: ChatOptions | None = None) -> None:
        self._tokenizer, self._options = tokenizer, options or ChatOptions(None, {}, DEFAULT_DAY)
        self.used = False
        self._checked = self._apart = 0
        self._last: tuple[Conversation | None, EncodedConversation | None] = (None, None)

    def __call__(self, conversation: Conversation, limit: int | None) -> tuple[EncodedConversation, int]:
        """Encode a conversation, without its oldest turns if its prompt has more ids than a limit.

        Returns:
            The conversation, and how many messages were left out.

        Raises:
            DataError: the template cannot show it.
            ModelError: there is no template, or it is invalid.
            UsageError: special tokens in data are to be parsed.
        """
        if self._tokenizer.parses_data:
            raise UsageError(
                "rows of messages are rendered here, and their text stays text",
                where="--special-tokens-in-data parse",
                fix="leave it out",
            )
        self.used = True
        prompt, answers = conversation.prompt, conversation.answers
        tools, kwargs = conversation.tools, conversation.template_kwargs
        if limit is None:
            encoded = self.template.encode(prompt, answers, tools, kwargs)
            # What is too long is asked for again, with a limit.
            self._last = conversation, encoded
            if self._checked < _CHECKED:
                self._checked += 1
                self._apart += not self.template.joins(encoded)
            return encoded, 0
        last, whole = self._last
        return self.template.shortened(prompt, answers, limit, tools, kwargs, whole if last is conversation else None)

    @cached_property
    def template(self) -> ChatTemplate:
        """The compiled template."""
        options = self._options
        if options.template is None and not self._tokenizer.backend.chat_template:
            raise ModelError(
                "the rows hold conversations, but the tokenizer has no chat template",
                where=str(self._tokenizer.source or "the tokenizer"),
                fix="give one with --chat-template FILE, or use the instruct model",
            )
        return ChatTemplate(self._tokenizer.backend, options.template, options.kwargs, options.day)

    def notices(self) -> list[str]:
        """What the user should know of the template."""
        if not self.used:
            given = self._options.template is not None or self._options.kwargs
            return ["no rows of messages: the chat template is not used"] if given else []
        notices, day = [], self.template.day
        if day is not None:
            notices.append(f"the chat template writes the date: {day.isoformat()} (--chat-date)")
        if self._apart:
            notices.append(
                f"{self._apart} of the first {self._checked} rendered conversations would tokenize differently with "
                "prompt and answer joined; the model generates them apart"
            )
        return notices

    def record(self) -> dict[str, Any] | None:
        """What determines the ids, for a manifest; None if there were no conversations."""
        return self.template.parts if self.used else None

    def check(self, recorded: Mapping[str, Any] | None, where: str) -> None:
        """Check that scores were computed under this template.

        Raises:
            DataError: they were computed under another one.
        """
        if not self.used or recorded is None:
            return
        parts = self.template.parts
        changed = [name for name in parts if recorded.get(name) != parts[name]]
        if changed:
            names = {"template_sha256": "chat template", "kwargs": "--chat-template-kwargs", "day": "--chat-date"}
            raise DataError(
                f"was scored with another {names[changed[0]]}",
                where=where,
                fix="use the options of `tisdpo estimate`, or score again",
            )
