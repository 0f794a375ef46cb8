"""The library in TRL's trainer, `examples/trl_trainer.py`: its losses are those of TRL with unit weights, and those of
`tisdpo train` with others. In float32, on the CPU, offline; TRL 1.16 is what this was written against.
"""

import sys
from pathlib import Path

import pytest
import torch
from conftest import read_jsonl, run_here, write_jsonl

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
transformers = pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))
trl_trainer = pytest.importorskip("trl_trainer")

UPDATES, BATCH, BOUND = 3, 4, 1e-5


def load(path):
    """A model in float32."""
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def losses(kind, world, directory, batch=BATCH, updates=UPDATES, **more):
    """The loss of every update of a trainer whose policy is not its reference, so that the first is not ln 2."""

    class Recording(kind):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            recorded.append(loss.item())
            return loss

        def _send_telemetry(self):
            pass

    recorded: list[float] = []
    config = trl.DPOConfig(
        output_dir=str(directory), beta=0.02, max_length=None, per_device_train_batch_size=batch, max_steps=updates,
        train_sampling_strategy="sequential", learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True,
        bf16=False, fp16=False, gradient_checkpointing=False, save_strategy="no", report_to="none", disable_tqdm=True,
        logging_steps=1, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = Recording(
        model=load(world / "dpo"),
        ref_model=load(world / "sft"),
        args=config,
        train_dataset=datasets.Dataset.from_list(read_jsonl(world / "scored" / "train.jsonl")),
        processing_class=transformers.AutoTokenizer.from_pretrained(world / "sft"),
        **more,
    )
    trainer.train()
    assert len(recorded) == updates
    return recorded, trainer


def test_with_unit_weights_the_losses_are_those_of_trl(contrast, tmp_path):
    theirs, _ = losses(trl.DPOTrainer, contrast, tmp_path / "trl")
    ours, trainer = losses(trl_trainer.TISDPOTrainer, contrast, tmp_path / "ours", recipe={"preset": "default"})
    assert abs(theirs[0] - 0.6931) > 100 * BOUND, "policy and reference must differ"
    assert ours == pytest.approx(theirs, abs=BOUND)
    assert {"rewards/margins", "rewards/accuracies"} <= set(trainer.state.log_history[0])


def test_the_loss_of_a_batch_is_that_of_the_program(contrast, tmp_path):
    recipe = {"transform": "rank_based", "min_scale": 0.2, "max_scale": 2.0}
    ours, _ = losses(trl_trainer.TISDPOTrainer, contrast, tmp_path / "ours", batch=24, updates=1, recipe=recipe)
    unit, _ = losses(trl.DPOTrainer, contrast, tmp_path / "trl", batch=24, updates=1)
    done = run_here(
        "train", "-m", contrast / "dpo", "--ref-model", contrast / "sft", "-d", contrast / "scored",
        "-o", tmp_path / "program", "--transform", "rank_based", "--min-scale", "0.2", "--max-scale", "2.0",
        "--beta", "0.02", "--batch-size", "24", "--max-steps", "1", "--warmup-steps", "0",
    )  # fmt: skip
    assert done.code == 0, done.err
    record = read_jsonl(tmp_path / "program" / "metrics.jsonl")[1]
    assert ours[0] == pytest.approx(record["loss"], abs=BOUND)
    assert abs(ours[0] - unit[0]) > 100 * BOUND, "the weights must matter"


def test_truncation_cuts_weights_with_their_tokens(contrast):
    tokenizer = transformers.AutoTokenizer.from_pretrained(contrast / "sft")
    example = {
        "prompt_ids": [1, 2], "chosen_ids": [3, 4, 5], "rejected_ids": [6],
        "chosen_token_weights": [0.5, 1.5, 2.5], "rejected_token_weights": [3.5],
    }  # fmt: skip
    start = trl_trainer.WeightCollator(tokenizer.pad_token_id, max_length=4)
    end = trl_trainer.WeightCollator(tokenizer.pad_token_id, max_length=4, truncation_mode="keep_end")
    assert start([example])["token_weights"].tolist() == [[0.0, 0.0, 0.5, 1.5], [0.0, 0.0, 3.5, 0.0]]
    assert end([example])["token_weights"].tolist() == [[0.0, 0.5, 1.5, 2.5], [0.0, 0.0, 3.5, 0.0]]


def test_rows_whose_scores_do_not_fit_are_refused(contrast, tmp_path):
    row = read_jsonl(contrast / "scored" / "train.jsonl")[0]
    with pytest.raises(ValueError, match="row 3: chosen was cut"):
        trl_trainer.row_weights({**row, "chosen_weight": [*row["chosen_weight"][:-1], None]}, "chosen", 3)
    row["rejected_weight"].pop()
    (tmp_path / "short" / "scored").mkdir(parents=True)
    for name in ("dpo", "sft"):
        (tmp_path / "short" / name).symlink_to(contrast / name)
    write_jsonl(tmp_path / "short" / "scored" / "train.jsonl", [row])
    with pytest.raises(ValueError, match=r"row 0: rejected has \d+ tokens in TRL, but \d+ scores"):
        losses(trl_trainer.TISDPOTrainer, tmp_path / "short", tmp_path / "out")


def test_the_example_trains_and_saves_a_model(contrast, tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv",
        ["trl_trainer.py", "--model", str(contrast / "sft"), "--dataset", str(contrast / "scored"),
         "--output-dir", str(tmp_path / "out"), "--max-steps", "2", "--batch-size", "4", "--learning-rate", "1e-3"],
    )  # fmt: skip
    trl_trainer.main()
    assert (tmp_path / "out" / "model.safetensors").is_file()
