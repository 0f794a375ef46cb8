"""Policies asked: their log-probs and KL on the pairs of a dataset, and responses of their own.

One policy is in memory at a time, beside the reference. It knows no rewards but the implicit ones.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.evaluation.results import PairMetrics, PolicyMetrics, SampleMetrics
from tisdpo_cli.engine.evaluation.sampling import Sample, Sampling, sample_all
from tisdpo_cli.engine.evaluation.statistics import mean, perplexity, ratio, repetition
from tisdpo_cli.errors import RankError
from tisdpo_cli.method.objectives import response_sums
from tisdpo_cli.model.loading import load_model, move_to_device
from tisdpo_cli.model.logprobs import TokenScorer, batch_for, compare
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Progress
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.settings.evaluate import Evaluate

_KL = "policy||reference"


@dataclass(frozen=True)
class Named:
    """A policy or the reference: what the user calls it, and where it is."""

    role: str
    option: str
    name: str
    path: Path


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer: the first row that has it, its text, its tokens as they are cut for that row."""

    row: int
    text: str
    ids: list[int]


@dataclass(frozen=True)
class Task:
    """What every policy is asked, the same for all.

    Attributes:
        prompts: each as often as it is answered.
        drawn: [prompts, new tokens], the chance that goes into each response.
    """

    settings: Evaluate
    runtime: Runtime
    tokenizer: Tokenizer
    pairs: list[EncodedPair]
    prompts: list[Prompt]
    draws: Tensor
    sampling: Sampling


@dataclass(frozen=True)
class Generations:
    """The responses of a policy, one to each prompt of the task; the KL of each summed over its tokens."""

    samples: list[Sample]
    texts: list[str]
    kl: list[float]
    rewards: list[float] | None = None


@dataclass(frozen=True)
class PolicyResult:
    """The facts of one policy, and what it answered."""

    facts: PolicyMetrics
    answers: Generations


def evaluate_policies(
    task: Task, paths: Sequence[Named], reference: Named
) -> tuple[list[PolicyResult], dict[str, float]]:
    """Every policy on the pairs and asked for responses; and the perplexities of the reference.

    Where responses are rewarded the reference answers too, last: it is the policy whose KL is 0.
    """
    ref, asked, perplexities = _load(task, reference), list[PolicyResult](), dict[str, float]()
    rewarded = task.settings.scorer is not None or task.settings.reward_model is not None
    rows = len(paths) * (2 * len(task.pairs) + len(task.prompts)) + rewarded * len(task.prompts)
    with task.runtime.reporter.progress("asking all policies", rows, 0, "evaluating") as progress:
        for named in paths:
            policy = _load(task, named)
            on_pairs, perplexities = _on_pairs(task, policy, ref, progress)
            answers = _answers(task, policy, ref, progress)
            asked.append(
                PolicyResult(PolicyMetrics(named.role, named.name, on_pairs, _on_samples(task, answers)), answers)
            )
            del policy
            gc.collect()
        if rewarded:
            answers = _answers(task, ref, ref, progress)
            asked.append(
                PolicyResult(PolicyMetrics(reference.role, reference.name, None, _on_samples(task, answers)), answers)
            )
    return asked, perplexities


def _load(task: Task, named: Named) -> TokenScorer:
    model = move_to_device(load_model(named.path, task.settings.trust_remote_code), task.runtime.device)
    model.requires_grad_(False)
    return TokenScorer(model, task.sampling.autocast)


