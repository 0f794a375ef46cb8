"""What every training command does around its loop: the model made ready, the output claimed, finished, told."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from tisdpo_cli.engine.training.batching import Microbatching, Plan, make_plan, microbatching
from tisdpo_cli.engine.training.profiling import TABLE, TRACE
from tisdpo_cli.engine.training.trainer import CheckpointConfig, EvalConfig, Schedule, Task, Trainer
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.files import reporting_write_errors
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.loading import save_model, shape_of
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.runs.outputs import METRICS_FILE, Output, apply_umask
from tisdpo_cli.runs.runtime import Runtime, StopRequest, autocast_dtype
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.groups import DEFAULT_BATCH_SIZE, Optim
from tisdpo_cli.settings.sources import to_yaml
from tisdpo_cli.settings.train_pairs import TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft

Trainable = TypeVar("Trainable", TrainPairs, TrainSft)


def resolved(runtime: Runtime, settings: Any) -> dict[str, Any]:
    """Settings whose value depends on the machine or on other settings, by dotted name, as they are in force."""
    if isinstance(settings, Estimate):
        return {"dtype": runtime.precision(settings.dtype, scoring=True)}
    rate = settings.learning_rate() if isinstance(settings, TrainSft) else settings.optim.learning_rate
    return {
        "optim.batch_size": _batching(runtime, settings)[0],
        "optim.learning_rate": rate,
        "memory.dtype": runtime.precision(settings.memory.dtype),
    }


def _batching(runtime: Runtime, settings: TrainPairs | TrainSft) -> tuple[int, Microbatching]:
    memory = settings.memory
    return microbatching(
        settings.optim.batch_size,
        memory.micro_batch_size,
        memory.gradient_accumulation,
        memory.tokens_per_microbatch or 0,
        runtime.world,
        DEFAULT_BATCH_SIZE,
    )


def with_token_budget(runtime: Runtime, settings: Trainable, path: Path | None) -> Trainable:
    """The settings with the tokens of a forward pass decided, where nothing else says how a batch is cut.

    Args:
        runtime: this process.
        settings: of a training.
        path: its model; None for a new one.
    """
    memory = settings.memory
    if memory.tokens_per_microbatch or memory.micro_batch_size or memory.gradient_accumulation:
        return settings
    if path is not None:
        layers, width = shape_of(path, settings.trust_remote_code)
    else:
        assert isinstance(settings, TrainSft)
        layers, width = settings.layers, settings.hidden_size
    return settings.with_values({"memory.tokens_per_microbatch": runtime.token_budget(layers, width)})  # type: ignore[return-value]


def scorer_of(
    runtime: Runtime,
    settings: TrainPairs | TrainSft,
    model: nn.Module,
    longest: int,
    name: str,
    layout: str | None = None,
) -> TokenScorer:
    """A model, on its device, as the settings of a training read it, or in another layout; see `make_scorer`."""
    precision = autocast_dtype(runtime.precision(settings.memory.dtype))
    return make_scorer(model, layout or settings.memory.layout, precision, longest, runtime.reporter.note, name)


@dataclass(frozen=True)
class TrainingSetup:
    """A training that is ready to start."""

    task: Task
    held: Task | None
    plan: Plan
    cutting: Microbatching


def plan_training(
    runtime: Runtime, settings: TrainPairs | TrainSft, costs: Sequence[int], unit: str
) -> tuple[Plan, Microbatching]:
    """Number the updates of a training and say what they are; needs no model.

    Raises:
        UsageFault: the batch size contradicts what it should be the product of.
    """
    optim = settings.optim
    size, cutting = _batching(runtime, settings)
    plan = make_plan(len(costs), size, optim.epochs, optim.max_steps, settings.seed)
    passes = len(cutting.split(plan.batch(0), costs, runtime.world)[0])
    note, warn = runtime.reporter.note, runtime.reporter.warn
    where = f" on each of {runtime.world} processes" if runtime.world > 1 else ""
    each = f"{passes} forward pass{'es' if passes != 1 else ''} each{where}"
    note(
        f"{plan.updates} updates of {min(size, plan.examples)} {unit} ({each}), "
        f"{plan.updates / plan.batches_per_epoch:.2f} epochs of {plan.examples} {unit}"
    )
    if optim.warmup_steps >= plan.updates:
        warn(
            f"the warm-up of {optim.warmup_steps} updates is not shorter than the run ({plan.updates}): the learning "
            f"rate ends at {plan.updates / (optim.warmup_steps + 1):.0%}; see --warmup-steps"
        )
    return plan, cutting


def schedule_of(optim: Optim, rate: float) -> Schedule:
    """The optimiser's part of the settings."""
    return Schedule(
        optim.optimizer, rate, optim.lr_scheduler, optim.warmup_steps, optim.weight_decay, optim.max_grad_norm
    )


def run_training(
    runtime: Runtime,
    settings: TrainPairs | TrainSft,
    output: Output,
    ready: TrainingSetup,
    scorer: TokenScorer,
    tokenizer: Tokenizer,
    rate: float,
    check: Callable[[float], None],
) -> StageResult:
    """Train, save, and mark the output as finished."""
    if settings.evaluation.eval_every is not None and ready.held is None:
        runtime.reporter.warn("there is no test split to evaluate: --eval-every does nothing")
    began = time.time()
    if runtime.main:
        output.start(to_yaml(settings.with_values(resolved(runtime, settings))))
    runtime.wait()
    if settings.memory.gradient_checkpointing:
        scorer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        scorer.model.train()
    trainer = Trainer(runtime, scorer, ready.task, ready.plan, ready.cutting, schedule_of(settings.optim, rate))
    kept = settings.checkpoints
    made_by = {"command": output.command, "made_from": output.made_from}
    keeping = CheckpointConfig(output.checkpoints, kept.save_every, kept.keep_checkpoints, kept.resume, made_by)
    evaluation = settings.evaluation
    held = EvalConfig(ready.held, evaluation.eval_every, evaluation.eval_batch_size) if ready.held is not None else None
    metrics = output.path / METRICS_FILE
    profile = Path(settings.profile).expanduser() if settings.profile is not None else None
    with StopRequest() as stop:
        last = trainer.train(metrics, keeping, held, check, stop, profile)
        if profile is not None:
            runtime.reporter.note(f"profile: {profile / TABLE}, and {profile / TRACE} for a browser's trace viewer")
        record = {
            "seed": settings.seed,
            "seconds": round(time.time() - began, 1),
            "updates": ready.plan.updates,
            "batch_size": ready.plan.batch_size,
            ready.task.unit: ready.plan.examples,
            "final_metrics": last,
        }
        runtime.on_main(lambda: _publish(output, trainer.model, tokenizer, record))
    made = StageResult(output.path, output.record(), fresh=True)
    runtime.wait()
    if stop.signal:
        raise Interrupted(stop.signal, f"stopped; {output.path} is finished", fix="the same command goes on")
    return made


def _publish(output: Output, model: nn.Module, tokenizer: Tokenizer, record: Mapping[str, Any]) -> None:
    with reporting_write_errors(output.path):
        staged = output.staging()
        save_model(model, tokenizer, staged)
        apply_umask(list(staged.iterdir()))
        files = output.publish(staged)
        output.finish(record, files)


def parameter_count(model: nn.Module) -> str:
    """`494.0 M parameters`."""
    size = sum(p.numel() for p in model.parameters())
    return f"{size / 1e6:.1f} M parameters" if size >= 1e5 else f"{size} parameters"
