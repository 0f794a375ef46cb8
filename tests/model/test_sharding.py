"""Families of models split over processes: the same log-probs, divergences and gradients as whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from processes import start
from test_logprobs import FAMILIES, LOGP_BOUND

pytestmark = pytest.mark.slow

PROGRAM = Path(__file__).parent / "sharded_families.py"


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest) -> dict[str, Any]:
    """The differences that each family shows, and the share of the weights that the first process holds."""
    process = start(request.param, [], [str(PROGRAM)], {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()})
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-4000:]
    return {"ranks": request.param, **json.loads(out.splitlines()[-1])}


def _path() -> str:
    tests = Path(__file__).parents[1]
    return ":".join(map(str, (tests.parent, tests, tests / "model")))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_model_computes_the_same(found: dict[str, Any], family: str) -> None:
    of_family = found[family]
    assert of_family["forward"] <= LOGP_BOUND
    assert of_family["values"] <= LOGP_BOUND
    assert of_family["gradients"] <= 1e-5
    assert of_family["rows"]
    # Four experts do not divide by three.
    assert of_family["held"] <= (0.55 if "experts" in family else 1 / found["ranks"] + 0.05)