def _compared(
    task: Task, policy: TokenScorer, reference: TokenScorer, rows: Sequence[tuple[list[int], list[int]]], done: Progress
) -> list[tuple[float, float, float]]:
    """Of each row (prompt, response): the sums over its response of log π, of log π_ref, and of KL(π ‖ π_ref)."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i][0]) - len(rows[i][1]))
    found: dict[int, tuple[float, float, float]] = {}
    for start in range(0, len(order), task.settings.batch_size):
        some = order[start : start + task.settings.batch_size]
        batch = batch_for(policy, [(rows[i][0], [rows[i][1]]) for i in some], task.tokenizer.pad)
        with torch.inference_mode():
            compared = compare(policy, reference, batch, _KL)
            assert compared.kl is not None
            columns = (compared.logps, compared.ref_logps, compared.kl)
            sums = [response_sums(column, batch.response_ids, len(some)).tolist() for column in columns]
        if not all(math.isfinite(value) for column in sums for value in column):
            raise RankError("a log-prob is not finite", fix="use --dtype float32")
        found |= zip(some, zip(*sums, strict=True), strict=True)
        done.advance(len(some), {})
    return [found[i] for i in range(len(rows))]


def _on_pairs(
    task: Task, policy: TokenScorer, reference: TokenScorer, done: Progress
) -> tuple[PairMetrics, dict[str, float]]:
    """The policy on the pairs of the dataset, and the perplexities of the reference there."""
    sides = {"chosen": [pair.chosen.ids for pair in task.pairs], "rejected": [pair.rejected.ids for pair in task.pairs]}
    prompts = [pair.prompt for pair in task.pairs]
    both = [*zip(prompts, sides["chosen"], strict=True), *zip(prompts, sides["rejected"], strict=True)]
    sums = _compared(task, policy, reference, both, done)
    tokens = {side: sum(map(len, ids)) for side, ids in sides.items()}
    found = dict(zip(sides, (sums[: len(prompts)], sums[len(prompts) :]), strict=True))
    beta = task.settings.beta
    rewards = {side: [beta * (ours - theirs) for ours, theirs, _ in rows] for side, rows in found.items()}
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    means = {side: math.fsum(values) / len(values) for side, values in rewards.items()}
    kl = {side: math.fsum(k for _, _, k in rows) / tokens[side] for side, rows in found.items()}
    ours = {side: perplexity(math.fsum(p for p, _, _ in rows), tokens[side]) for side, rows in found.items()}
    theirs = {side: perplexity(math.fsum(p for _, p, _ in rows), tokens[side]) for side, rows in found.items()}
    on_pairs = PairMetrics(
        accuracy=sum(m > 0 for m in margins) / len(margins),
        ties=sum(m == 0 for m in margins) / len(margins),
        margin=mean(margins),
        **{f"reward_{side}": value for side, value in means.items()},
        **{f"kl_{side}": value for side, value in kl.items()},
        **{f"perplexity_{side}": value for side, value in ours.items()},
    )
    return on_pairs, theirs


def _answers(task: Task, policy: TokenScorer, reference: TokenScorer, done: Progress) -> Generations:
    """Responses of a policy to all prompts, the same chance for every policy."""
    prompts = [prompt.ids for prompt in task.prompts]
    size = task.settings.batch_size
    samples = sample_all(policy.model, prompts, task.draws, task.sampling, size) if prompts else []
    rows = [(ids, said.scored(task.tokenizer.eos)) for ids, said in zip(prompts, samples, strict=True)]
    kl = [total for _, _, total in _compared(task, policy, reference, rows, done)]
    texts = [task.tokenizer.text(said.ids) for said in samples]
    return Generations(samples, texts, kl)


def _on_samples(task: Task, answers: Generations) -> SampleMetrics | None:
    samples = answers.samples
    if not samples:
        return None
    n, own = len(samples), task.sampling.temperature == 1
    counts = [len(said.scored(task.tokenizer.eos)) for said in samples]
    return SampleMetrics(
        samples=n,
        length=sum(len(said.ids) for said in samples) / n,
        ended=sum(said.ended for said in samples) / n,
        repetition=math.fsum(repetition(said.ids) for said in samples) / n,
        kl_per_token=ratio(answers.kl, counts) if own else None,
        kl_per_response=mean(answers.kl) if own else None,
        reward=None,
    )
