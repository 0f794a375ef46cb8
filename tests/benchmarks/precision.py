"""How far log-probs depend on precision and on the rows that share a forward pass, on a model and pairs of your own.

    python tests/benchmarks/precision.py MODEL PAIRS.jsonl --pairs 32

Per token in nats, and per pair the margin Σ (chosen) − Σ (rejected) of these differences: what DPO takes for a
preference where policy and reference are the same model.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from tisdpo_cli.data.tokens import EncodedPair, Limits, encode_pairs
from tisdpo_cli.engine.chat import vocabulary_of
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.loading import load_model, move_to_device
from tisdpo_cli.model.logprobs import batch_for, score
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer

Logps = list[tuple[Tensor, Tensor]]


def logps(
    model: torch.nn.Module, tokenizer: Tokenizer, pairs: Sequence[EncodedPair], size: int, dtype: torch.dtype | None
) -> Logps:
    """Log-probs of both responses of each pair, `size` pairs in a forward pass."""
    scorer = make_scorer(model, "auto", dtype, max(pair.longest for pair in pairs), print, "model")
    found: Logps = []
    for start in range(0, len(pairs), size):
        some = pairs[start : start + size]
        groups = [(pair.prompt, (pair.chosen.ids, pair.rejected.ids)) for pair in some]
        with torch.no_grad():
            values = score(scorer, batch_for(scorer, groups, tokenizer.pad))
        lengths = [len(pair.chosen.ids) for pair in some] + [len(pair.rejected.ids) for pair in some]
        parts = values.split(lengths)
        found += zip(parts[: len(some)], parts[len(some) :], strict=True)
    return found


def row(name: str, one: Logps, other: Logps) -> str:
    """A line of the table."""
    tokens = torch.cat([a - b for both in zip(one, other, strict=True) for a, b in zip(*both, strict=True)]).abs()
    margins = torch.stack([(a[0] - b[0]).sum() - (a[1] - b[1]).sum() for a, b in zip(one, other, strict=True)]).abs()
    numbers = (tokens.mean(), tokens.max(), margins.mean(), margins.max())
    return f"| {name} | " + " | ".join(f"{float(number):.1e}" for number in numbers) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--pairs", dest="count", type=int, default=32)
    asked = parser.parse_args()
    lines = asked.pairs.read_text(encoding="utf-8").splitlines()[: asked.count]
    rows = [json.loads(line) for line in lines]
    tokenizer = load_tokenizer(asked.model)
    prompts, chosen, rejected = ([entry[name] for entry in rows] for name in ("prompt", "chosen", "rejected"))
    pairs, _ = encode_pairs(prompts, chosen, rejected, [""] * len(rows), vocabulary_of(tokenizer), Limits())
    model = move_to_device(load_model(asked.model), torch.device("cpu")).requires_grad_(False)
    found = {
        (dtype, size): logps(model, tokenizer, pairs, size, dtype)
        for dtype in (None, torch.bfloat16)
        for size in (1, 8)
    }
    print("| compared | token, mean | token, largest | margin of a pair, mean | largest |\n|---|---|---|---|---|")
    print(row("float32: 1 and 8 pairs in a pass", found[None, 1], found[None, 8]))
    print(row("bf16: 1 and 8 pairs in a pass", found[torch.bfloat16, 1], found[torch.bfloat16, 8]))
    print(row("bf16 and float32", found[torch.bfloat16, 1], found[None, 1]))


if __name__ == "__main__":
    main()
