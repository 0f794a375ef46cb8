"""Separate rows are padded: their passes keep to the token budget with the padding counted."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from conftest import pair_rows, run_here, write_jsonl

from tisdpo_cli.engine.scoring.scorer import split_into_parts
from tisdpo_cli.engine.training.batching import Microbatching, PaddedCosts
from tisdpo_cli.model.logprobs import TokenScorer


def padded(group, costs):
    return len(group) * max(costs[i] for i in group)


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("tokens", [50, 400, 1000, 100_000])
def test_padded_passes_keep_to_the_budget(world, tokens):
    draw = random.Random(tokens + world)
    for _ in range(50):
        costs = PaddedCosts(draw.choice([draw.randint(2, 40), draw.randint(2, 300)]) for _ in range(40))
        batch = draw.sample(range(40), draw.randint(1, 32))
        ranks = Microbatching(tokens=tokens).split(batch, costs, world)
        groups = [group for rank in ranks for group in rank]
        assert len({len(rank) for rank in ranks}) == 1
        assert sorted(i for group in groups for i in group) == sorted(batch)
        for group in filter(None, groups):
            assert len(group) == 1 or padded(group, costs) <= tokens
        # Sorted by length: no group reaches into another.
        spans = sorted((min(costs[i] for i in g), max(costs[i] for i in g)) for g in groups if g)
        assert all(low >= high for (_, high), (low, _) in itertools.pairwise(spans))
        # As few as a greedy cut needs, up to a multiple of the ranks.
        greedy, size, largest = 0, 0, 0
        for i in sorted(batch, key=lambda i: -costs[i]):
            if not greedy or (size + 1) * largest > tokens:
                greedy, size, largest = greedy + 1, 0, costs[i]
            size += 1
        assert len(groups) == -(-greedy // world) * world


def test_passes_are_of_similar_size():
    costs = PaddedCosts([10] * 12)
    assert [len(group) for group in Microbatching(tokens=100).split(range(12), costs, 1)[0]] == [6, 6]
    assert [[len(g) for g in rank] for rank in Microbatching(tokens=1000).split(range(3), costs, 2)] == [[2], [1]]
    assert Microbatching(tokens=1000).split([5], costs, 2) == [[[5]], [[]]]


def test_packed_plans_are_what_they_were():
    draw = random.Random(0)
    costs = [draw.randint(20, 400) for _ in range(12)]
    assert Microbatching(tokens=1000).split(range(12), costs, 1) == [[[10, 6, 7, 3], [4, 1, 0, 11], [5, 8, 9, 2]]]
    assert Microbatching(micro=5).split(range(12), costs, 1) == [[[10, 4, 5, 8], [1, 6, 0, 9], [7, 3, 11, 2]]]


@pytest.fixture
def uneven(tmp_path):
    """Pairs whose responses differ in length, in a directory with a test split."""
    draw = random.Random(1)
    rows = [
        {**row, "chosen": row["chosen"] * draw.choice([1, 1, 1, 6]), "rejected": row["rejected"] * draw.choice([1, 3])}
        for row in pair_rows(48)
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows[:40])
    write_jsonl(tmp_path / "data" / "test.jsonl", rows[40:])
    return tmp_path / "data"


@pytest.fixture
def shapes(monkeypatch):
    """(rows, width, tokens without padding) of every forward pass of a batch of pairs."""
    seen = []
    forward = TokenScorer.forward

    def record(self, batch, *args, **kwargs):
        if len(batch.groups[0][1]) == 2:
            seen.append((*batch.input_ids.shape, batch.real_tokens))
        return forward(self, batch, *args, **kwargs)

    monkeypatch.setattr(TokenScorer, "forward", record)
    return seen


BUDGET = 600


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("command", ["train-dpo", "train-sft"])
def test_a_training_in_separate_rows_keeps_to_its_budget(world, uneven, tmp_path, shapes, command, dtype):
    def train(layout):
        shapes.clear()
        done = run_here(
            command, "-m", world / "sft", "-d", uneven, "-o", tmp_path / layout, "--layout", layout, "--max-steps", "3",
            "--batch-size", "16", "--warmup-steps", "0", "--tokens-per-microbatch", str(BUDGET), "--dtype", dtype,
            *(["--no-ref-cache"] if command == "train-dpo" else []),
        )  # fmt: skip
        assert done.code == 0, done.err
        metrics = [json.loads(line) for line in (tmp_path / layout / "metrics.jsonl").read_text().splitlines()]
        return [row["loss"] for row in metrics], list(shapes)

    losses, passes = train("separate")
    expected, _ = train("shared-prefix")
    bound = 2e-3 if dtype == "float32" else 5e-2
    assert losses == pytest.approx(expected, rel=bound)
    if command == "train-dpo":
        assert len(passes) > 8
        for rows, width, _ in passes:
            assert rows == 2 or rows * width <= BUDGET or rows <= 2 * 8, "evaluation goes by pairs"
        within = [p for p in passes if p[0] * p[1] <= BUDGET]
        assert len(within) >= 0.8 * len(passes)
        assert sum(r * w for r, w, _ in within) <= 2 * sum(real for *_, real in within)


def test_estimate_sorts_separate_rows_by_their_width():
    class Pair:
        def __init__(self, tokens, longest):
            self.tokens, self.longest = tokens, longest

    pairs = [Pair(10, 5), Pair(9, 8), Pair(12, 6)]
    order = {layout: split_into_parts("train", pairs, 2, layout)[0].batches for layout in ("auto", "separate")}
    assert order == {"auto": [[2, 0], [1]], "separate": [[1, 2], [0]]}
