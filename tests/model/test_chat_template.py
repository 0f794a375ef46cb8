"""Conversations become the ids that a model of each family would see, and markers in them stay text."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from typing import Any

import pytest
from chat_families import families, shown

from tisdpo_cli.errors import DataError
from tisdpo_cli.model.chat_template import ChatTemplate, EncodedConversation

FAMILIES = families()
DAY = datetime.date(2025, 1, 1)


class Clock(datetime.datetime):
    """The clock of transformers, at the same day."""

    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Clock:
        return cls(DAY.year, DAY.month, DAY.day, tzinfo=tz)


@pytest.fixture
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Clock)


def m(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


HI, YES, NO = m("user", "Hi"), m("assistant", "Yes"), m("assistant", "No")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOL = {"name": "add", "description": "x{stop}"}

# Prompt, chosen, rejected, and what else the row has. {begin} and {stop} are tokens of the family.
ROWS: dict[str, tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "plain": ([HI], YES, NO, {}),
    "system": ([m("system", "Be brief."), HI], YES, NO, {}),
    "several turns": ([HI, m("assistant", "Hello."), m("user", "Why?")], YES, NO, {}),
    "one answer begins the other": ([HI], YES, m("assistant", "Yes, of course"), {}),
    "blanks around": ([m("user", "  Hi \n")], m("assistant", "  Yes \n"), m("assistant", "\n\nNo "), {}),
    "equal but for blanks": ([HI], YES, m("assistant", " Yes "), {}),
    "markers in the question": ([m("user", "a{stop}{begin}b")], YES, NO, {}),
    "markers in an answer": ([HI], m("assistant", "{begin}Yes{stop}"), NO, {}),
    "markers in the system text": ([m("system", "{begin}s{stop}"), HI], YES, NO, {}),
    "unicode": ([m("user", "naïve 👩‍👧 你好")], m("assistant", "é"), m("assistant", "e\u0301 ﬁ"), {}),
    "reasoning in both": ([HI], {**YES, "reasoning_content": "One."}, {**NO, "thinking": "Two."}, {}),
    "reasoning in one": ([HI], {**YES, "reasoning_content": "One."}, NO, {}),
    "user twice": ([HI, m("user", "There?")], YES, NO, {}),
    "assistant first": ([m("assistant", "Hello."), HI], YES, NO, {}),
    "tool result": ([HI, m("assistant", "", tool_calls=[CALL]), m("tool", "sunny", name="weather")], YES, NO, {}),
    "tools": ([HI], YES, NO, {"tools": [TOOL]}),
    "developer": ([m("developer", "Be brief."), HI], YES, NO, {}),
    "end of reasoning in an answer": ([HI], m("assistant", "a</think>b"), NO, {}),
    "reasoning in an earlier text": ([HI, m("assistant", "<think>x</think>\n\ny"), m("user", "Why?")], YES, NO, {}),
    "variables of the row": (
        [HI], YES, NO, {"kwargs": {"enable_thinking": False, "date_string": "1 Jan", "effort": "{stop}low"}},
    ),
}  # fmt: skip


def filled(value: Any, begin: str, stop: str) -> Any:
    """A value with the tokens of a family in its texts."""
    if isinstance(value, str):
        return value.replace("{begin}", begin).replace("{stop}", stop)
    if isinstance(value, dict):
        return {key: filled(inner, begin, stop) for key, inner in value.items()}
    return [filled(inner, begin, stop) for inner in value] if isinstance(value, (list, tuple)) else value


# ---------------------------------------------------------------- golden rows

# By family and row: the prompt, the opening at its end, and both answers; or the reason why the row is refused. Text is
# what the tokens spell, added tokens stand between ⟦ and ⟧.
Golden = dict[str, "tuple[str, str, str, str] | str"]
REASONING = "the chat template leaves out the reasoning of an answer"
ALTERNATE = "the chat template refuses this conversation: roles must alternate"
UNICODE = ("é", "e\u0301 ﬁ")


def left_out(number: int, role: str) -> str:
    return f"the chat template leaves out message {number} of the prompt ({role})"


def no_call(number: int) -> str:
    return f"the chat template leaves out a tool call of message {number} of the prompt"


def chatml(role: str, text: str) -> str:
    return f"⟦<|im_start|>⟧{role}\n{text}⟦<|im_end|>⟧\n"


def smol() -> Golden:
    default, ask, answer = chatml("system", "You help."), chatml("user", "Hi"), "⟦<|im_start|>⟧assistant\n"
    plain = f"{default}{ask}{answer}"
    return {
        "plain": (plain, "", "Yes", "No"),
        "system": (f"{chatml('system', 'Be brief.')}{ask}{answer}", "", "Yes", "No"),
        "several turns": (
            f"{default}{ask}{chatml('assistant', 'Hello.')}{chatml('user', 'Why?')}{answer}", "", "Yes", "No",
        ),
        "one answer begins the other": (plain, "", "Yes", "Yes, of course"),
        "blanks around": (f"{default}{chatml('user', '  Hi ' + chr(10))}{answer}", "", "  Yes \n", "\n\nNo "),
        "equal but for blanks": (plain, "", "Yes", " Yes "),
        "markers in the question": (f"{default}{chatml('user', 'a<|im_end|><|im_start|>b')}{answer}", "", "Yes", "No"),
        "markers in an answer": (plain, "", "<|im_start|>Yes<|im_end|>", "No"),
        "markers in the system text": (
            f"{chatml('system', '<|im_start|>s<|im_end|>')}{ask}{answer}", "", "Yes", "No",
        ),
        "unicode": (f"{default}{chatml('user', 'naïve 👩‍👧 你好')}{answer}", "", *UNICODE),
        "reasoning in both": REASONING,
        "reasoning in one": REASONING,
        "user twice": (f"{default}{ask}{chatml('user', 'There?')}{answer}", "", "Yes", "No"),
        "assistant first": (f"{default}{chatml('assistant', 'Hello.')}{ask}{answer}", "", "Yes", "No"),
        "tool result": no_call(2),
        "tools": (plain, "", "Yes", "No"),
        "developer": (f"{default}{chatml('developer', 'Be brief.')}{ask}{answer}", "", "Yes", "No"),
        "end of reasoning in an answer": (plain, "", "a</think>b", "No"),
        "reasoning in an earlier text": (
            f"{default}{ask}{chatml('assistant', '<think>x</think>' + chr(10) * 2 + 'y')}{chatml('user', 'Why?')}"
            f"{answer}", "", "Yes", "No",
        ),
        "variables of the row": (plain, "", "Yes", "No"),
    }  # fmt: skip


def qwen() -> Golden:
    ask, answer, think = chatml("user", "Hi"), "⟦<|im_start|>⟧assistant\n", "⟦<think>⟧\n\n⟦</think>⟧\n\n"
    plain = f"{ask}{answer}{think}"
    call = '⟦<tool_call>⟧\n{"name": "weather", "arguments": {"city": "Rome"}}\n⟦</tool_call>⟧'
    tool = '{"name": "add", "description": "x<|im_end|>"}'
    return {
        "plain": (plain, think, "Yes", "No"),
        "system": (f"{chatml('system', 'Be brief.')}{plain}", think, "Yes", "No"),
        "several turns": (
            f"{ask}{chatml('assistant', 'Hello.')}{chatml('user', 'Why?')}{answer}{think}", think, "Yes", "No",
        ),
        "one answer begins the other": (plain, think, "Yes", "Yes, of course"),
        "blanks around": (f"{chatml('user', '  Hi ' + chr(10))}{answer}{think}", think, "  Yes \n", "No "),
        "equal but for blanks": (plain, think, "Yes", " Yes "),
        "markers in the question": (
            f"{chatml('user', 'a<|im_end|><|im_start|>b')}{answer}{think}", think, "Yes", "No",
        ),
        "markers in an answer": (plain, think, "<|im_start|>Yes<|im_end|>", "No"),
        "markers in the system text": (f"{chatml('system', '<|im_start|>s<|im_end|>')}{plain}", think, "Yes", "No"),
        "unicode": (f"{chatml('user', 'naïve 👩‍👧 你好')}{answer}{think}", think, *UNICODE),
        "reasoning in both": (
            f"{ask}{answer}", "", "⟦<think>⟧\nOne.\n⟦</think>⟧\n\nYes", "⟦<think>⟧\nTwo.\n⟦</think>⟧\n\nNo",
        ),
        "reasoning in one": (f"{ask}{answer}", "", "⟦<think>⟧\nOne.\n⟦</think>⟧\n\nYes", f"{think}No"),
        "user twice": (f"{ask}{chatml('user', 'There?')}{answer}{think}", think, "Yes", "No"),
        "assistant first": (f"{chatml('assistant', 'Hello.')}{plain}", think, "Yes", "No"),
        "tool result": (
            f"{ask}{chatml('assistant', call)}"
            f"{chatml('user', '<tool_response>' + chr(10) + 'sunny' + chr(10) + '</tool_response>')}"
            f"{answer}{think}", think, "Yes", "No",
        ),
        "tools": (f"{chatml('system', 'Tools:' + chr(10) + tool)}{plain}", think, "Yes", "No"),
        "developer": left_out(1, "developer"),
        "end of reasoning in an answer": (f"{ask}{answer}", "", "⟦<think>⟧\na\n⟦</think>⟧\n\nb", f"{think}No"),
        "reasoning in an earlier text": (
            f"{ask}{chatml('assistant', 'y')}{chatml('user', 'Why?')}{answer}{think}", think, "Yes", "No",
        ),
        "variables of the row": (plain, "", "Yes", "No"),
    }  # fmt: skip


def llama31() -> Golden:
    def turn(role: str, text: str) -> str:
        return f"⟦<|start_header_id|>⟧{role}⟦<|end_header_id|>⟧\n\n{text}⟦<|eot_id|>⟧"

    def begun(system: str, date: str = "26 Jul 2024") -> str:
        return f"⟦<|begin_of_text|>⟧{turn('system', f'Today: {date}' + chr(10) * 2 + system)}"

    ask, answer = turn("user", "Hi"), "⟦<|start_header_id|>⟧assistant⟦<|end_header_id|>⟧\n\n"
    plain = f"{begun('')}{ask}{answer}"
    tool = '{"name": "add", "description": "x<|eot_id|>"}'
    return {
        "plain": (plain, "", "Yes", "No"),
        "system": (f"{begun('Be brief.')}{ask}{answer}", "", "Yes", "No"),
        "several turns": (
            f"{begun('')}{ask}{turn('assistant', 'Hello.')}{turn('user', 'Why?')}{answer}", "", "Yes", "No",
        ),
        "one answer begins the other": (plain, "", "Yes", "Yes, of course"),
        "blanks around": (plain, "", "Yes", "No"),
        "equal but for blanks": (plain, "", "Yes", "Yes"),
        "markers in the question": (
            f"{begun('')}{turn('user', 'a<|eot_id|><|start_header_id|>b')}{answer}", "", "Yes", "No",
        ),
        "markers in an answer": (plain, "", "<|start_header_id|>Yes<|eot_id|>", "No"),
        "markers in the system text": (f"{begun('<|start_header_id|>s<|eot_id|>')}{ask}{answer}", "", "Yes", "No"),
        "unicode": (f"{begun('')}{turn('user', 'naïve 👩‍👧 你好')}{answer}", "", *UNICODE),
        "reasoning in both": REASONING,
        "reasoning in one": REASONING,
        "user twice": (f"{begun('')}{ask}{turn('user', 'There?')}{answer}", "", "Yes", "No"),
        "assistant first": (f"{begun('')}{turn('assistant', 'Hello.')}{ask}{answer}", "", "Yes", "No"),
        "tool result": (
            f"{begun('')}{ask}" + turn("assistant", '{"name": "weather", "parameters": {"city": "Rome"}}')
            + turn("ipython", '"sunny"') + answer, "", "Yes", "No",
        ),
        "tools": (f"{begun('')}{turn('user', tool + chr(10) * 2 + 'Hi')}{answer}", "", "Yes", "No"),
        "developer": (f"{begun('')}{turn('developer', 'Be brief.')}{ask}{answer}", "", "Yes", "No"),
        "end of reasoning in an answer": (plain, "", "a</think>b", "No"),
        "reasoning in an earlier text": (
            f"{begun('')}{ask}{turn('assistant', '<think>x</think>' + chr(10) * 2 + 'y')}{turn('user', 'Why?')}"
            f"{answer}", "", "Yes", "No",
        ),
        "variables of the row": (f"{begun('', '1 Jan')}{ask}{answer}", "", "Yes", "No"),
    }  # fmt: skip


def gemma() -> Golden:
    def turn(role: str, text: str) -> str:
        return f"⟦<start_of_turn>⟧{role}\n{text}⟦<end_of_turn>⟧\n"

    bos, ask, answer = "⟦<bos>⟧", turn("user", "Hi"), "⟦<start_of_turn>⟧model\n"
    plain = f"{bos}{ask}{answer}"
    return {
        "plain": (plain, "", "Yes", "No"),
        "system": (f"{bos}{turn('user', 'Be▁brief.' + chr(10) * 2 + 'Hi')}{answer}", "", "Yes", "No"),
        "several turns": (f"{bos}{ask}{turn('model', 'Hello.')}{turn('user', 'Why?')}{answer}", "", "Yes", "No"),
        "one answer begins the other": (plain, "", "Yes", "Yes,▁of▁course"),
        "blanks around": (plain, "", "Yes", "No"),
        "equal but for blanks": (plain, "", "Yes", "Yes"),
        "markers in the question": (
            f"{bos}{turn('user', 'a<end_of_turn><start_of_turn>b')}{answer}", "", "Yes", "No",
        ),
        "markers in an answer": (plain, "", "<start_of_turn>Yes<end_of_turn>", "No"),
        "markers in the system text": (
            f"{bos}{turn('user', '<start_of_turn>s<end_of_turn>' + chr(10) * 2 + 'Hi')}{answer}", "", "Yes", "No",
        ),
        "unicode": (f"{bos}{turn('user', 'naïve▁👩‍👧▁你好')}{answer}", "", "é", "e\u0301▁ﬁ"),
        "reasoning in both": REASONING,
        "reasoning in one": REASONING,
        "user twice": ALTERNATE,
        "assistant first": ALTERNATE,
        "tool result": ALTERNATE,
        "tools": (plain, "", "Yes", "No"),
        "developer": ALTERNATE,
        "end of reasoning in an answer": (plain, "", "a</think>b", "No"),
        "reasoning in an earlier text": (
            f"{bos}{ask}{turn('model', '<think>x</think>' + chr(10) * 2 + 'y')}{turn('user', 'Why?')}{answer}",
            "", "Yes", "No",
        ),
        "variables of the row": (plain, "", "Yes", "No"),
    }  # fmt: skip


def deepseek() -> Golden:
    bos, eos, user, answer = "⟦<｜begin▁of▁sentence｜>⟧", "⟦<｜end▁of▁sentence｜>⟧", "⟦<｜User｜>⟧", "⟦<｜Assistant｜>⟧"
    plain = f"{bos}{user}Hi{answer}"
    return {
        "plain": (plain, "", "Yes", "No"),
        "system": (f"{bos}Be brief.{user}Hi{answer}", "", "Yes", "No"),
        "several turns": (f"{bos}{user}Hi{answer}Hello.{eos}{user}Why?{answer}", "", "Yes", "No"),
        "one answer begins the other": (plain, "", "Yes", "Yes, of course"),
        "blanks around": (f"{bos}{user}  Hi \n{answer}", "", "  Yes \n", "\n\nNo "),
        "equal but for blanks": (plain, "", "Yes", " Yes "),
        "markers in the question": (
            f"{bos}{user}a<｜end▁of▁sentence｜><｜User｜>b{answer}", "", "Yes", "No",
        ),
        "markers in an answer": (plain, "", "<｜User｜>Yes<｜end▁of▁sentence｜>", "No"),
        "markers in the system text": (
            f"{bos}<｜User｜>s<｜end▁of▁sentence｜>{user}Hi{answer}", "", "Yes", "No",
        ),
        "unicode": (f"{bos}{user}naïve 👩‍👧 你好{answer}", "", *UNICODE),
        "reasoning in both": REASONING,
        "reasoning in one": REASONING,
        "user twice": (f"{bos}{user}Hi{user}There?{answer}", "", "Yes", "No"),
        "assistant first": (f"{bos}{answer}Hello.{eos}{user}Hi{answer}", "", "Yes", "No"),
        "tool result": no_call(2),
        "tools": (plain, "", "Yes", "No"),
        "developer": left_out(1, "developer"),
        "end of reasoning in an answer": (plain, "", "a</think>b", "No"),
        "reasoning in an earlier text": (
            f"{bos}{user}Hi{answer}<think>x</think>\n\ny{eos}{user}Why?{answer}", "", "Yes", "No",
        ),
        "variables of the row": (plain, "", "Yes", "No"),
    }  # fmt: skip


def gpt_oss() -> Golden:
    def turn(role: str, text: str, end: str = "end") -> str:
        return f"⟦<|start|>⟧{role}⟦<|message|>⟧{text}⟦<|{end}|>⟧"

    def begun(effort: str = "medium") -> str:
        return turn("system", f"Date: 2025-01-01\nEffort: {effort}")

    ask, answer, final = turn("user", "Hi"), "⟦<|start|>⟧assistant", "⟦<|channel|>⟧final⟦<|message|>⟧"
    plain = f"{begun()}{ask}{answer}{final}"
    thought = "⟦<|channel|>⟧analysis⟦<|message|>⟧{}⟦<|end|>⟧" + answer + final
    hello, developer = f"{answer}{final}Hello.⟦<|end|>⟧", turn("developer", "Be brief.")
    return {
        "plain": (plain, final, "Yes", "No"),
        "system": (f"{begun()}{developer}{ask}{answer}{final}", final, "Yes", "No"),
        "several turns": (f"{begun()}{ask}{hello}{turn('user', 'Why?')}{answer}{final}", final, "Yes", "No"),
        "one answer begins the other": (plain, final, "Yes", "Yes, of course"),
        "blanks around": (f"{begun()}{turn('user', '  Hi ' + chr(10))}{answer}{final}", final, "  Yes \n", "\n\nNo "),
        "equal but for blanks": (plain, final, "Yes", " Yes "),
        "markers in the question": (
            f"{begun()}{turn('user', 'a<|return|><|start|>b')}{answer}{final}", final, "Yes", "No",
        ),
        "markers in an answer": (plain, final, "<|start|>Yes<|return|>", "No"),
        "markers in the system text": (
            f"{begun()}{turn('developer', '<|start|>s<|return|>')}{ask}{answer}{final}", final, "Yes", "No",
        ),
        "unicode": (f"{begun()}{turn('user', 'naïve 👩‍👧 你好')}{answer}{final}", final, *UNICODE),
        "reasoning in both": (
            f"{begun()}{ask}{answer}", "", f"{thought.format('One.')}Yes", f"{thought.format('Two.')}No",
        ),
        "reasoning in one": (f"{begun()}{ask}{answer}", "", f"{thought.format('One.')}Yes", f"{final}No"),
        "user twice": (f"{begun()}{ask}{turn('user', 'There?')}{answer}{final}", final, "Yes", "No"),
        "assistant first": (f"{begun()}{hello}{ask}{answer}{final}", final, "Yes", "No"),
        "tool result": (
            f"{begun()}{ask}" + turn("assistant to=weather⟦<|channel|>⟧commentary", '{"city": "Rome"}', "call")
            + turn("weather to=assistant⟦<|channel|>⟧commentary", '"sunny"') + answer + final, final, "Yes", "No",
        ),
        "tools": (
            begun() + turn("developer", '\n{"name": "add", "description": "x<|return|>"}') + ask + answer + final,
            final, "Yes", "No",
        ),
        "developer": (f"{begun()}{developer}{ask}{answer}{final}", final, "Yes", "No"),
        "end of reasoning in an answer": (plain, final, "a</think>b", "No"),
        "reasoning in an earlier text": (
            f"{begun()}{ask}{answer}{final}<think>x</think>\n\ny⟦<|end|>⟧{turn('user', 'Why?')}{answer}{final}",
            final, "Yes", "No",
        ),
        "variables of the row": (f"{begun('<|return|>low')}{ask}{answer}{final}", final, "Yes", "No"),
    }  # fmt: skip


def llama2() -> Golden:
    def turn(text: str) -> str:
        return f"⟦<s>⟧▁[INST]▁{text}▁[/INST]"

    plain = turn("Hi")
    return {
        "plain": (plain, "", "▁Yes▁", "▁No▁"),
        "system": (turn("<<SYS>>\nBe▁brief.\n<</SYS>>\n\nHi"), "", "▁Yes▁", "▁No▁"),
        "several turns": (f"{plain}▁Hello.▁⟦</s>⟧{turn('Why?')}", "", "▁Yes▁", "▁No▁"),
        "one answer begins the other": (plain, "", "▁Yes▁", "▁Yes,▁of▁course▁"),
        "blanks around": (plain, "", "▁Yes▁", "▁No▁"),
        "equal but for blanks": (plain, "", "▁Yes▁", "▁Yes▁"),
        "markers in the question": (turn("a</s><s>b"), "", "▁Yes▁", "▁No▁"),
        "markers in an answer": (plain, "", "▁<s>Yes</s>▁", "▁No▁"),
        "markers in the system text": (turn("<<SYS>>\n<s>s</s>\n<</SYS>>\n\nHi"), "", "▁Yes▁", "▁No▁"),
        "unicode": (turn("naïve▁👩‍👧▁你好"), "", "▁é▁", "▁e\u0301▁ﬁ▁"),
        "reasoning in both": REASONING,
        "reasoning in one": REASONING,
        "user twice": ALTERNATE,
        "assistant first": ALTERNATE,
        "tool result": ALTERNATE,
        "tools": (plain, "", "▁Yes▁", "▁No▁"),
        "developer": ALTERNATE,
        "end of reasoning in an answer": (plain, "", "▁a</think>b▁", "▁No▁"),
        "reasoning in an earlier text": (
            f"{plain}▁<think>x</think>\n\ny▁⟦</s>⟧{turn('Why?')}", "", "▁Yes▁", "▁No▁",
        ),
        "variables of the row": (plain, "", "▁Yes▁", "▁No▁"),
    }  # fmt: skip


GOLDEN = {
    "smol": smol(), "qwen": qwen(), "llama3.1": llama31(), "gemma": gemma(), "deepseek": deepseek(),
    "gpt-oss": gpt_oss(), "llama2": llama2(),
}  # fmt: skip


def cells() -> Iterator[tuple[str, str]]:
    return ((family, name) for family in FAMILIES for name in ROWS)


def row_of(family: str, name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    prompt, chosen, rejected, more = filled(ROWS[name], FAMILIES[family].begin, FAMILIES[family].stop)
    return prompt, [chosen, rejected], more


TEMPLATES = {name: ChatTemplate(family.tokenizer, day=DAY) for name, family in FAMILIES.items()}


@pytest.mark.parametrize(("family", "name"), cells())
def test_golden_rows(family: str, name: str) -> None:
    expected, tokenizer = GOLDEN[family][name], FAMILIES[family].tokenizer
    prompt, answers, more = row_of(family, name)
    if isinstance(expected, str):
        with pytest.raises(DataError) as refused:
            TEMPLATES[family].encode(prompt, answers, **more)
        assert str(refused.value) == expected
        return
    encoded = TEMPLATES[family].encode(prompt, answers, **more)
    begin, opening, *both = expected
    assert shown(tokenizer, encoded.prompt) == begin
    assert shown(tokenizer, encoded.prompt[len(encoded.prompt) - encoded.opening :]) == opening
    assert [shown(tokenizer, ids) for ids in encoded.answers] == both
    assert tokenizer.convert_ids_to_tokens(encoded.stop) == FAMILIES[family].stop
    assert encoded.own_stop
    assert TEMPLATES[family].joins(encoded)


@pytest.mark.usefixtures("_same_day")
@pytest.mark.parametrize(
    ("family", "name"),
    [(f, n) for f, n in cells() if "marker" not in n and not isinstance(GOLDEN[f][n], str)],
)
def test_without_markers_the_prompt_is_that_of_transformers(family: str, name: str) -> None:
    """Up to the opening, which inference leaves to the model."""
    prompt, *answers, more = filled(ROWS[name], "", "")
    tools, kwargs = more.get("tools"), more.get("kwargs", {})
    encoded = TEMPLATES[family].encode(prompt, answers, tools, kwargs)
    theirs = FAMILIES[family].tokenizer.apply_chat_template(
        prompt, tools=tools, add_generation_prompt=True, tokenize=True, **kwargs
    )["input_ids"]
    assert encoded.prompt[: len(encoded.prompt) - encoded.opening] == theirs


def plain(family: str) -> EncodedConversation:
    return TEMPLATES[family].encode([HI], [YES, NO])


def test_texts_beside_the_ids() -> None:
    encoded = TEMPLATES["qwen"].encode([m("user", "<|im_end|>")], [m("assistant", "<|im_start|>"), NO])
    assert encoded.prompt_text.startswith("<|im_start|>user\n<|im_end|><|im_end|>\n")
    assert encoded.prompt_text.endswith("assistant\n<think>\n\n</think>\n\n")
    assert encoded.answer_texts == ("<|im_start|>", "No")
    assert plain("llama2").answer_texts == (" Yes ", " No ")


def test_an_opening_is_that_of_these_answers() -> None:
    """One answer moves it too, and with thinking disabled the prompt has the same ids."""
    one = TEMPLATES["qwen"].encode([HI], [YES])
    disabled = TEMPLATES["qwen"].encode([HI], [YES], kwargs={"enable_thinking": False})
    assert (one.opening, disabled.opening) == (6, 0)
    assert one.prompt == disabled.prompt == plain("qwen").prompt


# ---------------------------------------------------------------- what else is refused


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{{ messages[0].content }}", "the chat template does not show an answer as it is"),
        (
            "{% for m in messages %}{{ m.content }}{% endfor %}{{ messages[-1].content }}",
            "the chat template renders the prompt in another way when an answer follows it",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "the chat template renders the prompt in another way when an answer follows it",
        ),
        (
            "{% for m in messages %}{{ m.content + ('.' if 'Y' in m.content else '!') }}{% endfor %}",
            "the chat template ends this answer in another way than others",
        ),
        (
            "{% for m in messages if m.role != 'user' %}[{{ m.content }}]{% endfor %}",
            "the chat template leaves out message 1 of the prompt (user)",
        ),
    ],
)
def test_a_template_that_hides_what_it_is_given(template: str, sentence: str) -> None:
    chat = ChatTemplate(FAMILIES["smol"].tokenizer, template)
    with pytest.raises(DataError) as refused:
        chat.encode([HI], [YES, NO])
    assert str(refused.value) == sentence


def test_a_template_without_a_stop_ends_with_the_tokenizers() -> None:
    chat = ChatTemplate(FAMILIES["llama2"].tokenizer, "{% for m in messages %}[{{ m.content }}]{% endfor %}")
    encoded = chat.encode([HI], [YES])
    assert (encoded.stop, encoded.own_stop) == (FAMILIES["llama2"].tokenizer.eos_token_id, False)
    assert encoded.prompt_text + encoded.answer_texts[0] == "[Hi][Yes]"
    assert chat.joins(encoded)


# ---------------------------------------------------------------- old turns left out

TALK = [m("system", "Be brief."), HI, m("assistant", "Hello."), m("user", "Why?"), NO, m("user", "Well?")]


@pytest.mark.parametrize("family", FAMILIES)
def test_old_turns_are_left_out_whole(family: str) -> None:
    chat = TEMPLATES[family]
    kept = [chat.encode([TALK[0], *TALK[start:]], [YES, NO]) for start in (1, 3, 5)]
    lengths = [len(encoded.prompt) for encoded in kept]
    for limit, expected in [(lengths[0], 0), (lengths[0] - 1, 1), (lengths[1], 1), (lengths[2], 2), (1, 2)]:
        encoded, dropped = chat.shortened(TALK, [YES, NO], limit)
        assert (encoded.prompt, dropped) == (kept[expected].prompt, 2 * expected)
        assert encoded.answers == kept[0].answers


def test_a_tool_result_keeps_its_call() -> None:
    call, result = m("assistant", "", tool_calls=[CALL]), m("tool", "sunny")
    talk = [m("assistant", "Hello."), HI, call, result, NO, m("user", "Why?"), call, result]
    encoded, dropped = TEMPLATES["qwen"].shortened(talk, [YES, NO], 1)
    assert (encoded.prompt, dropped) == (TEMPLATES["qwen"].encode(talk[5:], [YES, NO]).prompt, 5)


# ---------------------------------------------------------------- what is recorded


def test_the_day_is_recorded_where_the_template_writes_it() -> None:
    assert [name for name, chat in TEMPLATES.items() if chat.writes_day] == ["gpt-oss"]
    assert (TEMPLATES["gpt-oss"].day, TEMPLATES["smol"].day) == (DAY, None)
    unset = ChatTemplate(FAMILIES["gpt-oss"].tokenizer)
    assert unset.day is not None
    assert abs(unset.day - datetime.date.today()) <= datetime.timedelta(days=1)


def test_the_record_covers_template_variables_and_a_day_that_is_written() -> None:
    def record(family: str, template: str | None = None, **more: Any) -> dict[str, Any]:
        return ChatTemplate(FAMILIES[family].tokenizer, template, **{"day": DAY, **more}).parts

    other = datetime.date(2025, 1, 2)
    assert record("smol") == record("smol", day=other) == record("smol", FAMILIES["smol"].tokenizer.chat_template)
    assert record("gpt-oss") != record("gpt-oss", day=other)
    assert record("smol") not in (record("smol", kwargs={"a": 1}), record("smol", "{{ bos_token }}"))
    parts = ChatTemplate(FAMILIES["gpt-oss"].tokenizer, kwargs={"effort": "low"}, day=DAY).parts
    assert {**parts, "template_sha256": len(parts["template_sha256"])} == {
        "template_sha256": 64, "kwargs": {"effort": "low"}, "day": "2025-01-01", "special_tokens": {},
    }  # fmt: skip


def test_the_record_has_the_special_tokens_that_the_template_names() -> None:
    tokenizer = FAMILIES["smol"].tokenizer
    named = ChatTemplate(tokenizer, "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}", day=DAY).parts
    assert named["special_tokens"] == {"bos_token": tokenizer.bos_token}


def test_variables_of_the_run_and_of_the_row() -> None:
    chat = ChatTemplate(FAMILIES["gpt-oss"].tokenizer, kwargs={"effort": "<|end|>"}, day=DAY)
    of_run, of_row = chat.encode([HI], [YES]), chat.encode([HI], [YES], kwargs={"effort": "low"})
    assert "Effort: ⟦<|end|>⟧" in shown(FAMILIES["gpt-oss"].tokenizer, of_run.prompt), "the run's are the template's"
    assert "Effort: low" in of_row.prompt_text
    for name in ("messages", "tools", "documents", "add_generation_prompt"):
        with pytest.raises(DataError, match=f"^chat template kwargs cannot set '{name}'$"):
            chat.encode([HI], [YES], kwargs={name: 1})
        with pytest.raises(DataError, match="cannot set"):
            ChatTemplate(FAMILIES["gpt-oss"].tokenizer, kwargs={name: 1})


def test_the_markers_of_each_family() -> None:
    for name, chat in TEMPLATES.items():
        special = {token.content for token in chat_tokens(name) if token.special}
        assert set(chat.markers) == special | ({"<｜User｜>", "<｜Assistant｜>"} if name == "deepseek" else set())
    disabled = ChatTemplate(FAMILIES["qwen"].tokenizer, kwargs={"enable_thinking": False})
    assert "<think>" not in disabled.markers


def chat_tokens(family: str) -> list[Any]:
    return list(FAMILIES[family].tokenizer.added_tokens_decoder.values())
