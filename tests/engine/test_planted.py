"""The planted-reward experiment: its language by hand, its figures, and a small run of all of it."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

PLANTED = Path(__file__).parents[2] / "examples" / "planted"
sys.path.insert(0, str(PLANTED))

import figures  # noqa: E402
import language  # noqa: E402
import plot  # noqa: E402
import policies  # noqa: E402
import run  # noqa: E402
import stages  # noqa: E402
import weights  # noqa: E402


def worth(text: str, ended: bool = True) -> list[int]:
    made = language.rewards([[language.ID[word] for word in text.split()]], [ended])
    return made.tokens[0].tolist()


def test_rewards_by_hand() -> None:
    said = "the good0 so bad1 very word2 quite good4"
    assert worth(said) == [0, 1, 0, -1, 0, 0, 0, 1, 0]
    assert worth("not good0 never bad1 not word2 quite good4") == [0, -1, 0, 1, 0, 0, 0, 1, 0]
    # A word where a filler belongs, and a filler where a word does.
    assert worth("good0 the so bad1 so good1 so good1") == [-1, -1, 0, -1, 0, 1, 0, 1, 0]
    # Ended too early, in the midst of a pair, or never.
    assert worth("the good0 the good1 the good2") == [0, 1, 0, 1, 0, 1, -1]
    assert worth(f"{said} the") == [0, 1, 0, -1, 0, 0, 0, 1, 0, -1]
    assert worth(f"{said} the", ended=False)[-1] == 0
    # Too long: what stands behind the sixth pair.
    assert worth(" ".join(["the good0"] * 7))[12:] == [-1, -1, -1]


def test_responses_of_the_language_are_grammatical_and_their_mode_shows() -> None:
    chance = random.Random(0)
    topics = language.prompts(24, chance)
    assert len(set(topics)) == 24
    totals = {}
    for mode in language.MODES:
        said = [language.respond(mode, t, chance) for t in topics * 10]
        made = language.rewards([[language.ID[w] for w in words] for words in said], [True] * len(said))
        assert (made.tokens == made.kind).all()
        assert {len(words) for words in said} <= {8, 10, 12}
        totals[mode] = made.totals.mean()
    assert totals["blame"] < -1 < abs(totals["plain"]) < 1 < totals["praise"]


def test_figures_by_hand() -> None:
    assert figures.auc(np.array([1.0, 2.0]), np.array([0.0, 1.0])) == pytest.approx(0.875)
    assert figures.ranks(np.array([5.0, 1.0, 5.0])).tolist() == [1.5, 0.0, 1.5]
    a = figures.PolicyResult(np.array([[1, 2], [0, 0]]), 0.5, 9.0)
    b = figures.PolicyResult(np.array([[1, 1], [0, 1]]), 0.0, 9.0)
    assert figures.win_rate(a, b) == pytest.approx((0.75 + 0.25) / 2)
    assert figures.win_rate(a, a) == 0.5


def test_leads_at_equal_kl_by_hand() -> None:
    """Between (1, 1) and (4, 2) a curve that grows with the root of KL is at 1.5 where KL is 2.25."""
    theirs = [(4.0, 2.0), (0.0, 0.0), (1.0, 1.0)]
    assert policies.lead([(2.25, 2.0)], theirs) == pytest.approx(0.5)
    assert policies.lead([(2.25, 2.0), (1.0, 0.9), (9.0, 9.0)], theirs) == pytest.approx(0.2)
    assert policies.lead([(9.0, 9.0)], theirs) is None
    assert policies.lead([(-1e-4, 0.1)], theirs) == pytest.approx(0.1)


def test_the_best_possible_policies_of_normal_rewards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where rewards of the start are N(m, 1), leaning by λ gives the reward m + λ at KL λ²/2. Bound: sampling."""
    world = argparse.Namespace(held=[("a",), ("b",)], seed=0)
    draws = np.random.default_rng(0).normal(size=(2, 1 << 16)) + np.array([[-1.0], [2.0]])
    monkeypatch.setattr(figures, "_OF_EACH", 1 << 16)
    monkeypatch.setattr(figures, "sample_from", lambda *_: [])
    monkeypatch.setattr(figures, "values_of", lambda _: draws.ravel())
    for leaning, (kl, reward) in list(zip(figures._LEANINGS, figures.best_possible(world, None), strict=True))[:12]:
        assert reward == pytest.approx(0.5 + leaning, abs=0.03)
        assert kl == pytest.approx(leaning**2 / 2, abs=0.03)


def test_seeds_in_processes_of_their_own_come_in_order_and_on_one_thread() -> None:
    found = list(policies.each_seed(_threads_of, [3, 1]))
    assert found == [{"seed": 3, "threads": 1}, {"seed": 1, "threads": 1}]
    before = torch.get_num_threads()
    assert list(policies.each_seed(_threads_of, [5])) == [{"seed": 5, "threads": 1}]
    assert torch.get_num_threads() == before


def _threads_of(seed: int) -> dict[str, int]:
    return {"seed": seed, "threads": torch.get_num_threads()}


def test_a_plot_stands_alone() -> None:
    made = plot.curves({"a <b>": [(0.0, 0.0), (1.0, 2.0), (9.0, 3.0)]}, "x", "y", 2.0)
    assert "a &lt;b&gt;" in made
    assert made.count("<circle") == 2
    assert "http" not in made.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.benchmark
def test_the_experiment_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same code with fewer steps: the scores find the words, and everything promised is in the object."""
    small = stages.Sizes(
        sft_steps=400, sft_examples=25600, pairs=400, held_pairs=80, contrast_steps=16, compared=8, asked=(4, 8),
        samples=20,
    )  # fmt: skip
    for module in (run, weights):
        monkeypatch.setattr(module, "Sizes", lambda: small)
    monkeypatch.setattr(policies, "_GATE", 0.7)
    run.main(["--seeds", "0", "--flip", "40", "--json", "--output-dir", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    wanted = {"auc_d", "auc_p", "spearman_d", "win_d", "win_p", "win_s", "win_shuffled", "win_random", "win_dpo_lr2"}
    assert wanted <= set(found["means"])
    assert wanted <= set(found["seeds"][0])
    assert found["means"]["auc_p"] > 0.7
    assert {"reward dpo", "win D", "win P", "win S"} <= set(found["seeds"][0]["flips"]["40"])
    weights.main(["--seeds", "0", "--only", "exp, dead zone 1; size of r", "--output-dir", str(tmp_path)])
    assert capsys.readouterr().out.count("of 1 |") == 2
    assert (tmp_path / "reward_kl.svg").read_text().startswith("<svg")
