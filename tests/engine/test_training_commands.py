"""The training commands as a whole: what an output holds, what is measured, which commands are the same training."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import oracle
import pytest
import torch
from conftest import Tisdpo, read_jsonl, run_here, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load
from tisdpo_cli.settings.yaml_files import read_yaml

LN2 = math.log(2)
REWARDS = [f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")]
PLAIN = ["loss", *REWARDS, "logps/chosen", "logps/rejected"]
WEIGHTED = [f"weighted_{name}" for name in REWARDS]
UPDATE = ["grad_norm", "learning_rate", "tokens_per_second", "pairs_per_second"]


class Listener(Silent):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)


def run(command: str, world: Path, out: Path, listener: Silent | None = None, **settings: object) -> StageResult:
    """A training command in this process, on the world's data, with few and large updates; None leaves a flag out."""
    given: dict[str, object] = {
        "model": world / "sft", "dataset": world / ("scored" if command == "train" else "data"), "output_dir": out,
        "max_steps": 5, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": 0,
    }  # fmt: skip
    given.update(settings)
    flags = {
        name: value if isinstance(value, bool) else str(value) for name, value in given.items() if value is not None
    }
    engine = train_sft if command == "train-sft" else train_pairs
    return engine(load(COMMANDS[command].settings, flags).settings, listener or Silent())


def fault_of(
    command: str, world: Path, out: Path, listener: Silent | None = None, **settings: object
) -> tuple[int, str]:
    """Exit code and sentence of a command in this process that does not succeed."""
    try:
        run(command, world, out, listener, **settings)
    except (Exception, Interrupted) as fault:
        told = explain(fault)
        return told.exit_code, str(told)
    raise AssertionError("it did succeed")


def metrics(out: Path) -> list[dict[str, float]]:
    return read_jsonl(out / "metrics.jsonl")


def column(out: Path, name: str) -> list[float]:
    return [row[name] for row in metrics(out) if name in row]


