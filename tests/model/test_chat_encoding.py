"""Hostile conversations by the thousand, and tokenizers with habits of their own, give what the template shows."""

from __future__ import annotations

import random
from typing import Any

import pytest
from chat_families import byte_level, families, metaspace, shown
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from transformers import PreTrainedTokenizerFast

from tisdpo_cli.errors import DataError, ModelError
from tisdpo_cli.model.chat_template import ChatTemplate, EncodedConversation
from tisdpo_cli.model.template_sandbox import END, START

FAMILIES = families()
TOKENS = sorted({token.content for f in FAMILIES.values() for token in f.tokenizer.added_tokens_decoder.values()})
# Parts of tokens, blanks, jinja, private marks, JSON, and letters of one to four bytes.
PIECES = [
    "<|im_", "start|>", "<", "|>", "</", "s>", "<｜", "｜>", "[INST]", "[/INST]", "<<SYS>>", " ", "  ", "\n", "\n\n",
    "\t", "{{ bos_token }}", "{% raw %}", "{# x #}", START, END, f"{START}<s>{END}", "\\", '"', "a", "Hi", "yes", "é",
    "你好", "🙂", "e\u0301", "\u200b", "\ufeff", "qqANSWERqq", "qqTEXT0qq", "system\n", "0", "",
]  # fmt: skip
CASES = 1430
HI, YES = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"}


def conversation(draw: random.Random, parts: list[str]) -> list[dict[str, Any]]:
    """Turns that alternate, perhaps behind a system message, and an answer; no text is blank."""
    roles = ["user", *["assistant", "user"] * draw.choice((0, 0, 1, 2)), "assistant"]
    roles = ["system", *roles] if draw.random() < 0.4 else roles
    texts = ["".join(draw.choices(parts, k=draw.randrange(1, 9))) for _ in roles]
    return [
        {"role": role, "content": draw.choice((f"x{text}", f"{text}x", f"{text}x{text}"))}
        for role, text in zip(roles, texts, strict=True)
    ]


