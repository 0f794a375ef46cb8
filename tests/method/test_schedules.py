"""Learning-rate schedules: those of transformers after the warm-up, and what their parameters may be."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from transformers import get_scheduler
from transformers.trainer_utils import SchedulerType

from tisdpo_cli.method.schedules import SCHEDULES, learning_rate, resolve_schedule
from tisdpo_cli.settings.optimization import Optim

PEAK, WARMUP, UPDATES = 8e-4, 5, 40
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 12}),
    ("cosine_with_min_lr", {"min_lr": 1e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 0.4}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 10}),
    ("warmup_stable_decay", {"num_decay_steps": 10, "num_stable_steps": 4, "min_lr_ratio": 0.1}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "1-sqrt", "warmup_type": "cosine"}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "decay_type": "linear", "warmup_type": "1-sqrt"}),
]


def rates_of_transformers(name: str, params: dict[str, Any], warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    scheduler = get_scheduler(name, optimizer, warmup, UPDATES, params or None)
    rates = []
    for _ in range(UPDATES):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def rates(name: str, params: dict[str, Any], warmup: int = WARMUP) -> list[float]:
    resolved = resolve_schedule(name, params, PEAK)
    return [learning_rate(step, PEAK, warmup, UPDATES, name, resolved) for step in range(UPDATES)]


@pytest.mark.filterwarnings("ignore:Both num_training_steps")
@pytest.mark.parametrize("warmup", [0, WARMUP])
@pytest.mark.parametrize(("name", "params"), CASES, ids=str)
def test_after_the_warm_up_a_schedule_is_that_of_transformers(name: str, params: dict[str, Any], warmup: int) -> None:
    ours, theirs = rates(name, params, warmup), rates_of_transformers(name, params, warmup)
    # The share of the peak that a warm-up starts with is theirs altogether.
    first = 0 if name == "cosine_warmup_with_min_lr" else warmup
    assert ours[first:] == pytest.approx(theirs[first:], rel=1e-12, abs=1e-18)
    assert len(set(ours)) > UPDATES / 2 or name == "warmup_stable_decay"


def test_every_schedule_of_transformers_is_here_or_refused_by_name() -> None:
    following_metrics = {"reduce_lr_on_plateau", "greedy"}
    theirs = {kind.value for kind in SchedulerType}
    assert theirs - {"constant_with_warmup"} - set(SCHEDULES) == following_metrics
    assert Optim(lr_scheduler="constant_with_warmup").lr_scheduler == "constant"
    for name in following_metrics:
        with pytest.raises(ValueError, match=f"{name} follows a metric"):
            Optim(lr_scheduler=name)


def test_warm_up_then_constant() -> None:
    """Over 3 updates: 1/4, 2/4, 3/4, then all of it."""
    rates = [learning_rate(step, 8.0, 3, 10, "constant") for step in range(6)]
    assert rates == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
    assert learning_rate(0, 8.0, 0, 10, "constant") == 8.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_decay_begins_after_the_warm_up_and_ends_at_0(schedule: str) -> None:
    rates = [learning_rate(step, 8.0, 2, 10, schedule) for step in range(11)]
    assert rates[:3] == pytest.approx([8 / 3, 16 / 3, 8.0])
    assert rates[6] == pytest.approx(4.0)
    assert rates[10] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(rates[2:]))
    assert rates[4] == pytest.approx({"linear": 6.0, "cosine": 4 * (1 + math.cos(math.pi / 4))}[schedule])


@pytest.mark.parametrize("shape", ["linear", "cosine", "1-sqrt"])
def test_a_warm_up_rises_from_above_the_minimum_to_the_peak(shape: str) -> None:
    params = {"num_decay_steps": 10, "warmup_type": shape, "min_lr_ratio": 0.1}
    ours = rates("warmup_stable_decay", params)
    assert all(0.1 * PEAK < rate < following for rate, following in pairwise(ours[: WARMUP + 1]))
    assert ours[WARMUP] == PEAK


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("linear", {"power": 2}, "lr_scheduler linear has no parameter power"),
        ("cosine_with_min_lr", {}, "needs min_lr or min_lr_rate: lr_scheduler_kwargs"),
        ("cosine_with_min_lr", {"min_lr": 0, "min_lr_rate": 0}, "needs min_lr or min_lr_rate"),
        ("warmup_stable_decay", {}, "needs num_decay_steps"),
        ("warmup_stable_decay", {"num_decay_steps": 5, "decay_type": "step"}, "must be one of linear, cosine, 1-sqrt"),
        ("polynomial", {"lr_end": 1.0}, "lr_end of lr_scheduler polynomial must be below the learning rate, 0.0008"),
        ("polynomial", {"power": 0}, "power of lr_scheduler polynomial must be above 0"),
        ("polynomial", {"power": "two"}, "power of lr_scheduler polynomial must be a number"),
        ("polynomial", {"power": True}, "must be a number"),
        ("cosine", {"num_cycles": float("nan")}, "must be a finite number"),
    ],
    ids=str,
)
def test_parameters_that_do_not_fit_are_refused(name: str, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_schedule(name, params, PEAK)


def test_numbers_may_be_text() -> None:
    assert resolve_schedule("polynomial", {"power": "2"}, PEAK)["power"] == 2.0
