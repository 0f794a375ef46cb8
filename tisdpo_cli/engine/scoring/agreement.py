"""How well scores in bf16 agree with those in float32, on a sample of rows.

Contrastive models differ from their start by small updates; the difference of their log-probs can be smaller than the
rounding of bf16.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.scoring.scorer import ScoringConfig, Side, extent, score_pairs
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.shared_models import SharedModels
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.runs.runtime import Runtime

_ROWS = 8


class Agreement(NamedTuple):
    """Scores in bf16 against float32.

    Attributes:
        rows: pairs in the sample.
        tokens: scored tokens in the sample.
        correlation: Pearson's, of r; None where r does not vary.
        signs: share of tokens whose r has the same sign.
    """

    rows: int
    tokens: int
    correlation: float | None
    signs: float


def bf16_agreement(
    runtime: Runtime, config: ScoringConfig, tokenizer: Tokenizer, sides: Sequence[Side], pairs: Sequence[EncodedPair]
) -> Agreement:
    """Score a sample of pairs, spread over all, in both precisions; one model is in memory at a time."""
    sample = [pairs[i * len(pairs) // _ROWS] for i in range(_ROWS)] if len(pairs) > _ROWS else list(pairs)
    reach = extent(sample, sides)
    longest = reach.longest + max(reach.added.values())
    logps: dict[tuple[str, str], Tensor] = {}
    for path in dict.fromkeys(side.path for side in sides):
        model = SharedModels(runtime.device, config.trust_remote_code, [s.path for s in sides]).load(path)
        for name, dtype in (("float32", None), ("bf16", torch.bfloat16)):
            scorer = make_scorer(model, config.layout, dtype, longest, lambda _: None, str(path))
            for side in sides:
                if side.path == path:
                    parts = [score_pairs(scorer, side, [pair], tokenizer)[0] for pair in sample]
                    logps[name, side.name] = torch.cat(parts)
    exact, rounded = (
        logps[name, sides[0].name].double() - logps[name, sides[1].name].double() for name in ("float32", "bf16")
    )
    return Agreement(
        len(sample), len(exact), _correlation(exact, rounded), float((exact.sign() == rounded.sign()).double().mean())
    )


def _correlation(a: Tensor, b: Tensor) -> float | None:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float((a * b).sum()) / size if size else None
