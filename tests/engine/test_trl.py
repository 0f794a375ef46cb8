"""The first updates of DPO, with smoothed labels too, and of IPO, side by side with TRL's DPOTrainer: same model, token
ids, batches and optimiser.

Bound, in float32: losses and rewards within 1e-5, log-probs of responses within 1e-6 of their size, and the weights
after four updates within 1e-4 of the way they have gone (AdamW turns rounding in tiny gradients into steps).
TRL 1.16 is what this was written against; it runs on the CPU, offline, and reports to nobody.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from bos_tokenizer import bos_tokenizer
from conftest import pair_rows
from transformers import LlamaConfig, LlamaForCausalLM

from tisdpo_cli.data.tokens import Limits, encode_pairs
from tisdpo_cli.engine.chat import vocabulary_of
from tisdpo_cli.engine.training.batching import Microbatching, Plan
from tisdpo_cli.engine.training.optimizer import Schedule
from tisdpo_cli.engine.training.pair_task import PairTask, WeightedPair
from tisdpo_cli.engine.training.state import CheckpointConfig
from tisdpo_cli.engine.training.trainer import Trainer
from tisdpo_cli.method.objectives import resolve_loss
from tisdpo_cli.model.loading import make_model
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.tokenizer import Tokenizer, make_tokenizer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.outputs import read_metrics
from tisdpo_cli.runs.runtime import Runtime, StopRequest

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

BOUND, BETA, UPDATES, BATCH = 1e-5, 0.1, 4, 4
ROWS = pair_rows(UPDATES * BATCH)
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def flat(model):
    """All weights as one vector."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@dataclass
class Case:
    """A model with its tokenizer, and how it is trained."""

    tokenizer: Tokenizer
    model: Any
    optimizer: str
    trl_optimizer: str
    rate: float


def without_bos():
    """Our own tokenizer and model, by SGD."""
    tokenizer = make_tokenizer((text for row in ROWS for text in row.values()), 320)
    model = make_model(tokenizer, hidden_size=32, layers=2, heads=2, positions=512, seed=0)
    return Case(tokenizer, model, "sgd", "sgd", 0.5)


def with_bos():
    """A Llama whose tokenizer adds a BOS, by AdamW."""
    tokenizer = bos_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer.backend), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=tokenizer.bos, eos_token_id=tokenizer.eos,
    )  # fmt: skip
    return Case(tokenizer, LlamaForCausalLM(config).eval(), "adamw", "adamw_torch", 1e-3)


def pairs_of(case):
    """The rows, tokenised by this case's tokenizer."""
    columns = ([row[name] for row in ROWS] for name in ("prompt", "chosen", "rejected"))
    wheres = [f"data.jsonl:{i + 1}" for i in range(len(ROWS))]
    return encode_pairs(*columns, wheres, vocabulary_of(case.tokenizer), Limits(512, 256))[0]


def train_here(case, policy, pairs, plan, directory, how):
    """Our metrics of each update."""
    reference = TokenScorer(copy.deepcopy(case.model).requires_grad_(False))
    task = PairTask([WeightedPair(pair) for pair in pairs], reference, how, case.tokenizer.pad)
    schedule = Schedule(case.optimizer, case.rate, "constant", 0, 0.0, 1e9)
    trainer = Trainer(Runtime(Silent()), TokenScorer(policy), task, plan, Microbatching(micro=2), schedule)
    metrics = directory / "metrics.jsonl"
    trainer.train(
        metrics, CheckpointConfig(directory / "checkpoints", None, 1, "never"), None, lambda _loss: None, StopRequest()
    )
    return read_metrics(metrics)[1:]


