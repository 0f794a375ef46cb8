"""`export`: the responses of an evaluation as AlpacaEval and Arena-Hard-Auto read them, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import Done, read_jsonl, run_here, write_jsonl

from tisdpo_cli.data.dialogues import dialogue_messages

QUESTIONS = [{"uid": f"u{i}", "category": "hard_prompt", "prompt": f"Question {i}?"} for i in range(3)]


def responses(text: str, ended: bool = True) -> list[dict[str, Any]]:
    more = {"tokens": 3, "ended": ended, "reward": None}
    return [
        {"role": "model", "model": "out/tisdpo", "response": text, **more},
        {"role": "baseline", "model": "out/dpo", "response": f"not {text}", **more},
    ]


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [*([{"role": "system", "content": system}] if system else []), *turns]


def sample(row: int, prompt: Any, text: str, number: int = 0, ended: bool = True) -> dict[str, Any]:
    return {"row": row, "sample": number, "prompt": prompt, "responses": responses(text, ended)}


@pytest.fixture
def samples(tmp_path: Path) -> Path:
    rows = [
        sample(0, chat("Question 0?"), " Answer <b>0</b> 你好"),
        sample(0, chat("Question 0?"), "second", number=1),
        sample(1, chat("Question 1?", system="Be brief."), "Answer 1", ended=False),
        sample(2, "\n\nHuman: Question 2?\n\nAssistant:", " Answer 2"),
    ]
    write_jsonl(tmp_path / "questions.jsonl", QUESTIONS)
    return write_jsonl(tmp_path / "samples.jsonl", rows)


def export(samples: Path, *more: str | Path) -> Done:
    return run_here("export", samples, *more)


def test_for_alpaca_eval(samples: Path, tmp_path: Path) -> None:
    done = export(samples, "--alpaca-eval", tmp_path / "o.json")
    assert (done.code, done.out) == (0, f"{tmp_path / 'o.json'}\n")
    assert "1 of 3 responses were cut" in done.err
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [(row["instruction"], row["output"], row["generator"]) for row in rows] == [
        ("Question 0?", " Answer <b>0</b> 你好", "tisdpo"),
        ("Question 1?", "Answer 1", "tisdpo"),
        ("Question 2?", "Answer 2", "tisdpo"),
    ]
    # One model of the leaderboard, and the one that it is compared with.
    done = export(samples, "--alpaca-eval", tmp_path / "r.json", "--policy", "baseline", "--name", "dpo v2", "--json")
    assert json.loads(done.out) == {"path": str(tmp_path / "r.json"), "model": "out/dpo", "responses": 3, "cut": 1}
    assert [row["generator"] for row in json.loads((tmp_path / "r.json").read_text())] == ["dpo v2"] * 3
    assert [row["instruction"] for row in json.loads((tmp_path / "r.json").read_text())] == [
        row["instruction"] for row in rows
    ]


def test_for_arena_hard(samples: Path, tmp_path: Path) -> None:
    """What its gen_judgment.py reads: by uid, the answer in the last message; the name is that of the file."""
    questions = tmp_path / "questions.jsonl"
    done = export(samples, "--arena-hard", tmp_path / "mine.jsonl", "--questions", questions)
    assert done.code == 0, done.err
    answers = {row["uid"]: row for row in read_jsonl(tmp_path / "mine.jsonl")}
    assert list(answers) == ["u0", "u1", "u2"]
    assert {row["model"] for row in answers.values()} == {"mine"}
    assert answers["u1"]["messages"] == [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Question 1?"},
        {"role": "assistant", "content": {"answer": "Answer 1"}},
    ]  # fmt: skip
    assert answers["u2"]["messages"][0] == {"role": "user", "content": "Question 2?"}
    assert len({row["ans_id"] for row in answers.values()}) == 3
    first = (tmp_path / "mine.jsonl").read_bytes()
    write_jsonl(questions, [*QUESTIONS, {"uid": "u3", "prompt": "Another?"}])
    done = export(samples, "--arena-hard", tmp_path / "mine.jsonl", "--questions", questions)
    assert "1 of 4 questions have no response" in done.err
    assert (tmp_path / "mine.jsonl").read_bytes() == first


def test_of_several_models_one_is_named(samples: Path, tmp_path: Path) -> None:
    rows = read_jsonl(samples)
    for row in rows:
        row["responses"].append({**row["responses"][0], "model": "out/other", "response": "other"})
    write_jsonl(samples, rows)
    done = export(samples, "--alpaca-eval", tmp_path / "o.json")
    assert (done.code, "several models of this role; there are: model out/tisdpo, " in done.error) == (2, True)
    done = export(samples, "--alpaca-eval", tmp_path / "o.json", "--policy", "out/other")
    assert done.code == 0, done.err
    assert {row["output"] for row in json.loads((tmp_path / "o.json").read_text())} == {"other"}
    assert "no responses of this policy" in export(samples, "--alpaca-eval", tmp_path / "o.json", "--policy", "x").error


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "invalid JSON"),
        ("[]", "not a JSON object"),
        ('{"row": 1}', "not a row of samples"),
        ('{"row": 1, "sample": 0, "prompt": 3, "responses": [1]}', "not a row of samples"),
        (json.dumps(sample(9, chat("a", "b", "c"), "d")), "a prompt of several turns"),
        (json.dumps(sample(9, "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:", "d")), "several turns"),
    ],
)
def test_rows_that_no_benchmark_takes(samples: Path, tmp_path: Path, line: str, said: str) -> None:
    samples.write_text(samples.read_text() + line + "\n")
    done = export(samples, "--alpaca-eval", tmp_path / "o.json")
    assert (done.code, done.out) == (1, "")
    assert f"{samples}:5: " in done.error
    assert said in done.error
    assert not (tmp_path / "o.json").exists()


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        ((), 2, "give either --alpaca-eval FILE or --arena-hard FILE"),
        (("--alpaca-eval", "a.json", "--arena-hard", "b.jsonl", "--questions", "q"), 2, "give either"),
        (("--alpaca-eval", "a.txt"), 2, "ends with .json"),
        (("--arena-hard", "b.json", "--questions", "q"), 2, "ends with .jsonl"),
        (("--arena-hard", "b.jsonl"), 2, "questions"),
        (("--alpaca-eval", "a.json", "--questions", "q"), 2, "questions belong to --arena-hard"),
        (("--arena-hard", "b.jsonl", "--questions", "nowhere"), 2, "no such file"),
    ],
)
def test_what_cannot_work_is_one_line(samples: Path, more: tuple[str, ...], code: int, said: str) -> None:
    done = export(samples, *more)
    assert (done.code, done.out) == (code, "")
    assert said in done.error


def test_responses_to_other_prompts_are_no_answers(samples: Path, tmp_path: Path) -> None:
    questions = write_jsonl(tmp_path / "q.jsonl", QUESTIONS[:2])
    done = export(samples, "--arena-hard", tmp_path / "b.jsonl", "--questions", questions)
    assert (done.code, "no question with the prompt 'Question 2?'" in done.error) == (1, True)
    write_jsonl(questions, [{"question_id": "x", "turns": []}])
    done = export(samples, "--arena-hard", tmp_path / "b.jsonl", "--questions", questions)
    assert (done.code, "use question.jsonl of v2.0 or later" in done.error) == (1, True)


def test_the_samples_of_an_evaluation(world: Path, tmp_path: Path) -> None:
    samples = tmp_path / "s.jsonl"
    done = run_here("evaluate", "-m", world / "sft", "--ref-model", world / "sft", "-d", world / "data", "--samples",
                    samples, "--sample-prompts", "3", "--max-new-tokens", "6")  # fmt: skip
    assert done.code == 0, done.err
    assert export(samples, "--alpaca-eval", tmp_path / "o.json").code == 0
    rows = json.loads((tmp_path / "o.json").read_text())
    assert [row["output"] for row in rows] == [r["responses"][0]["response"].strip() for r in read_jsonl(samples)]
    assert all("Human:" not in row["instruction"] and row["generator"] == "sft" for row in rows)


def test_only_dialogues_are_taken_apart() -> None:
    assert dialogue_messages("\n\nHuman: a\n\nAssistant:") == [{"role": "user", "content": "a"}]
    assert [dialogue_messages(text) for text in ("a", "", "\n\nHuman: a", "Human: a\n\nAssistant: b")] == [None] * 4
