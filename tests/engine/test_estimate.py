"""estimate: what the scores mean, what the files hold, and that nothing but the models and the data decides them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import oracle
import pytest
import torch
from conftest import Listener, largest_file, pair_rows, read_jsonl, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import Row
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.files import sha256
from tisdpo_cli.method.recipe import resolve_recipe, response_weights
from tisdpo_cli.method.transforms import RandomStream
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SIDES = ("chosen", "rejected")


def run(command: str, listener: Silent | None = None, **given: object) -> StageResult:
    """A command in this process."""
    flags = {name: value if isinstance(value, bool) else str(value) for name, value in given.items()}
    engine = estimate if command == "estimate" else train_pairs
    return engine(load(COMMANDS[command].settings, flags).settings, listener or Silent())


def fault_of(command: str, listener: Silent | None = None, **given: object) -> tuple[int, str, tuple[str, ...]]:
    """Exit code, sentence and details of a command in this process that does not succeed."""
    try:
        run(command, listener, **given)
    except (Exception, Interrupted) as fault:
        told = explain(fault)
        return told.exit_code, str(told), told.details
    raise AssertionError("it did succeed")


def score(contrast: Path, out: Path, listener: Silent | None = None, **settings: object) -> StageResult:
    given = {"forward": contrast / "dpo", "reverse": contrast / "reverse", "dataset": contrast / "data"}
    return run("estimate", listener, **{**given, "output_dir": out, **settings})


def train(contrast: Path, out: Path, listener: Silent | None = None, **settings: object) -> StageResult:
    given = {"model": contrast / "sft", "output_dir": out, "max_steps": 1, "batch_size": 4, "warmup_steps": 0}
    return run("train", listener, **{**given, **settings})


def splits(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.jsonl"))}


def scores(out: Path, split: str = "train") -> list[float]:
    """Every number of a split as it stands in the file, null left out, in order."""
    found: list[float] = []
    for row in read_jsonl(out / f"{split}.jsonl"):
        for side in SIDES:
            found += [v for v in (*row[f"{side}_weight"], row[f"{side}_eos_weight"]) if v is not None]
    return found


class Model:
    """A model in float64, and its tokenizer, straight from transformers."""

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(path)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]


# ---------------------------------------------------------------- what the scores mean


def test_scores_are_those_of_the_oracle_in_the_sign_of_the_file(contrast: Path) -> None:
    """The file holds −r for every token of both responses and for their EOS; r is exact to 1e-4 nats."""
    forward, reverse = Model(contrast / "dpo"), Model(contrast / "reverse")
    eos = forward.tokenizer.eos_token_id
    spread = 0.0
    for split in ("train", "test"):
        for row in read_jsonl(contrast / "scored" / f"{split}.jsonl"):
            for side in SIDES:
                response = [*forward.ids(row[side]), eos]
                r = oracle.scores(forward.model, reverse.model, forward.ids(row["prompt"]), response).tolist()
                stored = [*row[f"{side}_weight"], row[f"{side}_eos_weight"]]
                assert [-v for v in stored] == pytest.approx(r, abs=1e-4)
                spread = max(spread, *map(abs, r))
    assert spread > 0.1  # there was something to see


def test_signs_by_meaning(contrast: Path) -> None:
    """A token that the forward model likes more has r > 0; it weighs more than 1 if chosen, less if rejected."""
    forward, reverse = Model(contrast / "dpo"), Model(contrast / "reverse")
    eos, seen = forward.tokenizer.eos_token_id, {"chosen": 0, "rejected": 0}
    for row in read_jsonl(contrast / "scored" / "train.jsonl"):
        prompt = forward.ids(row["prompt"])
        for side in SIDES:
            ids = forward.ids(row[side])
            likes, dislikes = (oracle.token_logps(m.model, prompt, [*ids, eos]) for m in (forward, reverse))
            liked = int((likes - dislikes)[:-1].argmax())
            r = torch.tensor([-v for v in row[f"{side}_weight"]])
            if likes[liked] < dislikes[liked] + 1e-3:
                continue
            assert row[f"{side}_weight"][liked] < 0
            weights = response_weights(r, None, len(ids), False, resolve_recipe("rank_based"), RandomStream(side=side))
            assert weights[liked] > 1 if side == "chosen" else weights[liked] < 1
            assert weights[liked] == (weights.max() if side == "chosen" else weights.min())
            seen[side] += 1
    assert min(seen.values()) > 5


def test_the_preferred_side_scores_higher(contrast: Path) -> None:
    """Trained both ways on these pairs, the forward model likes chosen responses more, the reverse model rejected."""
    rows = read_jsonl(contrast / "scored" / "train.jsonl")
    mean = {side: sum(-v for row in rows for v in row[f"{side}_weight"]) for side in SIDES}
    assert mean["chosen"] > 0 > mean["rejected"]


def test_one_model_twice_scores_exactly_zero(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out", reverse=contrast / "dpo")
    assert set(scores(tmp_path / "out")) == {0.0}
    assert b"-0.0" not in (tmp_path / "out" / "train.jsonl").read_bytes()


def test_swapped_models_negate_the_scores(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out", forward=contrast / "reverse", reverse=contrast / "dpo")
    assert scores(tmp_path / "out") == [-v for v in scores(contrast / "scored")]


# ---------------------------------------------------------------- the same bytes


def test_the_same_command_in_another_process_writes_the_same_bytes(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out")
    assert splits(tmp_path / "out") == splits(contrast / "scored")


def test_one_model_at_a_time_writes_the_same_bytes(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out", sequential=True)
    assert splits(tmp_path / "out") == splits(contrast / "scored")


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_batch_size_is_rounding(contrast: Path, tmp_path: Path, batch_size: int) -> None:
    score(contrast, tmp_path / "out", batch_size=batch_size)
    for split in ("train", "test"):
        assert scores(tmp_path / "out", split) == pytest.approx(scores(contrast / "scored", split), abs=1e-5)


def test_the_order_of_the_rows_is_rounding(contrast: Path, tmp_path: Path) -> None:
    rows = read_jsonl(contrast / "data" / "train.jsonl")
    data = write_jsonl(tmp_path / "turned.jsonl", rows[::-1])
    score(contrast, tmp_path / "out", dataset=data, batch_size=3)
    turned = read_jsonl(tmp_path / "out" / "train.jsonl")[::-1]
    for row, other in zip(turned, read_jsonl(contrast / "scored" / "train.jsonl"), strict=True):
        assert row["prompt"] == other["prompt"]
        for side in SIDES:
            assert row[f"{side}_weight"] == pytest.approx(other[f"{side}_weight"], abs=1e-5)


def test_scores_keep_full_float32_precision(contrast: Path) -> None:
    found = scores(contrast / "scored")
    assert torch.tensor(found, dtype=torch.float32).tolist() == pytest.approx(found, rel=1e-7)
    assert sum(round(v, 3) != v for v in found) > len(found) / 2


# ---------------------------------------------------------------- rows and columns


def test_rows_columns_and_order_are_kept(contrast: Path, tmp_path: Path) -> None:
    rows = [
        {"id": i, **row, "score": 0.1 * i, "tags": ["ä", None, {"x": [1.5]}], "weird \u2028": "€𝄞"}
        for i, row in enumerate(pair_rows(7))
    ]
    rows[2]["rejected"] = rows[2]["chosen"]
    rows[4] = dict(reversed(rows[4].items()))
    rows[5] = dict(rows[1])
    rows[6]["chosen"] = " Grüße 你好 \U0001f600</s><|endoftext|>"
    score(contrast, tmp_path / "out", dataset=write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert list(splits(tmp_path / "out")) == ["train.jsonl"]
    scored = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_bytes().split(b"\n") if line]
    made = ["chosen_weight", "chosen_eos_weight", "rejected_weight", "rejected_eos_weight"]
    assert [list(row) for row in scored] == [[*row, *made] for row in rows]
    assert [{name: row[name] for name in row if name not in made} for row in scored] == rows
    assert scored[2]["chosen_weight"] == scored[2]["rejected_weight"]
    assert scored[5]["chosen_weight"] == pytest.approx(scored[1]["chosen_weight"], abs=1e-5)
    tokenizer = Model(contrast / "sft")
    for row in scored:
        for side in SIDES:
            assert len(row[f"{side}_weight"]) == len(
                tokenizer.tokenizer(row[side], add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )


def test_a_scored_dataset_can_be_scored_again(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out", dataset=contrast / "scored")
    assert splits(tmp_path / "out") == splits(contrast / "scored")


# ---------------------------------------------------------------- Parquet


@pytest.fixture(scope="module")
def parquet(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return score(contrast, tmp_path_factory.mktemp("parquet") / "out", format="parquet", keep_logps=True).path


def test_parquet_holds_the_same_rows_and_numbers(contrast: Path, parquet: Path, tmp_path: Path) -> None:
    lines = score(contrast, tmp_path / "lines", keep_logps=True).path
    record, counts = json.loads((parquet / "estimate.json").read_text()), {}
    for split in ("train", "test"):
        rows = read_jsonl(lines / f"{split}.jsonl")
        assert [row.columns for row in read_rows(parquet / f"{split}.parquet") if isinstance(row, Row)] == rows
        counts[split] = sha256(parquet / f"{split}.parquet")
    assert {split: count["sha256"] for split, count in record["counts"].items()} == counts
    assert not list(parquet.glob("*.jsonl"))


def test_parquet_is_scored_again_and_trained_on(contrast: Path, parquet: Path, tmp_path: Path) -> None:
    again = score(contrast, tmp_path / "again", dataset=parquet)
    assert splits(again.path) == splits(contrast / "scored")
    listener = Listener()
    weights = [
        train(contrast, tmp_path / name, listener, dataset=data, center="position").path / "model.safetensors"
        for name, data in (("one", parquet), ("other", contrast / "scored"))
    ]
    assert sha256(weights[0]) == sha256(weights[1])
    assert not any("changed since" in line for line in listener.warned + listener.said)


def test_rows_that_parquet_cannot_hold_are_refused_before_scoring(contrast: Path, tmp_path: Path) -> None:
    rows = read_jsonl(contrast / "data" / "train.jsonl")
    write_jsonl(tmp_path / "x.jsonl", [{**row, "id": i if i else "first"} for i, row in enumerate(rows)])
    code, message, _ = fault_of(
        "estimate", forward=contrast / "dpo", reverse=contrast / "reverse", dataset=tmp_path / "x.jsonl",
        output_dir=tmp_path / "out", format="parquet",
    )  # fmt: skip
    assert code == 1
    assert "x.jsonl:2" in message
    assert "column 'id'" in message
    assert "--format jsonl" in message
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- beyond the cut

SHORT = {"max_length": 32, "max_prompt_length": 10}


@pytest.fixture(scope="module")
def cut(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The data scored under limits that cut many responses, and what was said."""
    out, listener = tmp_path_factory.mktemp("cut") / "out", Listener()
    score(contrast, out, listener, **SHORT)
    return out, listener.said


