"""train-dpo, train-reverse and train: one training with two switches, whether pairs are swapped and which weights."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tisdpo_cli.data.arrow_files import IntArray
from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.stored_tokens import select_pairs, swapped_pairs
from tisdpo_cli.engine.arguments import find_dataset, read_options, reads_first, with_recorded_reading
from tisdpo_cli.engine.prepared import Prepared
from tisdpo_cli.engine.training.arguments import (
    asked_launch,
    claim_training_output,
    session_config,
    sharding_of,
    with_token_budget,
)
from tisdpo_cli.engine.training.batching import Microbatching, Plan, longest_rows, pair_costs, planned_passes
from tisdpo_cli.engine.training.dry_run import dry_run_result
from tisdpo_cli.engine.training.first_row import of_pair
from tisdpo_cli.engine.training.outlines import planned_pairs
from tisdpo_cli.engine.training.pair_data import PairSource, Weighting, prepare_pairs
from tisdpo_cli.engine.training.pair_task import PairTask
from tisdpo_cli.engine.training.policy import (
    base_model,
    check_start_adapter,
    parameter_count,
    report_adapter,
)
from tisdpo_cli.engine.training.reference import PAIRS_PER_PART, ReferencePass
from tisdpo_cli.engine.training.reference_model import Models, load_scorer, with_reference
from tisdpo_cli.engine.training.session import (
    SessionConfig,
    TrainingSetup,
    apply_gradient_checkpointing,
    plan_training,
    report_end_token,
    run_training,
)
from tisdpo_cli.engine.training.sharded_model import shard_model
from tisdpo_cli.engine.training.step0 import check_step0
from tisdpo_cli.engine.training.weighted_pairs import WeightedPair, WeightedPairs, tokens_of
from tisdpo_cli.errors import ModelError
from tisdpo_cli.method.objectives import Loss
from tisdpo_cli.model.adapters import adapters_of
from tisdpo_cli.model.directory import is_adapter, locate_model
from tisdpo_cli.model.loading import check_fit
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.cache import TensorCache
from tisdpo_cli.runs.outputs import Output
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, finished_result
from tisdpo_cli.settings.datasets import text_of
from tisdpo_cli.settings.train_pairs import Train, TrainPairs, TrainReverse


@dataclass(frozen=True)
class _Training:
    """A preference training as plain values.

    Attributes:
        swapped: whether chosen and rejected are swapped, as in `train-reverse`.
        cache: where reference log-probs are kept, or None.
    """

    models: Models
    source: PairSource
    loss: Loss
    swapped: bool
    cache: TensorCache | None
    session: SessionConfig


def train_pairs(settings: TrainPairs, reporter: Reporter) -> StageResult:
    """Run train-dpo, train-reverse or train, by the type of the settings.

    Raises:
        TisdpoError: anything the user can fix; see the subclasses in `errors`.
    """
    if isinstance(settings, Train):
        settings = with_recorded_reading(settings, text_of(settings.dataset))
    models = _locate_models(settings)
    splits = find_dataset(settings.dataset, settings.data, reporter)
    source = _source(settings, splits, reporter)
    prepared = Prepared(lambda to: _prepare(models, source, to))
    if reads_first(settings):
        prepared.start()
    runtime = Runtime(reporter, sharding_of(settings))
    settings = with_token_budget(runtime, settings, models.policy_path)
    training = _training(runtime, settings, models, source)
    check_start_adapter(training.session.adapter, training.session.quantized, models.policy_path)
    paths = {"model": models.policy_path, "ref_model": models.reference_path}
    claimed = nullcontext() if settings.dry_run else claim_training_output(runtime, settings, paths, splits)
    with claimed as output:
        if output is not None and output.state == "finished":
            return finished_result(runtime, output)
        tokenizer, pairs = prepared.result(runtime.reporter)
        report_end_token(runtime.reporter, models.policy_path, tokenizer, _taught_end(pairs[0], tokenizer))
        plan = plan_training(runtime, training.session, _plan_costs(training, pairs[0]), PairTask.unit)
        if output is None:
            trained = planned_pairs(runtime, training.session, models, training.loss, bool(training.cache), pairs)
            row, sizes = of_pair(pairs[0][0], tokenizer, training.swapped), [split.sizes for split in pairs]
            asked, directory = asked_launch(runtime, settings), Path(settings.output_dir)
            return dry_run_result(runtime, training.session, asked, plan, trained, row, sizes, directory)
        policy = load_scorer(runtime, models, training.session, _longest(pairs))
        setup = _set_up(runtime, training, output, tokenizer, pairs, plan, policy)
        # A model with an adapter is in a cycle, and would stay.
        gc.collect()
        return run_training(runtime, training.session, output, setup)


def _locate_models(settings: TrainPairs) -> Models:
    trust = settings.trust_remote_code
    return Models(
        policy=settings.model,
        policy_path=locate_model(settings.model, "--model", trust),
        reference=settings.ref_model or settings.model,
        reference_path=locate_model(settings.ref_model, "--ref-model", trust) if settings.ref_model else None,
        trust_remote_code=trust,
    )


def _source(settings: TrainPairs, splits: Mapping[str, DatasetSplit], reporter: Reporter) -> PairSource:
    return PairSource(
        dataset=text_of(settings.dataset),
        splits=splits,
        options=read_options(settings.data, reporter, settings.cache_dir),
        eval_pairs=settings.evaluation.eval_pairs,
        swapped=isinstance(settings, TrainReverse),
        weighting=_weighting(settings) if isinstance(settings, Train) else None,
    )


def _training(runtime: Runtime, settings: TrainPairs, models: Models, source: PairSource) -> _Training:
    directory = Path(settings.cache_dir).expanduser() if settings.cache_dir is not None else None
    return _Training(
        models=models,
        source=source,
        loss=settings.method.objective(),
        swapped=source.swapped,
        cache=None if settings.no_ref_cache else TensorCache(directory, runtime.reporter.warn),
        session=session_config(runtime, settings),
    )


def _weighting(settings: Train) -> Weighting:
    weights = settings.weights
    return Weighting(
        make_recipe=weights.recipe,
        centered="center" in weights.steps(),
        final=weights.weights_are == "final",
        eos_is_auto=weights.eos_weight == "auto",
        seed=settings.seed,
    )


# Below this line there are no settings ----------------------------------------------------------------------------

# The pairs to train, and those to evaluate.
_Pairs = tuple[WeightedPairs, WeightedPairs]


def _prepare(models: Models, source: PairSource, reporter: Reporter) -> tuple[Tokenizer, _Pairs]:
    tokenizer = _load_tokenizer(models, source)
    return tokenizer, prepare_pairs(source, tokenizer, reporter)


def _load_tokenizer(models: Models, source: PairSource) -> Tokenizer:
    """The tokenizer of the policy, checked against both models before their weights are read.

    Raises:
        ModelError: the reference has another tokenizer, or an embedding is too small.
    """
    trust, parse, max_length = models.trust_remote_code, source.options.parse_data, source.options.limits.max_length
    tokenizer = load_tokenizer(models.policy_path, trust, parse)
    check_fit(models.policy_path, tokenizer, max_length, models.trust_remote_code)
    if models.reference_path is not None:
        if load_tokenizer(models.reference_path, trust, parse).digest != tokenizer.digest:
            raise ModelError(
                "the tokenizer differs from the model's",
                where=f"--ref-model {models.reference}",
                fix="use a reference model with the same tokenizer",
            )
        check_fit(models.reference_path, tokenizer, max_length, models.trust_remote_code)
    return tokenizer


def _plan_costs(training: _Training, pairs: Sequence[WeightedPair]) -> Sequence[int]:
    """Costs before the model is loaded, when `auto` is taken to pack."""
    return pair_costs(tokens_of(pairs), packed=training.session.layout != "separate")


def _taught_end(pairs: Sequence[WeightedPair], tokenizer: Tokenizer) -> int:
    responses = (response for pair in tokens_of(pairs) for response in (pair.chosen, pair.rejected))
    return next((response.ids[-1] for response in responses if response.has_eos), tokenizer.eos)


def _longest(pairs: _Pairs) -> int:
    return max(int(longest_rows(tokens_of(split)).max(initial=0)) for split in pairs)


def _set_up(
    runtime: Runtime,
    training: _Training,
    output: Output,
    tokenizer: Tokenizer,
    pairs: _Pairs,
    plan: Plan,
    policy: TokenScorer,
) -> TrainingSetup:
    _show_banner(runtime.reporter, training, policy)
    divergence = training.loss.needs.divergence
    policy, reference = with_reference(runtime, training.models, training.session, policy, divergence, _longest(pairs))
    shard_model(runtime, policy, reference)
    # The reference leaves memory with this function, unless a task holds it.
    task, eval_task = _tasks(runtime, training, output, (policy, reference), tokenizer.pad, pairs, plan)
    adapters, precision = adapters_of(policy.model), training.session.precision
    # What an adapter that was trained before drops shows at once; a new one is 0 whatever it drops.
    drops = adapters is not None and bool(adapters.dropouts()) and is_adapter(training.models.policy_path)
    same_start = _same_start(output) and not drops
    return TrainingSetup(
        task,
        eval_task,
        plan,
        policy,
        tokenizer,
        lambda metrics: check_step0(metrics, training.loss, precision, same_start, runtime.reporter),
        base_model(
            policy.model, training.models.policy_path, training.models.policy, output.made_from["content of model"]
        ),
        training.loss.beta,
        _same_start(output),
    )


def _tasks(
    runtime: Runtime,
    training: _Training,
    output: Output,
    scorers: tuple[TokenScorer, TokenScorer],
    pad: int,
    pairs: _Pairs,
    plan: Plan,
) -> tuple[PairTask, PairTask | None]:
    """What is trained and what is evaluated, against one frozen reference.

    The reference is read once, before training, unless the objective needs its whole distribution.
    """
    train, test = pairs
    policy, reference = scorers
    loss = training.loss
    if loss.needs.divergence is not None:
        return PairTask(train, reference, loss, pad), PairTask(test, reference, loss, pad) if test else None
    source = {
        "model": output.made_from.get("content of ref_model") or output.made_from["content of model"],
        "dtype": training.session.precision,
    }
    split = training.session.microbatching
    if split.passes is not None:
        # A number of passes per update says nothing of their size.
        config = reference.model.config.get_text_config()  # type: ignore[operator, union-attr]
        split = Microbatching(tokens=runtime.token_budget(config.num_hidden_layers, config.hidden_size))
    reference_pass = ReferencePass(runtime, reference, pad, split, source, training.cache)
    if training.session.precision == "bf16":
        return _aligned_tasks(runtime, training, reference_pass, pad, pairs, plan, policy.packed)
    # A short run over many pairs waits for those that it trains only; a few are computed all, for others to share.
    trained = plan.trained() if len(train) > PAIRS_PER_PART else np.arange(len(train))
    needed = (trained, np.arange(len(test)))
    task, *others = (
        PairTask(_with_reference_logps(split, indices, reference_pass, training.swapped), None, loss, pad)
        for split, indices in zip(pairs, needed, strict=True)
        if split
    )
    return task, others[0] if others else None


def _aligned_tasks(
    runtime: Runtime,
    training: _Training,
    reference_pass: ReferencePass,
    pad: int,
    pairs: _Pairs,
    plan: Plan,
    packed: bool,
) -> tuple[PairTask, PairTask | None]:
    """Tasks whose reference was computed in their own forward passes, where the passes change the numbers."""
    train, test = pairs
    session, world, rank = training.session, runtime.world, runtime.rank
    # A layer that recomputes its activations computes all positions, the reference then too.
    apply_gradient_checkpointing(session, reference_pass.scorer)
    encoded = tokens_of(train)
    passes = planned_passes(plan, session.microbatching, pair_costs(encoded, packed), world, rank)
    logps = reference_pass.run_passes(encoded, passes)
    task = PairTask(train, logps, training.loss, pad)
    if not test:
        return task, None
    encoded = tokens_of(test)
    costs = pair_costs(encoded, packed)
    split = Microbatching(micro=session.eval_batch_size)
    # Where the model is sharded, an empty pass runs on the first pair.
    passes = [examples or [0] for examples in split.passes_of(range(len(test)), costs, world, rank)]
    return task, PairTask(test, reference_pass.run_passes(encoded, passes), training.loss, pad)


def _with_reference_logps(
    pairs: WeightedPairs, needed: IntArray, reference: ReferencePass, swapped: bool
) -> WeightedPairs:
    """The pairs, those that are needed with reference log-probs, which are computed unswapped so that all trainings
    share them.
    """
    tokens = select_pairs(pairs.tokens, needed)
    logps = reference.run(swapped_pairs(tokens) if swapped else tokens)
    return pairs.with_reference(needed, logps.swapped() if swapped else logps)


# Reports ------------------------------------------------------------------------------------------------------------


def _show_banner(reporter: Reporter, training: _Training, policy: TokenScorer) -> None:
    models, loss, adapters = training.models, training.loss, adapters_of(policy.model)
    kind = "" if adapters is None else f" + {'its' if is_adapter(models.policy_path) else 'a new'} adapter"
    reporter.note(
        f"policy = {models.policy}{kind} ({parameter_count(policy.model)}, trainable), reference = {models.reference} "
        "(frozen), dropout off"
    )
    report_adapter(reporter, policy.model)
    metrics_only = "; the reference is used for metrics only" if not loss.needs.reference else ""
    reporter.note(f"loss = {loss.describe()}: {loss.objective.help}{metrics_only}")
    if training.swapped:
        reporter.note("reverse training: in all metrics, 'chosen' is the dataset's rejected response")


def _same_start(output: Output) -> bool:
    """Whether policy and reference start with the same content; one model may be given under two names."""
    start = output.made_from["content of model"]
    return output.made_from.get("content of ref_model", start) == start
