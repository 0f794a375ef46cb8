"""What surrounds a training loop: planning, starting from a claimed output, running, publishing.

It is given plain values (`SessionConfig`) and knows no settings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from tisdpo_cli.engine.model_card import CARD_FILE, CardFacts, model_card
from tisdpo_cli.engine.training.batching import Microbatching, Plan, make_plan
from tisdpo_cli.engine.training.best import BestConfig, EvalConfig, check_best
from tisdpo_cli.engine.training.health import HealthConfig
from tisdpo_cli.engine.training.optimizer import Schedule
from tisdpo_cli.engine.training.profiling import TABLE, TRACE
from tisdpo_cli.engine.training.run_log import Watching
from tisdpo_cli.engine.training.samples import SampleConfig, SampleOptions, sample_config
from tisdpo_cli.engine.training.state import CheckpointConfig, whole_tensors
from tisdpo_cli.engine.training.task import Task
from tisdpo_cli.engine.training.trainer import Trainer
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.files import remove, reporting_write_errors, write_text
from tisdpo_cli.model.adapters import BaseModel, LoraShape, adapters_of
from tisdpo_cli.model.end_tokens import end_ids
from tisdpo_cli.model.fused_kernels import fuse_elementwise
from tisdpo_cli.model.layout import make_scorer, recompute_activations, scorer_with
from tisdpo_cli.model.loading import save_model
from tisdpo_cli.model.logprobs import ScorerTraits, TokenScorer
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.outputs import METRICS_FILE, SAMPLES_FILE, Output, apply_umask
from tisdpo_cli.runs.runtime import Runtime, StopRequest, autocast_dtype, deterministic_training
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.runs.trackers import TrackerConfig


@dataclass(frozen=True)
class SessionConfig:
    """How a training runs, with every value resolved for this machine.

    Attributes:
        config_yaml: the resolved settings, written to `config.yaml`.
        card: what the model card says of them.
        batch_size: examples per update, over all processes.
        microbatching: how a batch is split into forward passes.
        epochs: passes over the data.
        max_steps: number of updates, instead of `epochs`.
        precision: what forward passes compute in.
        layout: `auto`, `shared-prefix` or `separate`.
        save_every: updates between checkpoints.
        keep_checkpoints: number of checkpoints kept.
        resume: `auto`, `never` or the path of a checkpoint.
        eval_every: updates between evaluations, in addition to those before and after training.
        eval_batch_size: examples per forward pass and process in an evaluation.
        profile: directory for a profile of some updates.
        trackers: which get the metrics, or None.
        best: what is done about the best evaluation, or None.
        samples: how the policy is sampled while it is trained, or None.
        adapter: shape of the adapter to train, or None to train the whole model (or the adapter that it is).
        quantized: whether a new adapter's base model is held in 4 bits.
        liger_kernel: whether Liger's kernels compute elementwise operations.
    """

    config_yaml: str
    card: CardFacts
    seed: int
    batch_size: int
    microbatching: Microbatching
    epochs: float
    max_steps: int | None
    schedule: Schedule
    precision: Literal["bf16", "float32"]
    layout: str
    gradient_checkpointing: bool
    save_every: int | None
    keep_checkpoints: int
    resume: str
    eval_every: int | None
    eval_batch_size: int
    profile: Path | None
    trackers: TrackerConfig | None = None
    best: BestConfig | None = None
    samples: SampleOptions | None = None
    adapter: LoraShape | None = None
    quantized: bool = False
    liger_kernel: bool = False


def session_scorer(
    runtime: Runtime, config: SessionConfig, model: nn.Module, longest: int, name: str, layout: str | None = None
) -> TokenScorer:
    """A scorer of a model on its device, in the precision and layout of a training; see `make_scorer`.

    A model that will be sharded is looked at by the first process alone, which has it whole.
    """
    autocast = autocast_dtype(config.precision)
    if config.liger_kernel:
        fuse_elementwise(model, runtime.device)

    def make() -> TokenScorer:
        return make_scorer(model, layout or config.layout, autocast, longest, runtime.reporter.note, name)

    if runtime.sharding is None:
        return make()
    made: list[TokenScorer] = []

    def traits() -> ScorerTraits:
        made.append(make())
        return made[0].traits

    found = runtime.on_main(traits)
    return made[0] if made else scorer_with(model, found, autocast)


def apply_gradient_checkpointing(config: SessionConfig, scorer: TokenScorer) -> None:
    """Switch on gradient checkpointing if the config asks for it; more than once changes nothing."""
    if config.gradient_checkpointing:
        recompute_activations(scorer)


def report_end_token(reporter: Reporter, path: Path, tokenizer: Tokenizer, end: int) -> None:
    """Report which token a training teaches as the end of a response, if the model ends with others too."""
    ids = end_ids(path)
    if ids == [end]:
        return
    others = ", ".join(_token_name(token, tokenizer) for token in ids if token != end)
    its_ends = "names none" if not ids else f"{'also ' if end in ids else ''}names {others}"
    taught = _token_name(end, tokenizer)
    reporter.note(f"training teaches {taught} as the end of a response; the model's generation_config {its_ends}")


def _token_name(token: int, tokenizer: Tokenizer) -> str:
    known = token < len(tokenizer.backend)
    return f"{tokenizer.pieces([token])[0]!r} (id {token})" if known else f"id {token}"


def plan_training(runtime: Runtime, config: SessionConfig, costs: Sequence[int], unit: str) -> Plan:
    """Number the updates of a training and report the plan; needs no model.

    Args:
        runtime: this process.
        config: of the training.
        costs: tokens of each example.
        unit: what an example is called, in the plural.
    """
    size = config.batch_size
    plan = make_plan(len(costs), size, config.epochs, config.max_steps, config.seed)
    passes = len(config.microbatching.split(plan.batch(0), costs, runtime.world)[0])
    processes = f" on each of {runtime.world} processes" if runtime.world > 1 else ""
    runtime.reporter.note(
        f"{plan.updates} step{'s' if plan.updates != 1 else ''} of {min(size, plan.examples)} {unit} "
        f"({passes} forward pass{'es' if passes != 1 else ''} each{processes}), "
        f"{plan.updates / plan.batches_per_epoch:.2f} epochs of {plan.examples} {unit}"
    )
    warmup = config.schedule.warmup(plan.updates)
    if 0 < config.schedule.warmup_steps < 1:
        runtime.reporter.note(f"warm-up: {warmup} of {plan.updates} steps")
    if warmup >= plan.updates:
        runtime.reporter.warn(
            f"the run ({plan.updates} steps) is not longer than its warm-up ({warmup} steps): the learning rate only "
            f"reaches {plan.updates / (warmup + 1):.0%}; lower --warmup-steps"
        )
    decay = config.schedule.lr_scheduler_params.get("num_decay_steps", 0)
    if plan.updates > warmup > plan.updates - float(decay):
        runtime.reporter.warn(
            f"the decay ({decay:g} steps) begins before the warm-up ({warmup} steps) ends, in a run of {plan.updates} "
            "steps; lower num_decay_steps"
        )
    return plan


@dataclass(frozen=True)
class TrainingSetup:
    """A training that is ready to start.

    Attributes:
        task: what is trained.
        eval_task: what is evaluated, or None.
        plan: its updates.
        scorer: the model to train.
        tokenizer: saved beside the model.
        check_start: called with the metrics before the first update; may stop the run.
        base: what an adapter is put on; needed where one is trained.
        beta: of a preference objective, or None.
        starts_as_reference: whether the policy is its reference before the first update.
    """

    task: Task
    eval_task: Task | None
    plan: Plan
    scorer: TokenScorer
    tokenizer: Tokenizer
    check_start: Callable[[Mapping[str, Any]], None]
    base: BaseModel | None = None
    beta: float | None = None
    starts_as_reference: bool = False


def run_training(runtime: Runtime, config: SessionConfig, output: Output, setup: TrainingSetup) -> StageResult:
    """Train, save the model, and mark the output as finished.

    Raises:
        TrainingError: a loss or gradient is not finite, or the output cannot be written.
        Interrupted: by a signal, after a checkpoint.
    """
    reporter = runtime.reporter
    if config.eval_every is not None and setup.eval_task is None:
        reporter.warn("--eval-every has no effect: there is no test split to evaluate")
    check_best(config.best, setup.eval_task)
    started = time.time()
    if runtime.main:
        output.start(config.config_yaml)
    runtime.wait()
    apply_gradient_checkpointing(config, setup.scorer)
    _report_separate_passes(reporter, config, setup, runtime.world)
    if runtime.sharding is not None:
        _try_to_save(runtime, output, setup)
    trainer = Trainer(runtime, setup.scorer, setup.task, setup.plan, config.microbatching, config.schedule)
    with StopRequest() as stop, deterministic_training():
        metrics = trainer.train(
            output.path / METRICS_FILE,
            _checkpoint_config(config, output),
            _eval_config(config, setup.eval_task),
            setup.check_start,
            stop,
            Watching(config.profile, config.trackers, _health(setup), _samples(config, setup, output.path)),
        )
        if config.profile is not None:
            reporter.note(f"profile: {config.profile / TABLE}, and {config.profile / TRACE} for a trace viewer")
        record = {
            "seed": config.seed,
            "seconds": round(time.time() - started, 1),
            "updates": trainer.step,
            "batch_size": setup.plan.batch_size,
            setup.task.unit: setup.plan.examples,
            "final_metrics": metrics,
            **trainer.best.summary(),
            **({"warnings": [asdict(finding) for finding in trainer.findings]} if trainer.findings else {}),
        }
        tensors = whole_tensors(runtime, trainer.model)
        runtime.on_main(lambda: _publish(output, config.card, setup, record, tensors))
    result = StageResult(output.path, output.record(), fresh=True)
    runtime.wait()
    if stop.signal:
        raise Interrupted(stop.signal, f"interrupted; {output.path} is finished", fix="rerun the same command")
    return result


def _report_separate_passes(reporter: Reporter, config: SessionConfig, setup: TrainingSetup, world: int) -> None:
    """Report the forward passes of a step if the model needs separate rows, which the plan did not know."""
    if config.layout != "auto" or setup.scorer.packed:
        return
    batch = setup.plan.batch(0)
    packed, separate = (
        len(config.microbatching.split(batch, costs, world)[0]) for costs in (setup.task.costs, setup.task.padded_costs)
    )
    if packed != separate:
        reporter.note(f"{separate} forward passes per step with separate rows")


def _checkpoint_config(config: SessionConfig, output: Output) -> CheckpointConfig:
    created_by = {"command": output.command, "made_from": output.made_from}
    return CheckpointConfig(output.checkpoints, config.save_every, config.keep_checkpoints, config.resume, created_by)


def _samples(config: SessionConfig, setup: TrainingSetup, output: Path) -> SampleConfig | None:
    """The prompts to sample: the first distinct ones that are evaluated, or else trained."""
    if config.samples is None:
        return None
    task = setup.task if setup.eval_task is None else setup.eval_task
    prompts: dict[tuple[int, ...], str] = {}
    for example in range(len(task.costs)):
        if len(prompts) < config.samples.prompts and task.prompt(example):
            prompts.setdefault(tuple(task.prompt(example)), task.where(example))
    return sample_config(
        config.samples,
        output / SAMPLES_FILE,
        [(where, ids) for ids, where in prompts.items()],
        setup.scorer,
        setup.tokenizer,
        autocast_dtype(config.precision),
        setup.starts_as_reference,
    )


def _health(setup: TrainingSetup) -> HealthConfig | None:
    if setup.beta is None:
        return None
    return HealthConfig(setup.beta, min(setup.plan.batch_size, setup.plan.examples), setup.plan.updates)


def _eval_config(config: SessionConfig, task: Task | None) -> EvalConfig | None:
    return None if task is None else EvalConfig(task, config.eval_every, config.eval_batch_size, config.best)


def _try_to_save(runtime: Runtime, output: Output, setup: TrainingSetup) -> None:
    """Put a sharded model together and write it, before any time is spent on training it."""
    tensors = whole_tensors(runtime, setup.scorer.model)

    def save() -> None:
        with reporting_write_errors(output.path, "the model cannot be saved at the end"):
            remove(_staged(output, setup, tensors))

    runtime.on_main(save)


def _staged(output: Output, setup: TrainingSetup, tensors: Mapping[str, Tensor] | None) -> Path:
    staged = output.staging()
    save_model(setup.scorer.model, setup.tokenizer, staged, setup.base, tensors)
    apply_umask(list(staged.iterdir()))
    return staged


def _publish(
    output: Output,
    card: CardFacts,
    setup: TrainingSetup,
    record: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None,
) -> None:
    adapted = adapters_of(setup.scorer.model) is not None
    base = setup.base.name if adapted and setup.base is not None else None
    with reporting_write_errors(output.path):
        staged = _staged(output, setup, tensors)
        write_text(staged / CARD_FILE, model_card(card, output.made_from, record, base))
        files = output.publish(staged)
        output.finish(record, files)
