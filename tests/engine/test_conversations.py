"""Rows of messages through every command: the same bytes as the same rows rendered by hand, or a clear refusal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import Done, read_jsonl, run_here, write_jsonl

# The turn of the assistant ends with the EOS, so that rows rendered by hand as text end alike.
TEMPLATE = (
    "{% if date %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ '\n\n' + m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
)
TRAINING = ("--max-steps", "2", "--warmup-steps", "0", "--batch-size", "4", "--lr", "1e-4")


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def texts(world: Path) -> list[dict[str, str]]:
    """Pairs of texts without blanks around them."""
    rows = read_jsonl(world / "data" / "train.jsonl")[:8]
    names = ("prompt", "chosen", "rejected")
    return [{name: str(row[name]).strip().removesuffix("\n\nAssistant:") for name in names} for row in rows]


@pytest.fixture(scope="module")
def chat(texts: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": [user(r["prompt"])], "chosen": answer(r["chosen"]), "rejected": answer(r["rejected"])} for r in texts
    ]
    return write_jsonl(tmp_path_factory.mktemp("chat") / "train.jsonl", rows)


@pytest.fixture(scope="module")
def rendered(texts: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows as the template shows them, written by hand."""
    rows = [
        {
            "prompt": f"\n\nuser: {r['prompt']}\n\nassistant:",
            "chosen": f" {r['chosen']}",
            "rejected": f" {r['rejected']}",
        }
        for r in texts
    ]
    return write_jsonl(tmp_path_factory.mktemp("rendered") / "train.jsonl", rows)


def done(*arguments: str | Path) -> Done:
    result = run_here(*arguments)
    assert result.code == 0, result.err[-3000:]
    return result


def one_row(path: Path, **columns: object) -> Path:
    return write_jsonl(path / "train.jsonl", [columns])


def test_the_same_bytes_as_rows_rendered_by_hand(
    world: Path, chat: Path, rendered: Path, template: Path, tmp_path: Path
) -> None:
    """Trainings, scores, token weights and evaluation, from the first command to the last."""
    made: dict[str, dict[str, bytes]] = {}
    for kind, data in (("chat", chat), ("text", rendered)):
        root, options = tmp_path / kind, ("--chat-template", template) if kind == "chat" else ()
        done("train-sft", "-m", world / "sft", "-d", data, "-o", root / "sft", *TRAINING, *options)
        for command, name in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
            done(command, "-m", root / "sft", "-d", data, "-o", root / name, *TRAINING, *options)
        sides = ("--forward", root / "dpo", "--reverse", root / "reverse")
        done("estimate", *sides, "-d", data, "-o", root / "scored", *options)
        done("train", "-m", root / "sft", "-d", root / "scored", "-o", root / "tisdpo", *TRAINING, *options)
        models = {n: (root / n / "model.safetensors").read_bytes() for n in ("sft", "dpo", "reverse", "tisdpo")}
        scores = [
            [row[f"{side}{kind_}"] for side in ("chosen", "rejected") for kind_ in ("_weight", "_eos_weight")]
            for row in read_jsonl(root / "scored" / "train.jsonl")
        ]
        evaluated = done(
            "evaluate", "-m", root / "tisdpo", "--ref-model", root / "sft", "-d", data, "--split", "train",
            "--max-new-tokens", "6", "--sample-prompts", "2", "--json", *options,
        )  # fmt: skip
        numbers = {name: value for name, value in json.loads(evaluated.out).items() if name in ("pairs", "prompts")}
        made[kind] = {**models, "scores": json.dumps(scores).encode(), "evaluate": json.dumps(numbers).encode()}
    assert made["chat"] == made["text"]


def test_messages_to_learn_are_those_of_a_chosen_answer(
    world: Path, chat: Path, template: Path, tmp_path: Path
) -> None:
    rows = [{"messages": [*row["prompt"], *row["chosen"]]} for row in read_jsonl(chat)]
    messages = write_jsonl(tmp_path / "messages.jsonl", rows)
    options = ("-m", world / "sft", "--chat-template", template, *TRAINING)
    for name, data in (("pairs", chat), ("messages", messages)):
        done("train-sft", "-d", data, "-o", tmp_path / name, *options)
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("pairs", "messages")]
    assert both[0] == both[1]


