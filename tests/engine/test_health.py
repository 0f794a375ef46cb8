"""Signs of a degenerating training: found in metrics that show them, once, and in none that are healthy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener
from test_resume import stop_after, train

from tisdpo_cli.engine.training.health import Health, HealthConfig

BETA, BATCH, UPDATES = 0.1, 8, 100
Curve = Callable[[int], float]


def observed(**curves: Curve | float) -> Health:
    """A training whose metrics follow some curves over its steps, the others healthy."""
    health = Health(HealthConfig(BETA, BATCH, UPDATES))
    healthy: dict[str, Any] = {
        "rewards/chosen": lambda s: 0.005 * s, "rewards/rejected": lambda s: -0.005 * s,
        "rewards/margins": lambda s: 0.01 * s, "rewards/accuracies": lambda s: 0.75, "logps/chosen": lambda s: -80.0,
    }  # fmt: skip
    told = {name.replace("__", "/"): curve for name, curve in curves.items()}
    for step in range(UPDATES + 1):
        values = {**healthy, **told}
        health.observe({"step": step, **{n: c(step) if callable(c) else c for n, c in values.items()}})
    return health


def signs(health: Health) -> dict[str, int]:
    return {finding.name: finding.step for finding in health.findings}


def test_a_healthy_training_is_left_alone() -> None:
    assert signs(observed()) == {}


def fallen(nats: float) -> dict[str, Curve | float]:
    """Chosen responses that lose so many nats until step 50."""
    fall = lambda s: -nats * min(s, 50) / 50  # noqa: E731
    return {
        "rewards__chosen": lambda s: BETA * fall(s),
        "logps__chosen": lambda s: -80.0 + fall(s),
        "rewards__margins": lambda s: 0.02 * s,
    }


def test_falling_log_probs_of_chosen_responses() -> None:
    found = signs(observed(**fallen(40)))
    assert found.keys() == {"chosen_falls"}
    assert 10 < found["chosen_falls"] < 50
    # A little is common, and relative to long responses much is little.
    assert signs(observed(**fallen(9))) == {}
    assert signs(observed(**{**fallen(40), "logps__chosen": -900.0})) == {}


def test_pairs_that_are_told_apart_early() -> None:
    found = observed(rewards__accuracies=lambda s: 1.0 if s > 5 else 0.5)
    assert signs(found) == {"told_apart_early": 13}  # 8 batches of 8 pairs
    assert "the last 64 pairs were all told apart after 13% of the training" in found.findings[0].text
    assert signs(observed(rewards__accuracies=lambda s: 1.0 if s > 60 else 0.5)) == {}
    assert signs(observed(rewards__accuracies=lambda s: 1.0 if s % 7 else 0.875)) == {}


@pytest.mark.parametrize(
    ("curves", "words"),
    [
        ({"kl__chosen": lambda s: 3.0 * s}, "kl/chosen is 1"),
        ({"kl__chosen": 1.0, "kl__rejected": lambda s: 3.0 * s}, "kl/rejected is 1"),
        ({"rewards__rejected": lambda s: -0.3 * s}, "log-ratios of rejected responses are -1"),
        ({"rewards__chosen": lambda s: 0.3 * s}, "log-ratios of chosen responses are +1"),
    ],
    ids=["kl of chosen", "kl of rejected", "rejected", "chosen"],
)
def test_a_policy_far_from_its_reference(curves: dict[str, Curve], words: str) -> None:
    found = observed(**curves)
    assert signs(found).keys() == {"far_from_reference"}
    assert words in found.findings[0].text


def test_margins_where_nothing_is_learned() -> None:
    assert signs(observed(rewards__margins=lambda s: 0.5 * s)) == {"saturated": 45}


def test_one_step_is_no_sign() -> None:
    assert signs(observed(rewards__margins=lambda s: 150.0 if s == 30 else 1.0)) == {}


def test_a_run_says_each_once_and_records_it_also_when_resumed(world: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    settings = {"optimizer": "sgd", "learning_rate": 0.5, "max_steps": 40, "eval_pairs": 0}
    listener = Listener()
    train(world, tmp_path / "whole", listener, **settings)
    whole = json.loads((tmp_path / "whole" / "run.json").read_text())["warnings"]
    said = [text for text in listener.warned if text in {finding["text"] for finding in whole}]
    assert said == [finding["text"] for finding in whole]
    early = next(finding for finding in whole if finding["name"] == "told_apart_early")
    stop_after(world, tmp_path / "out", early["step"] + 2, **settings)
    listener = Listener()
    train(world, tmp_path / "out", listener, **settings)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["warnings"] == whole
    assert early["text"] not in listener.warned
