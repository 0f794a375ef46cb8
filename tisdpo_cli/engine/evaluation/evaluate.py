"""evaluate: policies held against their reference, each other, and whoever gives rewards.

It makes facts; how they look is not its business.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.splits import drop_untrainable, read_split
from tisdpo_cli.engine.arguments import read_options, vocabulary_of
from tisdpo_cli.engine.evaluation.policies import Named, PolicyResult, Prompt, Task, evaluate_policies
from tisdpo_cli.engine.evaluation.results import Evaluation, PolicyMetrics
from tisdpo_cli.engine.evaluation.rewards import Rewarder, model_rewarder, scorer_rewarder
from tisdpo_cli.engine.evaluation.sampling import Sampling, uniform_draws
from tisdpo_cli.engine.evaluation.statistics import between, bootstrap, win_rate
from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.files import sha256, write_text
from tisdpo_cli.model.directory import hash_model, locate_model
from tisdpo_cli.model.loading import check_fit, positions_of
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.runs.runtime import Runtime, autocast_dtype
from tisdpo_cli.settings.evaluate import Evaluate


def evaluate(settings: Evaluate, reporter: Reporter) -> Evaluation:
    """Evaluate policies on the held-out pairs of a dataset and on responses of their own.

    Raises:
        TisdpoError: anything the user can do something about; see the subclasses in `errors`.
    """
    if settings.samples is not None:
        _check_place(Path(settings.samples).expanduser())
    policies, reference = _policies(settings)
    files = find_splits(settings.dataset)
    split = _split(settings, files)
    rewarder = scorer_rewarder(settings.scorer) if settings.scorer is not None else None
    runtime = Runtime(reporter)
    if runtime.world > 1:
        raise UsageError("evaluate runs on one process", fix="start it without a launcher")
    task = _task(settings, runtime, files[split], [*policies, reference])
    asked, perplexities = evaluate_policies(task, policies, reference)
    if settings.reward_model is not None:
        judge = locate_model(settings.reward_model, "--reward-model")
        rewarder = model_rewarder(judge, runtime.device, settings.batch_size)
    if rewarder is not None:
        asked = _rewarded(task, asked, rewarder)
    if settings.samples is not None:
        write_text(Path(settings.samples).expanduser(), _side_by_side(task, asked))
        reporter.note(f"written: {settings.samples}")
    facts = [one.facts for one in asked]
    return Evaluation(
        dataset=settings.dataset,
        split=split,
        pairs=len(task.pairs),
        prompts=len({prompt.row for prompt in task.prompts}),
        policies=facts,
        reference_perplexity=perplexities,
        reward_at_baseline_kl=_at_baseline_kl(facts),
        provenance={
            "models": {named.name: hash_model(named.path) for named in [*policies, reference]},
            "dataset": sha256(files[split]),
            "settings": settings.fingerprint(),
            "versions": versions(),
        },
    )


# Checked before a model is loaded ---------------------------------------------------------------------------------


def _check_place(samples: Path) -> None:
    if samples.is_dir() or not samples.parent.is_dir():
        why = "is a directory" if samples.is_dir() else "there is no such directory to write into"
        raise UsageError(why, where=f"--samples {samples}")


def _policies(settings: Evaluate) -> tuple[list[Named], Named]:
    """The models and the baseline, and the reference."""

    def named(role: str, option: str, name: str) -> Named:
        return Named(role, option, name, locate_model(name, option, settings.trust_remote_code))

    policies = [named("model", "--model", name) for name in settings.models()]
    if settings.baseline is not None:
        policies.append(named("baseline", "--baseline", settings.baseline))
    return policies, named("reference", "--ref-model", settings.ref_model)


def _split(settings: Evaluate, files: dict[str, Path]) -> str:
    name = settings.split or ("test" if "test" in files else "train")
    if name not in files:
        raise UsageError(f"no such split; there is {' and '.join(files)}", where=f"--split {name}")
    return name


def _task(settings: Evaluate, runtime: Runtime, file: Path, models: Sequence[Named]) -> Task:
    """What is asked, checked as far as no weights are needed."""
    tokenizer = _shared_tokenizer(settings, models)
    split = read_split(file, read_options(settings.data), vocabulary_of(tokenizer), settings.eval_pairs)
    kept, dropped = drop_untrainable(split)
    for notice in (*tokenizer.notices, *split.notices, *dropped):
        runtime.reporter.note(notice)
    first = {tuple(pair.prompt): pair for pair in reversed(split.encoded)}
    asked = sorted(first.values(), key=lambda pair: pair.index)[: settings.sample_prompts]
    _check_room(settings, max((len(pair.prompt) for pair in asked), default=0), models)
    limit, each = settings.max_new_tokens, range(settings.samples_per_prompt)
    prompts = [Prompt(pair.index, split.pairs[pair.index].prompt, pair.prompt) for pair in asked for _ in each]
    keys = [(pair.index, number) for pair in asked for number in each]
    draws = uniform_draws(settings.seed, keys, limit) if keys else torch.empty(0, limit)
    compute = autocast_dtype(runtime.precision(settings.dtype, scoring=True))
    how = Sampling(tokenizer.eos, tokenizer.pad, limit, settings.temperature, compute)
    return Task(settings, runtime, tokenizer, kept, prompts, draws, how)


def _shared_tokenizer(settings: Evaluate, models: Sequence[Named]) -> Tokenizer:
    """The tokenizer of all models, which must be one: they are compared token by token."""
    tokenizer = load_tokenizer(models[0].path, settings.trust_remote_code)
    for named in models:
        own = tokenizer if named is models[0] else load_tokenizer(named.path, settings.trust_remote_code)
        if own.digest != tokenizer.digest:
            where, fix = f"{named.option} {named.name}", "compare models that share one"
            raise ModelError(f"has another tokenizer than {models[0].name}", where=where, fix=fix)
        check_fit(named.path, tokenizer, settings.data.max_length, settings.trust_remote_code)
    return tokenizer


def _check_room(settings: Evaluate, prompt: int, models: Sequence[Named]) -> None:
    """The longest prompt and its response must fit into every model."""
    for named in models if prompt else ():
        positions = positions_of(named.path, settings.trust_remote_code)
        if positions is not None and prompt + settings.max_new_tokens > positions:
            raise UsageError(
                f"with a prompt of {prompt} tokens that is beyond the {positions} positions of {named.name}",
                where=f"--max-new-tokens {settings.max_new_tokens}",
                fix=f"lower it to {positions - prompt}" if positions > prompt else "lower --max-prompt-length",
            )


# What is said of the responses ------------------------------------------------------------------------------------


def _rewarded(task: Task, asked: Sequence[PolicyResult], rewarder: Rewarder) -> list[PolicyResult]:
    """The same with rewards, and with the duels against the baseline."""
    prompts = [prompt.text for prompt in task.prompts]
    texts = [text for one in asked for text in one.answers.texts]
    given = rewarder(prompts * len(asked), texts)
    rewards = [given[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(asked))]
    baseline = next((mine for one, mine in zip(asked, rewards, strict=True) if one.facts.role == "baseline"), None)
    each = task.settings.samples_per_prompt
    made = []
    for one, mine in zip(asked, rewards, strict=True):
        groups = [mine[i : i + each] for i in range(0, len(mine), each)]
        assert one.facts.samples is not None
        facts = replace(
            one.facts,
            samples=replace(one.facts.samples, reward=bootstrap(groups, task.settings.seed)),
            against_baseline=win_rate(mine, baseline) if baseline and one.facts.role == "model" else None,
        )
        made.append(PolicyResult(facts, replace(one.answers, rewards=mine)))
    return made


def _at_baseline_kl(policies: Sequence[PolicyMetrics]) -> float | None:
    """What the checkpoints earn at the KL of the baseline; the reference is the checkpoint before any update."""
    points = {"baseline": list[tuple[float, float]](), "checkpoints": list[tuple[float, float]]()}
    for policy in policies:
        of = policy.samples
        if of is not None and of.reward is not None and of.kl_per_response is not None:
            kind = "baseline" if policy.role == "baseline" else "checkpoints"
            points[kind].append((of.kl_per_response.value, of.reward.mean))
    several = sum(policy.role == "model" for policy in policies) > 1
    return between(points["checkpoints"], points["baseline"][0][0]) if several and points["baseline"] else None


def _side_by_side(task: Task, asked: Sequence[PolicyResult]) -> str:
    """One line of JSON for each prompt and number, with the responses of all policies."""
    each = task.settings.samples_per_prompt
    lines = []
    for i, prompt in enumerate(task.prompts):
        responses = [
            {
                "role": one.facts.role,
                "model": one.facts.path,
                "response": one.answers.texts[i],
                "tokens": len(one.answers.samples[i].ids),
                "ended": one.answers.samples[i].ended,
                "reward": None if one.answers.rewards is None else one.answers.rewards[i],
            }
            for one in asked
        ]
        row = {"row": prompt.row, "sample": i % each, "prompt": prompt.text, "responses": responses}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
