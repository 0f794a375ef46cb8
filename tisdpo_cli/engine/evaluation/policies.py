"""Evaluate policies: log-probs and KL on the pairs of a dataset, and responses that they generate.

One policy is in memory at a time, next to the reference. Batches are the same on one process or several, which take
them in turns; every process gets all results. It knows no settings, and no rewards but the implicit ones.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.evaluation.results import PairMetrics, PolicyMetrics, SampleMetrics
from tisdpo_cli.engine.evaluation.sampling import Sample, Sampling, batches_by_length, sample
from tisdpo_cli.engine.evaluation.statistics import mean, perplexity, ratio, repetition
from tisdpo_cli.errors import Activity, RankError, UsageError, naming_out_of_memory
from tisdpo_cli.method.objectives import response_sums
from tisdpo_cli.model.adapters import remove_adapter
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.logprobs import TokenScorer, batch_for, compare
from tisdpo_cli.model.shared_models import SharedModels
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Progress
from tisdpo_cli.runs.runtime import Runtime

T = TypeVar("T")

_KL = "policy||reference"


@dataclass(frozen=True)
class PolicyRef:
    """A policy or the reference, before it is loaded.

    Attributes:
        role: `model`, `baseline` or `reference`.
        option: that names it.
        name: as given by the user.
        path: its directory.
    """

    role: str
    option: str
    name: str
    path: Path


@dataclass(frozen=True)
class Prompt:
    """A prompt to respond to.

    Attributes:
        row: the first row with this prompt.
        given: text of the dataset, or its conversation.
        ids: truncated as for that row.
    """

    row: int
    given: str | Conversation
    ids: list[int]


@dataclass(frozen=True)
class EvaluationTask:
    """What every policy is evaluated on, the same for all.

    Attributes:
        pairs: to compute log-probs and KL on.
        prompts: one entry per response to generate.
        draws: [prompts, new tokens] random numbers behind each response.
        samples_per_prompt: consecutive entries of `prompts` with the same prompt.
        batch_size: rows per forward pass.
        beta: of the implicit rewards.
        markers: ids to leave out of the texts of responses: in conversations they stand for no text.
        sample_reference: whether the reference generates responses too.
        trust_remote_code: whether to run code from model repositories.
    """

    runtime: Runtime
    tokenizer: Tokenizer
    pairs: Sequence[EncodedPair]
    prompts: list[Prompt]
    draws: Tensor
    sampling: Sampling
    samples_per_prompt: int
    batch_size: int
    beta: float
    markers: frozenset[int]
    sample_reference: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Generations:
    """Responses of a policy, one per entry of the prompts of the task.

    Attributes:
        texts: of the responses; without special tokens if they answer a conversation.
        kl: Σ KL(policy ‖ reference) over the tokens of each response.
        rewards: of each response, if there is a reward source.
    """

    samples: list[Sample]
    texts: list[str]
    kl: list[float]
    rewards: list[float] | None = None


@dataclass(frozen=True)
class PolicyResult:
    """The metrics of a policy and the responses that it generated."""

    metrics: PolicyMetrics
    generations: Generations


def evaluate_policies(
    task: EvaluationTask, policies: Sequence[PolicyRef], reference: PolicyRef
) -> tuple[list[PolicyResult], dict[str, float]]:
    """Evaluate policies one after the other.

    Args:
        task: what to evaluate on.
        policies: models and baseline.
        reference: of KL and implicit rewards; where it generates responses too it comes last, as the policy of KL 0.

    Returns:
        The result of each policy, and the perplexity of the reference by side of the pairs.
    """
    # Adapters of the reference's base model are put on it.
    paths = [reference.path, *(policy.path for policy in policies)]
    models = SharedModels(task.runtime.device, task.trust_remote_code, paths)
    reference_scorer = _scorer(task, reference, models.load(reference.path))
    results, perplexities = list[PolicyResult](), dict[str, float]()
    rows = len(policies) * (2 * len(task.pairs) + len(task.prompts)) + task.sample_reference * len(task.prompts)
    with task.runtime.reporter.progress("evaluating", rows, 0, "responses") as progress:
        for policy in policies:
            scorer = _scorer(task, policy, models.load(policy.path, keep=False))
            on_pairs, perplexities = _evaluate_pairs(task, scorer, reference_scorer, progress)
            generations = _generate(task, scorer, reference_scorer, progress)
            results.append(_result(task, policy, on_pairs, generations))
            remove_adapter(scorer.model, scorer.adapter)
            del scorer
            gc.collect()
        if task.sample_reference:
            generations = _generate(task, reference_scorer, reference_scorer, progress)
            results.append(_result(task, reference, None, generations))
    return results, perplexities


def _result(
    task: EvaluationTask, policy: PolicyRef, on_pairs: PairMetrics | None, generations: Generations
) -> PolicyResult:
    metrics = PolicyMetrics(policy.role, policy.name, on_pairs, _sample_metrics(task, generations))
    return PolicyResult(metrics, generations)


def _scorer(task: EvaluationTask, policy: PolicyRef, model: nn.Module) -> TokenScorer:
    longest = max((pair.longest for pair in task.pairs), default=0)
    generated = max((len(prompt.ids) + task.sampling.new_tokens for prompt in task.prompts), default=0)
    autocast, note = task.sampling.autocast, task.runtime.reporter.note
    scorer = make_scorer(model, "separate", autocast, max(longest, generated), note, policy.name)
    _check_generated(scorer, policy, generated, task.sampling.new_tokens)
    return scorer


def _check_generated(scorer: TokenScorer, policy: PolicyRef, longest: int, new_tokens: int) -> None:
    """Refuse to generate beyond a length from which the positions of all earlier tokens change."""
    limit = min((limit for limit, _ in scorer.rule.limits if limit), default=longest)
    if longest > limit:
        raise UsageError(
            f"with the longest prompt this exceeds {limit} tokens, where the rope scaling of {policy.name} changes; "
            "responses across that length cannot be generated",
            where=f"--max-new-tokens {new_tokens}",
            fix="lower it or --max-prompt-length, or use --sample-prompts 0",
        )


def _response_sums(
    task: EvaluationTask,
    policy: TokenScorer,
    reference: TokenScorer,
    rows: Sequence[tuple[list[int], list[int]]],
    progress: Progress,
    activity: Activity = "",
) -> list[tuple[float, float, float]]:
    """Sums over the response of each row (prompt, response): log π, log π_ref, KL(π ‖ π_ref)."""

    def of_batch(indices: Sequence[int]) -> Sequence[tuple[float, float, float]]:
        batch = batch_for(policy, [(rows[i][0], [rows[i][1]]) for i in indices], task.tokenizer.pad)
        with torch.inference_mode():
            compared = compare(policy, reference, batch, _KL)
            assert compared.kl is not None
            per_token = (compared.logps, compared.ref_logps, compared.kl)
            columns = [response_sums(values, batch.response_ids, len(indices)).tolist() for values in per_token]
        if not all(math.isfinite(value) for column in columns for value in column):
            raise RankError("a log-prob is not finite", fix="use --dtype float32")
        return list(zip(*columns, strict=True))

    batches = batches_by_length([len(prompt) + len(response) for prompt, response in rows], task.batch_size)
    return _shared(task.runtime, batches, of_batch, activity, lambda done: progress.advance(done, {}))


def _shared(
    runtime: Runtime,
    batches: Sequence[Sequence[int]],
    work: Callable[[Sequence[int]], Sequence[T]],
    activity: Activity,
    on_rows_done: Callable[[int], None] = lambda _rows: None,
) -> list[T]:
    """The results of all rows, in order; the processes take the batches in turns."""

    @naming_out_of_memory(activity)
    def mine() -> list[tuple[int, T]]:
        found: list[tuple[int, T]] = []
        for number, indices in enumerate(batches):
            if number % runtime.world == runtime.rank:
                found += zip(indices, work(indices), strict=True)
            on_rows_done(len(indices))
        return found

    by_row = dict(runtime.on_all(mine))
    return [by_row[i] for i in range(len(by_row))]


def _evaluate_pairs(
    task: EvaluationTask, policy: TokenScorer, reference: TokenScorer, progress: Progress
) -> tuple[PairMetrics, dict[str, float]]:
    """Metrics of the policy on the pairs, and the perplexity of the reference by side."""
    responses = {
        "chosen": [pair.chosen.ids for pair in task.pairs],
        "rejected": [pair.rejected.ids for pair in task.pairs],
    }
    prompts = [pair.prompt for pair in task.pairs]
    rows = [row for ids in responses.values() for row in zip(prompts, ids, strict=True)]
    sums = _response_sums(task, policy, reference, rows, progress)
    by_side = dict(zip(responses, (sums[: len(prompts)], sums[len(prompts) :]), strict=True))
    tokens = {side: sum(map(len, ids)) for side, ids in responses.items()}
    rewards = {side: [task.beta * (ours - theirs) for ours, theirs, _ in rows] for side, rows in by_side.items()}
    margins = [c - r for c, r in zip(rewards["chosen"], rewards["rejected"], strict=True)]
    means = {side: math.fsum(values) / len(values) for side, values in rewards.items()}
    kl = {side: math.fsum(k for _, _, k in rows) / tokens[side] for side, rows in by_side.items()}
    ours = {side: perplexity(math.fsum(p for p, _, _ in rows), tokens[side]) for side, rows in by_side.items()}
    theirs = {side: perplexity(math.fsum(p for _, p, _ in rows), tokens[side]) for side, rows in by_side.items()}
    metrics = PairMetrics(
        accuracy=sum(m > 0 for m in margins) / len(margins),
        ties=sum(m == 0 for m in margins) / len(margins),
        margin=mean(margins),
        **{f"reward_{side}": value for side, value in means.items()},
        **{f"kl_{side}": value for side, value in kl.items()},
        **{f"perplexity_{side}": value for side, value in ours.items()},
    )
    return metrics, theirs


def _generate(task: EvaluationTask, policy: TokenScorer, reference: TokenScorer, progress: Progress) -> Generations:
    """Responses of a policy to all prompts, from the same random numbers for every policy."""
    prompts = [prompt.ids for prompt in task.prompts]

    def sampled(rows: Sequence[int]) -> list[Sample]:
        return sample(policy.model, [prompts[i] for i in rows], task.draws[list(rows)], task.sampling)

    with policy.using_adapter():
        batches = batches_by_length(list(map(len, prompts)), task.batch_size)
        samples = _shared(task.runtime, batches, sampled, "generating")
    rows = [(ids, sample.scored) for ids, sample in zip(prompts, samples, strict=True)]
    kl = [total for _, _, total in _response_sums(task, policy, reference, rows, progress, "generating")]
    texts = [response_text(task, prompt, sample.ids) for prompt, sample in zip(task.prompts, samples, strict=True)]
    return Generations(samples, texts, kl)


def response_text(task: EvaluationTask, prompt: Prompt, ids: Sequence[int]) -> str:
    """The text of a response; that of a message has no special tokens, and no blanks that join it to its header."""
    if isinstance(prompt.given, str):
        return task.tokenizer.text(ids)
    return task.tokenizer.text([i for i in ids if i not in task.markers]).strip()


def _sample_metrics(task: EvaluationTask, generations: Generations) -> SampleMetrics | None:
    samples = generations.samples
    if not samples:
        return None
    n, on_policy = len(samples), task.sampling.temperature == 1
    counts = [len(sample.scored) for sample in samples]
    return SampleMetrics(
        samples=n,
        length=sum(len(sample.ids) for sample in samples) / n,
        ended=sum(sample.ended for sample in samples) / n,
        repetition=math.fsum(repetition(sample.ids) for sample in samples) / n,
        kl_per_token=ratio(generations.kl, counts) if on_policy else None,
        kl_per_response=mean(generations.kl) if on_policy else None,
        reward=None,
    )
