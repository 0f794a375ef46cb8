"""Settings of the trainings as plain values, resolved for this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.engine.arguments import output_request
from tisdpo_cli.engine.training.batching import Microbatching, microbatching
from tisdpo_cli.engine.training.best import BestConfig
from tisdpo_cli.engine.training.card import card_facts
from tisdpo_cli.engine.training.dry_run import AskedLaunch
from tisdpo_cli.engine.training.optimizer import Schedule
from tisdpo_cli.engine.training.samples import SampleOptions
from tisdpo_cli.engine.training.session import SessionConfig
from tisdpo_cli.errors import UsageError
from tisdpo_cli.files import CONFIG_FILE
from tisdpo_cli.model.adapters import LoraShape
from tisdpo_cli.model.fused_kernels import require_liger
from tisdpo_cli.model.loading import shape_of
from tisdpo_cli.runs.outputs import TRACKERS_DIRECTORY, Output
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.sharding import Sharding, requested_sharding
from tisdpo_cli.runs.stage import OutputRequest, claim_output
from tisdpo_cli.runs.trackers import TrackerConfig, check_trackers
from tisdpo_cli.settings.adapter import Adapter
from tisdpo_cli.settings.optimization import DEFAULT_BATCH_SIZE, Optim
from tisdpo_cli.settings.sources import to_yaml
from tisdpo_cli.settings.train_pairs import TrainPairs
from tisdpo_cli.settings.train_sft import TrainSft
from tisdpo_cli.settings.watching import Evaluation
from tisdpo_cli.settings.yaml_files import read_yaml

Settings = TypeVar("Settings", TrainPairs, TrainSft)


def with_token_budget(runtime: Runtime, settings: Settings, model: Path | None) -> Settings:
    """The settings with a token budget, unless they say how a batch is split into forward passes.

    An output that exists keeps the budget it was started with, whatever device continues it: another budget would give
    other bytes.

    Args:
        runtime: this process.
        settings: of a training.
        model: directory of the model, or None for one that is not there yet.
    """
    memory = settings.memory
    if memory.tokens_per_microbatch or memory.micro_batch_size or memory.gradient_accumulation:
        return settings
    budget = None if settings.overwrite else _recorded_budget(Path(settings.output_dir) / CONFIG_FILE)
    if budget is None:
        if model is not None:
            layers, width = shape_of(model, settings.trust_remote_code)
        elif isinstance(settings, TrainSft):
            layers, width = settings.layers, settings.hidden_size
        else:
            return settings
        budget = runtime.token_budget(layers, width)
    return settings.with_values({"memory.tokens_per_microbatch": budget})  # type: ignore[return-value]


def _recorded_budget(config: Path) -> int | None:
    """The token budget in the config file of an output, or None if there is none."""
    try:
        memory = read_yaml(config).get("memory")
    except UsageError:  # no such file, or not one of ours: claiming the output decides what that means
        return None
    budget = memory.get("tokens_per_microbatch") if isinstance(memory, dict) else None
    return budget if isinstance(budget, int) and not isinstance(budget, bool) and budget > 0 else None


def claim_training_output(
    runtime: Runtime,
    settings: TrainPairs | TrainSft,
    models: Mapping[str, Path | None],
    splits: Mapping[str, DatasetSplit],
) -> Output:
    """Claim the output directory of a training; see `claim_output`."""
    return claim_output(runtime, training_request(runtime, settings, models, splits))


def training_request(
    runtime: Runtime,
    settings: TrainPairs | TrainSft,
    models: Mapping[str, Path | None],
    splits: Mapping[str, DatasetSplit],
) -> OutputRequest:
    """The output that a training creates; see `output_request`."""
    return output_request(settings, _resolved(runtime, settings), models, splits.values())


def session_config(runtime: Runtime, settings: TrainPairs | TrainSft) -> SessionConfig:
    """How a training runs.

    Raises:
        UsageError: the batch size contradicts what it should be the product of.
    """
    optim, checkpoints, evaluation = settings.optim, settings.checkpoints, settings.evaluation
    batch_size, split = _microbatching(runtime, settings)
    resolved = _resolved(runtime, settings)
    sharding = _checked_sharding(runtime, settings)
    if settings.memory.liger_kernel:
        require_liger(runtime.device)
    return SessionConfig(
        config_yaml=to_yaml(settings.with_values(resolved)),
        card=card_facts(settings, resolved),
        seed=settings.seed,
        batch_size=batch_size,
        microbatching=split,
        epochs=optim.epochs,
        max_steps=optim.max_steps,
        schedule=_schedule(optim, resolved["optim.learning_rate"]),
        precision=resolved["memory.dtype"],
        layout=settings.memory.layout,
        gradient_checkpointing=settings.memory.gradient_checkpointing
        or (sharding is not None and sharding.checkpointing),
        save_every=checkpoints.save_every,
        keep_checkpoints=checkpoints.keep_checkpoints,
        resume=checkpoints.resume,
        eval_every=evaluation.eval_every,
        eval_batch_size=evaluation.eval_batch_size,
        profile=Path(settings.profile).expanduser() if settings.profile is not None else None,
        trackers=_trackers(settings),
        best=_best(evaluation),
        samples=_samples(settings),
        adapter=_lora_shape(settings.adapter),
        quantized=settings.adapter.load_in_4bit,
        liger_kernel=settings.memory.liger_kernel,
    )


def _schedule(optim: Optim, rate: float) -> Schedule:
    return Schedule(
        optim.optimizer,
        rate,
        optim.lr_scheduler,
        optim.warmup_steps,
        optim.weight_decay,
        optim.max_grad_norm,
        optim.schedule_params(rate),
        optim.optimizer_params(),
        optim.without_decay(),
    )


def _samples(settings: TrainPairs | TrainSft) -> SampleOptions | None:
    evaluation = settings.evaluation
    if evaluation.sample_every is None:
        return None
    return SampleOptions(
        evaluation.sample_every,
        evaluation.sample_prompts,
        evaluation.sample_tokens,
        evaluation.sample_temperature,
        settings.seed,
        evaluation.eval_batch_size,
    )


def _best(evaluation: Evaluation) -> BestConfig | None:
    if not evaluation.watches:
        return None
    return BestConfig(
        evaluation.best_metric(),
        evaluation.greater(),
        evaluation.early_stopping_patience,
        evaluation.early_stopping_threshold or 0.0,
        evaluation.load_best,
    )


def _trackers(settings: TrainPairs | TrainSft) -> TrackerConfig | None:
    """The trackers that a training reports to, or None.

    Raises:
        UsageError: one cannot run here.
    """
    tracking, output = settings.tracking, Path(settings.output_dir)
    if not tracking.names():
        return None
    check_trackers(tracking.names())
    values = {
        name: value if isinstance(value, bool | int | float) else str(value) for name, _, value in settings.leaves()
    }
    return TrackerConfig(
        tracking.names(),
        tracking.run_name or output.resolve().name,
        tracking.tracker_project,
        output / TRACKERS_DIRECTORY,
        {"command": settings.command, **values},
    )


def sharding_of(settings: TrainPairs | TrainSft) -> Sharding | None:
    """How a training on several processes splits its model, by its settings or by its launcher."""
    return requested_sharding(settings.memory.shard, settings.memory.cpu_offload)


def _checked_sharding(runtime: Runtime, settings: TrainPairs | TrainSft) -> Sharding | None:
    """How a training splits its model over the processes that it is meant for; one without effect is reported.

    Raises:
        UsageError: something does not work with shards.
    """
    optimizer, sharding = settings.optim.optimizer, asked_launch(runtime, settings).sharding
    if sharding is None:
        if settings.memory.shard == "full":
            runtime.reporter.note("--shard full has no effect on a single process")
    elif settings.evaluation.sample_every is not None:
        raise UsageError("a sharded model cannot be sampled", where="--sample-every", fix="use --shard none")
    elif settings.adapter.load_in_4bit:
        raise UsageError("weights in 4 bits cannot be sharded", where="--load-in-4bit", fix="use --shard none")
    elif optimizer.endswith("8bit") or optimizer == "adafactor":
        raise UsageError("its state cannot be sharded", where=f"--optimizer {optimizer}", fix="use adamw")
    return sharding


def asked_launch(runtime: Runtime, settings: TrainPairs | TrainSft) -> AskedLaunch:
    """The processes that a training is meant for: those that were started, or in a dry run those that are asked for."""
    asked = settings.num_processes if settings.dry_run else 1
    processes = max(runtime.world, asked)
    return AskedLaunch(processes, sharding_of(settings) if processes > 1 else None)


def _lora_shape(adapter: Adapter) -> LoraShape | None:
    alpha = adapter.alpha()
    if adapter.lora_r is None or alpha is None:
        return None
    names = adapter.targets(), adapter.modules_to_save()
    return LoraShape(adapter.lora_r, alpha, adapter.lora_dropout, *names, adapter.rslora, adapter.dora)


def _resolved(runtime: Runtime, settings: TrainPairs | TrainSft) -> dict[str, Any]:
    """Settings whose value depends on the machine or on other settings, by dotted name, as they are in force."""
    rate = settings.learning_rate() if isinstance(settings, TrainSft) else settings.optim.learning_rate
    return {
        "optim.batch_size": _microbatching(runtime, settings)[0],
        "optim.learning_rate": rate,
        "memory.dtype": runtime.precision(settings.memory.dtype),
    }


def _microbatching(runtime: Runtime, settings: TrainPairs | TrainSft) -> tuple[int, Microbatching]:
    memory = settings.memory
    return microbatching(
        settings.optim.batch_size,
        memory.micro_batch_size,
        memory.gradient_accumulation,
        memory.tokens_per_microbatch or 0,
        runtime.world,
        DEFAULT_BATCH_SIZE,
    )
