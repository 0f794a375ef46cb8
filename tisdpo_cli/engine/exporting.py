"""export: the responses of an evaluation in the format of a benchmark.

AlpacaEval (github.com/tatsu-lab/alpaca_eval) reads a JSON list of `instruction`, `output` and `generator`;
Arena-Hard-Auto (github.com/lmarena/arena-hard-auto, since v2.0) JSON Lines by the `uid` of its questions. Both take one
response to one instruction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.data.dialogues import dialogue_messages
from tisdpo_cli.errors import DataError, UsageError
from tisdpo_cli.files import near_matches, write_text
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.export import Export


def export(settings: Export, reporter: Reporter) -> StageResult:
    """Run export.

    Raises:
        UsageError: a file is not there, or no policy is meant, or several.
        DataError: a file is damaged, or a prompt is not one instruction.
    """
    rows = _read(settings.samples, "--samples")
    answers = _answers(rows, settings.policy, settings.samples)
    if settings.alpaca_eval is not None:
        path = Path(settings.alpaca_eval).expanduser()
        content = alpaca_eval(answers, settings.name or Path(answers[0].model).name)
    else:
        assert settings.arena_hard is not None
        assert settings.questions is not None
        path = Path(settings.arena_hard).expanduser()
        questions = _read(settings.questions, "--questions")
        content, missing = arena_hard(answers, questions, settings.name or path.stem, settings.questions)
        if missing:
            reporter.warn(f"{missing} of {len(questions)} questions have no response; Arena-Hard-Auto leaves them out")
    cut = sum(not answer.ended for answer in answers)
    if cut:
        reporter.warn(f"{cut} of {len(answers)} responses were cut at --max-new-tokens, and are judged as they are")
    write_text(path, content)
    return StageResult(path, {"model": answers[0].model, "responses": len(answers), "cut": cut}, fresh=True)


# Below this line there are no settings ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """A response.

    Attributes:
        model: path or hub id of what wrote it.
        instruction: the only turn of the user.
        messages: the prompt as turns.
        ended: whether it ended by itself.
    """

    model: str
    instruction: str
    messages: Sequence[Mapping[str, Any]]
    text: str
    ended: bool


def alpaca_eval(answers: Sequence[Answer], name: str) -> str:
    """The file that `alpaca_eval --model_outputs` or `--reference_outputs` reads."""
    rows = [
        {"dataset": "tisdpo", "instruction": answer.instruction, "output": answer.text, "generator": name}
        for answer in answers
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def arena_hard(
    answers: Sequence[Answer], questions: Sequence[Mapping[str, Any]], name: str, where: str
) -> tuple[str, int]:
    """The file `model_answer/NAME.jsonl` of Arena-Hard-Auto.

    Returns:
        Its content, and the number of questions without a response.

    Raises:
        DataError: a question has no uid or prompt, or a response belongs to none.
    """
    try:
        uids = {str(question["prompt"]): str(question["uid"]) for question in questions}
    except KeyError as error:
        raise DataError(
            f"a question without {error}", where=where, fix="use question.jsonl of v2.0 or later"
        ) from error
    foreign = next((answer for answer in answers if answer.instruction not in uids), None)
    if foreign is not None:
        raise DataError(
            f"no question with the prompt {foreign.instruction[:60]!r}",
            where=where,
            fix="evaluate on the questions as they are",
        )
    lines = []
    for answer in answers:
        uid = uids[answer.instruction]
        messages = [*answer.messages, {"role": "assistant", "content": {"answer": answer.text}}]
        ans_id = hashlib.sha256(f"{uid}\0{name}\0{answer.text}".encode()).hexdigest()[:22]
        row = {"uid": uid, "ans_id": ans_id, "model": name, "messages": messages}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines), len(set(uids.values())) - len(lines)


def _read(name: str, option: str) -> list[dict[str, Any]]:
    """The objects of a JSON Lines file."""
    path = Path(name).expanduser()
    if not path.is_file():
        raise UsageError(f"no such file{near_matches(path)}", where=f"{option} {name}")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError("invalid JSON", where=f"{name}:{number}", fix="write the file again") from error
        if not isinstance(row, dict):
            raise DataError("not a JSON object", where=f"{name}:{number}", fix="write the file again")
        rows.append(row)
    if not rows:
        raise DataError("empty", where=name)
    return rows


def _answers(rows: Sequence[Mapping[str, Any]], policy: str, where: str) -> list[Answer]:
    """The first response of a policy to every prompt.

    Raises:
        UsageError: no policy is meant, or several.
        DataError: a row is not one of `evaluate --samples`, or a prompt is not one instruction.
    """
    answers = []
    for number, row in enumerate(rows, start=1):
        try:
            given = [r for r in row["responses"] if policy in (r["role"], r["model"])]
            known = dict.fromkeys(f"{r['role']} {r['model']}" for r in row["responses"])
            if len({r["model"] for r in given}) != 1:
                what = "several models of this role" if given else "no responses of this policy"
                raise UsageError(what, where=f"--policy {policy}", fix=f"there are: {', '.join(known)}")
            if row["sample"] == 0:
                messages = _messages(row["prompt"])
                instruction = _instruction(messages, f"{where}:{number}")
                first = given[0]
                # A response to a text begins with the space that follows it.
                text = first["response"].strip() if isinstance(row["prompt"], str) else first["response"]
                answers.append(Answer(first["model"], instruction, messages, text, first["ended"]))
        except (KeyError, TypeError, AttributeError) as error:
            fix = "give what `tisdpo evaluate --samples` wrote"
            raise DataError("not a row of samples", where=f"{where}:{number}", fix=fix) from error
    return answers


def _messages(prompt: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A prompt as turns: a dialogue in one text as its turns, other text as that of a user."""
    if isinstance(prompt, list):
        return prompt
    return dialogue_messages(prompt) or [{"role": "user", "content": prompt}]


def _instruction(messages: Sequence[Mapping[str, Any]], where: str) -> str:
    turns = [message for message in messages if message["role"] != "system"]
    if len(turns) != 1 or turns[0]["role"] != "user" or not isinstance(turns[0]["content"], str):
        raise DataError(
            "a prompt of several turns; the benchmark takes one instruction", where=where, fix="leave such rows out"
        )
    return turns[0]["content"]
