"""Rows of messages through every command: the same bytes as the same rows rendered by hand, or a clear refusal."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import oracle
import pytest
from conftest import Done, read_jsonl, run_here, write_jsonl
from transformers import AutoModelForCausalLM

from tisdpo_cli.model.tokenizer import load_tokenizer

# The turn of the assistant ends with the EOS, so that rows rendered by hand as text end alike.
TEMPLATE = (
    "{% if date %}{{ strftime_now('%Y-%m-%d') }}{% endif %}"
    "{% for m in messages %}{% if m.content == 'forbidden' %}{{ raise_exception('not this') }}{% endif %}"
    "{{ '\n\n' + m.role + ': ' + m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nassistant:' }}{% endif %}"
)
REVERSED = "reverse training: 'chosen' is the dataset's rejected response"
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
    cut = done("train-dpo", *options, "--max-length", "80", "--max-prompt-length", "60", "--json")
    assert "oldest messages out of 1 conversations" in cut.err
    shown = "".join(token["text"] for token in json.loads(cut.out)["first_row"]["prompt"])
    assert shown.startswith("\n\nsystem: Be kind.\n\nuser:")


@pytest.mark.parametrize("command", ["train-dpo", "train-reverse", "train-sft"])
def test_a_dry_run_shows_what_is_scored(world: Path, chat: Path, tmp_path: Path, command: str) -> None:
    thinking = tmp_path / "think.jinja"
    thinking.write_text(TEMPLATE.replace("m.content }}", "('<t>' if m.role == 'assistant' else '') + m.content }}"))
    options = ("-m", world / "sft", "-d", chat, "-o", tmp_path / "out", "--chat-template", thinking, "--dry-run")
    dry = done(command, *options, "--json")
    row = json.loads(dry.out)["first_row"]
    lines = dry.err.splitlines()
    lines = lines[lines.index(f"first row: {chat}:1") :]
    data = read_jsonl(chat)[0]
    sides = {"train-dpo": ["chosen", "rejected"], "train-reverse": ["rejected", "chosen"], "train-sft": ["chosen"]}
    for response, side in zip(row["responses"], sides[command], strict=True):
        *texts, stop = response["tokens"]
        assert "".join(token["text"] for token in texts) == data[side][0]["content"]
        assert response["stop"] == stop
        assert (stop["text"], len(texts) + 1) == ("<|endoftext|>", response["whole"])
        assert f"first {response['side']} ({len(texts) + 1} tokens, all scored): " in "\n".join(lines)
    assert row["swapped"] == (command == "train-reverse") == (REVERSED in lines)
    begin = "".join(token["text"] for token in row["prompt"])
    assert begin == f"\n\nuser: {data['prompt'][0]['content']}\n\nassistant: <t>"
    assert "".join(token["text"] for token in row["prompt"][-row["opening"] :]) == " <t>"
    assert lines[1].startswith(f"first prompt ({len(row['prompt'])} tokens): … '")
    assert lines[2].startswith("the chat template writes before every answer, so not scored: ' ")
    assert f"the stop: '<|endoftext|>' (id {stop['id']}), the last token of a response" in lines
    assert "dry run: nothing was trained" in dry.err


def test_a_dry_run_of_texts_counts_what_is_truncated_or_has_no_weight(contrast: Path, tmp_path: Path) -> None:
    options = ("-m", contrast / "sft", "-o", tmp_path / "out", "--dry-run", "--json")
    lengths = ("--max-length", "30", "--max-prompt-length", "20")
    cut = done("train-dpo", "-d", contrast / "data", *options, *lengths)
    row = json.loads(cut.out)["first_row"]
    chosen, left = row["responses"][0], 30 - len(row["prompt"])
    assert (len(chosen["tokens"]), chosen["stop"]) == (left, None)
    assert f"first chosen ({left} of {chosen['whole']} tokens scored, truncated: no stop): " in cut.err
    assert "chat template" not in cut.err
    masked = done("train", "-d", contrast / "scored", *options, "--transform", "binary", "--top-percent", "30")
    chosen = json.loads(masked.out)["first_row"]["responses"][0]
    scored = [token["scored"] for token in chosen["tokens"]]
    assert 0 < sum(scored) < len(scored) == chosen["whole"]
    assert f"first chosen ({sum(scored)} of {len(scored)} tokens scored): " in masked.err
    assert "in parentheses: weight 0, not scored" in masked.err
    assert "('" in masked.err


@pytest.mark.parametrize("unit", ["word", "clause", "sentence"])
def test_spans_are_those_of_the_answer_as_text(
    world: Path, chat: Path, rendered: Path, template: Path, tmp_path: Path, unit: str
) -> None:
    weights = []
    for kind, data, options in (("chat", chat, ("--chat-template", template)), ("text", rendered, ())):
        scored = tmp_path / f"scored-{kind}"
        done("estimate", "--model", world / "sft", "-d", data, "-o", scored, "--positive-template", "normal",
             "--negative-template", "normal", *options)  # fmt: skip
        noise = random.Random(0)
        rows = read_jsonl(scored / "train.jsonl")
        for row in rows:
            for side in ("chosen", "rejected"):
                row[f"{side}_weight"] = [round(noise.gauss(0, 1), 3) for _ in row[f"{side}_weight"]]
        write_jsonl(scored / "train.jsonl", rows)
        table = tmp_path / f"{kind}.csv"
        done("inspect-weights", scored, "--spans", unit, "--transform", "exp", "--table", table, *options)
        trained = tmp_path / f"trained-{kind}"
        done("train", "-m", world / "sft", "-d", scored, "-o", trained, "--spans", unit, *TRAINING, *options)
        lines = list(csv.DictReader(table.open()))
        weights.append(([line["weight"] for line in lines], (trained / "model.safetensors").read_bytes()))
    assert weights[0] == weights[1]
    assert len(set(weights[0][0])) > 5


def test_a_prompt_template_is_a_system_message(world: Path, chat: Path, template: Path, tmp_path: Path) -> None:
    """Scores are those of texts that hold the system message, truncated or not; both sides score the same tokens."""
    limits = {"whole": (), "truncated": ("--max-length", "40", "--max-prompt-length", "25")}
    system, after = "\n\nsystem: Be rude.", " Think."
    tokenizer = load_tokenizer(world / "sft")
    model = AutoModelForCausalLM.from_pretrained(world / "sft").double().eval()
    for name, cut in limits.items():
        scored = tmp_path / name
        done("estimate", "--model", world / "sft", "-d", chat, "-o", scored, "--chat-template", template,
             "--positive-template", "normal", "--negative-template", "Be rude.\n\n{}" + after, *cut)  # fmt: skip
        for row in read_jsonl(scored / "train.jsonl"):
            said = row["prompt"][0]["content"]
            plain, framed = (
                tokenizer.encode_prompts([f"{head}\n\nuser: {said}{tail}\n\nassistant:"])[0]
                for head, tail in (("", ""), (system, after))
            )
            if cut and len(plain) > 25:
                (whole,) = tokenizer.encode_prompts([f"{system}\n\nuser: "])
                rest = framed[-(25 + len(framed) - len(plain) - len(whole)) :]
                plain, framed = plain[-25:], whole + rest
            for side in ("chosen", "rejected"):
                scores = row[f"{side}_weight"]
                (ids,) = tokenizer.encode_responses([f" {row[side][0]['content']}"])
                kept = ids[: sum(r is not None for r in scores)]
                forward, reverse = (oracle.token_logps(model, prompt, kept) for prompt in (plain, framed))
                assert [r for r in scores if r is not None] == pytest.approx((reverse - forward).tolist(), abs=1e-5)
    assert any(None in row["chosen_weight"] for row in read_jsonl(tmp_path / "truncated" / "train.jsonl"))


def test_a_prompt_template_joins_the_system_message_there_is(world: Path, template: Path, tmp_path: Path) -> None:
    """Where old turns go, the same go on both sides; a template that shows no system message is named."""
    turns = [message for i in range(6) for message in (user(f"question {i}"), *answer(f"answer {i}"))]
    prompt = [{"role": "system", "content": "Be kind."}, *turns, user("the last one")]
    joined = [{"role": "system", "content": "Be rude.\n\nBe kind."}, user("the last one")]
    rows = [{"prompt": messages, "chosen": answer("yes"), "rejected": answer("no")} for messages in (prompt, joined)]
    limits = ("--max-length", "80", "--max-prompt-length", "60", "--chat-template", template)
    scores = []
    for row, negative in zip(rows, ("Be rude. {}", "normal"), strict=True):
        data = one_row(tmp_path / negative, **row)
        done("estimate", "--model", world / "sft", "-d", data, "-o", tmp_path / f"{negative}-scored", *limits,
             "--positive-template", "harmful", "--negative-template", negative, "--keep-logps")  # fmt: skip
        (scored,) = read_jsonl(tmp_path / f"{negative}-scored" / "train.jsonl")
        scores.append(scored["chosen_logps_reverse"])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    silent = tmp_path / "silent.jinja"
    silent.write_text(TEMPLATE.replace("{{ '\n\n' + m.role", "{{ '' if m.role == 'system' else '\n\n' + m.role"))
    refused = run_here("estimate", "--model", world / "sft", "-d", tmp_path / "normal", "-o", tmp_path / "x",
                       "--chat-template", silent)  # fmt: skip
    assert refused.code == 1
    assert "leaves out message 1 of the prompt (system)" in refused.error


def test_a_conversation_is_shown_as_turns(world: Path, template: Path, tmp_path: Path) -> None:
    turns = [message for i in range(5) for message in (user(f"question {i}\nand more"), *answer(f"answer {i}"))]
    prompt = [{"role": "system", "content": "Be \x1b[31mkind."}, *turns, user("the last\none " + "x" * 5000)]
    data = one_row(tmp_path / "data", prompt=prompt, chosen=answer("yes"), rejected=answer("no"))
    options = ("--chat-template", template)
    models = ("--forward", world / "sft", "--reverse", world / "sft")
    done("estimate", *models, "-d", data, "-o", tmp_path / "scored", *options)
    shown = done("inspect-weights", tmp_path / "scored", "--index", "0", *options).out
    view = shown[shown.index("system: ") :].splitlines()
    expected = ["system: Be \\x1b[31mkind.", "… 6 turns", "user: question 3 and more", "assistant: answer 3"]
    assert view[:4] == expected
    assert view[6] == "user: the last"
    assert "more characters)" in shown
    assert len(view) < 40
    (pair,) = json.loads(done("inspect-weights", tmp_path / "scored", "--index", "0", "--json", *options).out)["views"]
    assert [(turn["role"], turn["text"]) for turn in pair["turns"]] == [(m["role"], m["content"]) for m in prompt]
    assert [token["kind"] for token in pair["chosen"]][-2:] == ["text", "eos"]


def test_tool_calls_are_part_of_a_shown_turn(world: Path, tmp_path: Path) -> None:
    shows_calls = tmp_path / "calls.jinja"
    shows_calls.write_text(
        TEMPLATE.replace("m.content }}", "(m.content or '') + (m.tool_calls | default('') | string) }}")
    )
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich"}}}
    as_text = {"name": "sun", "arguments": '{"city": "Bern"}'}
    calling = {"role": "assistant", "tool_calls": [call, as_text]}
    prompt = [user("Is it raining?"), calling, {"role": "tool", "content": "It rains."}]
    data = one_row(tmp_path / "data", prompt=prompt, chosen=answer("yes"), rejected=answer("no"))
    models, options = ("--forward", world / "sft", "--reverse", world / "sft"), ("--chat-template", shows_calls)
    done("estimate", *models, "-d", data, "-o", tmp_path / "scored", *options)
    shown = done("inspect-weights", tmp_path / "scored", *options).out
    calls = 'calls weather {"city": "Zürich"} calls sun {"city": "Bern"}'
    assert f"user: Is it raining?\nassistant: {calls}\ntool: It rains.\n" in shown


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
