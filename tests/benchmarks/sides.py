"""The two sides of the benchmarks: stages of this program run in this process, and what they are compared with."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common import MAX_LENGTH, MAX_PROMPT_LENGTH, Clock, made_for, on_gpu

BATCH, RATE, BETA = 8, 1e-5, 0.1
# What the dense scoring takes at once, in pairs: the default of `estimate`.
SCORED = 16


def out() -> Path:
    """A directory of this run's own, empty at first."""
    return Path(os.environ["TISDPO_BENCHMARK_OUT"])


# Here ----------------------------------------------------------------------------------------------------------


def import_here(where: Path) -> Clock:
    """Everything that the stages import on their way: imports and the loading of models are outside the time of all
    sides.

    A model and a tokenizer are loaded once, for loading imports the most. On a GPU models are there once loaded.

    Returns:
        The clock of the models and tokenizers that the stages load from now on.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tisdpo_cli.engine.scoring import estimate
    from tisdpo_cli.engine.training import policy, preference, reference_model
    from tisdpo_cli.model import adapters, shared_models

    # Peft's imports.
    adapters._peft()

    AutoModelForCausalLM.from_pretrained(where / "model").to(device())
    AutoTokenizer.from_pretrained(where / "model")
    clock = Clock()
    for module in (shared_models, policy, reference_model):
        module.load_model = _timed(_there(module.load_model), clock)  # type: ignore[attr-defined]
    for module in (estimate, preference):
        module.load_tokenizer = _timed(module.load_tokenizer, clock)  # type: ignore[attr-defined]
    return clock


def device() -> str:
    """Where all sides compute."""
    return "cuda" if on_gpu() else "cpu"


def _there(load: Any) -> Any:
    def loaded(*args: Any, **named: Any) -> Any:
        return load(*args, **named).to(device())

    return loaded


def _timed(function: Any, clock: Clock) -> Any:
    def timed(*args: Any, **named: Any) -> Any:
        with clock.running():
            return function(*args, **named)

    return timed


def train_here(where: Path, command: str, dataset: Path, dtype: str, **flags: Any) -> list[float]:
    """A training by its command's engine, with a cache that this run alone knows; the loss of every update."""
    from tisdpo_cli.engine.training.preference import train_pairs
    from tisdpo_cli.runs.outputs import read_metrics

    made = out() / command
    train_pairs(
        made_for(
            command, model=str(where / "model"), dataset=str(dataset), output_dir=str(made),
            cache_dir=str(out() / "cache"), batch_size=BATCH, learning_rate=RATE, optimizer="adamw", warmup_steps=0,
            beta=BETA, epochs=1.0, dtype=dtype, max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH, **flags,
        ),
        silent(),
    )  # fmt: skip
    return [line["loss"] for line in read_metrics(made / "metrics.jsonl")[1:]]


def seconds_of_updates(command: str) -> float:
    """What the updates of a training by `train_here` took: gradients and optimizer, no more."""
    from tisdpo_cli.runs.outputs import read_metrics

    lines = read_metrics(out() / command / "metrics.jsonl")[1:]
    return sum(BATCH / line["pairs_per_second"] for line in lines)


def score_here(where: Path, forward: Path, reverse: Path, dtype: str) -> Path:
    """`estimate`; the scored dataset."""
    from tisdpo_cli.engine.scoring.estimate import estimate

    settings = made_for(
        "estimate", forward=str(forward), reverse=str(reverse), dataset=str(where / "data"),
        output_dir=str(out() / "scored"), dtype=dtype, max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH,
    )  # fmt: skip
    return estimate(settings, silent()).path


def silent() -> Any:
    """A reporter that says nothing."""
    from tisdpo_cli.reporter import Silent

    return Silent()


# What it is compared with --------------------------------------------------------------------------------------


PRECOMPUTED, LIGER = "trl, reference precomputed", "trl with liger"


def trl_sides() -> list[str]:
    """The ways of TRL that can be measured here; Liger's kernels need a GPU."""
    return ["trl", PRECOMPUTED, *([LIGER] if on_gpu() and find_spec("liger_kernel") else [])]


