"""Turns a conversation and the answers to it into ids, as the model's chat template renders them.

Messages are plain dictionaries. The template's render decides: the prompt ends with the generation prompt, an answer is
what the template shows of it, and the first token of the template behind it is the stop. Knows transformers' tokenizers
as objects. Knows no dataset rows, no files and no settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from typing import Any

from tisdpo_cli.errors import DataError, ModelError
from tisdpo_cli.model.chat_encoding import ChatEncoding
from tisdpo_cli.model.chat_render import Message, Renderer, Scene, checked_kwargs
from tisdpo_cli.model.template_sandbox import CompiledTemplate

_SHAPE = re.compile(r"<.+>|\[.+\]", re.DOTALL)
# These frame a part of an answer, which the model itself generates; templates look for them in texts.
_REASONING = re.compile(r"</?(think|thinking|reasoning)>")


@dataclass(frozen=True)
class EncodedConversation:
    """One conversation as ids.

    Attributes:
        prompt: ids of the prompt, with the generation prompt and the opening.
        answers: ids of each answer, without the stop.
        stop: id that ends each answer.
        opening: number of ids at the end of the prompt that stand behind the generation prompt: what the template
            writes before each of these answers.
        own_stop: whether the template writes the stop; otherwise it is the tokenizer's EOS.
        prompt_text: rendered text of the prompt.
        answer_texts: rendered text of each answer, without the stop.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    stop: int
    opening: int
    own_stop: bool
    prompt_text: str
    answer_texts: tuple[str, ...]
    _marked: tuple[str, ...] = field(default=(), repr=False)


