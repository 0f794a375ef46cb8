"""Transforms from token scores r_t to token weights w_t.

Pure maths on one response at a time. Knows no file, no file's sign convention and no model. A new transform is one
function and one entry in `TRANSFORMS`. This module never imports torch at the top, so that the settings can read names,
parameters and defaults without loading it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from tisdpo_cli.method.params import Param

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["chosen", "rejected"]


@dataclass(frozen=True)
class RandomStream:
    """Source of random draws for one response: the same numbers on every machine and rank."""

    seed: int = 0
    row: int = 0
    side: Side = "chosen"

    def derived_seed(self) -> int:
        """Return a 63-bit seed that depends on seed, row and side."""
        digest = hashlib.sha256(f"{self.seed}/{self.row}/{self.side}".encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1


Function = Callable[["Tensor", Side, Mapping[str, Any], RandomStream], "Tensor"]


@dataclass(frozen=True)
class Transform:
    """One transform.

    Attributes:
        function: maps the scores r [n] of a response (already clamped), its side, the parameters and a random stream
            to weights [n].
        help: description.
        params: parameters by name.
        clamp: names of the lower and upper clamp parameters, and whether they clamp r or the signed score; or None.
        positive: whether all weights are positive under given parameters, so that `normalize mean` is allowed.
        reads_scores: whether the weights depend on the scores under given parameters, so that steps have an effect.
        formula: the weight of a token under given parameters, for people. In braces: `r` its score, `s` the signed one,
            `sign` a minus for a rejected response, `rank` counted from 0, `last` the highest rank, `place` counted from
            1 by the largest s, `n` the number of tokens, `top P` how many of them are P percent. Empty: none.
    """

    function: Function
    help: str
    params: Mapping[str, Param] = field(default_factory=dict)
    clamp: tuple[str, str, Literal["r", "signed"]] | None = None
    positive: Callable[[Mapping[str, Any]], bool] = lambda _params: False
    reads_scores: Callable[[Mapping[str, Any]], bool] = lambda _params: True
    formula: Callable[[Mapping[str, Any]], str] = lambda _params: ""


def signed(scores: Tensor, side: Side) -> Tensor:
    """Return s = r for a chosen response, −r for a rejected one; a large s means the token carries the preference."""
    return scores if side == "chosen" else -scores


def _exp(r: Tensor, side: Side, p: Mapping[str, Any], _: RandomStream) -> Tensor:
    return p["k"] * (p["mu"] * signed(r, side)).exp()


def _rank_based(r: Tensor, side: Side, p: Mapping[str, Any], _: RandomStream) -> Tensor:
    if r.numel() == 1:
        return r.new_ones(1)
    # Tied scores share their mean rank, counted from 0.
    _values, tie, sizes = signed(r, side).unique(sorted=True, return_inverse=True, return_counts=True)
    mean_rank = sizes.cumsum(0) - (sizes + 1) / 2
    fraction = mean_rank[tie].to(r.dtype) / (r.numel() - 1)
    return p["min_scale"] + (p["max_scale"] - p["min_scale"]) * fraction


def _threshold_and_scale(r: Tensor, side: Side, p: Mapping[str, Any], _: RandomStream) -> Tensor:
    fraction = (signed(r, side) - p["min_val"]) / (p["max_val"] - p["min_val"])
    return p["min_scale"] + (p["max_scale"] - p["min_scale"]) * fraction


def _binary(r: Tensor, side: Side, p: Mapping[str, Any], _: RandomStream) -> Tensor:
    s = signed(r, side)
    # Rounded before the floor: 18.4 % of 375 tokens is 69, but 68.99… in floating point.
    count = max(1, int(round(s.numel() * p["top_percent"] / 100, 9)))
    return (s >= s.topk(count).values[-1]).to(r.dtype)


def _random(r: Tensor, _side: Side, p: Mapping[str, Any], stream: RandomStream) -> Tensor:
    import random

    draw = random.Random(stream.derived_seed()).random
    fractions = r.new_tensor([draw() for _ in range(r.numel())])
    return p["min_val"] + (p["max_val"] - p["min_val"]) * fractions


def _signed_score(r: Tensor, side: Side, _p: Mapping[str, Any], _s: RandomStream) -> Tensor:
    return signed(r, side)


def _figure(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _exp_formula(p: Mapping[str, Any]) -> str:
    factor = "" if p["k"] == 1 else f"{_figure(p['k'])} · "
    slope = "" if p["mu"] == 1 else f"{_figure(p['mu'])} · "
    return f"{factor}exp({{sign}}{slope}clamp({{r}}, {_figure(p['L'])}, {_figure(p['U'])}))"


def _scaled_formula(p: Mapping[str, Any], fraction: str) -> str:
    return f"{_figure(p['min_scale'])} + {_figure(round(p['max_scale'] - p['min_scale'], 9))} · {fraction}"


def _between_formula(p: Mapping[str, Any]) -> str:
    low, high = p["min_val"], p["max_val"]
    shift = f"− {_figure(low)}" if low >= 0 else f"+ {_figure(-low)}"
    clamped = f"clamp({{s}}, {_figure(low)}, {_figure(high)})"
    return _scaled_formula(p, f"({clamped} {shift}) / {_figure(round(high - low, 9))}")


def _threshold_formula(p: Mapping[str, Any]) -> str:
    return f"clamp({{s}}, {_figure(p['lower_threshold'])}, {_figure(p['upper_threshold'])})"


def _scales(low: float, high: float) -> dict[str, Param]:
    return {
        "min_scale": Param(low, "weight of the lowest token", below="max_scale"),
        "max_scale": Param(high, "weight of the highest token"),
    }


def _values(low: float, high: float) -> dict[str, Param]:
    return {
        "min_val": Param(low, "lower end of the range", below="max_val"),
        "max_val": Param(high, "upper end of the range"),
    }


TRANSFORMS: dict[str, Transform] = {
    "exp": Transform(
        _exp,
        "k·exp(±μ·clamp(r, L, U)), as in the paper (Eq. 19)",
        {
            "k": Param(1.0, "factor of exp", above=0.0),
            "mu": Param(1.0, "slope μ of exp"),
            "L": Param(-0.5, "lower clamp of r in exp", below="U"),
            "U": Param(1.5, "upper clamp of r in exp"),
        },
        clamp=("L", "U", "r"),
        positive=lambda p: True,
        reads_scores=lambda p: p["mu"] != 0,
        formula=_exp_formula,
    ),
    "rank_based": Transform(
        _rank_based,
        "ranks scaled to a range",
        _scales(0.7, 1.3),
        positive=lambda p: p["min_scale"] > 0,
        formula=lambda p: _scaled_formula(p, "{rank} / {last}"),
    ),
    "threshold_and_scale": Transform(
        _threshold_and_scale,
        "clamped, then scaled to a range",
        _values(-1.5, 1.5) | _scales(0.7, 1.3),
        clamp=("min_val", "max_val", "signed"),
        formula=_between_formula,
        positive=lambda p: p["min_scale"] > 0,
    ),
    "threshold": Transform(
        _signed_score,
        "clamped scores",
        {
            "lower_threshold": Param(-1.0, "lower clamp of the signed score", below="upper_threshold"),
            "upper_threshold": Param(1.0, "upper clamp of the signed score"),
        },
        clamp=("lower_threshold", "upper_threshold", "signed"),
        formula=_threshold_formula,
        positive=lambda p: p["lower_threshold"] > 0,
    ),
    "binary": Transform(
        _binary,
        "1 for the top tokens, 0 for the rest",
        {"top_percent": Param(100.0, "share of tokens that get weight 1", above=0.0, at_most=100.0)},
        reads_scores=lambda p: p["top_percent"] < 100,
        formula=lambda p: f"[number {{place}} of {{n}} by s, the first {{top {p['top_percent']:g}}} get 1]",
    ),
    "random": Transform(
        _random,
        "uniform noise, a control",
        _values(0.7, 1.3),
        positive=lambda p: p["min_val"] > 0,
        reads_scores=lambda p: False,
        formula=lambda p: f"[at random from {_figure(p['min_val'])} to {_figure(p['max_val'])}]",
    ),
    "origin": Transform(_signed_score, "the signed score itself", formula=lambda _params: "{s}"),
}
