"""Files of the authors' research code train here, and ours are what it reads; final weights are taken as they are.

There a scored row has `prompt`, `chosen`, `rejected`, `chosen_weight`, `rejected_weight`: −r in both, two decimals, no
entry for the end of the sequence, in folders `{base}/{name}/{train,test}.jsonl`, with nothing beside them.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import oracle
import pytest
import torch
from conftest import Done, read_jsonl, run_here, write_jsonl
from transformers import AutoModelForCausalLM

from tisdpo_cli.method.steps import spans_of
from tisdpo_cli.model.tokenizer import load_tokenizer

SIDES = ("chosen", "rejected")
FIELDS = ("prompt", "chosen", "rejected", "chosen_weight", "rejected_weight")
SHORT = ("--max-steps", "2", "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0")


def rows_of(contrast: Path, split: str) -> list[dict]:
    return read_jsonl(contrast / "scored" / f"{split}.jsonl")


def rewritten(contrast: Path, folder: Path, change) -> Path:
    """A dataset of its own, made row by row from the scored one."""
    for split in ("train", "test"):
        write_jsonl(folder / f"{split}.jsonl", [change(dict(row)) for row in rows_of(contrast, split)])
    return folder


def rounded(row: dict) -> dict:
    return {**row, **{f"{s}_weight": [round(x, 2) for x in row[f"{s}_weight"]] for s in SIDES}}


def train(contrast: Path, dataset: Path, output: Path, *arguments: str) -> Done:
    return run_here("train", "-m", contrast / "sft", "-d", dataset, "-o", output, *SHORT, *arguments)


def model_bytes(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- files of the research code


@pytest.mark.parametrize("weights", [("--transform", "rank_based"), ("--transform", "exp"), ("--preset", "aggressive")])
def test_its_file_and_ours_rounded_give_the_same_training(contrast: Path, tmp_path: Path, weights) -> None:
    """The same weights, hence the same first update, to the last bit of the model."""
    theirs = rewritten(contrast, tmp_path / "base" / "pairs", lambda row: {k: rounded(row)[k] for k in FIELDS})
    ours = rewritten(contrast, tmp_path / "ours", rounded)
    done = train(contrast, theirs, tmp_path / "a", *weights)
    assert done.code == 0, done.err
    assert "EOS zero (auto: the file has no EOS scores)" in done.err
    assert train(contrast, ours, tmp_path / "b", *weights, "--eos-weight", "zero").code == 0
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    first = [read_jsonl(tmp_path / name / "metrics.jsonl")[1] for name in "ab"]
    assert [m["weighted_rewards/margins"] for m in first[:1]] == [m["weighted_rewards/margins"] for m in first[1:]]


def test_its_default_is_dpo_without_a_gradient_on_the_end_of_the_sequence(contrast: Path, tmp_path: Path) -> None:
    """One update on all pairs: the loss and the length of the gradient of plain DPO on responses without their EOS."""
    theirs = rewritten(contrast, tmp_path / "theirs", lambda row: {k: rounded(row)[k] for k in FIELDS})
    default, whole = ("--preset", "default", "--eos-weight", "zero"), ("--batch-size", "24", "--max-steps", "1")
    assert train(contrast, theirs, tmp_path / "a", *default, *whole).code == 0
    tokenizer = load_tokenizer(contrast / "sft")
    policy, reference = (AutoModelForCausalLM.from_pretrained(contrast / "sft").double().eval() for _ in range(2))
    pairs = []
    for row in rows_of(contrast, "train"):
        prompt, *responses = tokenizer.texts.encode([row["prompt"], *(row[side] for side in SIDES)])
        pairs.append({
            f"{name}_{side}_logps": oracle.token_logps(model, prompt, ids)
            for side, ids in zip(SIDES, responses, strict=True)
            for name, model in (("policy", policy), ("reference", reference))
        })  # fmt: skip
    loss = oracle.dpo_loss(pairs, 0.1)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
    first = read_jsonl(tmp_path / "a" / "metrics.jsonl")[1]
    assert first["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert first["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    # The same again by weights of 1 for the tokens and none for the end, over two updates.
    plain = rewritten(contrast, tmp_path / "ones", lambda row: {k: all_ones(row)[k] for k in FIELDS})
    assert train(contrast, plain, tmp_path / "b", "--weights-are", "final").code == 0
    assert train(contrast, theirs, tmp_path / "c", *default).code == 0
    assert model_bytes(tmp_path / "b") == model_bytes(tmp_path / "c")
    with_eos = run_here("train-dpo", "-m", contrast / "sft", "-d", contrast / "data", "-o", tmp_path / "d", *SHORT)
    assert with_eos.code == 0
    assert model_bytes(tmp_path / "d") != model_bytes(tmp_path / "c")


def test_our_file_is_what_it_reads(contrast: Path) -> None:
    """Where no row is cut, five fields in its meaning: one number per response token, −r; the rest it does not read."""
    tokenizer = load_tokenizer(contrast / "scored")
    for row in rows_of(contrast, "train"):
        assert set(FIELDS) <= set(row)
        for side in SIDES:
            assert len(row[f"{side}_weight"]) == len(tokenizer.texts.encode([row[side]])[0])
            assert all(isinstance(value, float) for value in row[f"{side}_weight"])
    # The forward model prefers the chosen words: −r is negative there on the whole.
    assert sum(sum(row["chosen_weight"]) for row in rows_of(contrast, "train")) < 0
    assert sum(sum(row["rejected_weight"]) for row in rows_of(contrast, "train")) > 0


def test_a_cut_file_of_ours_is_told_to_hold_what_it_does_not_read(contrast: Path, tmp_path: Path) -> None:
    """It reads numbers alone; a cut leaves nulls, of which `estimate` tells, and of nothing where there are none."""
    sides = ("--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", contrast / "data")
    told = "fits the longest row"
    cut, whole = (
        run_here("estimate", *sides, "-o", tmp_path / name, *limits)
        for name, limits in (("cut", ("--max-length", "32", "--max-prompt-length", "10")), ("whole", ()))
    )
    assert (cut.code, whole.code) == (0, 0), cut.err + whole.err
    assert cut.err.count(told) == 1
    assert told not in whole.err
    nulls = [[row[f"{s}_weight"].count(None) for row in read_jsonl(tmp_path / "cut" / "train.jsonl")] for s in SIDES]
    assert all(map(sum, nulls))
    assert not any(
        row[f"{s}_weight"].count(None) for row in read_jsonl(tmp_path / "whole" / "train.jsonl") for s in SIDES
    )


def test_a_folder_of_datasets_is_told_apart_from_one(contrast: Path, tmp_path: Path) -> None:
    rewritten(contrast, tmp_path / "base" / "pairs", rounded)
    done = train(contrast, tmp_path / "base", tmp_path / "o")
    assert done.code == 1
    assert f"choose one of {tmp_path / 'base' / 'pairs'}" in done.error


def test_whole_numbers_and_minus_zero_are_scores(contrast: Path, tmp_path: Path) -> None:
    data = rewritten(
        contrast, tmp_path / "d",
        lambda row: {**row, "chosen_weight": [0] * len(row["chosen_weight"]),
                     "rejected_weight": [-0.0] * len(row["rejected_weight"])},
    )  # fmt: skip
    done = train(contrast, data, tmp_path / "o", "--eos-weight", "one")
    assert done.code == 0, done.err


# ---------------------------------------------------------------- final weights


def all_ones(row: dict) -> dict:
    made = {f"{s}_weight": [1] * len(row[f"{s}_weight"]) for s in SIDES}
    return {**row, **made, **{f"{s}_eos_weight": 1.0 for s in SIDES}}


@pytest.mark.parametrize("loss", [(), ("--alpha", "0.5"), ("--loss", "ipo")])
def test_final_weights_of_one_are_the_plain_objective_to_the_last_bit(contrast: Path, tmp_path: Path, loss) -> None:
    data = rewritten(contrast, tmp_path / "ones", all_ones)
    done = train(contrast, data, tmp_path / "a", "--weights-are", "final", *loss)
    assert done.code == 0, done.err
    assert "EOS score (auto: the file has EOS weights)" in done.err
    plain = run_here("train-dpo", "-m", contrast / "sft", "-d", contrast / "data", "-o", tmp_path / "b", *SHORT, *loss)
    assert plain.code == 0, plain.err
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")


def by_hand(contrast: Path, split: str = "train"):
    """Weights after `center dataset`, `spans word`, `dead_zone`, `decay` and `exp`, in plain Python."""
    tokenizer = load_tokenizer(contrast / "scored")
    train_scores = [-x for row in rows_of(contrast, "train") for s in SIDES for x in row[f"{s}_weight"]]
    center = sum(train_scores) / len(train_scores)

    def stepped(scores: list[float], spans: list[int]) -> list[float]:
        r = [x - center for x in scores]
        means = {s: [x for x, other in zip(r, spans, strict=True) if other == s] for s in spans}
        r = [sum(means[s]) / len(means[s]) for s in spans]
        r = [0.0 if abs(x) <= 0.2 else x for x in r]
        return [x * 0.97**t for t, x in enumerate(r)]

    def weighed(row: dict) -> dict:
        made = dict(row)
        for side, sign in (("chosen", 1), ("rejected", -1)):
            text, scores = row[side], [-x for x in row[f"{side}_weight"]]
            spans = spans_of(text, tokenizer.offsets([text])[0], "word")
            joined = [*scores, -row[f"{side}_eos_weight"]], [*spans, spans[-1] + 1]
            weights = [math.exp(sign * min(1.5, max(-0.5, r))) for r in stepped(*joined)]
            made[f"{side}_weight"], made[f"{side}_eos_weight"] = weights[:-1], weights[-1]
        return made

    return weighed


STEPS = ("--center", "dataset", "--spans", "word", "--dead-zone", "0.2", "--decay", "0.97")


def test_steps_and_transform_agree_with_weights_made_by_hand(contrast: Path, tmp_path: Path) -> None:
    """Both splits: the test split is centred by the mean of the train split."""
    data = rewritten(contrast, tmp_path / "final", by_hand(contrast))
    assert train(contrast, data, tmp_path / "a", "--weights-are", "final").code == 0
    done = train(contrast, contrast / "scored", tmp_path / "b", *STEPS)
    assert done.code == 0, done.err
    assert "center dataset → spans word → dead_zone 0.2 → decay 0.97 → exp" in done.err
    for one, other in zip(*(read_jsonl(tmp_path / name / "metrics.jsonl") for name in "ab"), strict=True):
        for key, value in one.items():
            if "per_second" not in key:
                assert other[key] == pytest.approx(value, rel=1e-4, abs=1e-5), key


def broken(row: dict, at: int, side: str, **changed) -> dict:
    return {**row, **changed} if row["prompt"].endswith(f"({at})\n\nAssistant:") else row


@pytest.mark.parametrize(
    ("changed", "word"),
    [
        ({"chosen_weight": [1.0]}, "1 values"),
        (
            {"chosen_weight": [1.0] * 22},
            "one more than tokens (this model's tokenizer); put the weight of the EOS in",
        ),
        ({"chosen_weight": "x"}, "list of numbers"),
        ({"chosen_weight": [None] * 21}, "token 0 has no weight"),
        ({"chosen_weight": ["1"] * 21}, "a float32 number is needed"),
        ({"chosen_eos_weight": None}, "the EOS has no weight"),
        ({"chosen_eos_weight": True}, "must be a number"),
    ],
)
def test_final_weights_are_checked_row_by_row(contrast: Path, tmp_path: Path, changed, word) -> None:
    data = rewritten(contrast, tmp_path / "d", lambda row: broken(all_ones(row), 0, "chosen", **changed))
    done = train(contrast, data, tmp_path / "o", "--weights-are", "final")
    assert done.code == 1
    assert word in done.error
    assert "train.jsonl:1" in done.error


def test_a_file_without_weights_is_told(contrast: Path, tmp_path: Path) -> None:
    done = train(contrast, contrast / "data", tmp_path / "o", "--weights-are", "final")
    assert done.code == 1
    assert "no final weights" in done.error


def test_scores_are_not_taken_for_weights(contrast: Path, tmp_path: Path) -> None:
    done = train(contrast, contrast / "scored", tmp_path / "o", "--weights-are", "final")
    assert done.code == 2
    assert "holds scores" in done.error
    assert run_here("inspect-weights", contrast / "scored", "--weights-are", "final").code == 2


@pytest.mark.parametrize("name", ["train.jsonl", "some.jsonl"])
def test_scores_that_were_filtered_are_not_taken_for_weights_silently(contrast: Path, tmp_path: Path, name) -> None:
    """The hash no longer tells; what does is the manifest beside them, and that −r is negative for good words."""
    data = Path(shutil.copytree(contrast / "scored", tmp_path / "d"))
    split = write_jsonl(data / name, rows_of(contrast, "train")[::2])
    done = train(contrast, split, tmp_path / "o", "--weights-are", "final")
    assert done.code == 0, done.err
    assert f"warning: {name} has an estimate.json in its directory: if its columns are still scores" in done.err
    assert f"warning: {name}: the mean weight of chosen responses is -" in done.err
    shown = run_here("inspect-weights", split, "--weights-are", "final")
    assert f"warning: {name} has an estimate.json in its directory" in shown.err
    good = rewritten(contrast, tmp_path / "good", by_hand(contrast))
    assert "warning" not in train(contrast, good, tmp_path / "p", "--weights-are", "final").err


def test_weights_that_are_all_0_are_told(contrast: Path, tmp_path: Path) -> None:
    def nothing(row: dict) -> dict:
        return {**row, **{f"{s}_weight": [0.0] * len(row[f"{s}_weight"]) for s in SIDES}, **no_eos}

    no_eos = {f"{side}_eos_weight": 0 for side in SIDES}
    data = rewritten(contrast, tmp_path / "d", nothing)
    done = train(contrast, data, tmp_path / "o", "--weights-are", "final")
    assert done.code == 0, done.err
    told = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert told == [
        f"warning: {split}.jsonl: all weights are 0; nothing will be learned" for split in ("train", "test")
    ]


def test_negative_weights_and_none_for_the_eos_are_allowed(contrast: Path, tmp_path: Path) -> None:
    def change(row: dict) -> dict:
        return {k: v for k, v in {**all_ones(row), "chosen_weight": [-1.5] * len(row["chosen_weight"])}.items()
                if not k.endswith("eos_weight")}  # fmt: skip

    done = train(contrast, rewritten(contrast, tmp_path / "d", change), tmp_path / "o", "--weights-are", "final")
    assert done.code == 0, done.err
    assert "EOS zero (auto: the file has no EOS weights)" in done.err


# ---------------------------------------------------------------- seen by inspect-weights


def inspected(*arguments: str | Path) -> dict:
    done = run_here("inspect-weights", *arguments, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def test_inspect_shows_what_the_steps_do(contrast: Path) -> None:
    plain, stepped = (inspected(contrast / "scored", "--index", "3", *more) for more in ((), STEPS))
    expected = by_hand(contrast)(rows_of(contrast, "train")[3])
    for side in SIDES:
        tokens = stepped["views"][0][side]
        assert [t["score"] for t in tokens] == [t["score"] for t in plain["views"][0][side]]
        scores = [t["score"] for t in tokens]
        assert [t["adjusted"] for t in plain["views"][0][side]] == pytest.approx(scores, rel=1e-6)
        weights = [*expected[f"{side}_weight"], expected[f"{side}_eos_weight"]]
        assert [t["weight"] for t in tokens] == pytest.approx(weights, rel=1e-4)
        assert stepped["sides"][side]["mean_adjusted"] != stepped["sides"][side]["mean_score"]
        assert plain["sides"][side]["mean_adjusted"] is None
    done = run_here("inspect-weights", contrast / "scored", *STEPS, "--show", "adjusted")
    assert "mean r after the steps" in done.out
    assert "highest r after the steps" in done.out


def test_the_test_split_is_centred_by_the_train_split(contrast: Path) -> None:
    shown = inspected(contrast / "scored", "--split", "test", "--index", "0", "--center", "dataset")
    scores = [-x for row in rows_of(contrast, "train") for s in SIDES for x in row[f"{s}_weight"]]
    center = sum(scores) / len(scores)
    for token in shown["views"][0]["chosen"]:
        assert token["adjusted"] == pytest.approx(token["score"] - center, abs=1e-5)


def test_inspect_shows_final_weights(contrast: Path, tmp_path: Path) -> None:
    data = rewritten(contrast, tmp_path / "final", by_hand(contrast))
    arguments = (data, "--weights-are", "final", "--tokenizer", contrast / "sft")
    shown = inspected(*arguments, "--index", "1")
    row = read_jsonl(data / "train.jsonl")[1]
    assert [t["weight"] for t in shown["views"][0]["chosen"][:-1]] == pytest.approx(row["chosen_weight"], rel=1e-6)
    assert {t["score"] for t in shown["views"][0]["chosen"]} == {None}
    assert shown["separation"] is None
    assert shown["ranked_by"] == "weight"
    done = run_here("inspect-weights", *arguments)
    assert done.code == 0
    assert "ready weights" in done.out
    assert "mean score" not in done.out
    assert run_here("inspect-weights", *arguments, "--show", "scores").code == 2
