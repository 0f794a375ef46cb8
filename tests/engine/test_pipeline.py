"""run: the whole method from one file, finished stages skipped, stopped anywhere and gone on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import Listener, Tisdpo, read_jsonl, run_here, write_jsonl

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.engine import pipeline
from tisdpo_cli.engine.pipeline import PipelineDryRun, PipelineResult
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

STAGES = {"train_sft": "sft", "train_dpo": "dpo", "train_reverse": "reverse", "estimate": "scored", "train": "tisdpo"}
CONFIG = """
dataset: {data}
output_dir: {out}
batch_size: 8
max_steps: 4
warmup_steps: 0
train_sft:
  vocab_size: 300
  hidden_size: 16
  layers: 1
  heads: 2
  max_steps: 3
train_dpo:
  learning_rate: 1e-3
train_reverse:
  learning_rate: 1e-3
  max_steps: 6
train:
  transform: rank_based
  learning_rate: 1e-3
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def write_config(world: Path, folder: Path, more: str = "", data: Path | None = None) -> Path:
    """The file, for an output in `folder / "out"`."""
    folder.mkdir(exist_ok=True)
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(data=data or world / "data", out=folder / "out") + more)
    return path


def run(config: Path, listener: Silent | None = None, **settings: object) -> PipelineResult:
    """The pipeline in this process; settings by dotted name, `__` for the dot."""
    flags = {name.replace("__", "."): value for name, value in settings.items()}
    flags = {name: value if isinstance(value, bool) else str(value) for name, value in flags.items()}
    return pipeline.run(load(COMMANDS["run"].settings, flags, config=config).settings, listener or Silent())


def fault_of(config: Path, listener: Silent | None = None, **settings: object) -> tuple[int, str]:
    """Exit code and sentence of a pipeline in this process that does not succeed."""
    try:
        run(config, listener, **settings)
    except (Exception, Interrupted) as fault:
        told = explain(fault)
        return told.exit_code, str(told)
    raise AssertionError("it did succeed")


def made_now(made: PipelineResult) -> list[str]:
    return [name for name, stage in made.stages.items() if stage.fresh]


def files(out: Path) -> dict[str, tuple[int, bytes]]:
    """Everything in the folders of the stages, with the time it was written."""
    return {
        str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes())
        for folder in STAGES.values()
        for path in sorted((out / folder).rglob("*"))
        if path.is_file()
    }


def result(out: Path) -> dict[str, bytes]:
    """What each stage made that the next one reads."""
    made = {}
    for folder in STAGES.values():
        for name in json.loads((out / folder / "run.json").read_text())["files"]:
            if name != "estimate.json":  # it holds the paths of the models
                made[f"{folder}/{name}"] = (out / folder / name).read_bytes()
    return made


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline, uninterrupted; copied, not used, by tests that change it."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    run(write_config(world, folder))
    return folder / "out"


def copied(whole: Path, folder: Path) -> None:
    subprocess.run(["cp", "-rp", whole, folder / "out"], check=True)


# ---------------------------------------------------------------- what is made


def test_all_stages_are_made_in_order(world: Path, tmp_path: Path) -> None:
    listener = Listener()
    made = run(write_config(world, tmp_path), listener)
    assert list(made.stages) == made_now(made) == list(STAGES)
    assert [title.split()[0] for title in listener.titles] == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    for name, folder in STAGES.items():
        record = json.loads((tmp_path / "out" / folder / "run.json").read_text())
        assert record["command"] == name.replace("_", "-")
    assert made.inspection.source == str(tmp_path / "out" / "scored")


def test_each_stage_has_its_own_number_of_updates(whole: Path) -> None:
    steps = {
        folder: len(read_jsonl(whole / folder / "metrics.jsonl")) - 1
        for folder in STAGES.values()
        if folder != "scored"
    }
    assert steps == {"sft": 3, "dpo": 4, "reverse": 6, "tisdpo": 4}


def test_each_stage_reads_what_the_one_before_made(world: Path, whole: Path) -> None:
    made_from = {
        name: json.loads((whole / folder / "run.json").read_text())["made_from"] for name, folder in STAGES.items()
    }
    start = made_from["train_dpo"]["content of model"]
    assert made_from["train_reverse"]["content of model"] == made_from["train"]["content of model"] == start
    assert made_from["estimate"]["content of forward"] != made_from["estimate"]["content of reverse"] != start
    assert made_from["train"]["weights.transform"] == "rank_based"
    assert made_from["train"]["content of dataset"] != made_from["train_dpo"]["content of dataset"]


