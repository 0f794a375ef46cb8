"""Generated responses of all policies: their rewards, the comparison with the baseline, and a JSON Lines file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from tisdpo_cli.engine.evaluation.policies import PolicyResult, Prompt
from tisdpo_cli.engine.evaluation.results import PolicyMetrics
from tisdpo_cli.engine.evaluation.rewards import RewardFunction
from tisdpo_cli.engine.evaluation.statistics import bootstrap, interpolate, win_rate


def with_rewards(
    results: Sequence[PolicyResult],
    prompts: Sequence[Prompt],
    samples_per_prompt: int,
    reward_function: RewardFunction,
    seed: int,
) -> list[PolicyResult]:
    """Add the rewards of all responses, their means, and the win rates against the baseline.

    Args:
        results: one per policy.
        prompts: one entry per response of a policy.
        samples_per_prompt: consecutive responses to the same prompt.
        reward_function: called once with all prompts and responses.
        seed: of the bootstrap.
    """
    texts = [text for result in results for text in result.generations.texts]
    values = reward_function([prompt.given for prompt in prompts] * len(results), texts)
    rewards = [values[i * len(prompts) : (i + 1) * len(prompts)] for i in range(len(results))]
    baseline = next((own for result, own in zip(results, rewards, strict=True) if _role(result) == "baseline"), None)
    rewarded = []
    for result, own in zip(results, rewards, strict=True):
        groups = [own[i : i + samples_per_prompt] for i in range(0, len(own), samples_per_prompt)]
        assert result.metrics.samples is not None
        metrics = replace(
            result.metrics,
            samples=replace(result.metrics.samples, reward=bootstrap(groups, seed)),
            against_baseline=win_rate(own, baseline) if baseline and _role(result) == "model" else None,
        )
        rewarded.append(PolicyResult(metrics, replace(result.generations, rewards=own)))
    return rewarded


def _role(result: PolicyResult) -> str:
    return result.metrics.role


def reward_at_baseline_kl(policies: Sequence[PolicyMetrics]) -> float | None:
    """Reward of the checkpoints at the KL of the baseline; the reference counts as the checkpoint before training."""
    baseline: list[tuple[float, float]] = []
    checkpoints: list[tuple[float, float]] = []
    for policy in policies:
        samples = policy.samples
        if samples is not None and samples.reward is not None and samples.kl_per_response is not None:
            points = baseline if policy.role == "baseline" else checkpoints
            points.append((samples.kl_per_response.value, samples.reward.mean))
    several = sum(policy.role == "model" for policy in policies) > 1
    return interpolate(checkpoints, baseline[0][0]) if several and baseline else None


def samples_jsonl(results: Sequence[PolicyResult], prompts: Sequence[Prompt], samples_per_prompt: int) -> str:
    """One line of JSON per prompt (a text, or messages) and response number, with the responses of all policies."""
    lines = []
    for i, prompt in enumerate(prompts):
        responses = [
            {
                "role": result.metrics.role,
                "model": result.metrics.path,
                "response": result.generations.texts[i],
                "tokens": len(result.generations.samples[i].ids),
                "ended": result.generations.samples[i].ended,
                "reward": None if result.generations.rewards is None else result.generations.rewards[i],
            }
            for result in results
        ]
        given = prompt.given if isinstance(prompt.given, str) else prompt.given.prompt
        row = {"row": prompt.row, "sample": i % samples_per_prompt, "prompt": given, "responses": responses}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    return "".join(lines)