class ChatTemplate:
    """The chat template of a tokenizer.

    Args:
        backend: transformers tokenizer.
        template: text of the template, instead of the tokenizer's own.
        kwargs: variables for the template, beside the messages; what they spell out is the template's own.
        day: what the template's clock says; default today.

    Attributes:
        writes_day: whether the template reads the clock.
        kwargs: the variables.

    Raises:
        ModelError: there is no template, or it is not valid.
        DataError: a variable has the name of one that every conversation sets.
    """

    def __init__(
        self,
        backend: Any,
        template: str | None = None,
        kwargs: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        self.kwargs = checked_kwargs(kwargs or {})
        self._sources = {"default": template} if template is not None else _own_templates(backend)
        self._day = day or date.today()
        compiled = {name: CompiledTemplate(source, self._day) for name, source in self._sources.items()}
        self.writes_day = any(template.reads_clock for template in compiled.values())
        self._backend = backend
        names = {**backend.special_tokens_map, **self.kwargs}
        frame = _frame(backend, Renderer(compiled, names, ChatEncoding(backend).mark))
        self._encoding = ChatEncoding(backend, frame=frame)
        self._renderer = Renderer(compiled, names, self._encoding.mark)

    @property
    def day(self) -> date | None:
        """The day that the template writes, or None if it writes none."""
        return self._day if self.writes_day else None

    @property
    def parts(self) -> dict[str, Any]:
        """What determines a render, as plain values for a manifest."""
        body = json.dumps(self._sources, sort_keys=True)
        return {
            "template_sha256": hashlib.sha256(body.encode()).hexdigest(),
            "kwargs": self.kwargs,
            "day": self.day.isoformat() if self.day else None,
            "special_tokens": self._names_in_use(),
        }

    def _names_in_use(self) -> dict[str, str]:
        """The special tokens that a template can write by name, such as `bos_token`."""
        known = self._backend.special_tokens_map.items()
        sources = self._sources.values()
        return {name: str(token) for name, token in known if any(name in source for source in sources)}

    @cached_property
    def markers(self) -> dict[str, int]:
        """Text to id of what data never becomes: special tokens, and those that the template writes around turns."""
        return self._encoding.tokens

    def encode(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> EncodedConversation:
        """Encode a conversation.

        Args:
            prompt: messages before the answers.
            answers: assistant messages, one of which follows the prompt.
            tools: JSON schemas of the tools that the assistant may call.
            kwargs: variables for the template, for this conversation only.

        Raises:
            DataError: the template refuses the conversation or leaves out a part of it, or an answer does not follow
                its generation prompt.
        """
        scene = Scene(self._renderer, prompt, tools, kwargs)
        begin = scene.render([], generation=True)
        opening, tail = scene.around_answers(begin)
        stop = self._encoding.find(tail)
        closing = tail[: stop.start()] if stop else tail
        rests = [scene.rest(begin, answer, tail) for answer in answers]
        scene.check_prompt_is_shown()
        ids = self._encoding.encode_marked(begin)
        moved = 0
        if opening.strip() and all(rest.startswith(opening) for rest in rests):
            with_opening = self._encoding.encode_marked(begin + opening)
            if with_opening[: len(ids)] == ids:
                moved = len(with_opening) - len(ids)
                ids, begin, rests = with_opening, begin + opening, [rest[len(opening) :] for rest in rests]
        shown = [rest + closing for rest in rests]
        return EncodedConversation(
            prompt=ids,
            answers=tuple(self._answers(shown, ids)),
            stop=self._encoding.tokens[stop["token"]] if stop else self._backend.eos_token_id,
            opening=moved,
            own_stop=stop is not None,
            prompt_text=self._encoding.unmark(begin),
            answer_texts=tuple(map(self._encoding.unmark, shown)),
            _marked=(begin, *(text + (stop["token"] if stop else "") for text in shown)),
        )

    def encode_whole(
        self, prompt: Sequence[Message], answer: str, tools: Sequence[dict[str, Any]] | None = None
    ) -> list[int]:
        """Encode a conversation with its answer to one sequence, with what the template writes behind the answer.

        Raises:
            DataError: the template refuses the conversation or leaves out a message.
        """
        scene = Scene(self._renderer, prompt, tools)
        scene.check_prompt_is_shown()
        message = self._encoding.mark({"role": "assistant", "content": answer})
        return self._encoding.encode_marked(scene.render([message], generation=False))

    def _answers(self, shown: Sequence[str], prompt: Sequence[int]) -> list[list[int]]:
        if prompt:
            return self._encoding.encode_behind(shown, prompt[-1])
        return [self._encoding.encode_marked(text) for text in shown]

    def joins(self, encoded: EncodedConversation) -> bool:
        """Whether prompt and each answer have the same ids joined, as one text, as they have apart."""
        begin, *rests = encoded._marked
        end = [encoded.stop] if encoded.own_stop else []
        return all(
            self._encoding.encode_marked(begin + rest) == [*encoded.prompt, *answer, *end]
            for rest, answer in zip(rests, encoded.answers, strict=True)
        )

    def shortened(
        self,
        prompt: Sequence[Message],
        answers: Sequence[Message],
        limit: int,
        tools: Sequence[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        whole: EncodedConversation | None = None,
    ) -> tuple[EncodedConversation, int]:
        """Encode a conversation without as many of its oldest turns as its prompt needs to have at most `limit` ids.

        Leading system messages stay, and what stays begins with a user's message. Where even the last turn is longer,
        only that one is left. Answers keep their ids.

        Args:
            prompt: messages before the answers.
            answers: assistant messages, one of which follows the prompt.
            limit: ids of the prompt, at most.
            tools: JSON schemas of the tools that the assistant may call.
            kwargs: variables for the template, for this conversation only.
            whole: the same conversation as `encode` returns it, if it is known.

        Returns:
            The conversation, and how many messages are left out.

        Raises:
            DataError: as `encode`.
        """
        whole = best = whole if whole is not None else self.encode(prompt, answers, tools, kwargs)
        head = next((i for i, message in enumerate(prompt) if not _is_system(message)), len(prompt))
        dropped = 0
        starts = [i for i in range(head + 1, len(prompt)) if prompt[i]["role"] == "user"]
        for start in starts if len(whole.prompt) > limit else []:
            try:
                shorter = self.encode([*prompt[:head], *prompt[start:]], answers, tools, kwargs)
            except DataError:
                continue
            if (shorter.answers, shorter.stop, shorter.opening) == (whole.answers, whole.stop, whole.opening):
                best, dropped = shorter, start - head
                if len(best.prompt) <= limit:
                    break
        return best, dropped


def _own_templates(backend: Any) -> dict[str, str]:
    """Return the tokenizer's template, and its separate template for tools if there is one."""
    own = backend.chat_template
    found = {"default": own} if isinstance(own, str) else {k: v for k, v in (own or {}).items() if isinstance(v, str)}
    if not found.get("default"):
        raise ModelError("the tokenizer has no chat template")
    return {name: source for name, source in found.items() if name in ("default", "tool_use")}


def _frame(backend: Any, renderer: Renderer) -> tuple[str, ...]:
    """Added tokens that are not special and that the template writes around turns."""
    user, assistant = ({"role": role, "content": "qq"} for role in ("user", "assistant"))
    shown = ""
    for probe in ([user, assistant, user], [user]):
        try:
            shown += Scene(renderer, probe).render([], generation=True)
        except DataError:
            continue
    added = [token.content for token in backend.added_tokens_decoder.values() if not token.special]
    return tuple(t for t in added if t in shown and _SHAPE.fullmatch(t) and not _REASONING.fullmatch(t))


def _is_system(message: Message) -> bool:
    return message["role"] in ("system", "developer")
