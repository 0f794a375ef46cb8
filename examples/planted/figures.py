"""The figures of merit of the planted experiment: how scores agree with the truth, and which policy says better things.

It knows scored rows and samples, and trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import language
import numpy as np
import torch
from stages import World, read_jsonl, sample_from, values_of
from torch import nn

from tisdpo_cli.files import write_text
from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.logprobs import TokenScorer, compare


def agreement(scored: Path) -> dict[str, float]:
    """How r of the held-out pairs agrees with the truth.

    Returns:
        `auc`: good words, by their sign in place, against bad ones. `spearman`: with the reward of each token.
        `neutral`: spread of r on tokens that are worth nothing, in nats.
    """
    r, kind, worth = [], [], []
    for row in read_jsonl(scored / "test.jsonl"):
        for side in ("chosen", "rejected"):
            ids = [language.ID[word] for word in row[side].split()]
            true = language.rewards([ids], [True])
            r += [-v for v in row[f"{side}_weight"]]
            kind += true.kind[0, : len(ids)].tolist()
            worth += true.tokens[0, : len(ids)].tolist()
    scores, kinds, values = (np.array(column, dtype=float) for column in (r, kind, worth))
    return {
        "auc": auc(scores[kinds > 0], scores[kinds < 0]),
        "spearman": float(np.corrcoef(ranks(scores), ranks(values))[0, 1]),
        "neutral": float(scores[values == 0].std()),
    }


def gate(world: World) -> float:
    """How well the prompt contrast of the starting model tells good words from bad ones, on held-out prompts."""
    return agreement(world.score(world.make_pairs(0.0), "P"))["auc"]


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share their mean rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(sizes) - (sizes + 1) / 2)[group]


def auc(above: np.ndarray, below: np.ndarray) -> float:
    """How often a value of the first kind is above one of the second, ties counted half."""
    placed = ranks(np.concatenate([above, below]))[: len(above)]
    return float((placed.sum() - len(above) * (len(above) - 1) / 2) / (len(above) * len(below)))


@dataclass(frozen=True)
class PolicyResult:
    """What a policy says to the held-out prompts.

    Attributes:
        rewards: [prompts, samples] true rewards.
        kl: KL(policy ‖ SFT) of a response in nats, estimated on the samples.
        tokens: mean tokens of a response.
    """

    rewards: np.ndarray
    kl: float
    tokens: float

    @property
    def reward(self) -> float:
        """Mean reward of a response."""
        return float(self.rewards.mean())


def ask(world: World, policy: nn.Module, sft: nn.Module) -> PolicyResult:
    """Sample from a policy; every policy meets the same chances."""
    prompts = [language.prompt_text("plain", topics) for topics in world.held for _ in range(world.sizes.samples)]
    said = sample_from(policy, prompts, f"held/{world.seed}")
    pad = language.ID[language.PAD]
    rows = [([language.ID[w] for w in p.split()], [s.scored]) for p, s in zip(prompts, said, strict=True)]
    total = 0.0
    for start in range(0, len(rows), 1024):
        batch = collate(rows[start : start + 1024], pad, packed=False)
        with torch.inference_mode():
            kl = compare(TokenScorer(policy), TokenScorer(sft), batch, "policy||reference").kl
        assert kl is not None
        total += float(kl.double().sum())
    rewards = values_of(said).reshape(len(world.held), world.sizes.samples)
    return PolicyResult(rewards, total / len(rows), float(np.mean([len(s.ids) for s in said])))


# How strongly the best policies lean towards reward, and how many responses of each prompt they are made of: beyond
# this leaning, at a KL of 4 nats, too few of them carry the weight.
_LEANINGS, _OF_EACH = np.linspace(0.1, 1.9, 19), 2048


def best_possible(world: World, sft: nn.Module) -> list[tuple[float, float]]:
    """(KL, reward) of the policies that no other can beat at their KL, from none to much of it.

    They are π(y|x) ∝ π_SFT(y|x) exp(λ reward(y)) (eq. 4 of Rafailov et al. 2023), here by weighing samples of the SFT
    model; what a policy of this kind says, and how far it went, is known without training one.
    """
    prompts = [language.prompt_text("plain", topics) for topics in world.held for _ in range(_OF_EACH)]
    values = values_of(sample_from(sft, prompts, f"best/{world.seed}")).reshape(len(world.held), _OF_EACH)
    points = []
    for leaning in _LEANINGS:
        weights = np.exp(leaning * (values - values.max(1, keepdims=True)))
        normalisers = np.log(weights.mean(1)) + leaning * values.max(1)
        reward = (weights * values).sum(1) / weights.sum(1)
        points.append((float((leaning * reward - normalisers).mean()), float(reward.mean())))
    return points


def win_rate(a: PolicyResult, b: PolicyResult) -> float:
    """How often a response of A is worth more than one of B to the same prompt; ties count half."""
    return float(np.mean([auc(x, y) for x, y in zip(a.rewards, b.rewards, strict=True)]))


def write_asked(path: Path, asked: Mapping[int, PolicyResult]) -> None:
    """Keep what was found, by updates."""
    kept = {step: {**asdict(of), "rewards": of.rewards.tolist()} for step, of in asked.items()}
    write_text(path, json.dumps(kept))


def read_asked(path: Path) -> dict[int, PolicyResult]:
    """What `write_asked` kept."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return {int(step): PolicyResult(**{**of, "rewards": np.array(of["rewards"])}) for step, of in kept.items()}
