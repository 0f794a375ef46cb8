"""Rewards of answers to conversations: scorers get messages, reward models their own template's render."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bos_tokenizer import bos_tokenizer
from conftest import Done, read_jsonl, run_here, write_jsonl
from transformers import LlamaConfig, LlamaForSequenceClassification

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.engine.evaluation.policies import Prompt, response_text
from tisdpo_cli.model.loading import load_reward_model

# An answer that never ends soon: special tokens are in it, and blanks around it.
POLICY_TEMPLATE = (
    "{% for m in messages %}{{ '\n\n' + m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
)
# Writes the BOS that the tokenizer adds to texts, and a line end behind the last turn.
JUDGE_TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role + '=' + m.content + eos_token + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {
            "prompt": [
                {"role": "system", "content": f"Be kind. {i}"},
                {"role": "user", "content": "Say <s> and </s>."},
            ],
            "chosen": [{"role": "assistant", "content": "Gladly."}],
            "rejected": [{"role": "assistant", "content": "No."}],
        }
        for i in range(3)
    ]
    return write_jsonl(tmp_path_factory.mktemp("chat") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random reward model with a tokenizer of its own, which adds a BOS to texts."""
    folder = tmp_path_factory.mktemp("judge")
    backend = bos_tokenizer().backend
    backend.chat_template = JUDGE_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(backend), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=512, num_labels=1, initializer_range=0.3,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    backend.save_pretrained(folder)
    return folder


def evaluated(world: Path, data: Path, folder: Path, *options: str | Path) -> Done:
    (folder / "chat.jinja").write_text(POLICY_TEMPLATE)
    return run_here(
        "evaluate", "-m", world / "sft", "--ref-model", world / "sft", "-d", data, "--chat-template",
        folder / "chat.jinja", "--max-new-tokens", "8", "--samples", folder / "s.jsonl", *options,
    )  # fmt: skip


def test_a_reward_model_reads_what_its_own_template_renders(
    world: Path, data: Path, judge: Path, tmp_path: Path
) -> None:
    done = evaluated(world, data, tmp_path, "--reward-model", judge)
    assert done.code == 0, done.err
    model, backend = load_reward_model(judge)
    rows = read_jsonl(tmp_path / "s.jsonl")
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_jsonl(data)]
    for row in rows:
        for response in row["responses"]:
            # What a text spells out stays text, so the ids are put together by hand.
            ids = [backend.bos_token_id]
            for message in [*row["prompt"], {"role": "assistant", "content": response["response"]}]:
                text = f"{message['role']}={message['content']}"
                ids += backend(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
                ids += [backend.eos_token_id, *backend("\n", add_special_tokens=False)["input_ids"]]
            assert ids.count(backend.bos_token_id) == 1
            expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0].detach())
            assert response["reward"] == pytest.approx(expected, abs=1e-5)


def test_plain_conversations_are_rendered_as_transformers_does_it(judge: Path) -> None:
    from tisdpo_cli.model.chat_template import ChatTemplate

    backend = load_reward_model(judge)[1]
    prompt, answer = [{"role": "user", "content": "Hi\nthere"}], " well "
    whole = [*prompt, {"role": "assistant", "content": answer}]
    expected = backend.apply_chat_template(whole, tokenize=True, return_dict=False)
    assert ChatTemplate(backend).encode_whole(prompt, answer) == expected


def test_a_reward_model_without_a_template_is_refused_before_anything_is_computed(
    world: Path, data: Path, judge: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in judge.iterdir():
        if file.name != "chat_template.jinja":
            (bare / file.name).write_bytes(file.read_bytes())
    refused = evaluated(world, data, tmp_path, "--reward-model", bare)
    assert refused.code == 1
    assert f"--reward-model {bare}: the rows hold conversations" in refused.error
    assert "has no chat template; use a reward model for conversations" in refused.error
    assert "evaluating" not in refused.err
    for template, sentence in (("{{ raise_exception('no system message') }}", "no system message"), ("{% if", "valid")):
        (bare / "chat_template.jinja").write_text(template)
        refused = evaluated(world, data, tmp_path, "--reward-model", bare)
        assert refused.code == 1
        assert refused.error.startswith(f"error: --reward-model {bare}: the chat template")
        assert sentence in refused.error
        assert not (tmp_path / "s.jsonl").exists()


def test_a_scorer_gets_messages_and_answers_without_markers(
    world: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chat_taste.py").write_text(
        "import json\n"
        "def taste(prompts, responses):\n"
        "    with open('given.json', 'w') as file:\n"
        "        json.dump([prompts, responses], file)\n"
        "    for prompt in prompts:\n"
        "        prompt.clear()\n"
        "    return [len(r) for r in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    done = evaluated(world, data, tmp_path, "--scorer", "chat_taste:taste", "--temperature", "3")
    assert done.code == 0, done.err
    prompts, responses = json.loads((tmp_path / "given.json").read_text())
    rows, asked = read_jsonl(tmp_path / "s.jsonl"), [row["prompt"] for row in read_jsonl(data)]
    assert [row["prompt"] for row in rows] == asked
    assert prompts == asked * 2
    shown = [row["responses"][k]["response"] for k in range(2) for row in rows]
    assert responses == shown
    assert all(text == text.strip() and "<|" not in text for text in responses)
    assert any(responses)


def test_the_text_of_an_answer_has_no_markers_and_that_of_a_text_keeps_them() -> None:
    tokenizer = bos_tokenizer()
    task: Any = SimpleNamespace(tokenizer=tokenizer, markers=frozenset({tokenizer.bos}))
    (ids,) = tokenizer.texts.encode([" two words "])
    ids.insert(4, tokenizer.bos)
    conversation = Conversation([{"role": "user", "content": "hi"}], ())
    assert response_text(task, Prompt(0, conversation, []), ids) == "two words"
    assert response_text(task, Prompt(0, "hi", []), ids) == " two<s> words "