def test_tokens_beyond_the_cut_are_null_and_counted(contrast: Path, cut: tuple[Path, list[str]]) -> None:
    out, said = cut
    model, nulls, scored, eos = Model(contrast / "sft"), 0, 0, 0
    for row in read_jsonl(out / "train.jsonl"):
        ids = {name: model.ids(row[name]) for name in ("prompt", *SIDES)}
        kept = oracle.encode_and_cut(
            ids["prompt"], ids["chosen"], ids["rejected"], bos=None, eos=0, keep="end", **SHORT
        )  # fmt: skip
        for side in SIDES:
            weights = row[f"{side}_weight"]
            assert len(weights) == len(ids[side])
            assert [v is None for v in weights] == [t >= kept[f"{side}_kept"] for t in range(len(weights))]
            assert (row[f"{side}_eos_weight"] is not None) == kept[f"{side}_has_eos"]
            nulls += weights.count(None)
            scored += len(weights) - weights.count(None)
            eos += kept[f"{side}_has_eos"]
    assert nulls > 0
    assert 0 < eos < 48
    counts = {"rows": 24, "scored_tokens": scored, "unscored_tokens": nulls, "scored_eos": eos}
    assert counts.items() <= json.loads((out / "estimate.json").read_text())["counts"]["train"].items()
    assert any("train" in line and str(nulls) in line and "null" in line for line in said)