def test_one_line_on_stdout(world: Path, tmp_path: Path, whole: Path, tisdpo: Tisdpo) -> None:
    config = write_config(world, tmp_path)
    done = tisdpo("run", "--config", config, env=ONE_THREAD)
    assert (done.code, done.out) == (0, f"{tmp_path / 'out'}\n"), done.err
    assert result(tmp_path / "out") == result(whole)
    before = files(tmp_path / "out")
    done = tisdpo("run", "--config", config, "--json", env=ONE_THREAD)
    assert done.code == 0, done.err
    told = json.loads(done.out)
    assert told["path"] == str(tmp_path / "out")
    assert {name: stage["made"] for name, stage in told["stages"].items()} == dict.fromkeys(STAGES, False)
    assert files(tmp_path / "out") == before


def test_a_starting_model_may_be_given(world: Path, tmp_path: Path) -> None:
    lines = CONFIG[: CONFIG.index("train_sft:")] + CONFIG[CONFIG.index("train_dpo:") :]
    config = tmp_path / "run.yaml"
    config.write_text(lines.format(data=world / "data", out=tmp_path / "out") + f"model: {world / 'sft'}\n")
    assert made_now(run(config)) == ["train_dpo", "train_reverse", "estimate", "train"]
    assert not (tmp_path / "out" / "sft").exists()


# ---------------------------------------------------------------- again


