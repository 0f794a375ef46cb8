"""Renders a conversation by a chat template, part by part, and refuses what the template does not show.

Messages are plain dictionaries. Knows no tokenizers, no dataset rows and no files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tisdpo_cli.errors import DataError
from tisdpo_cli.model.template_sandbox import CompiledTemplate

Message = dict[str, Any]

_RESERVED = ("messages", "tools", "documents", "add_generation_prompt")
_REASONING = ("reasoning_content", "thinking", "reasoning")


@dataclass(frozen=True)
class Renderer:
    """What all conversations share.

    Attributes:
        templates: the template as `default`, and one for conversations with tools as `tool_use` if there is one.
        variables: what templates read beside the conversation, by name.
        mark: marks what texts of a value spell out.
    """

    templates: Mapping[str, CompiledTemplate]
    variables: Mapping[str, Any]
    mark: Callable[[Any], Any]
    # What the template leaves out, by the shape of a prompt.
    left_out: dict[int, str] = field(default_factory=dict, repr=False, compare=False)


class Scene:
    """One conversation, marked, with all that its renders share.

    Args:
        renderer: the template.
        prompt: messages before the answers.
        tools: JSON schemas of the tools that the assistant may call.
        kwargs: variables for the template, for this conversation only.

    Raises:
        DataError: a variable has the name of one that every conversation sets.
    """

    def __init__(
        self,
        renderer: Renderer,
        prompt: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        self._renderer = renderer
        self._prompt = [renderer.mark(message) for message in prompt]
        self._tools = renderer.mark(list(tools)) if tools else None
        self._kwargs = renderer.mark(checked_kwargs(kwargs or {}))
        templates = renderer.templates
        self._template = templates.get("tool_use", templates["default"]) if tools else templates["default"]

    def render(self, messages: Sequence[Message], generation: bool, prompt: list[Message] | None = None) -> str:
        """Render the prompt, or another in its place, and further messages, all marked.

        Raises:
            DataError: the template refuses them, or fails.
        """
        shown = [*(self._prompt if prompt is None else prompt), *messages]
        variables = {
            **self._renderer.variables,
            **self._kwargs,
            "messages": list(map(_with_reasoning, shown)),
            "tools": self._tools,
            "documents": None,
            "add_generation_prompt": generation,
        }
        return self._template.render(variables)

    def around_answers(self, begin: str) -> tuple[str, str]:
        """Return what the template writes between the generation prompt and an answer, and behind an answer.

        Args:
            begin: the render of the prompt, with the generation prompt.

        Raises:
            DataError: an answer is not shown, or does not follow the generation prompt.
        """
        probe = _probe(begin)
        around = self._behind(begin, {"role": "assistant", "content": probe}).split(probe)
        if len(around) != 2:
            raise DataError("the chat template does not show an answer as it is")
        return around[0], around[1]

    def rest(self, begin: str, answer: Message, tail: str) -> str:
        """Return what the template shows of an answer between the generation prompt and what is behind it.

        Args:
            begin: the render of the prompt, with the generation prompt.
            answer: assistant message.
            tail: what is behind an answer.

        Raises:
            DataError: the answer does not stand between the two, or its reasoning is left out.
        """
        marked = self._renderer.mark(answer)
        rest = self._behind(begin, marked)
        if not rest.endswith(tail):
            raise DataError("the chat template ends this answer in another way than others")
        if _reasoning(marked):
            probe = _probe(begin + rest)
            if probe not in self.render([{**_plain(marked), _REASONING[0]: probe}], generation=False):
                raise DataError("the chat template leaves out the reasoning of an answer")
        return rest[: len(rest) - len(tail)]

    def _behind(self, begin: str, answer: Message) -> str:
        shown = self.render([answer], generation=False)
        if not shown.startswith(begin):
            raise DataError("the chat template renders the prompt in another way when an answer follows it")
        return shown[len(begin) :]

    def check_prompt_is_shown(self) -> None:
        """Check that the template leaves out no message and no tool call of the prompt, once for each shape of prompt.

        Raises:
            DataError: it leaves out one.
        """
        known = self._renderer.left_out
        shape = hash(json.dumps([list(map(_shape, self._prompt)), self._tools, self._kwargs], default=str))
        if shape not in known:
            known[shape] = self._left_out()
        if known[shape]:
            raise DataError(f"the chat template leaves out {known[shape]}")

    def _left_out(self) -> str:
        """What the template leaves out of a prompt of this shape, by its texts replaced with probes."""
        probes, replaced = {}, []
        for i, message in enumerate(self._prompt):
            message = dict(message)
            if (message.get("content") or "").strip():
                message["content"] = f"qqTEXT{i}qq"
                probes[message["content"]] = f"message {i + 1} of the prompt ({message['role']})"
            if message.get("tool_calls"):
                names = [f"qqCALL{i}qq{k}qq" for k in range(_calls(message))]
                message["tool_calls"] = [_renamed(*call) for call in zip(message["tool_calls"], names, strict=True)]
                probes |= dict.fromkeys(names, f"a tool call of message {i + 1} of the prompt")
            replaced.append(message)
        try:
            shown = self.render([], generation=True, prompt=replaced)
        except DataError:
            # The template looks into texts; it has shown the messages as they are without an error.
            return ""
        return next((what for probe, what in probes.items() if probe not in shown), "")


def checked_kwargs(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return variables for a template, as a new dictionary.

    Raises:
        DataError: a variable has the name of one that every conversation sets.
    """
    taken = [name for name in _RESERVED if name in kwargs]
    if taken:
        raise DataError(f"chat template kwargs cannot set {taken[0]!r}")
    return dict(kwargs)


def _reasoning(message: Message) -> str | None:
    return next((message[key] for key in _REASONING if message.get(key) is not None), None)


def _with_reasoning(message: Message) -> Message:
    """A message with its reasoning under the names that templates read, as transformers does it."""
    reasoning = _reasoning(message)
    return message if reasoning is None else {"thinking": reasoning, **message, "reasoning_content": reasoning}


def _plain(message: Message) -> Message:
    return {key: value for key, value in message.items() if key not in _REASONING}


def _calls(message: Message) -> int:
    return len(message.get("tool_calls") or ())


def _renamed(call: dict[str, Any], name: str) -> dict[str, Any]:
    """A tool call with another name of its function."""
    return {**call, "function": {**call["function"], "name": name}} if "function" in call else {**call, "name": name}


def _shape(message: Message) -> list[Any]:
    return [message["role"], bool((message.get("content") or "").strip()), *sorted(message), _calls(message)]


def _probe(text: str) -> str:
    """A word that is not in a text."""
    probe = "qqANSWERqq"
    while probe in text:
        probe += "q"
    return probe