def clock_of_trl() -> Clock:
    """The clock of the passes in which TRL computes reference log-probs, which it makes while a trainer is made."""
    from trl import DPOTrainer

    clock = Clock()
    DPOTrainer._precompute_ref_logps = _timed(DPOTrainer._precompute_ref_logps, clock)  # type: ignore[method-assign]
    return clock


def trl_trainer(where: Path, dtype: str, side: str, swapped: bool = False, lora_r: int | None = None) -> Any:
    """TRL's DPOTrainer on the rows in our order, its models loaded and its rows tokenised.

    Args:
        where: model and data.
        dtype: what it computes in.
        side: one of `trl_sides`.
        swapped: whether chosen and rejected change places.
        lora_r: rank of an adapter on all linear layers, or None to train the whole model.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from tisdpo_cli.engine.training.batching import make_plan

    rows = [json.loads(line) for line in (where / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    if swapped:
        rows = [{"prompt": r["prompt"], "chosen": r["rejected"], "rejected": r["chosen"]} for r in rows]
    plan = make_plan(len(rows), BATCH, 1.0, None, 0)
    order = [i for step in range(plan.updates) for i in plan.batch(step)]
    precompute = side == PRECOMPUTED
    config = DPOConfig(
        output_dir=str(out() / f"trl{swapped}"), beta=BETA, max_length=MAX_LENGTH,
        per_device_train_batch_size=BATCH, num_train_epochs=1, train_sampling_strategy="sequential",
        optim="adamw_torch", learning_rate=RATE, weight_decay=0.0, lr_scheduler_type="constant", warmup_steps=0,
        max_grad_norm=10.0, use_cpu=not on_gpu(), bf16=dtype == "bf16", fp16=False, gradient_checkpointing=False,
        logging_steps=1, save_strategy="no", report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
        precompute_ref_log_probs=precompute, precompute_ref_batch_size=BATCH if precompute else None,
        use_liger_kernel=side == LIGER,
    )  # fmt: skip

    # As ours: weights that no update changes are in the precision of the computation.
    weights = torch.bfloat16 if lora_r is not None and dtype == "bf16" else torch.float32

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(where / "model", dtype=weights)

    adapter = None
    if lora_r is not None:
        from peft import LoraConfig

        adapter = LoraConfig(r=lora_r, lora_alpha=2 * lora_r, target_modules="all-linear", task_type="CAUSAL_LM")
    return DPOTrainer(
        model=model(),
        # With an adapter the reference is the model without it.
        ref_model=None if precompute or adapter is not None else model(),
        peft_config=adapter,
        args=config,
        train_dataset=Dataset.from_list([rows[i] for i in order]),
        processing_class=AutoTokenizer.from_pretrained(where / "model"),
    )


def losses_of(trainer: Any) -> list[float]:
    """The logged loss of every update."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def score_dense(where: Path, models: list[Any], tokenizer: Any, dtype: str) -> list[tuple[list[float], list[float]]]:
    """r of every response token: padded rows, all logits, one log-softmax; what one writes first."""
    import torch

    rows = [json.loads(line) for line in (where / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    found: list[tuple[list[float], list[float]]] = []
    for begin in range(0, len(rows), SCORED):
        some = rows[begin : begin + SCORED]
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in some for _ in (0, 1)]
        responses = [
            tokenizer(row[side])["input_ids"] + [tokenizer.eos_token_id]
            for row in some
            for side in ("chosen", "rejected")
        ]
        longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
        ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)
        mask = torch.zeros_like(ids)
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            length = len(prompt) + len(response)
            ids[i, :length], mask[i, :length] = torch.tensor(prompt + response), 1
        ids, mask = ids.to(device()), mask.to(device())
        logps = []
        for model in models:
            with torch.no_grad(), torch.autocast(device(), torch.bfloat16, enabled=dtype == "bf16"):
                logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
                logps.append(logits.log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0])
        r = logps[0] - logps[1]
        cut = [
            r[i, len(prompt) - 1 : len(prompt) + len(response) - 1].tolist()
            for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]
        found += zip(cut[::2], cut[1::2], strict=True)
    return found
