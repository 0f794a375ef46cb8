"""The prediction of a dry run: what the plan, the shapes of the models and this machine say about a training.

Weights are not read. The only thing measured is the rate of matrix products, for a fraction of a second.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.engine.dry_run import DryRun, memory_per_process, program_memory
from tisdpo_cli.engine.training import planning
from tisdpo_cli.engine.training.batching import PaddedCosts, Plan
from tisdpo_cli.engine.training.first_row import FirstRow
from tisdpo_cli.engine.training.fitting import Choices, best_change
from tisdpo_cli.engine.training.planning import Launch, OtherModel, PassSize, Prediction, Work
from tisdpo_cli.engine.training.session import SessionConfig
from tisdpo_cli.model.shapes import ModelShape, measure
from tisdpo_cli.runs.machine import free_disk, product_rate
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.sharding import Sharding
from tisdpo_cli.runs.stage import StageResult

# Examples and updates that are looked at; all others are taken to be like them.
_EXAMPLES, _UPDATES = 1000, 16


@dataclass(frozen=True)
class AskedLaunch:
    """The processes that a training is meant for, and how it would be split over them."""

    processes: int
    sharding: Sharding | None


@dataclass(frozen=True)
class ExampleSize:
    """Tokens of an example: of its prompt, and of each response."""

    prompt: int
    responses: tuple[int, ...]

    def work(self, packed: bool) -> Work:
        """What it takes, with its prompt once or once for each response."""
        prompt, responses, scored = self.prompt, self.responses, sum(self.responses)
        again = (len(responses) - 1) * prompt
        seen = sum((prompt + length) ** 2 / 2 for length in responses)
        return Work(prompt + scored + (0 if packed else again), scored, seen - (again * prompt / 2 if packed else 0))


@dataclass(frozen=True)
class Examples:
    """Examples of a split.

    Attributes:
        costs: tokens of each in a forward pass.
        size: gives the sizes of one.
    """

    costs: Sequence[int]
    size: Callable[[int], ExampleSize]

    @property
    def packed(self) -> bool:
        """Whether each prompt is encoded once."""
        return not isinstance(self.costs, PaddedCosts)

    def total(self) -> Work:
        """What all of them take."""
        return self.mean().times(len(self.costs))

    def mean(self) -> Work:
        """What an example takes on average."""
        count = len(self.costs)
        step = max(1, count // _EXAMPLES)
        works = [self.size(i).work(self.packed) for i in range(0, count, step)]
        return reduce(Work.plus, works).times(1 / len(works))

    def pass_size(self, examples: Sequence[int]) -> PassSize:
        """The size of a forward pass over some of them."""
        costs = [self.costs[i] for i in examples]
        tokens = sum(costs) if self.packed else len(costs) * max(costs, default=0)
        return PassSize(tokens, sum(sum(self.size(i).responses) for i in examples))


@dataclass(frozen=True)
class ReferencePlan:
    """What is done with the reference.

    Attributes:
        other: the model, if it is not the policy as it starts or a part of it.
        in_training: whether every forward pass needs it; otherwise its log-probs are computed before.
        cached: whether these are kept.
    """

    other: OtherModel | None
    in_training: bool
    cached: bool


@dataclass(frozen=True)
class Trained:
    """What is trained.

    Attributes:
        model: without the values of its weights.
        file: size of its weight files in bytes; 0 for a new model.
        examples: to train.
        tests: to evaluate, or None.
        reference: None where nothing is compared with one.
        adaptable: whether an adapter could be trained instead.
    """

    model: nn.Module
    file: int
    examples: Examples
    tests: Examples | None
    reference: ReferencePlan | None
    adaptable: bool


def predict_training(
    runtime: Runtime, session: SessionConfig, asked: AskedLaunch, plan: Plan, trained: Trained, output: Path
) -> Prediction:
    """What a training will need.

    Args:
        runtime: this process.
        session: how the training runs.
        asked: on how many processes.
        plan: its updates.
        trained: the model and the examples.
        output: the output directory.
    """
    shape = measure(trained.model)
    on_gpu = runtime.device.type == "cuda"
    size = _largest_pass(session, plan, trained.examples, asked.processes)
    launch = Launch(
        processes=asked.processes,
        on_gpu=on_gpu,
        sharded=asked.sharding is not None,
        offload=asked.sharding is not None and asked.sharding.offload,
        precision=session.precision,
        optimizer=session.schedule.optimizer,
        momentum=session.schedule.has_momentum,
        gradient_checkpointing=session.gradient_checkpointing,
        quantized=session.quantized,
    )
    program = program_memory(runtime)
    other = trained.reference.other if trained.reference is not None else None

    def memory(shape: ModelShape, launch: Launch, size: PassSize) -> planning.Memory:
        return planning.predict_memory(shape, launch, size, program, trained.file, other)

    here = int(os.environ.get("LOCAL_WORLD_SIZE", asked.processes)) if runtime.world > 1 else asked.processes
    peak, limit = memory(shape, launch, size), memory_per_process(runtime, here)
    choices = Choices(shape, launch, size, session.microbatching, max(trained.examples.costs), trained.adaptable)
    work = _work(session, plan, trained)
    rate = product_rate(runtime.device, torch.bfloat16 if session.precision == "bf16" else torch.float32)
    flops = _flops(shape, session, trained, work)
    # Processes that were not started would share the cores of this one.
    devices = asked.processes if on_gpu else runtime.world
    return Prediction(
        processes=asked.processes,
        device=runtime.device.type,
        sharded=launch.sharded,
        memory=peak.parts,
        when=peak.when,
        device_memory=limit,
        disk=_disk(shape, session, plan, trained, work),
        free_disk=free_disk(output),
        flops=flops,
        seconds={stage: planning.seconds_of(count, rate, session.precision, devices) for stage, count in flops.items()},
        change=best_change(choices, limit, lambda *changed: memory(*changed).total) if peak.total > limit else None,
    )


def dry_run_result(
    runtime: Runtime,
    session: SessionConfig,
    asked: AskedLaunch,
    plan: Plan,
    trained: Trained,
    row: FirstRow,
    sizes: Sequence[Mapping[str, Any]],
    output: Path,
) -> StageResult:
    """What a dry run of a training found.

    Args:
        runtime: this process.
        session: how the training runs.
        asked: on how many processes.
        plan: its updates.
        trained: the model and the examples.
        row: the first row.
        sizes: counts and lengths of the examples to train, and of those to evaluate.
        output: the output directory.
    """
    prediction = predict_training(runtime, session, asked, plan, trained, output)
    runtime.reporter.note("dry run: nothing was trained")
    passes = session.microbatching.split(plan.batch(0), trained.examples.costs, asked.processes)[0]
    steps = {
        "steps": plan.updates,
        "batch_size": min(plan.batch_size, plan.examples),
        "forward_passes_per_step": len(passes),
        "epochs": plan.updates / plan.batches_per_epoch,
    }
    splits = {name: of for name, of in zip(("train", "test"), sizes, strict=True) if of}
    return StageResult(output, {}, False, DryRun(session.config_yaml, splits, row, prediction, steps))


def _largest_pass(session: SessionConfig, plan: Plan, examples: Examples, processes: int) -> PassSize:
    """The largest forward pass of updates all over the training."""
    sizes = []
    for step in range(0, plan.updates, max(1, plan.updates // _UPDATES)):
        for of_rank in session.microbatching.split(plan.batch(step), examples.costs, processes):
            sizes += [examples.pass_size(some) for some in of_rank if some]
    return max(sizes, key=lambda size: size.tokens)


# Work of each stage: what is trained, what is evaluated, what the reference computes before.
_Stages = dict[str, Work]


def _work(session: SessionConfig, plan: Plan, trained: Trained) -> _Stages:
    mean, size = trained.examples.mean(), min(plan.batch_size, plan.examples)
    steps = mean.times(plan.updates * plan.examples / plan.batches_per_epoch)
    stages = {"training": steps}
    tests = trained.tests
    if tests is not None:
        between = (plan.updates - 1) // session.eval_every if session.eval_every else 0
        stages["evaluation"] = tests.mean().times(len(tests.costs) * (2 + between))
    if trained.reference is not None and not trained.reference.in_training:
        # In bf16 each forward pass has its own.
        once = mean.times(min(plan.examples, plan.updates * size))
        before = steps if session.precision == "bf16" else once
        stages["reference"] = before if tests is None else before.plus(tests.mean().times(len(tests.costs)))
    return stages


def _flops(shape: ModelShape, session: SessionConfig, trained: Trained, work: _Stages) -> dict[str, float]:
    """Of each stage, in the order in which they run."""
    both = 2 if trained.reference is not None and trained.reference.in_training else 1
    flops = {
        "reference": planning.forward_flops(shape, work["reference"]) if "reference" in work else 0.0,
        "training": planning.training_flops(shape, work["training"], session.gradient_checkpointing)
        + (both - 1) * planning.forward_flops(shape, work["training"]),
        "evaluation": both * planning.forward_flops(shape, work["evaluation"]) if "evaluation" in work else 0.0,
    }
    return {stage: count for stage, count in flops.items() if count}


def _disk(shape: ModelShape, session: SessionConfig, plan: Plan, trained: Trained, work: _Stages) -> dict[str, int]:
    # The oldest one is removed when the newest is whole.
    saved = plan.updates // session.save_every if session.save_every else 0
    best = int(session.best is not None and session.best.load)
    cached = work["reference"].scored if trained.reference is not None and trained.reference.cached else 0.0
    return planning.predict_disk(
        shape,
        session.schedule.optimizer,
        shape.frozen > 0,
        min(saved, session.keep_checkpoints + 1) + best,
        cached,
        session.schedule.has_momentum,
    )
