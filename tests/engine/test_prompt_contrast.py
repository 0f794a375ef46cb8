"""Contrastive models that are one model under two prompts: `estimate --model`, checked token by token.

Bound: scores agree with the oracle in float64 within 1e-5 nat.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import oracle
import pytest
from conftest import Listener, pair_rows, read_jsonl, run_here, write_jsonl
from transformers import AutoModelForCausalLM

from tisdpo_cli.data.tokens import TemplateTokens
from tisdpo_cli.engine.scoring import estimate as engine
from tisdpo_cli.errors import UsageError
from tisdpo_cli.model import loading
from tisdpo_cli.model.loading import check_fit
from tisdpo_cli.model.tokenizer import load_tokenizer
from tisdpo_cli.settings.estimate import Estimate

BEFORE, AFTER = "Be <|endoftext|> kind.\n", "\nThink."


def score(world: Path, output: Path, **settings: object) -> Listener:
    """Run `estimate --model` on the tiny world in this process."""
    listener = Listener()
    given = {"model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(output), **settings}
    engine.estimate(Estimate(value_layers=[given]), listener)
    return listener


def columns(scored: Path, split: str = "train") -> list[dict]:
    return read_jsonl(scored / f"{split}.jsonl")


def values(row: dict, side: str) -> list[float]:
    """Numbers of one side of a row, the EOS last where it has one."""
    eos = row[f"{side}_eos_weight"]
    return [v for v in [*row[f"{side}_weight"], eos] if v is not None]


@pytest.mark.parametrize("template", ["normal", "harmful", "Answer {} well."])
def test_equal_templates_give_scores_of_exactly_zero(world: Path, tmp_path: Path, template: str) -> None:
    listener = score(world, tmp_path / "o", positive_template=template, negative_template=template)
    assert not any(v for row in columns(tmp_path / "o") for side in ("chosen", "rejected") for v in values(row, side))
    assert "every score will be 0" in listener.warned[0]


def test_scores_agree_with_the_oracle(world: Path, tmp_path: Path) -> None:
    """The template's marker is a token, the same text in a prompt is not; both prompts have their own length."""
    rows = pair_rows(3)
    rows[0]["prompt"] = "Say <|endoftext|> now"
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    score(world, tmp_path / "o", dataset=str(data), positive_template=BEFORE + "{}" + AFTER, negative_template="normal")
    tokenizer = load_tokenizer(world / "sft")
    model = AutoModelForCausalLM.from_pretrained(world / "sft").double().eval()
    before, after = tokenizer.texts.encode([BEFORE, AFTER], markers=True)
    assert tokenizer.eos in before
    for row, made in zip(rows, columns(tmp_path / "o"), strict=True):
        prompt = tokenizer.texts.encode([row["prompt"]])[0]
        assert tokenizer.eos not in prompt
        for side in ("chosen", "rejected"):
            ids = [*tokenizer.texts.encode([row[side]])[0], tokenizer.eos]
            plus = oracle.token_logps(model, [*before, *prompt, *after], ids)
            minus = oracle.token_logps(model, prompt, ids)
            assert values(made, side) == pytest.approx((minus - plus).tolist(), abs=1e-5)


def test_the_other_way_round_the_scores_change_their_sign(world: Path, tmp_path: Path) -> None:
    score(world, tmp_path / "a")
    score(world, tmp_path / "b", positive_template="harmful", negative_template="harmless")
    for one, other in zip(columns(tmp_path / "a"), columns(tmp_path / "b"), strict=True):
        assert values(one, "chosen") == [-v for v in values(other, "chosen")]
        assert any(values(one, "chosen"))


@pytest.mark.parametrize("sequential", [False, True])
def test_one_model_is_loaded_once(world: Path, tmp_path: Path, monkeypatch, sequential: bool) -> None:
    loaded = []
    load = loading._load_whole
    monkeypatch.setattr(loading, "_load_whole", lambda path, *rest: loaded.append(path) or load(path, *rest))
    score(world, tmp_path / "o", sequential=sequential)
    assert loaded == [world / "sft"]