def test_the_scores_before_the_cut_are_those_of_the_same_prompt(contrast: Path, cut: tuple[Path, list[str]]) -> None:
    """Cut from the end, a prompt of 10 tokens is the context of every score."""
    forward, reverse = Model(contrast / "dpo"), Model(contrast / "reverse")
    row = read_jsonl(cut[0] / "train.jsonl")[0]
    ids = forward.ids(row["chosen"])
    prompt = forward.ids(row["prompt"])[-10:]
    r = oracle.scores(forward.model, reverse.model, prompt, ids).tolist()
    stored = [-v for v in row["chosen_weight"] if v is not None]
    assert stored == pytest.approx(r[: len(stored)], abs=1e-4)


def test_train_under_wider_limits_is_refused(contrast: Path, cut: tuple[Path, list[str]], tmp_path: Path) -> None:
    code, text, details = fault_of(
        "train", model=contrast / "sft", dataset=cut[0], output_dir=tmp_path / "out", max_steps=1
    )
    assert code == 1
    assert f"{cut[0] / 'train.jsonl'}:" in text
    assert details
    assert not (tmp_path / "out" / "run.json").exists()


def test_train_under_the_same_limits_trains(contrast: Path, cut: tuple[Path, list[str]], tmp_path: Path) -> None:
    train(contrast, tmp_path / "same", dataset=cut[0], **SHORT)
    assert (tmp_path / "same" / "run.json").exists()
    # Shorter still: what was scored covers it, though other EOS are gone.
    train(contrast, tmp_path / "shorter", dataset=cut[0], max_length=28, max_prompt_length=10)
    assert (tmp_path / "shorter" / "run.json").exists()


