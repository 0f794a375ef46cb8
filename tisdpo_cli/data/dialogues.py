"""Splits dialogues written in one text, as those of hh-rlhf, into messages. Knows no files and no tokens."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tisdpo_cli.data.messages import Conversation, Message
from tisdpo_cli.data.rows import emptiness
from tisdpo_cli.errors import DataError

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def dialogue_conversation(
    columns: Mapping[str, Any], prompt: str = "prompt", chosen: str = "chosen", rejected: str = "rejected"
) -> Conversation:
    r"""Read a preference row whose texts have turns that begin with "\n\nHuman:" and "\n\nAssistant:".

    Args:
        columns: the row.
        prompt: column of the dialogue up to the last "\n\nAssistant:"; if null or missing, the answers hold it.
        chosen: column of the chosen answer, or of the whole dialogue with it.
        rejected: column of the rejected answer, likewise.

    Raises:
        DataError: turns do not alternate from Human to Assistant, one is empty, or the dialogues share no prompt.
    """
    texts = {name: _text(columns, name) for name in (chosen, rejected)}
    if columns.get(prompt) is not None:
        messages = _turns(_text(columns, prompt), prompt)
        if messages[-1] != {"role": "assistant", "content": ""}:
            raise DataError(f"{prompt!r} does not end with 'Assistant:'")
        answers = [_answer(text, name) for name, text in texts.items()]
        return _conversation(messages[:-1], answers)
    whole = [_turns(text, name) for name, text in texts.items()]
    if whole[0][:-1] != whole[1][:-1]:
        raise DataError(f"{chosen!r} and {rejected!r} differ before the last answer")
    for messages, name in zip(whole, texts, strict=True):
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{name!r} does not end with an answer of the assistant")
        if emptiness(messages[-1]["content"]):
            raise DataError(f"{name!r} ends with an empty answer")
    return _conversation(whole[0][:-1], [messages[-1] for messages in whole])


def dialogue_messages(prompt: str) -> list[Message] | None:
    r"""The turns of a prompt that is such a dialogue up to its last "\n\nAssistant:", or None for any other text."""
    try:
        messages = _turns(prompt, "prompt")
    except DataError:
        return None
    return messages[:-1] if messages[-1] == {"role": "assistant", "content": ""} else None


def _conversation(prompt: list[Message], answers: list[Message]) -> Conversation:
    if any(emptiness(message["content"]) for message in prompt):
        raise DataError("a turn of the dialogue is empty")
    return Conversation(prompt, tuple(answers))


def _text(columns: Mapping[str, Any], name: str) -> str:
    if name not in columns:
        raise DataError(f"column {name!r} is missing")
    if not isinstance(columns[name], str):
        raise DataError(f"{name!r} is not text")
    return columns[name]


def _turns(text: str, name: str) -> list[Message]:
    """The turns of a dialogue, which alternate from the human."""
    begin, *parts = _TURN.split("\n\n" + text.lstrip("\n"))
    if begin.strip() or not parts:
        raise DataError(f"{name!r} does not begin with 'Human:'")
    speakers, contents = parts[::2], parts[1::2]
    for i, speaker in enumerate(speakers):
        if speaker != ("Human", "Assistant")[i % 2]:
            raise DataError(f"{name!r} does not alternate between Human and Assistant (turn {i + 1})")
    return [
        {"role": _ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(speakers, contents, strict=True)
    ]


def _answer(text: str, name: str) -> Message:
    if _TURN.search(text):
        raise DataError(f"{name!r} holds turns of a dialogue; one answer is needed")
    problem = emptiness(text)
    if problem:
        raise DataError(f"{name!r} {problem}")
    return {"role": "assistant", "content": text.strip()}
