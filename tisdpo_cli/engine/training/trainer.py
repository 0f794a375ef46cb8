"""The training loop: updates, metrics, evaluation, checkpoints, interruption.

It knows no pairs and no loss: a `Task` defines what a forward pass computes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.engine.training.ahead import Ahead
from tisdpo_cli.engine.training.batching import Microbatching, Plan
from tisdpo_cli.engine.training.best import BestEvaluation, EvalConfig
from tisdpo_cli.engine.training.health import Finding
from tisdpo_cli.engine.training.optimizer import Schedule, make_optimizer
from tisdpo_cli.engine.training.profiling import profiled
from tisdpo_cli.engine.training.run_log import RunLog, Watching
from tisdpo_cli.engine.training.state import (
    EVALUATION,
    CheckpointConfig,
    all_finite,
    find_checkpoint,
    restore_state,
    save_state,
)
from tisdpo_cli.engine.training.task import Task
from tisdpo_cli.errors import Interrupted, TrainingError, UsageError, naming_out_of_memory
from tisdpo_cli.model.adapters import adapter_dropout
from tisdpo_cli.model.quantization import is_quantized
from tisdpo_cli.model.sharding import whole
from tisdpo_cli.runs.checkpoints import checkpoint_of, open_checkpoint
from tisdpo_cli.runs.outputs import last_metrics, metrics_of, read_metrics
from tisdpo_cli.runs.runtime import Runtime, StopRequest

_UNWATCHED = Watching()


class Trainer:
    """One training, from its first update or a checkpoint to its last."""

    def __init__(
        self,
        runtime: Runtime,
        scorer: nn.Module,
        task: Task,
        plan: Plan,
        microbatching: Microbatching,
        schedule: Schedule,
    ) -> None:
        self.runtime, self.task, self.plan, self.microbatching, self.schedule = (
            runtime,
            task,
            plan,
            microbatching,
            schedule,
        )
        # A sharded one synchronizes itself.
        self.scorer = scorer if runtime.sharding is not None else runtime.accelerator.prepare_model(scorer)
        self.model: nn.Module = runtime.accelerator.unwrap_model(self.scorer).model
        self.optimizer = make_optimizer(self.scorer, schedule)
        self.step = 0
        self.best = BestEvaluation(None)
        self.findings: list[Finding] = []
        self._resumed_in: Path | None = None
        # Metrics of the first update, whose backward pass gives the loss of step 0 too; and the seconds it took.
        self._ahead: tuple[Tensor, float] | None = None
        self._batches = Ahead(self._prepare, plan.updates)

    def train(
        self,
        metrics_file: Path,
        checkpoints: CheckpointConfig,
        evaluation: EvalConfig | None,
        check_start: Callable[[Mapping[str, Any]], None],
        stop: StopRequest,
        watching: Watching = _UNWATCHED,
    ) -> dict[str, Any]:
        """Train to the end.

        Args:
            metrics_file: receives one line per update.
            checkpoints: where and how often.
            evaluation: evaluated before, during and after training, or None.
            check_start: called with the metrics before the first update; may stop the run.
            stop: a request to stop, answered after an update.
            watching: what shows it while it runs.

        Returns:
            The last line of metrics.

        Raises:
            TrainingError: a loss or gradient is not finite, and the model is not updated; or a tracker does not start.
            Interrupted: by a signal, after a checkpoint.
        """
        runtime = self.runtime
        self.best = BestEvaluation(evaluation.best if evaluation is not None else None)
        resumed = self._resume(checkpoints)
        log = self._open_log(metrics_file, self.step if resumed else None, watching)
        record: dict[str, Any] = {}
        with (
            log,
            runtime.reporter.progress("training", self.plan.updates, self.step, "steps") as progress,
            profiled(watching.profile if runtime.main else None, self.plan.updates - self.step) as profiled_update,
            closing(self._batches),
        ):
            if not resumed:
                record = {**self._before(), **self._evaluate(evaluation)}
                check_start(record)
                log.write(record)
                self._sample(log, watching)
                progress.advance(0, record)
            elif runtime.main:
                for earlier in read_metrics(metrics_file):
                    progress.advance(0, earlier)
            while not self._done:
                record = self._update()
                profiled_update()
                last, improved = self.step == self.plan.updates, False
                if evaluation is not None and (last or (evaluation.every and self.step % evaluation.every == 0)):
                    record.update(self._evaluate(evaluation))
                    improved = self.best.observe(self.step, record)
                log.write(record)
                self._sample(log, watching)
                progress.advance(1, record)
                self._save_or_stop(checkpoints, stop, improved and self.best.loads and not last)
        self.findings = log.findings
        self._check_weights()
        if not record:
            # Resumed after the last update: an earlier run wrote the line, or this is another output.
            record = runtime.on_main(lambda: last_metrics(metrics_file, self.step)) or self._evaluate(evaluation)
        return self._load_best(checkpoints, metrics_file, record)

    @property
    def _done(self) -> bool:
        return self.step >= self.plan.updates or self.best.stops

    def _load_best(self, config: CheckpointConfig, metrics_file: Path, record: dict[str, Any]) -> dict[str, Any]:
        """Take up the model of the best evaluation, if it is to be the result; returns the metrics of the result."""
        runtime, step = self.runtime, self.best.step
        if self.best.stops and self.step < self.plan.updates:
            runtime.reporter.note(
                f"stopped after step {self.step} of {self.plan.updates}: the evaluations no longer improve"
            )
        if not self.best.loads or step is None or step == self.step:
            return record
        places = (config.directory, self._resumed_in)
        checkpoint = runtime.on_main(lambda: open_checkpoint(checkpoint_of(places, step) or config.directory))
        restore_state(checkpoint, self.model, None)
        runtime.reporter.note(f"the result is the model of step {step}, the best of all evaluations")
        return runtime.on_main(lambda: metrics_of(metrics_file, step)) or record

    def _open_log(self, path: Path, resume_step: int | None, watching: Watching) -> RunLog:
        """The log of this process; the first one's may fail to open, on all."""
        logs: list[RunLog] = []
        reporter = self.runtime.reporter
        self.runtime.on_main(lambda: logs.append(RunLog(path, resume_step, watching, reporter)))
        return logs[0] if logs else RunLog(None, None, watching, reporter)

    def _before(self) -> dict[str, Any]:
        """Step 0: the objective on the first batch, before any update. The first update reuses its gradients."""
        began = time.perf_counter()
        batch = self.plan.batch(0)
        sums = self._backward(batch)
        self._check_gradients()
        self._ahead = sums, time.perf_counter() - began
        return {"step": 0, "epoch": 0.0, **self._averages(self.task, sums, batch)}

    def _check_gradients(self) -> None:
        """Refuse a quantized model of which a part gets no gradients: some kernels have none, and do not say so."""
        if not is_quantized(self.model):
            return
        without = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if without:
            raise TrainingError(
                f"{without[0]} gets no gradients through the quantized layers", fix="leave out --load-in-4bit"
            )

    def _update(self) -> dict[str, Any]:
        began = time.perf_counter()
        batch = self.plan.batch(self.step)
        sums, before = self._ahead or (self._backward(batch), 0.0)
        self._ahead = None
        norm = self._clip(batch)
        rate = self.schedule.rate(self.step, self.plan.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        averages = self._averages(self.task, sums, batch)
        seconds = time.perf_counter() - began + before
        return {
            "step": self.step,
            "epoch": round(self.step / self.plan.batches_per_epoch, 4),
            **averages,
            "grad_norm": norm,
            "learning_rate": rate,
            "tokens_per_second": round(sum(self.task.costs[i] for i in batch) / seconds, 1),
            f"{self.task.unit}_per_second": round(len(batch) / seconds, 2),
        }

    def _backward(self, batch: Sequence[int]) -> Tensor:
        """Compute the gradients of a batch, every example counting once; returns the metrics summed over all ranks."""
        runtime, passes = self.runtime, self._batches.take(self.step)
        # DDP averages over ranks, the loss is a mean over the whole batch.
        scale = runtime.world / self.task.normaliser(batch)
        total = torch.zeros(len(self.task.metrics), dtype=torch.float64, device=runtime.device)
        losses: list[tuple[list[int], Tensor]] = []
        for k, (examples, prepared) in enumerate(passes):
            last = k == len(passes) - 1
            waiting = nullcontext() if last or runtime.sharding else runtime.accelerator.no_sync(self.scorer)
            with waiting, adapter_dropout(self.model, (self.plan.seed, self.step, runtime.rank, k)):
                loss, sums = self.task.forward(self.scorer, prepared)
                weight = 1.0 if examples else 0.0
                runtime.accelerator.backward(loss * (scale * weight))
            losses.append((examples, loss.detach()))
            total += sums * weight
        total = runtime.total(total)
        # Looked at once: every look at a number waits for the GPU.
        if not torch.isfinite(total[0]):
            non_finite = [i for examples, loss in losses if not torch.isfinite(loss) for i in examples]
            raise self._not_finite("loss", runtime.gather(non_finite))
        return total

    def _prepare(self, step: int) -> list[tuple[list[int], Any]]:
        """The forward passes of this rank in a step: their examples, and what they need."""
        batch = self.plan.batch(step)
        costs = self._costs(self.task)
        passes = self.microbatching.passes_of(batch, costs, self.runtime.world, self.runtime.rank)
        # An empty pass runs on any example with weight 0: every rank must take part in every pass.
        return [(examples, self.task.prepare(self.scorer, examples or batch[:1])) for examples in passes]

    def _costs(self, task: Task) -> Sequence[int]:
        return task.costs if getattr(self.model_scorer, "packed", True) else task.padded_costs

    def _clip(self, batch: Sequence[int]) -> float:
        norm = float(whole(nn.utils.clip_grad_norm_(self.scorer.parameters(), self.schedule.max_grad_norm)))
        if not math.isfinite(norm):
            raise self._not_finite("gradient", list(batch))
        return norm

    def _not_finite(self, what: str, examples: Sequence[int]) -> TrainingError:
        rows = ", ".join(self.task.where(i) for i in examples[:4]) + (" …" if len(examples) > 4 else "")
        return TrainingError(
            f"the {what} of step {self.step + 1} is not finite; the model was not updated (rows: {rows})",
            fix="lower --learning-rate or use --dtype float32; earlier checkpoints are kept",
        )

    def _sums(self, task: Task, examples: Sequence[int], split: Microbatching) -> Tensor:
        """Metrics summed over examples, split among the ranks, without gradients."""
        runtime = self.runtime
        total = torch.zeros(len(task.metrics), dtype=torch.float64, device=runtime.device)
        with torch.no_grad():
            for batch in split.passes_of(examples, self._costs(task), runtime.world, runtime.rank):
                # Every rank must take part in every pass of a sharded model.
                if batch or runtime.sharding is not None:
                    prepared = task.prepare(self.model_scorer, batch or examples[:1])
                    total += task.forward(self.model_scorer, prepared)[1] * bool(batch)
        return runtime.total(total)

    @property
    def model_scorer(self) -> nn.Module:
        """The scorer without DDP: a forward pass alone needs no synchronization."""
        return self.runtime.accelerator.unwrap_model(self.scorer)

    @staticmethod
    def _averages(task: Task, sums: Tensor, examples: Sequence[int]) -> dict[str, float]:
        means = (sums / task.normaliser(examples)).tolist()
        return dict(zip(task.metrics, means, strict=True))

    @naming_out_of_memory("evaluating")
    def _evaluate(self, evaluation: EvalConfig | None) -> dict[str, float]:
        if evaluation is None:
            return {}
        examples = range(len(evaluation.task.costs))
        sums = self._sums(evaluation.task, examples, Microbatching(micro=evaluation.batch_size))
        if not torch.isfinite(sums[0]):
            raise TrainingError(
                f"the evaluation after step {self.step} is not finite",
                fix="lower --learning-rate or use --dtype float32; earlier checkpoints are kept",
            )
        return {f"eval/{name}": value for name, value in self._averages(evaluation.task, sums, examples).items()}

    @naming_out_of_memory("evaluating")
    def _sample(self, log: RunLog, watching: Watching) -> None:
        """Samples of the first process, for which the others wait."""
        if watching.samples is not None and (self._done or watching.samples.due(self.step)):
            self.runtime.on_main(lambda: log.sample(self.step))

    # Checkpoints ------------------------------------------------------------------------------------------

    def _save_or_stop(self, checkpoints: CheckpointConfig, stop: StopRequest, needed: bool) -> None:
        signalled = stop.agreed(self.runtime)
        due = needed or (checkpoints.every is not None and self.step % checkpoints.every == 0)
        if due or signalled:
            self._check_weights()
            save_state(self.runtime, checkpoints, self.step, self.model, self.optimizer, self.best)
        if signalled:
            raise Interrupted(
                signalled,
                f"interrupted after step {self.step} of {self.plan.updates}; checkpoint saved",
                fix="rerun the same command to resume",
            )

    def _check_weights(self) -> None:
        """Refuse weights that overflowed in an optimizer step with finite gradients; they are never saved."""
        if not all_finite(self.runtime, self.model):
            raise TrainingError(
                f"the weights are not finite after step {self.step}",
                fix="lower --learning-rate; earlier checkpoints are kept",
            )

    def _resume(self, checkpoints: CheckpointConfig) -> bool:
        """Resume from a checkpoint, if there is one and resuming is allowed; returns whether it did."""
        runtime = self.runtime
        checkpoint = runtime.on_main(lambda: find_checkpoint(checkpoints, self.plan.updates, runtime.reporter.warn))
        if checkpoint is None:
            return False
        if checkpoint.step > self.plan.updates:
            raise UsageError(f"beyond the {self.plan.updates} steps of this run", where=str(checkpoint.path))
        restore_state(checkpoint, self.model, self.optimizer)
        self.step = checkpoint.step
        self.best.restore(checkpoint.state.get(EVALUATION, {}))
        self._resumed_in, best = checkpoint.path.parent, self.best.step
        if best is not None and self.best.loads:
            places = (checkpoints.directory, self._resumed_in)
            if runtime.on_main(lambda: checkpoint_of(places, best)) is None:
                runtime.reporter.warn(
                    f"the checkpoint of step {best}, the best so far, is gone; looking for a new best"
                )
                self.best.forget()
        self.runtime.reporter.note(f"resuming from {checkpoint.path}: {self.step} of {self.plan.updates} steps done")
        return True