def trl_trainer(case, policy, rows, directory, batch=BATCH, adapter=None, **method):
    """TRL's trainer on rows in this order, of a new adapter if given, which keeps every loss unrounded."""

    class Recording(trl.DPOTrainer):
        losses: list[float]

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            self.losses.append(loss.item())
            return loss

        def _send_telemetry(self):
            pass  # off with HF_HUB_OFFLINE too, which conftest sets

    config = trl.DPOConfig(
        output_dir=str(directory), beta=BETA, max_length=None, pad_to_multiple_of=None,
        per_device_train_batch_size=batch, gradient_accumulation_steps=1, max_steps=UPDATES,
        train_sampling_strategy="sequential", optim=case.trl_optimizer, learning_rate=case.rate, weight_decay=0.0,
        lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9, use_cpu=True, bf16=False, fp16=False,
        gradient_checkpointing=False, disable_dropout=True, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, **method,
    )  # fmt: skip
    trainer = Recording(
        model=policy,
        ref_model=copy.deepcopy(case.model) if adapter is None else None,
        peft_config=adapter,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=case.tokenizer.backend,
    )
    trainer.losses = []
    return trainer


@pytest.mark.parametrize("make", [without_bos, with_bos])
def test_the_first_updates_of_dpo_equal_those_of_trl(make, tmp_path):
    case, plan = make(), Plan(len(ROWS), BATCH, UPDATES, seed=3)
    pairs = pairs_of(case)
    order = [i for step in range(UPDATES) for i in plan.batch(step)]
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)

    records = train_here(case, ours, pairs, plan, tmp_path, resolve_loss("dpo", BETA))
    trainer = trl_trainer(case, theirs, [ROWS[i] for i in order], tmp_path / "trl")
    for row, i in zip(trainer.train_dataset, order, strict=True):
        assert row["prompt_ids"] == pairs[i].prompt
        assert row["chosen_ids"] == pairs[i].chosen.ids
        assert row["rejected_ids"] == pairs[i].rejected.ids
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]

    assert len(records) == len(logged) == len(trainer.losses) == UPDATES
    assert trainer.losses[0] == pytest.approx(math.log(2), abs=BOUND)
    assert abs(trainer.losses[-1] - math.log(2)) > 100 * BOUND, "the updates must show"
    for record, entry, value in zip(records, logged, trainer.losses, strict=True):
        assert record["loss"] == pytest.approx(value, abs=BOUND)
        assert record["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-4)
        assert record["learning_rate"] == entry["learning_rate"]
        for name in REWARDS:
            assert record[name] == pytest.approx(entry[name], abs=BOUND), name
        for name in ("logps/chosen", "logps/rejected"):
            assert record[name] == pytest.approx(entry[name], rel=1e-6), name
    assert (flat(ours) - flat(theirs)).norm() <= 1e-4 * (flat(ours) - flat(case.model)).norm()


# Of TRL's losses only `aot` smooths labels as DPO does, but it sorts the log-ratios of a batch: a pair at a time, it is
# DPO. And `ipo` takes means over tokens.
@pytest.mark.parametrize(
    ("how", "batch", "rate", "start", "method"),
    [
        (resolve_loss("ipo", BETA, {"length_normalize": True}), BATCH, 1e-3, 25.0, {"loss_type": ["ipo"]}),
        (
            resolve_loss("dpo", BETA, {"label_smoothing": 0.2}), 1, 0.5, math.log(2),
            {"loss_type": ["aot"], "label_smoothing": 0.2},
        ),
    ],
    ids=["ipo, length_normalize", "dpo, label_smoothing"],
)  # fmt: skip
def test_the_first_updates_of_other_objectives_equal_those_of_trl(how, batch, rate, start, method, tmp_path):
    case, plan = replace(without_bos(), rate=rate), Plan(len(ROWS), batch, UPDATES, seed=3)
    pairs = pairs_of(case)
    order = [i for step in range(UPDATES) for i in plan.batch(step)]
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)
    records = train_here(case, ours, pairs, plan, tmp_path, how)
    trainer = trl_trainer(case, theirs, [ROWS[i] for i in order], tmp_path / "trl", batch, **method)
    trainer.train()
    assert len(records) == len(trainer.losses) == UPDATES
    assert trainer.losses[0] == pytest.approx(start, abs=BOUND)
    assert abs(trainer.losses[-1] - start) > 100 * BOUND, "the updates must show"
    for record, value in zip(records, trainer.losses, strict=True):
        assert record["loss"] == pytest.approx(value, rel=BOUND)
    assert (flat(ours) - flat(theirs)).norm() <= 1e-4 * (flat(ours) - flat(case.model)).norm()
