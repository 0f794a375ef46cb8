"""evaluate: compare policies with their reference, with a baseline, and by rewards.

The entry point: settings stop here. It returns plain values (`results`) and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.splits import drop_untrainable, read_split
from tisdpo_cli.engine.arguments import evaluated_split, parses, read_options
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.dry_run import DryRun
from tisdpo_cli.engine.evaluation.policies import EvaluationTask, PolicyRef, Prompt, evaluate_policies
from tisdpo_cli.engine.evaluation.prediction import predict_evaluation
from tisdpo_cli.engine.evaluation.results import Evaluation
from tisdpo_cli.engine.evaluation.rewards import (
    RewardFunction,
    check_renders,
    rewards_from_function,
    rewards_from_model,
)
from tisdpo_cli.engine.evaluation.samples import reward_at_baseline_kl, samples_jsonl, with_rewards
from tisdpo_cli.engine.evaluation.sampling import Sampling, uniform_draws
from tisdpo_cli.engine.training.first_row import of_pair
from tisdpo_cli.engine.training.weighted_pairs import WeightedPair
from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.files import sha256, write_text
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.end_tokens import end_ids
from tisdpo_cli.model.loading import check_fit, positions_of
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.runs.runtime import Runtime, autocast_dtype
from tisdpo_cli.settings.datasets import text_of
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.sources import to_yaml


def evaluate(settings: Evaluate, reporter: Reporter) -> Evaluation | DryRun:
    """Evaluate policies on held-out pairs of a dataset and on responses that they generate.

    Args:
        settings: of evaluate.
        reporter: shows progress and notes.

    Raises:
        TisdpoError: anything the user can fix; see the subclasses in `errors`.

    Returns:
        The evaluation; of several processes only the first one has rewards and the hashes of models. What was found
        out instead, if it was a dry run.
    """
    samples_path = None if settings.samples is None else Path(settings.samples).expanduser()
    if samples_path is not None:
        _check_writable(samples_path)
    policies, reference = _locate_models(settings)
    split, source = evaluated_split(settings.dataset, settings.split, settings.data)
    runtime = Runtime(reporter)
    # Functions of the user run on one process only, the import of their module included.
    functions: list[RewardFunction] = []
    if settings.scorer is not None:
        scorer = settings.scorer
        runtime.on_main(lambda: functions.append(rewards_from_function(scorer)))
    task, sizes = _task(settings, runtime, source, [*policies, reference])
    reward_model = None if settings.reward_model is None else locate_model(settings.reward_model, "--reward-model")
    if reward_model is not None:
        check_renders(reward_model, [prompt.given for prompt in task.prompts])
    if settings.dry_run:
        processes = max(runtime.world, settings.num_processes)
        prediction = predict_evaluation(task, processes, policies, reference, samples_path)
        runtime.reporter.note("dry run: nothing was evaluated")
        row = of_pair(WeightedPair(task.pairs[0]), task.tokenizer, swapped=False)
        return DryRun(to_yaml(settings), {split: sizes}, row, prediction)
    results, perplexities = evaluate_policies(task, policies, reference)
    # The rest is for the first process. The others do not wait for it: a reward function may take longer than a
    # collective call may.
    if reward_model is not None and runtime.main:
        functions.append(rewards_from_model(reward_model, runtime.device, settings.batch_size))
    for function in functions:
        results = with_rewards(results, task.prompts, task.samples_per_prompt, function, settings.seed)
    if samples_path is not None and runtime.main:
        write_text(samples_path, samples_jsonl(results, task.prompts, task.samples_per_prompt))
        reporter.note(f"wrote {settings.samples}")
    metrics = [result.metrics for result in results]
    return Evaluation(
        dataset=text_of(settings.dataset),
        split=split,
        pairs=len(task.pairs),
        prompts=len({prompt.row for prompt in task.prompts}),
        policies=metrics,
        reference_perplexity=perplexities,
        reward_at_baseline_kl=reward_at_baseline_kl(metrics),
        provenance={
            "models": {model.name: hash_model(model.path) for model in [*policies, reference]} if runtime.main else {},
            "dataset": sha256(*source.paths),
            "settings": settings.fingerprint(),
            "versions": versions(),
        },
    )


# Settings as plain arguments -----------------------------------------------------------------------------------


def _locate_models(settings: Evaluate) -> tuple[list[PolicyRef], PolicyRef]:
    """The models and the baseline; the reference."""

    def locate(role: str, option: str, name: str) -> PolicyRef:
        return PolicyRef(role, option, name, locate_model(name, option, settings.trust_remote_code))

    policies = [locate("model", "--model", name) for name in settings.models()]
    if settings.baseline is not None:
        policies.append(locate("baseline", "--baseline", settings.baseline))
    return policies, locate("reference", "--ref-model", settings.ref_model)


def _task(
    settings: Evaluate, runtime: Runtime, source: DatasetSplit, models: Sequence[PolicyRef]
) -> tuple[EvaluationTask, dict[str, Any]]:
    """The task, checked as far as possible without loading weights; counts and lengths of the split."""
    trust, limit, per_prompt = settings.trust_remote_code, settings.max_new_tokens, settings.samples_per_prompt
    tokenizer = _shared_tokenizer(models, settings.data.max_length, trust, parses(settings.data))
    options = read_options(settings.data, runtime.reporter)
    chat = ChatEncoder(tokenizer, options.chat)
    split = read_split(source, options, vocabulary_of(tokenizer, chat), settings.eval_pairs)
    kept, dropped = drop_untrainable(split)
    for warning in split.warnings:
        runtime.reporter.warn(warning)
    for notice in (*tokenizer.notices, *chat.notices(), *split.notices, *dropped):
        runtime.reporter.note(notice)
    first_pairs = {tuple(pair.prompt): pair for pair in reversed(split.encoded)}
    prompted = sorted(first_pairs.values(), key=lambda pair: pair.index)[: settings.sample_prompts]
    _check_positions(models, max((len(pair.prompt) for pair in prompted), default=0), limit, trust)
    given = {pair.index: pair.conversation or pair.prompt for pair in split.pairs}
    prompts = [Prompt(pair.index, given[pair.index], pair.prompt) for pair in prompted for _ in range(per_prompt)]
    keys = [(pair.index, number) for pair in prompted for number in range(per_prompt)]
    autocast = autocast_dtype(runtime.precision(settings.dtype, scoring=True))
    # The same for all models, which share a tokenizer.
    ends = {tokenizer.eos, *split.stops}.union(*(end_ids(model.path) for model in models))
    task = EvaluationTask(
        runtime=runtime,
        tokenizer=tokenizer,
        pairs=kept,
        prompts=prompts,
        draws=uniform_draws(settings.seed, keys, limit) if keys else torch.empty(0, limit),
        sampling=Sampling(ends, tokenizer.pad, limit, settings.temperature, autocast),
        samples_per_prompt=per_prompt,
        batch_size=settings.batch_size,
        beta=settings.beta,
        markers=frozenset(chat.template.markers.values() if chat.used else ()),
        sample_reference=settings.scorer is not None or settings.reward_model is not None,
        trust_remote_code=trust,
    )
    return task, split.sizes


# Checks before a model is loaded -------------------------------------------------------------------------------


def _check_writable(path: Path) -> None:
    where = f"--samples {path}"
    if path.is_dir():
        raise UsageError("is a directory", where=where, fix="name a file")
    if not path.parent.is_dir():
        raise UsageError(f"no such directory: {path.parent}", where=where, fix="create it first")


def _shared_tokenizer(
    models: Sequence[PolicyRef], max_length: int, trust_remote_code: bool, parse_data: bool
) -> Tokenizer:
    """The tokenizer of all models, which must be the same because they are compared token by token."""
    tokenizer = load_tokenizer(models[0].path, trust_remote_code, parse_data)
    for model in models:
        own = tokenizer if model is models[0] else load_tokenizer(model.path, trust_remote_code, parse_data)
        if own.digest != tokenizer.digest:
            raise ModelError(
                f"has another tokenizer than {models[0].name}",
                where=f"{model.option} {model.name}",
                fix="compare models that share a tokenizer",
            )
        check_fit(model.path, tokenizer, max_length, trust_remote_code)
    return tokenizer


def _check_positions(
    models: Sequence[PolicyRef], prompt_tokens: int, max_new_tokens: int, trust_remote_code: bool
) -> None:
    """Check that the longest prompt and its response fit into every model; 0 prompt tokens stand for no prompt."""
    for model in models if prompt_tokens else ():
        positions = positions_of(model.path, trust_remote_code)
        if positions is not None and prompt_tokens + max_new_tokens > positions:
            raise UsageError(
                f"with a prompt of {prompt_tokens} tokens this exceeds the {positions} positions of {model.name}",
                where=f"--max-new-tokens {max_new_tokens}",
                fix=f"lower it to {positions - prompt_tokens}"
                if positions > prompt_tokens
                else "lower --max-prompt-length",
            )