def test_again_everything_is_skipped(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    before = files(tmp_path / "out")
    made = run(write_config(world, tmp_path))
    assert made_now(made) == []
    assert files(tmp_path / "out") == before


def test_moved_elsewhere_everything_is_skipped(world: Path, tmp_path: Path, whole: Path) -> None:
    """Stages, data and output have other names now, and the same content."""
    copied(whole, tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "out").rename(tmp_path / "a" / "out")
    subprocess.run(["cp", "-r", world / "data", tmp_path / "moved"], check=True)
    before = files(tmp_path / "a" / "out")
    made = run(write_config(world, tmp_path / "a", data=tmp_path / "moved"))
    assert made_now(made) == []
    assert files(tmp_path / "a" / "out") == before


def test_what_does_not_shape_the_result_may_change(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    made = run(write_config(world, tmp_path), estimate__sequential=True, train__save_every=2, train_dpo__resume="never")
    assert made_now(made) == []


def plan_of(listener: Listener) -> dict[str, str]:
    """What was said before the first stage: stage to what is done with it."""
    begin = listener.said.index("what is done with each stage:") + 1
    lines = [line.strip().partition(": ") for line in listener.said[begin : begin + len(STAGES)]]
    return {name.replace("-", "_"): text for name, _, text in lines}


AFTER = {
    "train": ("train__transform", "threshold", ["train"]),
    "estimate": ("estimate__dtype", "bf16", ["estimate", "train"]),
    "train_reverse": ("train_reverse__learning_rate", 2e-3, ["train_reverse", "estimate", "train"]),
    "train_dpo": ("train_dpo__max_steps", 5, ["train_dpo", "estimate", "train"]),
    "train_sft": ("train_sft__seed", 3, list(STAGES)),
}


@pytest.mark.parametrize("stage", AFTER)
def test_another_setting_is_named_and_redoes_exactly_what_depends_on_it(
    world: Path, tmp_path: Path, whole: Path, stage: str
) -> None:
    name, value, again = AFTER[stage]
    copied(whole, tmp_path)
    config = write_config(world, tmp_path)
    before = files(tmp_path / "out")
    listener = Listener()
    assert made_now(run(config, listener, **{name: value})) == again
    planned = plan_of(listener)
    for other in STAGES:
        assert planned[other].split(":")[0] == ("redo" if other in again else "skip")
    assert name.split("__")[1] in planned[stage]
    assert f"→ {value}" in planned[stage]
    assert all(f"{again[0].replace('_', '-')} is redone" in planned[other] for other in READERS[stage])
    now = files(tmp_path / "out")
    kept = {path for path in before if now.get(path) == before[path]}
    for other, folder in STAGES.items():
        inside = {path for path in before if path.startswith(f"{folder}/")}
        assert inside <= kept if other not in again else f"{folder}/run.json" not in kept


# Which stages read the output of a stage.
READERS = {
    "train_sft": ["train_dpo", "train_reverse", "train"],
    "train_dpo": ["estimate"],
    "train_reverse": ["estimate"],
    "estimate": ["train"],
    "train": [],
}


def test_another_beta_of_the_contrast_redoes_it_and_what_reads_it(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    listener = Listener()
    betas = {"train_dpo__beta": 0.2, "train_reverse__beta": 0.2}
    made = run(write_config(world, tmp_path), listener, **betas)
    assert made_now(made) == ["train_dpo", "train_reverse", "estimate", "train"]
    assert plan_of(listener)["train_dpo"] == "redo: method.beta 0.1 → 0.2"
    assert plan_of(listener)["estimate"] == "redo: train-dpo is redone; train-reverse is redone"
    listener = Listener()
    assert made_now(run(write_config(world, tmp_path), listener, **betas)) == []
    assert set(plan_of(listener).values()) == {"skip"}


def test_a_change_and_back_ends_in_the_same_bytes(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    config = write_config(world, tmp_path)
    assert made_now(run(config, train__transform="threshold")) == ["train"]
    assert made_now(run(config)) == ["train"]
    assert result(tmp_path / "out") == result(whole)


def test_what_run_did_not_make_is_never_overwritten_unasked(world: Path, tmp_path: Path, whole: Path) -> None:
    """A stage that was made again by hand, and outputs whose maker is not known."""
    copied(whole, tmp_path)
    config, out = write_config(world, tmp_path), tmp_path / "out"
    flags = {"model": out / "sft", "dataset": world / "data", "output_dir": out / "dpo", "max_steps": 2}
    flags |= {"batch_size": 8, "warmup_steps": 0, "beta": 0.3}
    by_hand = {name: str(value) for name, value in flags.items()}
    train_pairs(load(COMMANDS["train-dpo"].settings, {**by_hand, "overwrite": True}).settings, Silent())
    before = files(out)
    code, text = fault_of(config)
    assert (code, "method.beta 0.3 → 0.1" in text, str(out / "dpo") in text) == (2, True, True)
    code, text = fault_of(config, train__transform="threshold")
    assert files(out) == before
    assert made_now(run(config, overwrite=True)) == ["train_dpo"], "which is the same again"

    (out / ".stages.json").unlink()
    before = files(out)
    code, text = fault_of(config, train__transform="threshold")
    assert (code, "transform rank_based → threshold" in text) == (2, True)
    assert files(out) == before
    assert made_now(run(config)) == []


def test_a_stage_that_was_stopped_is_restarted_with_other_settings(world: Path, tmp_path: Path) -> None:
    config = write_config(world, tmp_path, "save_every: 1\n")
    fault_of(config, Listener(5))
    listener = Listener()
    made = run(config, listener, train_dpo__beta=0.2)
    assert plan_of(listener)["train_dpo"] == "redo: method.beta 0.1 → 0.2"
    assert plan_of(listener)["train_sft"] == "skip"
    assert plan_of(listener)["train"] == "make"
    assert made_now(made) == ["train_dpo", "train_reverse", "estimate", "train"]


def test_other_data_make_everything_again(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    rows = read_jsonl(world / "data" / "train.jsonl")
    rows[3]["rejected"] += " No."
    data = write_jsonl(tmp_path / "data" / "train.jsonl", rows).parent
    config = write_config(world, tmp_path, data=data)
    listener = Listener()
    assert made_now(run(config, listener)) == list(STAGES)
    assert plan_of(listener)["train_sft"] == "redo: the content of dataset has changed"


def test_a_stage_that_is_gone_is_made_again_to_the_byte(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    subprocess.run(["rm", "-r", tmp_path / "out" / "reverse"], check=True)
    listener = Listener()
    assert made_now(run(write_config(world, tmp_path), listener)) == ["train_reverse"]
    assert plan_of(listener)["train_reverse"] == "make"
    assert plan_of(listener)["estimate"] == "redo: train-reverse is made first; skipped if that changes nothing"
    assert result(tmp_path / "out") == result(whole)


# ---------------------------------------------------------------- a dry run


def dry_run(config: Path, **settings: object) -> PipelineDryRun:
    found = run(config, dry_run=True, **settings)
    assert isinstance(found, PipelineDryRun)
    return found


def test_a_dry_run_tries_every_stage_and_writes_nothing(world: Path, tmp_path: Path) -> None:
    config = write_config(world, tmp_path)
    before = sorted(tmp_path.rglob("*"))
    found = dry_run(config)
    assert sorted(tmp_path.rglob("*")) == before
    assert [plan.action for plan in found.plan.values()] == ["make"] * len(STAGES)
    assert list(found.stages) == list(STAGES)
    assert [stage.steps.get("steps") for stage in found.stages.values()] == [3, 4, 6, None, 4]
    weights = {name: stage.prediction.memory["weights"] for name, stage in found.stages.items()}
    assert weights["train_dpo"] == weights["train_reverse"] == weights["train"] == weights["train_sft"]
    assert weights["estimate"] == 2 * weights["train_dpo"]
    assert found.seconds > 0


@pytest.mark.parametrize("method", ["sft", "prompt"])
def test_a_dry_run_knows_every_method(world: Path, tmp_path: Path, method: str) -> None:
    found = dry_run(write_config(world, tmp_path), method=method)
    assert list(found.stages) == list(found.plan)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_tries_only_what_would_be_made(world: Path, tmp_path: Path, whole: Path) -> None:
    copied(whole, tmp_path)
    config, before = write_config(world, tmp_path), files(tmp_path / "out")
    assert list(dry_run(config).stages) == []
    found = dry_run(config, train__transform="threshold")
    assert list(found.stages) == ["train"]
    assert found.stages["train"].first_row.responses[0].tokens[0].weight is not None, "the scores are there"
    found = dry_run(config, train_reverse__beta=0.2)
    assert list(found.stages) == ["train_reverse", "estimate", "train"]
    assert files(tmp_path / "out") == before


def test_a_dry_run_is_one_object_on_stdout(world: Path, tmp_path: Path) -> None:
    done = run_here("run", "--config", write_config(world, tmp_path), "--dry-run", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["dry_run"], found["command"], list(found["stages"])) == (True, "run", list(STAGES))
    assert found["plan"]["train"] == {"action": "make", "reasons": []}
    assert found["stages"]["estimate"]["settings"]["forward"] == str(tmp_path / "out" / "dpo")
    assert "tisdpo-dry-run" not in done.err + done.out.replace("first_row", "")
    assert "all stages: about " in done.err
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- stopped


@pytest.mark.parametrize("after", [2, 5, 7, 11, 20, 60, 80])
def test_interrupted_in_any_stage_and_gone_on(world: Path, tmp_path: Path, whole: Path, after: int) -> None:
    """3 + 4 + 6 updates, 64 scored pairs, 4 updates."""
    config = write_config(world, tmp_path)
    code, text = fault_of(config, Listener(after))
    assert (code, "same command" in text) == (143, True)
    run(config)
    assert result(tmp_path / "out") == result(whole)


@pytest.mark.slow
def test_killed_in_several_stages_and_gone_on(world: Path, tmp_path: Path) -> None:
    more = "save_every: 5\n"
    steps = {"train_dpo__max_steps": 60, "train__max_steps": 60}
    run(write_config(world, tmp_path / "whole", more), **steps)
    config = write_config(world, tmp_path / "killed", more)
    out = tmp_path / "killed" / "out"
    sets = [part for name, value in steps.items() for part in ("--set", f"{name.replace('__', '.')}={value}")]
    for folder, lines in (("dpo", 12), ("tisdpo", 8)):
        process = subprocess.Popen(
            [sys.executable, "-m", "tisdpo_cli", "run", "-c", str(config), *sets],
            stderr=subprocess.DEVNULL,
            env={**os.environ, **ONE_THREAD},
        )
        metrics = out / folder / "metrics.jsonl"
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < lines:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.002)
        process.kill()
        process.wait()
        assert not (out / folder / "run.json").exists()
    made = run(config, **steps)
    assert made_now(made) == ["train"]
    assert result(out) == result(tmp_path / "whole" / "out")


# ---------------------------------------------------------------- typed wrong


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("trian: {}\n", "trian"),
        ("estimate: {forward: somewhere}\n", "forward"),
        ("evaluation: {eval_every: 0}\n", "eval_every"),
        ("estimate: {max_length: 5, max_prompt_length: 9}\n", "max_prompt_length"),
    ],
)
def test_a_wrong_file_is_refused_before_anything_is_made(world: Path, tmp_path: Path, more: str, named: str) -> None:
    code, text = fault_of(write_config(world, tmp_path, more))
    assert (code, named in text.replace("-", "_")) == (2, True)
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- other ways to a contrast


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        ("sft", ["train_sft", "sft_chosen", "sft_rejected", "estimate", "train"]),
        ("prompt", ["train_sft", "estimate", "train"]),
    ],
)
def test_every_method_runs_to_the_end_and_is_skipped_the_second_time(world, tmp_path, method, stages) -> None:
    config = write_config(world, tmp_path)
    listener = Listener()
    made = run(config, listener, method=method)
    assert made_now(made) == stages
    assert [title.split(": ")[0] for title in listener.titles] == [
        f"{i}/{len(stages)} {name.replace('_', '-')}" for i, name in enumerate(stages, start=1)
    ]
    assert any(
        value for row in read_jsonl(tmp_path / "out" / "scored" / "train.jsonl") for value in row["chosen_weight"]
    )
    assert made_now(run(config, method=method)) == []


def test_method_sft_is_the_chain_of_its_commands(world: Path, tmp_path: Path) -> None:
    """Two supervised trainings from the same start, each on one side, then the estimation."""
    out = tmp_path / "out"
    run(write_config(world, tmp_path), method="sft")
    common = {"model": out / "sft", "dataset": world / "data", "batch_size": 8, "max_steps": 4, "warmup_steps": 0}
    for target in ("chosen", "rejected"):
        flags = {k: str(v) for k, v in {**common, "target": target, "output_dir": tmp_path / target}.items()}
        train_sft(load(COMMANDS["train-sft"].settings, flags).settings, Silent())
        made = (tmp_path / target / "model.safetensors").read_bytes()
        assert made == (out / f"sft-{target}" / "model.safetensors").read_bytes()
    sides = {"forward": tmp_path / "chosen", "reverse": tmp_path / "rejected"}
    flags = {k: str(v) for k, v in {**sides, "dataset": world / "data", "output_dir": tmp_path / "scored"}.items()}
    estimate(load(COMMANDS["estimate"].settings, flags).settings, Silent())
    assert (tmp_path / "scored" / "train.jsonl").read_bytes() == (out / "scored" / "train.jsonl").read_bytes()


def test_templates_of_ones_own_reach_the_scores(world: Path, tmp_path: Path) -> None:
    """One at the top of the file, one in its section: the same bytes as by `estimate` with both."""
    kind, rude = "Be kind.\\n{}\\nThink first.", "Be rude: {}"
    more = f'method: prompt\npositive_template: "{kind}"\nestimate:\n  negative_template: "{rude}"\n'
    config, out = write_config(world, tmp_path, more), tmp_path / "out"
    assert made_now(run(config)) == ["train_sft", "estimate", "train"]
    texts = {"positive_template": kind.replace("\\n", "\n"), "negative_template": rude}
    manifest = json.loads((out / "scored" / "estimate.json").read_text())
    assert manifest["templates"] == {"forward": texts["positive_template"], "reverse": rude}
    flags = {"model": str(out / "sft"), "dataset": str(world / "data"), "output_dir": str(tmp_path / "alone"), **texts}
    # The batch size at the top of the file is that of every stage.
    estimate(load(COMMANDS["estimate"].settings, {**flags, "batch_size": "8"}).settings, Silent())
    assert (tmp_path / "alone" / "train.jsonl").read_bytes() == (out / "scored" / "train.jsonl").read_bytes()
    assert made_now(run(config)) == []
    listener = Listener()
    assert made_now(run(config, listener, positive_template="harmless")) == ["estimate", "train"]
    assert any("estimate: redo: positive_template Be kind." in line for line in listener.said)


def test_another_method_in_the_same_place_redoes_the_scores(world: Path, tmp_path: Path) -> None:
    config = write_config(world, tmp_path)
    run(config)
    assert made_now(run(config, method="prompt")) == ["estimate", "train"]
