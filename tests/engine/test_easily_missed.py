"""Small slips that would change results without a word: each was made by hand once, and no test failed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, run_here, write_jsonl
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.evaluation.sampling import pick
from tisdpo_cli.engine.training.batching import Microbatching, Plan
from tisdpo_cli.engine.training.optimizer import OPTIMIZERS, Schedule, make_optimizer
from tisdpo_cli.engine.training.pair_task import PairTask, WeightedPair
from tisdpo_cli.engine.training.trainer import Trainer
from tisdpo_cli.method.objectives import resolve_loss
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.outputs import read_metrics
from tisdpo_cli.runs.runtime import Runtime

SHORT = ("--max-steps", "2", "--batch-size", "8", "--warmup-steps", "0", "--lr", "1e-3")


def tiny_model() -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def tiny_pairs(count: int) -> list[WeightedPair]:
    ids = [[(7 * i + k) % 39 for k in range(4)] for i in range(count)]
    return [
        WeightedPair(
            EncodedPair(i, f"f:{i}", ids[i], Response([*ids[i], 39], True, 4), Response([5, i % 39, 39], True, 2))
        )
        for i in range(count)
    ]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_moves_weights_without_a_gradient(name: str) -> None:
    def after(decay: float) -> torch.Tensor:
        model = nn.Linear(3, 2, bias=False)
        with torch.no_grad():
            model.weight.fill_(2.0)
        optimizer = make_optimizer(model, Schedule(name, 0.1, "constant", 0, decay, 1.0))
        model.weight.grad = torch.zeros_like(model.weight)
        optimizer.step()
        return model.weight.detach()

    assert torch.equal(after(0.0), torch.full((2, 3), 2.0))
    assert (after(0.5) < 2.0).all()
    if name in ("sgd", "adamw"):
        assert after(0.5) == pytest.approx(2.0 * (1 - 0.1 * 0.5))


def test_weight_decay_reaches_the_optimizer_of_a_training(contrast: Path, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("decay", ("--weight-decay", "0.5"))):
        done = run_here(
            "train-dpo", "-m", contrast / "sft", "-d", contrast / "data", "-o", tmp_path / name, *SHORT,
            "--optimizer", "adamw", *more,
        )  # fmt: skip
        assert done.code == 0, done.err
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "decay")]
    assert models[0] != models[1]


def test_other_prompts_have_a_reference_of_their_own(contrast: Path, tmp_path: Path) -> None:
    """The same responses behind other prompts, as long as the first: the cache must not mix them up."""
    cache = ("--cache-dir", tmp_path / "cache")
    rows = read_jsonl(contrast / "data" / "train.jsonl")
    others = [row | {"prompt": row["prompt"].replace("Human", "Robot")} for row in rows]
    assert all(other["prompt"] != row["prompt"] for other, row in zip(others, rows, strict=True))
    data = {name: write_jsonl(tmp_path / f"{name}.jsonl", of) for name, of in (("first", rows), ("second", others))}
    metrics = {}
    for name, source, more in (
        ("warm", "first", cache),
        ("cached", "second", cache),
        ("new", "second", ("--no-ref-cache",)),
    ):
        done = run_here("train-dpo", "-m", contrast / "sft", "-d", data[source], "-o", tmp_path / name, *SHORT, *more)
        assert done.code == 0, done.err
        metrics[name] = [line["rewards/chosen"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert metrics["cached"] == metrics["new"] != metrics["warm"]


def test_equal_responses_in_two_rows_get_other_random_weights(contrast: Path, tmp_path: Path) -> None:
    row = read_jsonl(contrast / "scored" / "train.jsonl")[0]
    write_jsonl(tmp_path / "scored" / "train.jsonl", [row, row])
    for file in (contrast / "scored").glob("*token*"):
        (tmp_path / "scored" / file.name).write_bytes(file.read_bytes())
    table = tmp_path / "tokens.csv"
    options = ("--transform", "random", "--table", table, "--sort", "index")
    done = run_here("inspect-weights", tmp_path / "scored", *options)
    assert done.code == 0, done.err
    lines = [line.split(",") for line in table.read_text(encoding="utf-8").splitlines()]
    weight = lines[0].index("weight")
    columns = {pair: [line[weight] for line in lines[1:] if line[:2] == [pair, "chosen"]] for pair in ("0", "1")}
    assert len(columns["0"]) == len(columns["1"]) > 3
    assert not set(columns["0"]) & set(columns["1"])


def test_a_row_without_its_eos_score_is_refused_where_others_have_one(contrast: Path, tmp_path: Path) -> None:
    rows = read_jsonl(contrast / "scored" / "train.jsonl")
    rows[2]["rejected_eos_weight"] = None
    path = write_jsonl(tmp_path / "scored.jsonl", rows)
    options = ("train", "-m", contrast / "sft", "-d", path, "-o", tmp_path / "out", *SHORT)
    done = run_here(*options)
    assert done.code == 1
    assert f"{path}:3" in done.error
    assert "rejected" in done.error
    assert run_here(*options, "--eos-weight", "zero").code == 0


def test_the_temperature_shapes_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]]).repeat(2000, 1)
    draws = torch.linspace(0, 1, 2001, dtype=torch.float64)[:-1]
    for temperature in (0.25, 1.0, 4.0):
        shares = torch.bincount(pick(logits, draws, temperature), minlength=3).double() / 2000
        assert shares.tolist() == pytest.approx((logits[0].double() / temperature).softmax(0).tolist(), abs=1e-3)


def test_passes_without_examples_count_nothing_in_an_evaluation() -> None:
    """With more processes than examples some have an empty pass, for the sake of the others."""
    model, pairs = tiny_model(), tiny_pairs(2)
    task = PairTask(pairs, TokenScorer(copy.deepcopy(model).requires_grad_(False)), resolve_loss("dpo", 0.1), 39)
    runtime = Runtime(Silent())
    schedule = Schedule("sgd", 0.1, "constant", 0, 0.0, 1.0)
    trainer = Trainer(runtime, TokenScorer(model), task, Plan(2, 2, 1, 0), Microbatching(micro=2), schedule)
    split = Microbatching(micro=1)
    alone = trainer._sums(task, range(2), split)
    runtime.total = lambda values: values  # type: ignore[method-assign]
    runtime.world, parts = 3, []
    for rank in range(3):
        runtime.rank = rank
        parts.append(trainer._sums(task, range(2), split))
    assert torch.allclose(sum(parts), alone)
    assert any(not part.any() for part in parts)


def test_dropout_is_off_where_a_model_is_trained_in_training_mode(contrast: Path, tmp_path: Path) -> None:
    """Gradient checkpointing needs training mode: with dropout in the configuration the loss must not change."""
    source = tmp_path / "with-dropout"
    source.mkdir()
    for file in (contrast / "sft").iterdir():
        if file.is_file() and file.name not in ("run.json", "config.yaml", "metrics.jsonl"):
            (source / file.name).write_bytes(file.read_bytes())
    text = (source / "config.json").read_text(encoding="utf-8")
    assert '"attention_dropout": 0.0' in text
    (source / "config.json").write_text(text.replace('"attention_dropout": 0.0', '"attention_dropout": 0.5'))
    losses = []
    for name, model in (("plain", contrast / "sft"), ("dropout", source)):
        done = run_here(
            "train-dpo", "-m", model, "-d", contrast / "data", "-o", tmp_path / name, *SHORT, "--no-ref-cache",
            "--gradient-checkpointing",
        )  # fmt: skip
        assert done.code == 0, done.err
        losses.append([line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")])
    assert losses[0] == losses[1]
    assert '"attention_dropout": 0.5' in (tmp_path / "dropout" / "config.json").read_text(encoding="utf-8")
