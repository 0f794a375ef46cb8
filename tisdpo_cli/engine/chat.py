"""Conversations under the chat template of a model, which is compiled when the first one comes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date
from functools import cached_property, partial
from importlib import metadata
from typing import Any

from tisdpo_cli.data.chat_tokens import ChatOptions
from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.vocabulary import CHAT_OBSERVED, Vocabulary
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

    encoder = chat or ChatEncoder(tokenizer)
    # Nothing here is a function of this call, so that a vocabulary can be sent to another process.
    return Vocabulary(
        tokenizer.encode_prompts,
        partial(tokenizer.encode_responses, at_start=at_start),
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.marker,
        encoder,
        partial(_depends_on, tokenizer, encoder, at_start),
    )


def _depends_on(tokenizer: Tokenizer, encoder: ChatEncoder, at_start: bool, chat: bool) -> dict[str, Any] | None:
    if not tokenizer.backend.is_fast or (chat and tokenizer.parses_data):
        # The digest of a slow tokenizer is not all that it does, and parsed conversations are refused.
        return None
    try:
        rendering = {"chat": encoder.template.parts} if chat else {}
    except DataError:  # which every row will meet
        return None
    packages = {name: metadata.version(name) for name in _ENCODING_PACKAGES}
    ids = {"tokenizer": tokenizer.digest, "parses": tokenizer.parses_data, "at_start": at_start}
    return {**ids, **packages, **rendering}


_ENCODING_PACKAGES = ("transformers", "tokenizers", "jinja2")


class ChatEncoder:
    """Encodes conversations for one tokenizer.

    Attributes:
        used: whether any conversation was encoded.
        observed: of the first conversations, whether prompt and answers have the same ids joined as apart.
    """

    def __init__(self, tokenizer: Tokenizer, options: ChatOptions | None = None) -> None:
        self._tokenizer, self._options = tokenizer, options or ChatOptions(None, {}, DEFAULT_DAY)
        self.used = False
        self.observed: list[bool] = []
        self._last: tuple[Conversation | None, EncodedConversation | None] = (None, None)

    def __getstate__(self) -> dict[str, Any]:
        # Another process compiles the template itself.
        return {**vars(ChatEncoder(self._tokenizer, self._options))}

    def copy(self) -> ChatEncoder:
        """The same encoder, with nothing observed."""
        copied = ChatEncoder(self._tokenizer, self._options)
        if "template" in vars(self):
            vars(copied)["template"] = self.template
        return copied

    def observe(self, observed: Sequence[bool]) -> None:
        """Count what a copy observed."""
        self.used = True
        self.observed = [*self.observed, *observed][:CHAT_OBSERVED]

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
            if len(self.observed) < CHAT_OBSERVED:
                self.observed.append(self.template.joins(encoded))
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
        apart = self.observed.count(False)
        if apart:
            notices.append(
                f"{apart} of the first {len(self.observed)} rendered conversations would tokenize differently with "
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
        # Earlier versions recorded less.
        changed = [name for name in parts if name in recorded and recorded[name] != parts[name]]
        if changed:
            names = {
                "template_sha256": "chat template",
                "kwargs": "--chat-template-kwargs",
                "day": "--chat-date",
                "special_tokens": "special token in the chat template",
            }
            raise DataError(
                f"was scored with another {names[changed[0]]}",
                where=where,
                fix="use the options of `tisdpo estimate`, or score again",
            )
