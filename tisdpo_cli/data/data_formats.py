"""Turns the rows of well-known datasets into pairs: the best answer against the worst. Knows no files and no tokens.

A format is one entry of `CONVERTERS`, under a name of `DataFormat` in `formats.py`. A converter takes the columns of a
row and returns prompt, chosen and rejected; None where no answer is better. It raises `DataError` for other rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tisdpo_cli.errors import DataError

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Choice:
    """A pair that a row holds: texts, or messages."""

    prompt: Any
    chosen: Any
    rejected: Any


@dataclass(frozen=True)
class Converter:
    """A format.

    Attributes:
        convert: gives the pair of a row.
        consumed: columns that the pair is made of; every other column stays in the row.
    """

    convert: Callable[[Values], Choice | None]
    consumed: tuple[str, ...]

    def apply(self, columns: Values) -> dict[str, Any] | None:
        """Return the columns of a row as a pair, or None if no answer is better.

        Raises:
            DataError: the row has another shape.
        """
        pair = self.convert(columns)
        if pair is None:
            return None
        others = {name: value for name, value in columns.items() if name not in self.consumed}
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected, **others}


def check_scores(columns: Values) -> bool:
    """Whether the scores of a pair differ.

    Raises:
        DataError: they contradict the pair, or are not there.
    """
    names = ("score_chosen", "score_rejected")
    chosen, rejected = (_number(_column(columns, name), repr(name)) for name in names)
    if chosen < rejected:
        raise DataError(f"'score_chosen' ({chosen:g}) is below 'score_rejected' ({rejected:g})")
    return chosen > rejected


def recognize(rows: Sequence[Values]) -> str | None:
    """The format that all of some rows have, of which there is one at least, or None."""
    for name, converter in CONVERTERS.items():
        try:
            for columns in rows:
                converter.apply(columns)
        except DataError:
            continue
        return name
    return None


# Formats -----------------------------------------------------------------------------------------------------------


def _ultrafeedback(columns: Values) -> Choice | None:
    return _best_and_worst(_column(columns, "instruction"), _rated(columns, "completions"))


def _rated_responses(columns: Values) -> Choice | None:
    name = "responses" if "responses" in columns else "completions"
    return _best_and_worst(_column(columns, "prompt"), _rated(columns, name))


def _nectar(columns: Values) -> Choice | None:
    answers = [
        (_column(answer, "answer", place), -_number(_column(answer, "rank", place), f"the rank of {place}"))
        for answer, place in _listed(columns, "answers")
    ]
    return _best_and_worst(_column(columns, "prompt"), answers)


def _pku_saferlhf(label: str) -> Callable[[Values], Choice | None]:
    def convert(columns: Values) -> Choice | None:
        better = _one_of(columns, label, (0, 1))
        answers = [_column(columns, f"response_{i}") for i in (0, 1)]
        return Choice(_column(columns, "prompt"), answers[better], answers[1 - better])

    return convert


def _helpsteer3(columns: Values) -> Choice | None:
    preference = _one_of(columns, "overall_preference", range(-3, 4))
    first, second = _column(columns, "response1"), _column(columns, "response2")
    prompt = _column(columns, "context")
    if not preference:
        return None
    # Negative where the first response is preferred.
    return Choice(prompt, first, second) if preference < 0 else Choice(prompt, second, first)


def _shp(columns: Values) -> Choice | None:
    first, second = _column(columns, "human_ref_A"), _column(columns, "human_ref_B")
    prompt = _column(columns, "history")
    # 1 where A is preferred.
    return Choice(prompt, first, second) if _one_of(columns, "labels", (0, 1)) else Choice(prompt, second, first)


_RESPONSES = ("response_0", "response_1")
# By the name of the format, in the order in which they are recognized.
CONVERTERS: dict[str, Converter] = {
    "ultrafeedback": Converter(_ultrafeedback, ("instruction", "completions")),
    "rated-responses": Converter(_rated_responses, ("responses", "completions", "ratings", "scores")),
    "nectar": Converter(_nectar, ("answers",)),
    "pku-saferlhf": Converter(_pku_saferlhf("better_response_id"), _RESPONSES),
    "pku-saferlhf-safer": Converter(_pku_saferlhf("safer_response_id"), _RESPONSES),
    "helpsteer3": Converter(_helpsteer3, ("context", "response1", "response2")),
    "shp": Converter(_shp, ("history", "human_ref_A", "human_ref_B")),
}


# Parts of rows -----------------------------------------------------------------------------------------------------

# What a rated answer calls its text and its rating.
_TEXTS = ("response", "text", "content")
_RATINGS = ("overall_score", "rating", "score")


def _best_and_worst(prompt: Any, answers: Sequence[tuple[Any, float]]) -> Choice | None:
    """The answer with the highest rating and that with the lowest, of equal ones the first."""
    if len(answers) < 2:
        raise DataError(f"{len(answers)} rated answers; a pair needs two")
    best, worst = max(answers, key=lambda answer: answer[1]), min(answers, key=lambda answer: answer[1])
    return Choice(prompt, best[0], worst[0]) if best[1] > worst[1] else None


def _rated(columns: Values, name: str) -> list[tuple[Any, float]]:
    """The answers of a row with their ratings: objects with both, or texts beside a list of ratings."""
    values = _column(columns, name)
    beside = next((other for other in ("ratings", "scores") if other in columns), None)
    if beside is not None and isinstance(values, list) and all(isinstance(value, str) for value in values):
        ratings = columns[beside]
        if not isinstance(ratings, list) or len(ratings) != len(values):
            raise DataError(f"{beside!r} does not hold one rating for each of {name!r}")
        return [(text, _number(ratings[i], f"{beside}[{i}]")) for i, text in enumerate(values)]
    return [
        (_first_of(answer, _TEXTS, place), _number(_first_of(answer, _RATINGS, place), f"the rating of {place}"))
        for answer, place in _listed(columns, name)
    ]


def _column(columns: Values, name: str, where: str = "") -> Any:
    if columns.get(name) is None:
        raise DataError(f"{where} has no {name!r}" if where else f"column {name!r} is missing")
    return columns[name]


def _listed(columns: Values, name: str) -> list[tuple[Values, str]]:
    """The objects of a list with their places."""
    values = _column(columns, name)
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise DataError(f"{name!r} is not a list of objects")
    return [(value, f"{name}[{i}]") for i, value in enumerate(values)]


def _first_of(values: Values, names: Sequence[str], where: str) -> Any:
    return _column(values, next((name for name in names if values.get(name) is not None), names[0]), where)


def _one_of(columns: Values, name: str, allowed: Sequence[int]) -> int:
    value = _number(_column(columns, name), repr(name))
    if value not in allowed:
        raise DataError(f"{name!r} is {value:g}; it must be from {allowed[0]} to {allowed[-1]}")
    return int(value)


def _number(value: Any, where: str) -> float:
    """A finite number, also written as text."""
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(f"{where} is not a number")
    return number