def plain(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages without private marks, which are removed from data."""
    return [{**m, "content": m["content"].replace(START, "").replace(END, "")} for m in messages]


def spelled(family: str, ids: list[int]) -> str:
    """What ids spell. Where the tokenizer puts a space behind a special token, that one is left out."""
    text = shown(FAMILIES[family].tokenizer, ids)
    text = text.replace("⟧▁", "⟧") if FAMILIES[family].adds_space else text
    text = text.replace("⟦", "").replace("⟧", "")
    return text if family == "deepseek" else text.replace("▁", " ")


@pytest.fixture(scope="module")
def templates() -> dict[str, ChatTemplate]:
    return {name: ChatTemplate(family.tokenizer) for name, family in FAMILIES.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_generated_conversations(family: str, templates: dict[str, ChatTemplate]) -> None:
    """Ten thousand in all, half of them without markers: held against transformers."""
    draw, chat, tokenizer = random.Random(family), templates[family], FAMILIES[family].tokenizer
    controls = set(chat.markers.values())
    frames: dict[tuple[str, ...], list[int]] = {}
    # A tokenizer that writes a space as "▁" does not tell one from the other.
    tokens = [text for text in TOKENS if "▁" not in text or family == "deepseek"]
    for case in range(CASES):
        messages = conversation(draw, [*PIECES, *tokens, *tokens] if case % 2 else PIECES)
        prompt = messages[:-1]
        ids, encoded = encode(chat, messages)
        theirs, ours = tokenizer.apply_chat_template(plain(messages), tokenize=False), spelled(family, ids)
        assert theirs.startswith(ours), messages
        assert theirs[len(ours) :].strip() == "", messages
        roles = tuple(m["role"] for m in messages)
        if roles not in frames:
            frames[roles], _ = encode(chat, [{**m, "content": "x"} for m in messages])
        assert [i for i in ids if i in controls] == [i for i in frames[roles] if i in controls], messages
        if not any(text in m["content"] for m in plain(prompt) for text in chat.markers):
            begin = encoded.prompt[: len(encoded.prompt) - encoded.opening]
            out = tokenizer.apply_chat_template(plain(prompt), add_generation_prompt=True, tokenize=True)
            assert begin == out["input_ids"], messages


def encode(chat: ChatTemplate, messages: list[dict[str, Any]]) -> tuple[list[int], EncodedConversation]:
    encoded = chat.encode(messages[:-1], messages[-1:])
    return [*encoded.prompt, *encoded.answers[0], encoded.stop], encoded


# ---------------------------------------------------------------- tokenizers with habits of their own

TURNS = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
TURNS += "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
FRAME = ("<|user|>", "<|assistant|>", "<|end|>")
TALK = [HI, YES, {"role": "user", "content": "  Why?\n"}]
ANSWERS = [{"role": "assistant", "content": " Yes "}, {"role": "assistant", "content": "\nNo"}]


def letters(
    *added: AddedToken, normalizer: Any = None, merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """Byte-level, with added tokens as they are given."""
    vocabulary = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(vocabulary)}, merges=list(merges)))
    backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(list(added))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")
    made.chat_template = TURNS
    return made


def theirs(tokenizer: PreTrainedTokenizerFast, prompt: list[dict[str, Any]]) -> list[int]:
    return tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=True)["input_ids"]


def test_tokens_that_take_in_the_blanks_beside_them() -> None:
    tokenizer = letters(
        AddedToken("<|user|>", special=True, rstrip=True),
        AddedToken("<|assistant|>", special=True, rstrip=True),
        AddedToken("<|end|>", special=True, lstrip=True, rstrip=True),
    )
    chat = ChatTemplate(tokenizer)
    encoded = chat.encode(TALK, ANSWERS)
    assert encoded.prompt == theirs(tokenizer, TALK)
    assert (
        shown(tokenizer, encoded.prompt)
        == "⟦<|user|>⟧Hi⟦<|end|>⟧⟦<|assistant|>⟧Yes⟦<|end|>⟧⟦<|user|>⟧Why?⟦<|end|>⟧⟦<|assistant|>⟧"
    )
    assert [shown(tokenizer, ids) for ids in encoded.answers] == [" Yes ", "\nNo"], "blanks of an answer stay"
    marked = chat.encode([{"role": "user", "content": " <|end|> \n"}], ANSWERS)
    assert shown(tokenizer, marked.prompt) == "⟦<|user|>⟧<|end|>⟦<|end|>⟧⟦<|assistant|>⟧"


@pytest.mark.parametrize("prefix", ["", "first", "normalizer"])
@pytest.mark.parametrize("special", [True, False])
def test_spaces_before_a_text_are_those_of_the_tokenizer(prefix: str, special: bool) -> None:
    tokenizer = metaspace(FRAME if special else ("<|end|>",), () if special else FRAME, prefix, eos_token="<|end|>")
    tokenizer.chat_template = TURNS
    chat = ChatTemplate(tokenizer)
    encoded, marked = (
        chat.encode(TALK, ANSWERS),
        chat.encode([*TALK[:2], {"role": "user", "content": "<|user|>"}], ANSWERS),
    )
    assert encoded.prompt == theirs(tokenizer, TALK)
    assert chat.joins(encoded)
    space = "▁" if prefix == "normalizer" else ""
    assert [shown(tokenizer, ids) for ids in encoded.answers] == ["▁Yes▁", "\nNo"]
    assert shown(tokenizer, marked.prompt).endswith(
        f"⟦<|user|>⟧{space}\n<|user|>⟦<|end|>⟧{space}\n⟦<|assistant|>⟧{space}\n"
    )


def test_an_answer_right_behind_a_token_begins_as_the_tokenizer_begins_it() -> None:
    for prefix, expected in (("", "Yes"), ("first", "Yes"), ("normalizer", "▁Yes")):
        tokenizer = metaspace(FRAME, (), prefix, eos_token="<|end|>")
        tokenizer.chat_template = TURNS.replace("|>\\n", "|>").replace("|>\n", "|>")
        chat = ChatTemplate(tokenizer)
        encoded = chat.encode([HI], [YES])
        assert shown(tokenizer, encoded.answers[0]) == expected
        assert chat.joins(encoded)


def test_text_that_becomes_a_special_token_only_when_normalized_stays_text() -> None:
    tokens = [AddedToken(text, special=True, normalized=True) for text in FRAME]
    tokenizer = letters(*tokens, normalizer=normalizers.NFKC())
    encoded = ChatTemplate(tokenizer).encode([{"role": "user", "content": "＜|end|＞<|ｅnd|>"}], [YES])
    assert theirs(tokenizer, [{"role": "user", "content": "＜|end|＞"}]).count(tokenizer.eos_token_id) == 2
    assert shown(tokenizer, encoded.prompt) == "⟦<|user|>⟧\n<|end|><|end|>⟦<|end|>⟧\n⟦<|assistant|>⟧\n"


def test_text_that_a_tokenizer_cannot_but_make_a_token_of_the_frame_is_refused() -> None:
    tokens = [AddedToken(text, special=text == "<|end|>", normalized=True) for text in FRAME]
    chat = ChatTemplate(letters(*tokens, normalizer=normalizers.NFKC()))
    assert chat.encode([{"role": "user", "content": "<|user|>"}], [YES])
    for prompt, answer in (({**HI, "content": "＜|user|＞"}, YES), (HI, {**YES, "content": "＜|user|＞"})):
        with pytest.raises(DataError, match=r"^the tokenizer turns text of this conversation into a special token$"):
            chat.encode([prompt], [answer])


def test_what_the_vocabulary_does_not_know_is_the_unknown_token() -> None:
    words = {word: i for i, word in enumerate(("<unk>", "user", "assistant", "Hi", "Yes"))}
    backend = Backend(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<unk>", *FRAME])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>", unk_token="<unk>")
    tokenizer.chat_template = TURNS
    encoded = ChatTemplate(tokenizer).encode([{"role": "user", "content": "Hi <|end|>"}], [YES])
    names = tokenizer.convert_ids_to_tokens(encoded.prompt)
    assert names == ["<|user|>", "Hi", "<unk>", "<unk>", "<unk>", "<|end|>", "<|assistant|>"]


def test_texts_that_would_merge_across_the_prompts_end_are_told() -> None:
    """The prompt keeps the ids that a model sees when it generates."""
    tokenizer = letters(*(AddedToken(text, special=True) for text in FRAME), merges=(("Ċ", "Ċ"),))
    chat = ChatTemplate(tokenizer)
    apart, joined = chat.encode([HI], ANSWERS), chat.encode([HI], ANSWERS[:1])
    assert (chat.joins(apart), chat.joins(joined)) == (False, True)
    assert apart.prompt == joined.prompt == theirs(tokenizer, [HI])


# ---------------------------------------------------------------- where else data stands


def test_markers_in_keys_and_calls_and_tools_stay_text(templates: dict[str, ChatTemplate]) -> None:
    chat, tokenizer = templates["qwen"], FAMILIES["qwen"].tokenizer
    bad = "<|im_end|>"
    call = {"function": {"name": bad, "arguments": {bad: [{bad: bad}], "n": 1}}}
    prompt = [HI, {"role": "assistant", "content": bad, "tool_calls": [call]}, {"role": "tool", "content": bad}]
    hostile = chat.encode(prompt, [YES], [{bad: {bad: [bad, 1, None]}}], {"other": bad})
    benign = chat.encode(
        [HI, {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": {}}}]},
         {"role": "tool", "content": "x"}], [YES], [{"x": 1}],
    )  # fmt: skip
    assert hostile.prompt.count(tokenizer.eos_token_id) == benign.prompt.count(tokenizer.eos_token_id)
    assert hostile.prompt_text.count(bad) == benign.prompt_text.count(bad) + 9


def test_markers_escaped_by_a_template_stay_text() -> None:
    tokenizer = byte_level(FRAME, eos_token="<|end|>")
    source = TURNS.replace("m.content", "m.content | tojson(ensure_ascii=true)")
    encoded = ChatTemplate(tokenizer, source).encode([{"role": "user", "content": "é<|end|>"}], [YES])
    assert shown(tokenizer, encoded.prompt) == '⟦<|user|>⟧\n"\\u00e9<|end|>"⟦<|end|>⟧\n⟦<|assistant|>⟧\n"'
    assert shown(tokenizer, encoded.answers[0]) == 'Yes"', "the first quote is before every answer"


# ---------------------------------------------------------------- which template


def test_a_tokenizer_without_a_template_is_refused() -> None:
    tokenizer = byte_level(FRAME, eos_token="<|end|>")
    with pytest.raises(ModelError, match=r"^the tokenizer has no chat template$"):
        ChatTemplate(tokenizer)
    assert ChatTemplate(tokenizer, TURNS).encode([HI], [YES]).prompt_text == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    tokenizer.chat_template = {"rag": TURNS}
    with pytest.raises(ModelError, match=r"^the tokenizer has no chat template$"):
        ChatTemplate(tokenizer)


def test_a_template_of_its_own_for_tools() -> None:
    tokenizer = byte_level(FRAME, eos_token="<|end|>")
    tokenizer.chat_template = {"default": TURNS, "tool_use": "{{ tools | tojson }}" + TURNS, "rag": ""}
    chat = ChatTemplate(tokenizer)
    assert chat.encode([HI], [YES], []).prompt_text == "<|user|>\nHi<|end|>\n<|assistant|>\n"
    assert chat.encode([HI], [YES], [{"a": 1}]).prompt_text == '[{"a": 1}]<|user|>\nHi<|end|>\n<|assistant|>\n'
    assert chat.parts != ChatTemplate(tokenizer, TURNS).parts
