"""What the README promises of the quickstart, in its real configuration: it learns, and the words stand out."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import run_tisdpo

from tisdpo_cli.data.reader import read_rows
from tisdpo_cli.data.rows import Row
from tisdpo_cli.model.tokenizer import load_tokenizer

REPOSITORY = Path(__file__).parents[2]
EXAMPLES = REPOSITORY / "examples"
sys.path.insert(0, str(EXAMPLES))

import make_quickstart_data  # noqa: E402


def area_under_curve(above: list[float], below: list[float]) -> float:
    """How often a value of `above` is larger than one of `below`."""
    ranked = sorted([(value, 1) for value in above] + [(value, 0) for value in below])
    ranks = sum(rank for rank, (_, is_above) in enumerate(ranked, start=1) if is_above)
    return (ranks - len(above) * (len(above) + 1) / 2) / (len(above) * len(below))


def scores_by_preference(scored: Path) -> dict[int, list[float]]:
    """r of every response token, by what the generator knows of its word: 1, −1 or 0."""
    tokenizer = load_tokenizer(scored)
    scores: dict[int, list[float]] = {1: [], 0: [], -1: []}
    for row in read_rows(scored / "test.jsonl"):
        assert isinstance(row, Row)
        for side in ("chosen", "rejected"):
            ids = tokenizer.texts.encode([row.columns[side]])[0]
            for piece, stored in zip(tokenizer.pieces(ids), row.columns[f"{side}_weight"], strict=True):
                scores[make_quickstart_data.preference_of(piece)].append(-stored)
    return scores


@pytest.mark.benchmark
def test_the_words_that_carry_the_preference_stand_out(tmp_path: Path) -> None:
    done = run_tisdpo(
        "run", "--config", EXAMPLES / "quickstart.yaml", "--dataset", EXAMPLES / "quickstart_data",
        "--output-dir", tmp_path / "out", "--json",
        env={"OMP_NUM_THREADS": "2"}, timeout=900,
    )  # fmt: skip
    assert done.code == 0, done.err
    # The command that follows shows the weights that were trained with.
    assert "/scored --transform exp --spans word --dead-zone 0.3\n" in done.err
    stages = json.loads(done.out)["stages"]
    metrics = {name: stage.get("final_metrics", {}) for name, stage in stages.items()}
    # Far above chance; rounding alone (another processor, say) moves so short a training by some points.
    for name in ("train_dpo", "train_reverse"):
        assert metrics[name]["eval/rewards/accuracies"] > 0.8
    # The weighted loss is what this one follows.
    assert metrics["train"]["eval/weighted_rewards/accuracies"] > 0.9
    assert metrics["train"]["eval/rewards/accuracies"] > 0.7
    assert (tmp_path / "out" / "report.svg").read_text().startswith("<svg")
    scores = scores_by_preference(tmp_path / "out" / "scored")
    assert min(len(values) for values in scores.values()) > 100
    assert area_under_curve(scores[1], scores[0]) > 0.9
    assert area_under_curve(scores[0], scores[-1]) > 0.9


def test_the_dataset_is_what_its_script_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["make_quickstart_data.py", "--output-dir", str(tmp_path)])
    make_quickstart_data.main()
    for split in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / split).read_bytes() == (EXAMPLES / "quickstart_data" / split).read_bytes()


def test_the_picture_asks_the_network_for_nothing() -> None:
    picture = (EXAMPLES / "quickstart.svg").read_text(encoding="utf-8")
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", picture))
    assert "<image" not in picture
    assert "@font-face" not in picture


def test_dialogues_are_split_at_the_last_turn_they_share() -> None:
    import hh_pairs

    head = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Bye\n\nAssistant:"
    assert hh_pairs.split_dialogues(head + " A", head + " B") == {"prompt": head, "chosen": " A", "rejected": " B"}
    assert hh_pairs.split_dialogues(head + " A", head + " A") is None
    assert hh_pairs.split_dialogues(head + " A", "\n\nHuman: Hi\n\nAssistant: Ho\n\nHuman: Bye\n\nAssistant: B") is None
    # One answer is the beginning of the other.
    assert hh_pairs.split_dialogues(head + " A", head + " A B")["rejected"] == " A B"