def test_dialogues_in_one_text_are_messages_on_request(
    world: Path, chat: Path, texts: list[dict[str, str]], template: Path, tmp_path: Path
) -> None:
    rows = [
        {side: f"\n\nHuman: {r['prompt']}\n\nAssistant: {r[side]}" for side in ("chosen", "rejected")} for r in texts
    ]
    dialogues = write_jsonl(tmp_path / "hh.jsonl", rows)
    options = ("-m", world / "sft", "--chat-template", template, *TRAINING)
    done("train-dpo", "-d", dialogues, "-o", tmp_path / "hh", "--dialogue", "hh", *options)
    done("train-dpo", "-d", chat, "-o", tmp_path / "chat", *options)
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hh", "chat")]
    assert both[0] == both[1]
    assert "--dialogue" not in run_here("train-dpo", "-d", chat, "-o", tmp_path / "x", *options, "--dry-run").err


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        ({"prompt": "hi", "chosen": "a", "rejected": "b"}, "a row of texts in a file of conversations"),
        ({"prompt": [user("hi")], "chosen": answer(""), "rejected": answer("b")}, "'chosen' is empty"),
        ({"prompt": [{"content": "hi"}], "chosen": answer("a"), "rejected": answer("b")}, "prompt[0] has no role"),
        ({"prompt": [user("forbidden")], "chosen": answer("a"), "rejected": answer("b")}, "not this"),
    ],
    ids=["text", "empty", "no role", "refused by the template"],
)
def test_a_bad_row_is_named_and_can_be_skipped(
    world: Path, template: Path, tmp_path: Path, second: dict[str, object], sentence: str
) -> None:
    good = {"prompt": [user("hi")], "chosen": answer("yes"), "rejected": answer("no")}
    data = write_jsonl(tmp_path / "train.jsonl", [good, second, good])
    options = ("-m", world / "sft", "-d", data, "--chat-template", template, "--dry-run")
    refused = run_here("train-dpo", *options, "-o", tmp_path / "out")
    assert refused.code == 1
    assert f"{data}:2" in refused.error
    assert sentence in refused.error
    skipped = done("train-dpo", *options, "-o", tmp_path / "out", "--on-bad-row", "skip")
    assert "2 pairs" in skipped.err


def test_messages_in_a_file_of_texts_are_refused(world: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": "hi", "chosen": "a", "rejected": "b"},
        {"prompt": [user("hi")], "chosen": answer("a"), "rejected": answer("b")},
    ]
    data = write_jsonl(tmp_path / "train.jsonl", rows)
    refused = run_here("train-dpo", "-m", world / "sft", "-d", data, "-o", tmp_path / "out")
    assert (refused.code, f"{data}:2" in refused.error) == (1, True)


def test_a_model_without_a_template_is_refused_with_the_way_on(world: Path, chat: Path, tmp_path: Path) -> None:
    refused = run_here("train-dpo", "-m", world / "sft", "-d", chat, "-o", tmp_path / "out")
    assert refused.code == 1
    assert "has no chat template; give one with --chat-template FILE" in refused.error
    assert not (tmp_path / "out").exists()


def test_scores_belong_to_their_template_and_day(world: Path, chat: Path, template: Path, tmp_path: Path) -> None:
    scored = tmp_path / "scored"
    dated = ("--chat-template", template, "--chat-template-kwargs", '{"date": true}')
    models = ("--forward", world / "sft", "--reverse", world / "sft")
    estimated = done("estimate", *models, "-d", chat, "-o", scored, *dated, "--chat-date", "2026-03-01")
    assert "the chat template writes the date: 2026-03-01" in estimated.err
    record = json.loads((scored / "estimate.json").read_text())["chat"]
    assert (record["day"], record["kwargs"]) == ("2026-03-01", {"date": True})
    train = ("train", "-m", world / "sft", "-d", scored, *TRAINING, "--chat-template", template)
    done(*train, "-o", tmp_path / "out")
    for name, options in {"day": ("--chat-date", "2026-03-02"), "kwargs": ("--chat-template-kwargs", "{}")}.items():
        refused = run_here(*train, "-o", tmp_path / name, *options)
        assert refused.code == 1
        assert "was scored with another" in refused.error