def model_bytes(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def without_clock(row: Mapping[str, object]) -> dict[str, object]:
    return {name: value for name, value in row.items() if not name.endswith("_per_second")}


@pytest.fixture(scope="module")
def dpo(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five updates of train-dpo."""
    out = tmp_path_factory.mktemp("dpo") / "out"
    torch.set_num_threads(1)
    run("train-dpo", world, out)
    return out


# ---------------------------------------------------------------- the output directory


def test_what_the_output_holds(world: Path, dpo: Path) -> None:
    assert {path.name for path in dpo.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md", "config.yaml", "metrics.jsonl", "run.json",
    }  # fmt: skip
    modes = {path.stat().st_mode & 0o777 for path in dpo.iterdir()}
    assert len(modes) == 1  # others can read the weights where they can read the rest


def test_the_model_is_one_for_transformers(world: Path, dpo: Path) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(dpo, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer, start = AutoTokenizer.from_pretrained(dpo), AutoTokenizer.from_pretrained(world / "sft")
    text = "Human: Where? \U0001f600 <|endoftext|>"
    assert tokenizer(text)["input_ids"] == start(text)["input_ids"]
    assert model.config.use_cache
    assert model.config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("\n\nHuman: Where can I sleep?\n\nAssistant:", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def test_the_metrics_file_is_flat_and_starts_before_any_update(dpo: Path) -> None:
    rows = metrics(dpo)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert [rows[0][name] for name in REWARDS] == [0, 0, 0, 0]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for row in rows for value in row.values())
    assert [row["epoch"] for row in rows] == pytest.approx([0, 1 / 3, 2 / 3, 1, 4 / 3, 5 / 3], abs=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_the_run_is_recorded_last(world: Path, dpo: Path) -> None:
    record = json.loads((dpo / "run.json").read_text())
    assert record["command"] == "train-dpo"
    assert {"tisdpo", "python", "torch", "transformers", "accelerate", "datasets"} <= record["versions"].keys()
    assert record["seed"] == 0
    assert record["seconds"] > 0
    assert (record["updates"], record["pairs"]) == (5, 24)
    assert record["final_metrics"] == metrics(dpo)[-1]
    for name in ("model", "dataset"):
        assert len(record["made_from"][f"content of {name}"]) == 64
    times = {path.name: path.stat().st_mtime_ns for path in dpo.iterdir()}
    assert max(times, key=lambda name: times[name]) == "run.json"


def test_the_settings_are_written_down_and_read_back(world: Path, dpo: Path, tmp_path: Path) -> None:
    flags = {"output_dir": str(tmp_path / "out")}
    again = load(COMMANDS["train-dpo"].settings, flags, config=dpo / "config.yaml").settings
    train_pairs(again, Silent())
    assert model_bytes(tmp_path / "out") == model_bytes(dpo)
    written = read_yaml(dpo / "config.yaml")
    assert written["optim"]["learning_rate"] == 1e-3
    assert written["data"]["max_length"] == 512


class Looking(Silent):
    """Looks at the output at every update."""

    def __init__(self, out: Path) -> None:
        self.out, self.seen = out, 0

    def progress(self, title: str, total: int, done: int, unit: str) -> Looking:
        return self

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        self.seen += 1
        names = {path.name for path in self.out.iterdir()}
        assert not names & {"run.json", "model.safetensors", "config.json"}
        assert {"config.yaml", "metrics.jsonl"} <= names
        assert len(metrics(self.out)) == self.seen

    def __enter__(self) -> Looking:
        return self

    def __exit__(self, *_: object) -> None:
        return None


def test_while_it_runs_there_is_no_model_and_no_mark(world: Path, tmp_path: Path) -> None:
    looking = Looking(tmp_path / "out")
    run("train-dpo", world, tmp_path / "out", looking)
    assert looking.seen == 6
    assert (tmp_path / "out" / "run.json").exists()


# ---------------------------------------------------------------- what is measured


def evaluated(names: list[str]) -> list[str]:
    return [f"eval/{name}" for name in names]


def test_metrics_of_train_dpo(dpo: Path) -> None:
    rows = metrics(dpo)
    assert list(rows[0]) == ["step", "epoch", *PLAIN, *evaluated(PLAIN)]
    assert list(rows[1]) == ["step", "epoch", *PLAIN, *UPDATE]
    assert list(rows[-1]) == ["step", "epoch", *PLAIN, *UPDATE, *evaluated(PLAIN)]


def test_metrics_of_train(contrast: Path, tmp_path: Path) -> None:
    run("train", contrast, tmp_path / "out", transform="rank_based")
    rows = metrics(tmp_path / "out")
    both = [*PLAIN, *WEIGHTED]
    assert list(rows[0]) == ["step", "epoch", *both, *evaluated(both)]
    assert list(rows[1]) == ["step", "epoch", *both, *UPDATE]
    assert rows[0]["loss"] == pytest.approx(LN2, abs=1e-6)
    assert rows[-1]["weighted_rewards/margins"] != rows[-1]["rewards/margins"]


def test_what_the_metrics_say_is_what_the_oracle_says(world: Path, dpo: Path) -> None:
    """The evaluation after the last update, computed again from the two models with the plain maths in float64."""
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (dpo, world / "sft")
    )
    tokenizer = AutoTokenizer.from_pretrained(dpo)
    pairs = []
    for row in read_jsonl(world / "data" / "test.jsonl"):
        ids = {name: tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row}
        pair = {}
        for side in ("chosen", "rejected"):
            response = [*ids[side], tokenizer.eos_token_id]
            for name, model in (("policy", policy), ("reference", reference)):
                pair[f"{name}_{side}_logps"] = oracle.token_logps(model, ids["prompt"], response).detach()
        pairs.append(pair)
    last = metrics(dpo)[-1]
    assert last["eval/loss"] == pytest.approx(oracle.dpo_loss(pairs, 0.1).item(), abs=1e-4)
    rewards = oracle.rewards(pairs, 0.1)
    for name, values in rewards.items():
        assert last[f"eval/rewards/{name}"] == pytest.approx(sum(values) / len(values), abs=1e-4)
    logps = sum(pair["policy_chosen_logps"].sum().item() for pair in pairs) / len(pairs)
    assert last["eval/logps/chosen"] == pytest.approx(logps, abs=1e-3)


def test_evaluation_before_during_and_after(world: Path, tmp_path: Path) -> None:
    run("train-dpo", world, tmp_path / "every", eval_every=2)
    assert [row["step"] for row in metrics(tmp_path / "every") if "eval/loss" in row] == [0, 2, 4, 5]
    run("train-dpo", world, tmp_path / "none", eval_pairs=0)
    assert not any(name.startswith("eval/") for row in metrics(tmp_path / "none") for name in row)
    run("train-dpo", world, tmp_path / "file", dataset=world / "data" / "train.jsonl")
    assert not any(name.startswith("eval/") for row in metrics(tmp_path / "file") for name in row)
    # Looking at the test pairs changes nothing.
    assert model_bytes(tmp_path / "every") == model_bytes(tmp_path / "none") == model_bytes(tmp_path / "file")


def test_as_many_test_pairs_as_asked_for(world: Path, tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "data" / "test.jsonl", read_jsonl(world / "data" / "test.jsonl")[:3])
    write_jsonl(first.with_name("train.jsonl"), read_jsonl(world / "data" / "train.jsonl"))
    run("train-dpo", world, tmp_path / "three", eval_pairs=3, max_steps=2)
    run("train-dpo", world, tmp_path / "file", dataset=first.parent, max_steps=2)
    assert column(tmp_path / "three", "eval/loss") == column(tmp_path / "file", "eval/loss")


def test_a_warm_up_longer_than_the_run_is_told(world: Path, tmp_path: Path) -> None:
    listener = Listener()
    run("train-dpo", world, tmp_path / "out", listener, warmup_steps=150)
    (warning,) = listener.warned
    assert "--warmup-steps" in warning
    assert "150" in warning
    listener = Listener()
    run("train-dpo", world, tmp_path / "short", listener, warmup_steps=4)
    assert listener.warned == []
    rates = column(tmp_path / "short", "learning_rate")
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3])
    listener = Listener()
    run("train-dpo", world, tmp_path / "share", listener, warmup_steps=0.75)
    assert column(tmp_path / "share", "learning_rate") == rates
    assert f"warm-up: 4 of {len(rates)} steps" in listener.said


def test_reverse_says_once_what_chosen_means(world: Path, tmp_path: Path) -> None:
    listener = Listener()
    run("train-reverse", world, tmp_path / "out", listener)
    meaning = "in all metrics, 'chosen' is the dataset's rejected response"
    assert len([line for line in listener.said if meaning in line]) == 1


# ---------------------------------------------------------------- the same training


def zeros(contrast: Path, folder: Path) -> Path:
    """The scored dataset with all scores 0, and its EOS scores too."""
    for split in ("train", "test"):
        rows = read_jsonl(contrast / "scored" / f"{split}.jsonl")
        for row in rows:
            for side in ("chosen", "rejected"):
                row[f"{side}_weight"] = [0.0] * len(row[f"{side}_weight"])
                row[f"{side}_eos_weight"] = 0.0
        write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


UNIT = {
    "zero scores, exp": (True, {"transform": "exp", "mu": 0, "eos_weight": "one"}),
    "zero scores, exp, EOS scored": (True, {"transform": "exp"}),
    "any scores, exp without a slope": (False, {"transform": "exp", "mu": 0}),
    "preset default, EOS one": (False, {"preset": "default", "eos_weight": "one"}),
    "preset default, EOS scored": (False, {"preset": "default"}),
}


@pytest.mark.parametrize("name", UNIT)
def test_weights_of_one_train_as_plain_dpo_to_the_byte(contrast: Path, dpo: Path, tmp_path: Path, name: str) -> None:
    zero, settings = UNIT[name]
    dataset = zeros(contrast, tmp_path / "zeros") if zero else contrast / "scored"
    run("train", contrast, tmp_path / "out", dataset=dataset, **settings)
    assert model_bytes(tmp_path / "out") == model_bytes(dpo)
    for metric in (*PLAIN, *evaluated(PLAIN), "grad_norm"):
        assert column(tmp_path / "out", metric) == column(dpo, metric)
    for metric in REWARDS:
        assert column(tmp_path / "out", f"weighted_{metric}") == column(dpo, metric)


def test_other_weights_train_otherwise(contrast: Path, dpo: Path, tmp_path: Path) -> None:
    run("train", contrast, tmp_path / "out", transform="rank_based")
    assert model_bytes(tmp_path / "out") != model_bytes(dpo)


def test_reverse_is_dpo_on_swapped_pairs_to_the_byte(world: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = read_jsonl(world / "data" / f"{split}.jsonl")
        swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
        write_jsonl(tmp_path / "swapped" / f"{split}.jsonl", swapped)
    run("train-reverse", world, tmp_path / "reverse")
    run("train-dpo", world, tmp_path / "dpo", dataset=tmp_path / "swapped")
    assert model_bytes(tmp_path / "reverse") == model_bytes(tmp_path / "dpo")
    assert [without_clock(row) for row in metrics(tmp_path / "reverse")] == [
        without_clock(row) for row in metrics(tmp_path / "dpo")
    ]


def test_renamed_columns_are_the_same_training(world: Path, dpo: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        rows = read_jsonl(world / "data" / f"{split}.jsonl")
        write_jsonl(
            tmp_path / "data" / f"{split}.jsonl",
            [
                {"id": i, "q": row["prompt"], "good": row["chosen"], "bad": row["rejected"]}
                for i, row in enumerate(rows)
            ],
        )
    columns = {"prompt_column": "q", "chosen_column": "good", "rejected_column": "bad"}
    run("train-dpo", world, tmp_path / "out", dataset=tmp_path / "data", **columns)
    assert model_bytes(tmp_path / "out") == model_bytes(dpo)


def test_the_seed_decides(world: Path, dpo: Path, tmp_path: Path) -> None:
    run("train-dpo", world, tmp_path / "other", seed=1)
    assert model_bytes(tmp_path / "other") != model_bytes(dpo)


def test_a_reference_with_the_same_content_is_the_same_start(world: Path, dpo: Path, tmp_path: Path) -> None:
    """Named twice or copied, the loss before the first update is checked; another model's is only told."""
    copy = shutil.copytree(world / "sft", tmp_path / "copy")
    for name, reference in (("twice", world / "sft"), ("copied", copy)):
        listener = Listener()
        run("train-dpo", world, tmp_path / name, listener, ref_model=reference)
        assert "step-0 loss 0.6931 = ln 2 as expected" in listener.said
        assert model_bytes(tmp_path / name) == model_bytes(dpo)
    listener = Listener()
    run("train-dpo", world, tmp_path / "other", listener, ref_model=dpo, max_steps=1)
    assert any("policy and reference differ" in line for line in listener.said)


@pytest.mark.parametrize("command", ["train-dpo", "train-reverse"])
def test_weights_that_a_command_does_not_read_are_told_once(contrast: Path, tmp_path: Path, command: str) -> None:
    told = "ignoring the token weights in this dataset"
    for name, count in (("scored", 1), ("data", 0)):
        listener = Listener()
        run(command, contrast, tmp_path / name, listener, dataset=contrast / name, max_steps=1)
        assert len([line for line in listener.said if told in line]) == count
    assert model_bytes(tmp_path / "scored") == model_bytes(tmp_path / "data")


# ---------------------------------------------------------------- batches and memory


def assert_same_curve(out: Path, other: Path, bound: float = 1e-4) -> None:
    for name in ("loss", "rewards/margins", "eval/loss", "logps/chosen"):
        assert column(out, name) == pytest.approx(column(other, name), abs=bound, rel=bound)


@pytest.mark.parametrize(
    "settings",
    [
        {"micro_batch_size": 1},
        {"micro_batch_size": 3},
        {"gradient_accumulation": 2},
        {"batch_size": None, "micro_batch_size": 2, "gradient_accumulation": 4},
        {"micro_batch_size": 4, "gradient_accumulation": 2},
        {"gradient_checkpointing": True},
        {"eval_batch_size": 1},
    ],
    ids=str,
)
def test_what_saves_memory_changes_only_rounding(
    world: Path, dpo: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    run("train-dpo", world, tmp_path / "out", **settings)
    assert_same_curve(tmp_path / "out", dpo)


def test_batch_options_that_do_not_multiply_are_refused(world: Path, tmp_path: Path, tisdpo: Tisdpo) -> None:
    done = tisdpo(
        "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--batch-size", "7",
        "--per-device-train-batch-size", "2", "--gradient-accumulation-steps", "2",
    )  # fmt: skip
    assert (done.code, done.out) == (2, "")
    assert all(word in done.error for word in ("7", "2 ×", "= 4"))
    assert not (tmp_path / "out" / "run.json").exists()


def test_an_incomplete_last_batch_is_used(world: Path, tmp_path: Path) -> None:
    listener = Listener()
    made = run("train-dpo", world, tmp_path / "out", listener, batch_size=5, max_steps=None, epochs=2)
    assert made.record["updates"] == 10
    assert column(tmp_path / "out", "epoch")[-1] == 2


def test_bf16_runs_on_a_cpu_and_starts_at_exactly_zero(world: Path, dpo: Path, tmp_path: Path) -> None:
    run("train-dpo", world, tmp_path / "out", dtype="bf16")
    first = metrics(tmp_path / "out")[0]
    assert [first[name] for name in (*REWARDS, *evaluated(REWARDS))] == [0] * 8
    assert first["loss"] == pytest.approx(LN2, abs=1e-6)
    assert column(tmp_path / "out", "loss") == pytest.approx(column(dpo, "loss"), abs=0.05)
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.float32}


def test_bf16_with_gradient_checkpointing_starts_at_exactly_zero(world: Path, tmp_path: Path) -> None:
    run("train-dpo", world, tmp_path / "out", dtype="bf16", gradient_checkpointing=True, max_steps=1)
    assert metrics(tmp_path / "out")[0]["rewards/margins"] == 0
    assert metrics(tmp_path / "out")[1]["rewards/margins"] == 0


# ---------------------------------------------------------------- not finite


def test_a_loss_that_is_not_finite_stops_at_its_step(world: Path, tmp_path: Path) -> None:
    code, text = fault_of("train-dpo", world, tmp_path / "out", optimizer="sgd", learning_rate=1e30, save_every=1)
    assert code == 1
    assert "step 2" in text
    assert "train.jsonl:" in text
    assert not (tmp_path / "out" / "run.json").exists()
    assert not (tmp_path / "out" / "model.safetensors").exists()
    assert [row["step"] for row in metrics(tmp_path / "out")] == [0, 1]
    # Nothing came of it: the same directory serves for another try.
    run("train-dpo", world, tmp_path / "out", overwrite=True)


def test_a_model_that_the_last_update_broke_is_not_finished(world: Path, tmp_path: Path) -> None:
    """Its loss before the update is fine, and the evaluation after it is not."""
    code, text = fault_of("train-dpo", world, tmp_path / "out", optimizer="sgd", learning_rate=1e30, max_steps=1)
    assert code == 1
    assert "finite" in text
    assert not (tmp_path / "out" / "run.json").exists()


def test_weights_that_the_last_update_broke_are_not_published(world: Path, tmp_path: Path) -> None:
    """Nothing is evaluated, so only the weights themselves tell: the step was too long for float32."""
    settings = {"optimizer": "sgd", "learning_rate": 3e38, "beta": 1e4, "max_grad_norm": 1e9, "max_steps": 1}
    code, text = fault_of("train-dpo", world, tmp_path / "out", **settings, eval_pairs=0)
    assert code == 1
    assert "finite" in text
    assert not (tmp_path / "out" / "model.safetensors").exists()


# ---------------------------------------------------------------- train-sft


def test_sft_on_instruction_rows(world: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say {i}.", "input": "" if i % 2 else "now", "output": f"It is {i}."} for i in range(12)]
    data = write_jsonl(tmp_path / "alpaca.jsonl", rows)
    made = run("train-sft", world, tmp_path / "out", dataset=data, max_steps=20, batch_size=12)
    assert made.record["examples"] == 12
    losses = column(tmp_path / "out", "loss")
    assert losses[-1] < losses[0] - 0.5
    # The same texts as pairs: one way of building a prompt, and one response.
    pairs = [
        {
            "prompt": f"\n\nHuman: Say {i}.{'' if i % 2 else chr(10) + 'now'}\n\nAssistant:",
            "chosen": f" It is {i}.",
            "rejected": " No.",
        }
        for i in range(12)
    ]
    data = write_jsonl(tmp_path / "pairs.jsonl", pairs)
    run("train-sft", world, tmp_path / "pairs", dataset=data, max_steps=20, batch_size=12)
    assert model_bytes(tmp_path / "pairs") == model_bytes(tmp_path / "out")


@pytest.mark.parametrize(("target", "count"), [("chosen", 24), ("rejected", 24), ("both", 48)])
def test_sft_learns_the_responses_asked_for(world: Path, tmp_path: Path, target: str, count: int) -> None:
    made = run("train-sft", world, tmp_path / "out", target=target, max_steps=30)
    assert made.record["examples"] == count
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    start = AutoModelForCausalLM.from_pretrained(world / "sft").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    gain = {"chosen": 0.0, "rejected": 0.0}
    for row in read_jsonl(world / "data" / "test.jsonl"):
        ids = {name: tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in row}
        for side in gain:
            after, before = (oracle.token_logps(m, ids["prompt"], ids[side]).sum().item() for m in (model, start))
            gain[side] += after - before
    if target == "both":
        assert min(gain.values()) > 0
    else:
        other = {"chosen": "rejected", "rejected": "chosen"}[target]
        assert gain[target] > max(0, gain[other])


def test_sft_loss_is_a_mean_over_tokens(world: Path, tmp_path: Path) -> None:
    """Before any update, over the whole of the data: the oracle's log-probs of all responses and their EOS."""
    run("train-sft", world, tmp_path / "out", batch_size=24, max_steps=1)
    model = AutoModelForCausalLM.from_pretrained(world / "sft", dtype=torch.float64).eval()
    tokenizer = AutoTokenizer.from_pretrained(world / "sft")
    logps = []
    for row in read_jsonl(world / "data" / "train.jsonl"):
        prompt, response = (
            tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "chosen")
        )
        logps += oracle.token_logps(model, prompt, [*response, tokenizer.eos_token_id]).tolist()
    first = metrics(tmp_path / "out")[0]
    assert first["loss"] == pytest.approx(-sum(logps) / len(logps), abs=1e-5)
    assert first["token_probability"] == pytest.approx(sum(map(math.exp, logps)) / len(logps), abs=1e-5)


def test_sft_makes_a_model_from_nothing_twice_the_same(world: Path, tmp_path: Path) -> None:
    shape = {"vocab_size": 300, "hidden_size": 16, "layers": 1, "heads": 2, "learning_rate": None, "max_steps": 3}
    for name in ("a", "b"):
        run("train-sft", world, tmp_path / name, model=None, init=True, **shape)
    assert model_bytes(tmp_path / "a") == model_bytes(tmp_path / "b")
    assert (tmp_path / "a" / "tokenizer.json").read_bytes() == (tmp_path / "b" / "tokenizer.json").read_bytes()
    assert column(tmp_path / "a", "learning_rate") == [3e-3] * 3
    assert metrics(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(300), abs=0.3)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "a")
    every_byte = "".join(map(chr, range(1, 0x250))) + "你好\U0001f600"
    assert tokenizer.decode(tokenizer(every_byte)["input_ids"]) == every_byte


def test_sft_output_is_a_starting_model_for_everything(world: Path, tmp_path: Path) -> None:
    run("train-sft", world, tmp_path / "sft", max_steps=1)
    run("train-dpo", world, tmp_path / "dpo", model=tmp_path / "sft", max_steps=1)
    assert metrics(tmp_path / "dpo")[0]["loss"] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("updates", [1, 3])
def test_a_profile_says_where_the_time_goes(world: Path, tmp_path: Path, updates: int) -> None:
    done = run_here(
        "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", str(updates),
        "--batch-size", "8", "--profile", tmp_path / "profile",
    )  # fmt: skip
    assert done.code == 0, done.err
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    assert any(event.get("name") == "_HeadLogps" for event in trace["traceEvents"])
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table
    assert f"profile: {tmp_path / 'profile' / 'table.txt'}" in done.err
    # The mirror would write over it.
    (following,) = [line for line in done.err.splitlines() if line.startswith("next:")]
    assert "--batch-size 8" in following
    assert "--profile" not in following