def test_both_sides_are_cut_as_training_cuts(contrast: Path, tmp_path: Path) -> None:
    """Templates of very different length change nothing about which tokens have a score, and training finds all."""
    limits = ("--max-length", "30", "--max-prompt-length", "12")
    long = "Here is a long and winding introduction to what will be asked of you. {} Now then:"
    for name, sides in (
        ("d", ("--forward", contrast / "dpo", "--reverse", contrast / "reverse")),
        ("p", ("--model", contrast / "sft", "--positive-template", long, "--negative-template", "normal")),
    ):
        done = run_here("estimate", *sides, "-d", contrast / "data", "-o", tmp_path / name, *limits)
        assert done.code == 0, done.err
    two, one = columns(tmp_path / "d"), columns(tmp_path / "p")
    nulls = [[v is None for v in row["chosen_weight"]] for row in two]
    assert [[v is None for v in row["chosen_weight"]] for row in one] == nulls
    assert any(any(row) for row in nulls)
    done = run_here(
        "train", "-m", contrast / "sft", "-d", tmp_path / "p", "-o", tmp_path / "t", "--max-steps", "2", *limits
    )
    assert done.code == 0, done.err


def test_models_and_templates_are_on_record(world: Path, tmp_path: Path) -> None:
    listener = score(world, tmp_path / "o", negative_template="Be rude: {}")
    manifest = json.loads((tmp_path / "o" / "estimate.json").read_text())
    assert manifest["templates"]["reverse"] == "Be rude: {}"
    assert manifest["templates"]["forward"].endswith("{}")
    assert manifest["models"]["forward"] == manifest["models"]["reverse"]
    assert any("Be rude: {}" in line and "tokens beyond --max-length" in line for line in listener.said)
    assert score(world, tmp_path / "o", negative_template="Be rude: {}").said[-1].endswith("nothing to do")
    with pytest.raises(UsageError, match="template"):
        score(world, tmp_path / "o", negative_template="Be nice: {}")


def test_what_comes_next_names_the_model_where_there_is_one(contrast: Path, tmp_path: Path) -> None:
    for name, sides, model in (
        ("p", ("--model", contrast / "sft"), contrast / "sft"),
        ("d", ("--forward", contrast / "dpo", "--reverse", contrast / "reverse"), "MODEL"),
    ):
        done = run_here("estimate", *sides, "-d", contrast / "data", "-o", tmp_path / name)
        assert done.code == 0, done.err
        assert f"next: tisdpo train --model {model} --dataset {tmp_path / name} " in done.err


def test_templates_work_with_two_models_too(contrast: Path, tmp_path: Path) -> None:
    sides = {"model": None, "forward": str(contrast / "dpo"), "reverse": str(contrast / "dpo")}
    listener = score(contrast, tmp_path / "o", positive_template="harmless", **sides)
    assert not listener.warned
    assert any(values(columns(tmp_path / "o")[0], "chosen"))


def test_the_model_must_have_room_for_the_template(world: Path, tmp_path: Path) -> None:
    short = tmp_path / "short"
    shutil.copytree(world / "sft", short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 130}))
    tokenizer = load_tokenizer(short)
    check_fit(short, tokenizer, 120, template=10)
    with pytest.raises(UsageError, match=r"121 plus 10 tokens .* 130 positions") as told:
        check_fit(short, tokenizer, 121, template=10)
    assert "lower it to 120" in str(told.value.fix)
    done = run_here(
        "estimate", "-m", short, "-d", world / "data", "-o", tmp_path / "o", "--max-length", "128",
        "--max-prompt-length", "64",
    )  # fmt: skip
    assert done.code == 2
    assert "130 positions" in done.error
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--positive-template", "harmfull"), "harmful"),
        (("--negative-template", "two {} places {}"), "exactly once"),
        (("--forward", "x"), "--model"),
    ],
)
def test_what_cannot_work_is_told_at_once(world: Path, tmp_path: Path, arguments, word) -> None:
    done = run_here("estimate", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "o", *arguments)
    assert done.code == 2
    assert word in done.error


def test_a_bos_stands_once_in_front() -> None:
    for before in ([5, 6], [0, 5, 6]):
        assert TemplateTokens(before, [7]).wrap([0, 1, 2], bos=0) == [0, 5, 6, 1, 2, 7]
    assert TemplateTokens([0, 5], []).wrap([1], bos=None) == [0, 5, 1]
    assert TemplateTokens([5], [6]).wrap([1], bos=0) == [5, 1, 6]
    assert len(TemplateTokens([5], [6])) == 2


def test_data_stays_text_and_templates_have_markers(world: Path) -> None:
    tokenizer = load_tokenizer(world / "sft")
    text = "a<|endoftext|>b"
    data, template = tokenizer.texts.encode([text])[0], tokenizer.texts.encode([text], markers=True)[0]
    assert tokenizer.eos not in data
    assert template.count(tokenizer.eos) == 1
    assert [len(at) for at in tokenizer.offsets([text, ""])] == [len(data), 0]