def test_old_turns_go_before_tokens(world: Path, template: Path, tmp_path: Path) -> None:
    turns = [message for i in range(6) for message in (user(f"question {i}"), *answer(f"answer {i}"))]
    prompt = [{"role": "system", "content": "Be kind."}, *turns, user("the last one")]
    data = one_row(tmp_path / "data", prompt=prompt, chosen=answer("yes"), rejected=answer("no"))
    options = ("-m", world / "sft", "-d", data, "-o", tmp_path / "out", "--chat-template", template, "--dry-run")
    whole = done("train-dpo", *options)
    assert "oldest messages" not in whole.err
    cut = done("train-dpo", *options, "--max-length", "80", "--max-prompt-length", "60")
    assert "oldest messages out of 1 conversations" in cut.err
    assert "'s' 'y' 's' 't' 'e' 'm'" in cut.err.split("first prompt")[1]


def test_what_conversations_cannot_do_yet_is_said(world: Path, chat: Path, template: Path, tmp_path: Path) -> None:
    options = ("-d", chat, "-o", tmp_path / "scored", "--chat-template", template)
    prompts = ("--model", world / "sft", "--positive-template", "Be kind. {}", "--negative-template", "Be rude. {}")
    refused = run_here("estimate", *prompts, *options)
    assert (refused.code, "prompt templates on conversations are not supported" in refused.error) == (2, True)
    done("estimate", "--forward", world / "sft", "--reverse", world / "sft", *options)
    refused = run_here("inspect-weights", tmp_path / "scored", "--chat-template", template, "--spans", "word")
    assert (refused.code, "spans of conversations are not supported" in refused.error) == (2, True)


def test_a_conversation_is_shown_with_its_roles(world: Path, chat: Path, template: Path, tmp_path: Path) -> None:
    models = ("--forward", world / "sft", "--reverse", world / "sft")
    done("estimate", *models, "-d", chat, "-o", tmp_path / "scored", "--chat-template", template)
    shown = done("inspect-weights", tmp_path / "scored", "--index", "0", "--chat-template", template)
    assert "user: " in shown.out


@pytest.mark.parametrize("value", ["[1]", "{", "nothing"])
def test_variables_of_a_template_are_an_object(world: Path, chat: Path, tmp_path: Path, value: str) -> None:
    options = ("-m", world / "sft", "-d", chat, "-o", tmp_path / "out")
    refused = run_here("train-dpo", *options, "--chat-template-kwargs", value)
    assert (refused.code, "must be a JSON object" in refused.error) == (2, True)


def test_a_changed_template_is_another_setting(world: Path, chat: Path, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE)
    options = ("-m", world / "sft", "-d", chat, "-o", tmp_path / "out", "--chat-template", file, *TRAINING)
    done("train-dpo", *options)
    file.rename(tmp_path / "moved.jinja")
    again = [tmp_path / "moved.jinja" if option == file else option for option in options]
    done("train-dpo", *again)
    (tmp_path / "moved.jinja").write_text(TEMPLATE.replace("': '", "' says '"))
    refused = run_here("train-dpo", *again)
    assert (refused.code, "the content of chat_template has changed" in refused.error) == (2, True)


def test_options_that_would_do_nothing_are_said(
    world: Path, chat: Path, rendered: Path, template: Path, tmp_path: Path
) -> None:
    options = ("-m", world / "sft", "-o", tmp_path / "out", "--chat-template", template, "--dry-run")
    assert "no rows of messages: the chat template is not used" in done("train-dpo", "-d", rendered, *options).err
    refused = run_here("train-dpo", "-d", chat, *options, "--special-tokens-in-data", "parse")
    assert (refused.code, "their text stays text" in refused.error) == (2, True)
