"""Turns the columns of a row that holds messages into one conversation: its prompt and the answers to it.

Refuses a row with one short sentence (`DataError`), to which the caller adds the place. Knows no files, no template and
no tokens; dialogues in one text are read by `dialogues`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tisdpo_cli.data.rows import emptiness
from tisdpo_cli.errors import DataError

Message = dict[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
# What ShareGPT calls them.
_ALIASES = {"human": "user", "gpt": "assistant", "observation": "tool"}
_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXTS = (*_REASONING, "name", "tool_call_id")


@dataclass(frozen=True)
class Conversation:
    """Messages and the answers to them, each message a dictionary with `role` and, but for some tool calls, `content`.

    Attributes:
        prompt: messages before the answers, the last of a user or a tool.
        answers: assistant messages, one of which follows the prompt: chosen and rejected, or the one to learn.
        tools: JSON schemas of the tools that the assistant may call, or None.
        template_kwargs: variables of the chat template, for this row only.
    """

    prompt: list[Message]
    answers: tuple[Message, ...]
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def is_conversational(columns: Mapping[str, Any], names: Sequence[str] = ("prompt", "chosen", "rejected")) -> bool:
    """Whether a row holds messages rather than texts.

    Args:
        columns: the row.
        names: columns of the prompt and the answers; where there is no prompt, `conversations` is it.
    """
    present = [columns.get(name) for name in names]
    present += [columns.get("conversations")] if columns.get(names[0]) is None else []
    return any(map(_holds_messages, present))


def _holds_messages(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(inner, dict) for inner in value))


def is_supervised(columns: Mapping[str, Any]) -> bool:
    """Whether a row holds one conversation to learn: `messages`, `conversations`, or a prompt and its completion."""
    whole = any(isinstance(columns.get(name), list) for name in ("messages", "conversations"))
    return whole or ("completion" in columns and is_conversational(columns, ("prompt", "completion")))


def preference_conversation(
    columns: Mapping[str, Any], prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected"
) -> Conversation:
    """Read a preference row; its prompt is a column, or what the conversations of both answers begin with.

    Args:
        columns: the row.
        prompt: column of the prompt: messages, or the text of the last user message of both conversations.
        chosen: column of the chosen answer: a message, a conversation that ends with it, or its text.
        rejected: column of the rejected answer, likewise.

    Raises:
        DataError: the row is invalid.
    """
    for name in (chosen, rejected):
        if columns.get(name) is None:
            raise DataError(f"column {name!r} is missing")
    if columns.get(prompt) is None and columns.get("conversations") is not None:
        prompt = "conversations"
    given = columns.get(prompt)
    answers = {name: _messages(columns[name], name, text_role="assistant") for name in (chosen, rejected)}
    if given is None or isinstance(given, str):
        shared = _shared(*answers.values())
        if isinstance(given, str):
            _check_prompt_text(given, shared, prompt)
        rests = [messages[len(shared) :] for messages in answers.values()]
    else:
        shared = _messages(given, prompt)
        rests = [_without(shared, messages) for messages in answers.values()]
    sides = tuple(_answer(rest, name) for rest, name in zip(rests, answers, strict=True))
    return _conversation(columns, shared, sides)


def supervised_conversation(columns: Mapping[str, Any]) -> Conversation:
    """Read a row with one conversation to learn: `messages` or `conversations`, or `prompt` and `completion`.

    Raises:
        DataError: the row is invalid.
    """
    name = next((name for name in ("messages", "conversations") if isinstance(columns.get(name), list)), None)
    if name is None:
        shared = _messages(columns.get("prompt"), "prompt")
        completion = _messages(columns.get("completion"), "completion", text_role="assistant")
        return _conversation(columns, shared, (_answer(_without(shared, completion), "completion"),))
    messages = _messages(columns[name], name)
    if messages[-1]["role"] != "assistant":
        raise DataError(f"{name!r} ends with a message of role {messages[-1]['role']!r}; it must end with an answer")
    return _conversation(columns, messages[:-1], (_answer(messages[-1:], name),))


def _conversation(columns: Mapping[str, Any], prompt: list[Message], answers: tuple[Message, ...]) -> Conversation:
    """A conversation with what other columns of the row add to it."""
    if not prompt:
        raise DataError("there is no prompt before the answers")
    if prompt[-1]["role"] not in ("user", "tool"):
        raise DataError(f"the prompt ends with a message of role {prompt[-1]['role']!r}; it must end with a user's")
    return Conversation(_with_system(columns, prompt), answers, _tools(columns), _template_kwargs(columns))


def with_template(conversation: Conversation, before: str, after: str) -> Conversation:
    """Return a conversation with a prompt template around its prompt.

    Args:
        conversation: prompt and answers.
        before: becomes a system message, in front of the text of one that is there.
        after: goes to the end of the last user message, or of the last message if no user has one.
    """
    prompt = list(conversation.prompt)
    text = before.strip()
    if text and is_system(prompt[0]):
        prompt[0] = {**prompt[0], "content": f"{text}\n\n{prompt[0]['content']}"}
    elif text:
        prompt.insert(0, {"role": "system", "content": text})
    if after:
        users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
        last = users[-1] if users else len(prompt) - 1
        prompt[last] = {**prompt[last], "content": prompt[last]["content"] + after}
    return replace(conversation, prompt=prompt)


def with_other_text(conversation: Conversation) -> Conversation:
    """Return a conversation whose first message that is not a system message has another text."""
    prompt = list(conversation.prompt)
    first = next((i for i, message in enumerate(prompt) if not is_system(message)), len(prompt) - 1)
    prompt[first] = {**prompt[first], "content": "qqOTHERqq"}
    return replace(conversation, prompt=prompt)


def without_oldest(conversation: Conversation, count: int) -> Conversation:
    """Return a conversation without its oldest messages; leading system messages stay."""
    prompt = conversation.prompt
    head = next((i for i, message in enumerate(prompt) if not is_system(message)), len(prompt))
    return replace(conversation, prompt=[*prompt[:head], *prompt[head + count :]])


def is_system(message: Mapping[str, Any]) -> bool:
    """Whether a message instructs the assistant rather than talks to it."""
    return message["role"] in ("system", "developer")


# Prompt and answers ------------------------------------------------------------------------------------------------


def _shared(chosen: list[Message], rejected: list[Message]) -> list[Message]:
    """The messages that both conversations begin with; the last message of equal conversations is their answer."""
    if chosen == rejected:
        return chosen[:-1]
    count = 0
    while chosen[count : count + 1] == rejected[count : count + 1]:
        count += 1
    return chosen[:count]


def _check_prompt_text(text: str, shared: list[Message], name: str) -> None:
    users = [message for message in shared if message["role"] == "user"]
    if not users or users[-1]["content"].strip() != text.strip():
        raise DataError(f"{name!r} is text, and not the last user message that both conversations share")


def _without(prompt: list[Message], messages: list[Message]) -> list[Message]:
    """An answer without the messages of the prompt, if it repeats them."""
    repeated = len(messages) > len(prompt) and messages[: len(prompt)] == prompt
    return messages[len(prompt) :] if repeated else messages


def _answer(messages: list[Message], name: str) -> Message:
    """The only message after the prompt, which must be an assistant's, with text and without tool calls."""
    if [message["role"] for message in messages] != ["assistant"]:
        roles = ", ".join(message["role"] for message in messages) or "nothing"
        raise DataError(f"{name!r} must add one assistant message to the shared prompt; it adds {roles}")
    if "tool_calls" in messages[0]:
        raise DataError(f"{name!r} calls tools; an answer must be text")
    _check_text(messages[0]["content"], repr(name))
    return messages[0]


