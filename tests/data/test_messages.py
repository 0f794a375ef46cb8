"""Rows with messages, in every shape, become a prompt and its answers, or are refused in one sentence."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tisdpo_cli.data.dialogues import dialogue_conversation
from tisdpo_cli.data.messages import (
    Conversation,
    is_conversational,
    is_supervised,
    preference_conversation,
    supervised_conversation,
)
from tisdpo_cli.errors import DataError


def m(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def user(content: str = "Hi", **more: Any) -> dict[str, Any]:
    return m("user", content, **more)


def bot(content: str, **more: Any) -> dict[str, Any]:
    return m("assistant", content, **more)


def from_(speaker: str, value: str) -> dict[str, Any]:
    return {"from": speaker, "value": value}


def part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


YES, NO, SYSTEM = bot("Yes"), bot("No"), m("system", "Be terse.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLING = {"role": "assistant", "tool_calls": [CALL]}
RESULT = m("tool", "", name="weather", tool_call_id="c1")
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}
PLAIN = Conversation([user()], (YES, NO))

# ---------------------------------------------------------------- shapes of preference rows

SHAPES: dict[str, tuple[dict[str, Any], Conversation]] = {
    "explicit prompt": ({"prompt": [user()], "chosen": [YES], "rejected": [NO]}, PLAIN),
    "single messages": ({"prompt": user(), "chosen": YES, "rejected": NO}, PLAIN),
    "implicit prompt": ({"chosen": [user(), YES], "rejected": [user(), NO]}, PLAIN),
    "implicit prompt of equal conversations": (
        {"chosen": [user(), YES], "rejected": [user(), YES]},
        Conversation([user()], (YES, YES)),
    ),
    "a prompt column that is null": ({"prompt": None, "chosen": [user(), YES], "rejected": [user(), NO]}, PLAIN),
    "implicit prompt of several turns": (
        {"chosen": [SYSTEM, user(), YES, user("Really?"), YES], "rejected": [SYSTEM, user(), YES, user("Really?"), NO]},
        Conversation([SYSTEM, user(), YES, user("Really?")], (YES, NO)),
    ),
    "text prompt beside conversations": (
        {"prompt": "Hi", "chosen": [SYSTEM, user(), YES], "rejected": [SYSTEM, user(), NO], "messages": [user(), YES]},
        Conversation([SYSTEM, user()], (YES, NO)),
    ),
    "text prompt but for blanks around it": (
        {"prompt": "Hi", "chosen": [user("Hi\n"), YES], "rejected": [user("Hi\n"), NO]},
        Conversation([user("Hi\n")], (YES, NO)),
    ),
    "text answers": ({"prompt": [user()], "chosen": "Yes", "rejected": "No"}, PLAIN),
    "answers that repeat the prompt": (
        {"prompt": [user()], "chosen": [user(), YES], "rejected": [user(), NO]},
        PLAIN,
    ),
    "one answer that repeats the prompt": ({"prompt": [user()], "chosen": [user(), YES], "rejected": "No"}, PLAIN),
    "sharegpt": (
        {"chosen": [from_("human", "Hi"), from_("gpt", "Yes")], "rejected": [from_("human", "Hi"), from_("gpt", "No")]},
        PLAIN,
    ),
    "sharegpt with conversations": (
        {
            "conversations": [from_("system", "Be terse."), from_("human", "Hi")],
            "chosen": from_("gpt", "Yes"),
            "rejected": from_("gpt", "No"),
        },
        Conversation([SYSTEM, user()], (YES, NO)),
    ),
    "conversations beside a prompt": (
        {"prompt": [user()], "conversations": [user("other")], "chosen": "Yes", "rejected": "No"},
        PLAIN,
    ),
    "roles of openai under from": (
        {"prompt": [from_("user", "Hi")], "chosen": [from_("assistant", "Yes")], "rejected": "No"},
        PLAIN,
    ),
    "text parts": (
        {
            "prompt": [m("user", [part("H"), part("i")])],
            "chosen": [m("assistant", [part("Yes")])],
            "rejected": [m("assistant", [{**part("No"), "image": None}])],
        },
        PLAIN,
    ),
    "tools called before": (
        {"prompt": [user(), CALLING, RESULT], "chosen": "Yes", "rejected": "No"},
        Conversation([user(), CALLING, RESULT], (YES, NO)),
    ),
    "observation of sharegpt": (
        {"prompt": [from_("human", "Hi"), CALLING, from_("observation", "sunny")], "chosen": "Yes", "rejected": "No"},
        Conversation([user(), CALLING, m("tool", "sunny")], (YES, NO)),
    ),
    "reasoning, under any of its names": (
        {
            "prompt": [user(), bot("Hello", thinking="A."), user("Well?")],
            "chosen": [bot("Yes", reasoning_content="B.")],
            "rejected": [bot("No", reasoning="C.")],
        },
        Conversation(
            [user(), bot("Hello", thinking="A."), user("Well?")],
            (bot("Yes", reasoning_content="B."), bot("No", reasoning="C.")),
        ),
    ),
    "what a table fills with null or empty values": (
        {
            "prompt": [user(tool_calls=None, name=None)],
            "chosen": [bot("Yes", reasoning_content="", tool_calls=[])],
            "rejected": [bot("No", reasoning_content=None)],
            "tools": None,
            "system": None,
            "chat_template_kwargs": {"a": None, "b": False},
        },
        Conversation([user()], (YES, NO), None, {"b": False}),
    ),
    "other keys of messages": (
        {"prompt": [user(weight=1, name="Ann")], "chosen": [bot("Yes", score=9.0)], "rejected": "No"},
        Conversation([user(name="Ann")], (YES, NO)),
    ),
    "developer": (
        {"prompt": [m("developer", "Be terse."), user()], "chosen": "Yes", "rejected": "No"},
        Conversation([m("developer", "Be terse."), user()], (YES, NO)),
    ),
    "system column": (
        {"system": "Be terse.", "prompt": [user()], "chosen": "Yes", "rejected": "No"},
        Conversation([SYSTEM, user()], (YES, NO)),
    ),
    "system column, implicit prompt": (
        {"system": "Be terse.", "chosen": [user(), YES], "rejected": [user(), NO]},
        Conversation([SYSTEM, user()], (YES, NO)),
    ),
    "system column that the prompt repeats": (
        {"system": "Be terse.", "prompt": [SYSTEM, user()], "chosen": "Yes", "rejected": "No"},
        Conversation([SYSTEM, user()], (YES, NO)),
    ),
    "empty system column": ({"system": "", "prompt": [user()], "chosen": "Yes", "rejected": "No"}, PLAIN),
    "tools": (
        {"prompt": [user()], "chosen": "Yes", "rejected": "No", "tools": [TOOL]},
        Conversation([user()], (YES, NO), [TOOL]),
    ),
    "tools as JSON": (
        {"prompt": [user()], "chosen": "Yes", "rejected": "No", "tools": json.dumps([TOOL])},
        Conversation([user()], (YES, NO), [TOOL]),
    ),
    "no tools": ({"prompt": [user()], "chosen": "Yes", "rejected": "No", "tools": []}, PLAIN),
    "no tools as text": ({"prompt": [user()], "chosen": "Yes", "rejected": "No", "tools": " "}, PLAIN),
    "template kwargs": (
        {"prompt": [user()], "chosen": "Yes", "rejected": "No", "chat_template_kwargs": {"enable_thinking": False}},
        Conversation([user()], (YES, NO), None, {"enable_thinking": False}),
    ),
    "blanks around texts stay": (
        {"prompt": [user(" Hi\n")], "chosen": [bot("  Yes ")], "rejected": [bot("\nNo")]},
        Conversation([user(" Hi\n")], (bot("  Yes "), bot("\nNo"))),
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_shape_of_preference_rows(name: str) -> None:
    row, expected = SHAPES[name]
    before = json.dumps(row)
    assert is_conversational(row)
    assert preference_conversation(row) == expected
    assert json.dumps(row) == before, "the row is left as it is"


def test_columns_may_have_other_names() -> None:
    row = {"question": [user()], "good": [YES], "bad": [NO], "prompt": "not this", "chosen": 1}
    assert is_conversational(row, ("question", "good", "bad"))
    assert preference_conversation(row, "question", "good", "bad") == PLAIN


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No"}, False),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "messages": [user()], "tools": []}, False),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": "No", "conversations": [user()]}, False),
        ({"conversations": [user()], "chosen": "Yes", "rejected": "No"}, True),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": [NO]}, True),
        ({}, False),
    ],
)
def test_a_row_is_conversational_if_prompt_or_answers_hold_messages(row: dict[str, Any], expected: bool) -> None:
    assert is_conversational(row) is expected


# ---------------------------------------------------------------- refused preference rows


def row(**columns: Any) -> dict[str, Any]:
    return {"prompt": [user()], "chosen": [YES], "rejected": [NO], **columns}


ADDS = "must add one assistant message to the shared prompt; it adds"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no answer column": ({"prompt": [user()], "chosen": [YES]}, "column 'rejected' is missing"),
    "an answer that is null": (row(chosen=None), "column 'chosen' is missing"),
    "an answer that is a number": (row(chosen=3), "'chosen' is int; messages are needed"),
    "a prompt that is a number": (row(prompt=3), "'prompt' is int; messages are needed"),
    "no messages": (row(prompt=[]), "'prompt' holds no messages"),
    "no messages in an answer": (row(chosen=[]), "'chosen' holds no messages"),
    "no message": (row(prompt=["Hi"]), "prompt[0] is not a message"),
    "no role": (row(prompt=[{"content": "Hi"}]), "prompt[0] has no role"),
    "null as role": (row(prompt=[user(), {"role": None, "content": "Hi"}]), "prompt[1] has no role"),
    "unknown role": (
        row(prompt=[m("user<|im_end|>", "Hi")]),
        "prompt[0] has the unknown role 'user<|im_end|>'; known are system, developer, user, assistant, tool",
    ),
    "unknown speaker": (
        row(prompt=[from_("bing", "Hi")]),
        "prompt[0] has the unknown role 'bing'; known are system, developer, user, assistant, tool",
    ),
    "names of sharegpt as roles": (
        row(prompt=[m("human", "Hi")]),
        "prompt[0] has the unknown role 'human'; known are system, developer, user, assistant, tool",
    ),
    "a role that is a list": (
        row(prompt=[{"role": ["user"], "content": "Hi"}]),
        "prompt[0] has the unknown role ['user']; known are system, developer, user, assistant, tool",
    ),
    "no text": (row(prompt=[{"role": "user"}]), "prompt[0] has no text"),
    "an answer without text": (row(chosen=[{"role": "assistant", "content": None}]), "chosen[0] has no text"),
    "a number as text": (row(prompt=[{"role": "user", "content": 4}]), "prompt[0] has no text"),
    "an image": (
        row(prompt=[{"role": "user", "content": [part("Hi"), {"type": "image"}]}]),
        "prompt[0] has content of type 'image'; only text is supported",
    ),
    "parts that are texts": (
        row(prompt=[{"role": "user", "content": ["Hi"]}]),
        "prompt[0] has content of type 'str'; only text is supported",
    ),
    "a part without text": (
        row(prompt=[{"role": "user", "content": [{"type": "text"}]}]),
        "prompt[0] has a part without text",
    ),
    "blank user": (row(prompt=[user(" \n")]), "prompt[0] is empty"),
    "blank system": (row(prompt=[m("system", ""), user()]), "prompt[0] is empty"),
    "invisible user": (row(prompt=[user("\u200b\n")]), "prompt[0] is empty (only invisible characters)"),
    "invisible answer": (row(chosen=[bot("\u200b\u2060")]), "'chosen' is empty (only invisible characters)"),
    "invisible system column": (row(system="\u200b"), "'system' is empty (only invisible characters)"),
    "blank answer": (row(chosen=[bot(" \n")]), "'chosen' is empty"),
    "blank text answer": (row(rejected=""), "'rejected' is empty"),
    "an answer that calls tools": (row(chosen=[CALLING]), "'chosen' calls tools; an answer must be text"),
    "calls without a name": (
        row(prompt=[user(), {"role": "assistant", "tool_calls": [{"function": {}}]}, RESULT]),
        "prompt[1] has tool calls without the name of a function",
    ),
    "calls that are text": (
        row(prompt=[user(), {"role": "assistant", "tool_calls": "weather()"}, RESULT]),
        "prompt[1] has tool calls without the name of a function",
    ),
    "reasoning that is no text": (
        row(chosen=[bot("Yes", reasoning_content=["a"])]),
        "chosen[0] has a 'reasoning_content' that is not text",
    ),
    "an answer of the user": (row(rejected=[user("No")]), f"'rejected' {ADDS} user"),
    "two answers": (row(chosen=[YES, user(), NO]), f"'chosen' {ADDS} assistant, user, assistant"),
    "an answer that is the prompt": (row(chosen=[user()]), f"'chosen' {ADDS} user"),
    "one conversation begins the other": (
        {"chosen": [user(), YES], "rejected": [user(), YES, user(), NO]},
        f"'chosen' {ADDS} nothing",
    ),
    "no shared message": (
        {"chosen": [user("A"), YES], "rejected": [user("B"), NO]},
        f"'chosen' {ADDS} user, assistant",
    ),
    "answers alone": ({"chosen": [YES], "rejected": [NO]}, "there is no prompt before the answers"),
    "a prompt that ends with the assistant": (
        row(prompt=[user(), bot("Once")]),
        "the prompt ends with a message of role 'assistant'; it must end with a user's",
    ),
    "a prompt that ends with the system": (
        row(prompt=[SYSTEM]),
        "the prompt ends with a message of role 'system'; it must end with a user's",
    ),
    "text prompt beside answers alone": (
        row(prompt="Hi"),
        "'prompt' is text, and not the last user message that both conversations share",
    ),
    "text prompt of another message": (
        {"prompt": "Hello", "chosen": [user(), YES], "rejected": [user(), NO]},
        "'prompt' is text, and not the last user message that both conversations share",
    ),
    "empty text prompt": (
        {"prompt": "", "chosen": [user(), YES], "rejected": [user(), NO]},
        "'prompt' is text, and not the last user message that both conversations share",
    ),
    "system twice": (
        row(system="Be kind.", prompt=[SYSTEM, user()]),
        "the row has both a 'system' column and a system message",
    ),
    "system that is no text": (row(system=["a"]), "'system' is not text"),
    "blank system column": (row(system=" "), "'system' is empty"),
    "tools that are no JSON": (row(tools="[{"), "'tools' is not JSON"),
    "tools that are no list": (row(tools='{"a": 1}'), "'tools' is not a list of JSON schemas"),
    "tools that are names": (row(tools=["weather"]), "'tools' is not a list of JSON schemas"),
    "kwargs that are no dictionary": (row(chat_template_kwargs="{}"), "'chat_template_kwargs' is not a dictionary"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_row(name: str) -> None:
    columns, sentence = REFUSED[name]
    with pytest.raises(DataError) as refused:
        preference_conversation(columns)
    assert str(refused.value) == sentence
    assert "\n" not in sentence


# ---------------------------------------------------------------- one conversation to learn

LEARNT = Conversation([user()], (YES,))


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"messages": [user(), YES]}, LEARNT),
        ({"conversations": [from_("human", "Hi"), from_("gpt", "Yes")]}, LEARNT),
        ({"messages": [user(), YES], "conversations": [user(), NO]}, LEARNT),
        ({"prompt": [user()], "completion": [YES]}, LEARNT),
        ({"prompt": [user()], "completion": "Yes"}, LEARNT),
        ({"prompt": [user()], "completion": [user(), YES]}, LEARNT),
        ({"system": "Be terse.", "messages": [user(), YES]}, Conversation([SYSTEM, user()], (YES,))),
        (
            {"messages": [user(), NO, user("Sure?"), YES], "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
            Conversation([user(), NO, user("Sure?")], (YES,), [TOOL], {"a": 1}),
        ),
    ],
)
def test_a_conversation_to_learn(columns: dict[str, Any], expected: Conversation) -> None:
    assert is_supervised(columns)
    assert supervised_conversation(columns) == expected


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"messages": []}, "'messages' holds no messages"),
        ({"messages": [user()]}, "'messages' ends with a message of role 'user'; it must end with an answer"),
        ({"messages": [YES]}, "there is no prompt before the answers"),
        ({"messages": [user(), bot("")]}, "'messages' is empty"),
        ({"messages": [user(), CALLING]}, "'messages' calls tools; an answer must be text"),
        (
            {"messages": [user(), YES, NO]},
            "the prompt ends with a message of role 'assistant'; it must end with a user's",
        ),
        ({"prompt": [user()], "completion": [YES, user()]}, f"'completion' {ADDS} assistant, user"),
        ({"prompt": "Hi", "completion": [YES]}, "'prompt' is str; messages are needed"),
        ({"completion": [YES]}, "'prompt' is null; messages are needed"),
    ],
)
def test_a_refused_conversation_to_learn(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        supervised_conversation(columns)
    assert str(refused.value) == sentence


def test_rows_that_are_no_conversation_to_learn() -> None:
    assert not is_supervised({"prompt": "Hi", "completion": "Yes"})
    assert not is_supervised({"instruction": "Hi", "output": "Yes"})
    assert not is_supervised({"prompt": [user()], "chosen": "Yes", "rejected": "No"})


# ---------------------------------------------------------------- dialogues in one text

ASK = "\n\nHuman: Hi"
BEFORE = f"{ASK}\n\nAssistant: Hello\n\nHuman:  Why? \n\nAssistant:"
TURNS = [user(), bot("Hello"), user("Why?")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"prompt": f"{ASK}\n\nAssistant:", "chosen": " Yes", "rejected": " No\n"}, PLAIN),
        ({"prompt": "Human: Hi\n\nAssistant:", "chosen": "Yes", "rejected": "No"}, PLAIN),
        ({"prompt": BEFORE, "chosen": " Yes", "rejected": " No"}, Conversation(TURNS, (YES, NO))),
        ({"chosen": f"{BEFORE} Yes", "rejected": f"{BEFORE} No"}, Conversation(TURNS, (YES, NO))),
        ({"prompt": None, "chosen": f"{BEFORE} Yes", "rejected": f"{BEFORE} No"}, Conversation(TURNS, (YES, NO))),
        (
            {"prompt": "\n\nHuman: a\nHuman: b\n\nAssistant:", "chosen": "Yes", "rejected": "a\nAssistant: b"},
            Conversation([user("a\nHuman: b")], (YES, bot("a\nAssistant: b"))),
        ),
    ],
)
def test_a_dialogue_is_split_into_turns(columns: dict[str, Any], expected: Conversation) -> None:
    assert dialogue_conversation(columns) == expected


@pytest.mark.parametrize(
    ("columns", "sentence"),
    [
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "'prompt' does not begin with 'Human:'"),
        (
            {"prompt": f"Note.{ASK}\n\nAssistant:", "chosen": "a", "rejected": "b"},
            "'prompt' does not begin with 'Human:'",
        ),
        (
            {"prompt": "\n\nAssistant: Hi\n\nHuman: Hi\n\nAssistant:", "chosen": "a", "rejected": "b"},
            "'prompt' does not alternate between Human and Assistant (turn 1)",
        ),
        (
            {"prompt": f"{ASK}{ASK}\n\nAssistant:", "chosen": "a", "rejected": "b"},
            "'prompt' does not alternate between Human and Assistant (turn 2)",
        ),
        ({"prompt": ASK, "chosen": "a", "rejected": "b"}, "'prompt' does not end with 'Assistant:'"),
        (
            {"prompt": f"{ASK}\n\nAssistant: Sure", "chosen": "a", "rejected": "b"},
            "'prompt' does not end with 'Assistant:'",
        ),
        (
            {"prompt": "\n\nHuman: \n\nAssistant:", "chosen": "a", "rejected": "b"},
            "a turn of the dialogue is empty",
        ),
        ({"prompt": BEFORE, "chosen": " ", "rejected": "b"}, "'chosen' is empty"),
        ({"prompt": BEFORE, "chosen": "\u200b", "rejected": "b"}, "'chosen' is empty (only invisible characters)"),
        (
            {"prompt": BEFORE, "chosen": "a", "rejected": f"b{ASK}"},
            "'rejected' holds turns of a dialogue; one answer is needed",
        ),
        ({"prompt": BEFORE, "chosen": "a"}, "column 'rejected' is missing"),
        ({"prompt": BEFORE, "chosen": "a", "rejected": ["b"]}, "'rejected' is not text"),
        (
            {"chosen": f"{BEFORE} a", "rejected": f"{ASK}\n\nAssistant: b"},
            "'chosen' and 'rejected' differ before the last answer",
        ),
        ({"chosen": ASK, "rejected": ASK}, "'chosen' does not end with an answer of the assistant"),
        ({"chosen": f"{BEFORE} a", "rejected": BEFORE}, "'rejected' ends with an empty answer"),
    ],
)
def test_a_refused_dialogue(columns: dict[str, Any], sentence: str) -> None:
    with pytest.raises(DataError) as refused:
        dialogue_conversation(columns)
    assert str(refused.value) == sentence