# ---------------------------------------------------------------- what is recorded


def test_what_the_output_holds(contrast: Path) -> None:
    out = contrast / "scored"
    assert {path.name for path in out.iterdir() if not path.name.startswith(".")} == {
        "train.jsonl", "test.jsonl", "estimate.json", "run.json", "config.yaml", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    assert not (out / ".parts").exists()
    mine = AutoTokenizer.from_pretrained(out)
    assert mine.get_vocab() == AutoTokenizer.from_pretrained(contrast / "sft").get_vocab()


def test_what_is_recorded(contrast: Path) -> None:
    manifest = json.loads((contrast / "scored" / "estimate.json").read_text())
    assert manifest["models"]["forward"]["path"] == str(contrast / "dpo")
    hashes = [manifest["models"]["forward"]["sha256"], manifest["models"]["reverse"]["sha256"]]
    hashes += [manifest["dataset"]["sha256"], manifest["tokenizer"]]
    assert all(len(value) == 64 for value in hashes)
    assert len(set(hashes)) == 4
    assert "templates" in manifest
    assert manifest["lengths"] == {"max_length": 512, "max_prompt_length": 256, "keep_prompt": "end"}
    assert manifest["counts"]["train"]["rows"] == 24
    assert manifest["counts"]["test"]["rows"] == 8
    assert manifest["counts"]["train"]["scored_eos"] == 48
    assert manifest["counts"]["train"]["unscored_tokens"] == 0
    assert {"tisdpo", "torch", "transformers"} <= manifest["versions"].keys()

    record = json.loads((contrast / "scored" / "run.json").read_text())
    assert record["command"] == "estimate"
    assert record["counts"] == manifest["counts"]
    assert record["made_from"]["content of forward"] == hashes[0]
    assert record["made_from"]["content of dataset"] == hashes[2]
    assert record["seconds"] > 0
    assert record["versions"] == manifest["versions"]


@pytest.mark.parametrize(("asked", "used"), [("auto", "float32"), ("bf16", "bf16")])
def test_the_dtype_that_was_computed_in_is_recorded(contrast: Path, tmp_path: Path, asked: str, used: str) -> None:
    score(contrast, tmp_path / "out", dtype=asked)
    assert used in json.loads((tmp_path / "out" / "estimate.json").read_text())["dtype"]


def test_bf16_is_about_right(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out", dtype="bf16")
    off = [abs(a - b) for a, b in zip(scores(tmp_path / "out"), scores(contrast / "scored"), strict=True)]
    assert 0 < sum(off) / len(off) < 0.05


# ---------------------------------------------------------------- stopped, and gone on


@pytest.fixture(scope="module")
def many(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A file of 400 pairs, and what it is scored to without interruption, two pairs at a time (13 parts)."""
    root = tmp_path_factory.mktemp("many")
    data = write_jsonl(root / "pairs.jsonl", pair_rows(400))
    torch.set_num_threads(1)
    score(contrast, root / "whole", dataset=data, batch_size=2)
    return data, root / "whole"


@pytest.mark.parametrize("sequential", [False, True])
def test_interrupted_and_gone_on(contrast: Path, many: tuple[Path, Path], tmp_path: Path, sequential: bool) -> None:
    data, whole = many
    given = {
        "forward": contrast / "dpo", "reverse": contrast / "reverse", "dataset": data, "output_dir": tmp_path / "out",
        "batch_size": 2, "sequential": sequential,
    }  # fmt: skip
    for after in (150, 210):
        code, text, _ = fault_of("estimate", Listener(after), **given)
        assert (code, "same command" in text) == (143, True)
        assert not list((tmp_path / "out").glob("*.jsonl"))
        assert not (tmp_path / "out" / "run.json").exists()
    listener = Listener()
    run("estimate", listener, **given)
    assert any(line.startswith("resuming: ") for line in listener.said)
    assert splits(tmp_path / "out") == splits(whole)
    assert not (tmp_path / "out" / ".parts").exists()


def test_killed_and_gone_on(contrast: Path, many: tuple[Path, Path], tmp_path: Path) -> None:
    data, whole = many
    out = tmp_path / "out"
    arguments = ["--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", data, "-o", out]
    process = subprocess.Popen(
        [sys.executable, "-m", "tisdpo_cli", "estimate", *map(str, arguments), "--batch-size", "2"],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    while len(list((out / ".parts").glob("train-*"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not list(out.glob("*.jsonl"))
    listener = Listener()
    score(contrast, out, listener, dataset=data, batch_size=2)
    assert any(line.startswith("resuming: ") for line in listener.said)
    assert splits(out) == splits(whole)


def test_other_settings_on_the_way_are_refused_by_name(contrast: Path, many: tuple[Path, Path], tmp_path: Path) -> None:
    given = {
        "forward": contrast / "dpo", "reverse": contrast / "reverse", "dataset": many[0],
        "output_dir": tmp_path / "out", "batch_size": 2,
    }  # fmt: skip
    fault_of("estimate", Listener(100), **given)
    changes = {
        "max_length": {"max_length": 300},
        "reverse": {"reverse": contrast / "sft"},
        "batch_size": {"batch_size": 3},
    }
    for name, change in changes.items():
        code, text, _ = fault_of("estimate", **{**given, **change})
        assert (code, name in text) == (2, True)
    listener = Listener()
    run("estimate", listener, **given, resume="never")
    assert not any(line.startswith("resuming") for line in listener.said)
    assert splits(tmp_path / "out") == splits(many[1])


def test_a_damaged_part_is_scored_again(contrast: Path, many: tuple[Path, Path], tmp_path: Path) -> None:
    given = {
        "forward": contrast / "dpo", "reverse": contrast / "reverse", "dataset": many[0],
        "output_dir": tmp_path / "out", "batch_size": 2,
    }  # fmt: skip
    fault_of("estimate", Listener(200), **given)
    part = sorted((tmp_path / "out" / ".parts").glob("*.safetensors"))[1]
    part.write_bytes(part.read_bytes()[:50])
    run("estimate", **given)
    assert splits(tmp_path / "out") == splits(many[1])


@pytest.mark.parametrize("size", [2500, 5000])
def test_no_room_is_told_and_gone_on_from(contrast: Path, tmp_path: Path, size: int) -> None:
    """2,500 bytes stop the parts, 5,000 the dataset."""
    given = {"forward": contrast / "dpo", "reverse": contrast / "reverse", "dataset": contrast / "data"}
    with largest_file(size):
        code, text, _ = fault_of("estimate", **given, output_dir=tmp_path / "out")
    assert code == 1
    assert str(tmp_path / "out") in text
    assert "fault of the program" not in text
    assert not list((tmp_path / "out").glob("*.jsonl"))
    score(contrast, tmp_path / "out")
    assert splits(tmp_path / "out") == splits(contrast / "scored")


def test_finished_is_finished(contrast: Path, tmp_path: Path) -> None:
    score(contrast, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    made = score(contrast, tmp_path / "out", sequential=True)
    assert not made.fresh
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_an_unfinished_scored_dataset_is_not_trained_on(contrast: Path, tmp_path: Path) -> None:
    """Without its completion marker nobody knows whether all splits are there."""
    shutil.copytree(contrast / "scored", tmp_path / "scored")
    (tmp_path / "scored" / "run.json").unlink()
    code, text, _ = fault_of(
        "train", model=contrast / "sft", dataset=tmp_path / "scored", output_dir=tmp_path / "out", max_steps=1
    )
    assert code == 1
    assert "incomplete output" in text