# Messages ----------------------------------------------------------------------------------------------------------


def _messages(value: Any, name: str, text_role: str = "") -> list[Message]:
    """Return messages from a list, from one message, or from a text, which becomes a message of `text_role`."""
    if isinstance(value, str) and text_role:
        value = [{"role": text_role, "content": value}]
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise DataError(f"{name!r} is {'null' if value is None else type(value).__name__}; messages are needed")
    if not value:
        raise DataError(f"{name!r} holds no messages")
    return [_message(message, f"{name}[{i}]") for i, message in enumerate(value)]


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise DataError(f"{where} is not a message")
    given = {key: inner for key, inner in value.items() if inner is not None}
    message: Message = {"role": _role(given, where)}
    if given.get("tool_calls"):
        message["tool_calls"] = _tool_calls(given["tool_calls"], where)
    content = given.get("content", given.get("value") if "from" in given else None)
    if content is not None or "tool_calls" not in message:
        message["content"] = _content(content, where)
    if message["role"] not in ("assistant", "tool"):
        _check_text(message.get("content", ""), where)
    for key in _TEXTS:
        if not isinstance(given.get(key, ""), str):
            raise DataError(f"{where} has a {key!r} that is not text")
        if given.get(key):
            message[key] = given[key]
    return message


def _check_text(text: str, where: str) -> None:
    problem = emptiness(text)
    if problem:
        raise DataError(f"{where} {problem}")


def _role(given: Mapping[str, Any], where: str) -> str:
    """The role of a message; a template would write any other text into the frame of the turn."""
    role = given.get("role", given.get("from"))
    if role is None:
        raise DataError(f"{where} has no role")
    role = _ALIASES.get(role, role) if isinstance(role, str) and "role" not in given else role
    if role not in ROLES:
        raise DataError(f"{where} has the unknown role {role!r}; known are {', '.join(ROLES)}")
    return role


def _content(value: Any, where: str) -> str:
    """The text of a message, from a text or a list of text parts."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise DataError(f"{where} has no text")
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text":
            raise DataError(f"{where} has content of type {kind!r}; only text is supported")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{where} has a part without text")
    return "".join(part["text"] for part in value)


def _tool_calls(value: Any, where: str) -> list[dict[str, Any]]:
    for call in value if isinstance(value, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            raise DataError(f"{where} has tool calls without the name of a function")
    return value


# Other columns -----------------------------------------------------------------------------------------------------


def _with_system(columns: Mapping[str, Any], prompt: list[Message]) -> list[Message]:
    """The prompt with the text of the `system` column as its first message."""
    text = columns.get("system")
    if text is None or text == "":
        return prompt
    if not isinstance(text, str):
        raise DataError("'system' is not text")
    _check_text(text, "'system'")
    first = prompt[0]
    if not is_system(first):
        return [{"role": "system", "content": text}, *prompt]
    if first["content"] != text:
        raise DataError(f"the row has both a 'system' column and a {first['role']} message")
    return prompt


def _tools(columns: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    value = columns.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise DataError("'tools' is not JSON") from error
    if not value or (isinstance(value, str) and not value.strip()):
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise DataError("'tools' is not a list of JSON schemas")
    return value


def _template_kwargs(columns: Mapping[str, Any]) -> dict[str, Any]:
    value = columns.get("chat_template_kwargs")
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise DataError("'chat_template_kwargs' is not a dictionary")
    # A table fills what a row does not set with null.
    return {str(key): inner for key, inner in value.items() if inner is not None}
