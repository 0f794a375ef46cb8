"""The first updates of DPO on an adapter, side by side with TRL's DPOTrainer and peft, from equal initial adapters.

Bound, in float32: losses within 1e-5, and the adapter after four updates within 1e-4 of the way it has gone.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, run_here, write_jsonl
from peft import LoraConfig
from safetensors.torch import load_file
from test_trl import BATCH, BETA, BOUND, ROWS, UPDATES, trl_trainer, with_bos

from tisdpo_cli.engine.training.batching import Plan
from tisdpo_cli.model.adapters import LoraShape, attach_new

pytest.importorskip("trl")

SEED = 3


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=["lora", "rslora"])
def test_the_first_updates_of_an_adapter_equal_those_of_trl(tmp_path: Path, options: dict[str, bool]) -> None:
    case = with_bos()
    case.model.save_pretrained(tmp_path / "model")
    case.tokenizer.backend.save_pretrained(tmp_path / "model")
    data = write_jsonl(tmp_path / "train.jsonl", ROWS)
    done = run_here(
        "train-dpo", "-m", tmp_path / "model", "-d", data, "-o", tmp_path / "ours", "--max-steps", str(UPDATES),
        "--warmup-steps", "0", "--batch-size", str(BATCH), "--beta", str(BETA), "--optimizer", "adamw", "--lr", "1e-3",
        "--max-grad-norm", "1e9", "--dtype", "float32", "--seed", str(SEED), "--lora-r", "4", "--lora-alpha", "8",
        *(["--rslora"] if options else []),
    )  # fmt: skip
    assert done.code == 0, done.err
    records = read_jsonl(tmp_path / "ours" / "metrics.jsonl")[1:]

    plan = Plan(len(ROWS), BATCH, UPDATES, SEED)
    order = [i for step in range(UPDATES) for i in plan.batch(step)]
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    rows = [ROWS[i] for i in order]
    trainer = trl_trainer(case, copy.deepcopy(case.model), rows, tmp_path / "trl", adapter=config)
    start = copy.deepcopy(case.model)
    attach_new(start, LoraShape(4, 8.0, rslora=bool(options)), SEED)
    initial = {name: p.detach().clone() for name, p in start.named_parameters() if "lora_" in name}
    theirs = {
        name.removeprefix("base_model.model."): p for name, p in trainer.model.named_parameters() if "lora_" in name
    }
    assert theirs.keys() == initial.keys()
    for name, parameter in theirs.items():
        parameter.data.copy_(initial[name])
    trainer.train()

    assert len(records) == len(trainer.losses) == UPDATES
    assert trainer.losses[0] == pytest.approx(math.log(2), abs=BOUND)
    assert abs(trainer.losses[-1] - math.log(2)) > 100 * BOUND, "the updates must show"
    for record, value in zip(records, trainer.losses, strict=True):
        assert record["loss"] == pytest.approx(value, abs=BOUND)
    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    gone = difference = 0.0
    for name, parameter in theirs.items():
        trained = ours[f"base_model.model.{name.replace('.default', '')}"]
        difference += float((trained - parameter.detach()).square().sum())
        gone += float((trained - initial[name]).square().sum())
    assert difference**0.5 <= 1e-4 * gone**0.5
    assert torch.isfinite(torch.tensor(gone))
