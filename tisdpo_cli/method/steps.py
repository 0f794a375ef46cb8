"""Optional steps that change the scores r of a response before a transform makes them weights.

They always run in the order of `STEPS`: `center`, `spans`, `dead_zone`, `decay`. A new step is one function and one
entry there. Pure maths on one response at a time. Like `transforms` it never imports torch, so that the settings can
read the registry without loading it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tisdpo_cli.method.params import Param, Value

if TYPE_CHECKING:
    from torch import Tensor

# Positions that fewer responses reach share one mean: a mean over three responses is noise.
_MIN_RESPONSES = 20


@dataclass(frozen=True)
class Centers:
    """Mean scores of a dataset in nats, over all tokens and by position.

    Attributes:
        dataset: mean over all tokens of both sides.
        positions: mean at each position from 0 that at least 20 responses reach.
        tail: mean over all tokens at later positions.
    """

    dataset: float
    positions: tuple[float, ...]
    tail: float

    def at(self, position: int) -> float:
        """Return the mean at a position."""
        return self.positions[position] if position < len(self.positions) else self.tail


@dataclass(frozen=True)
class Context:
    """What the steps need of a response besides its scores.

    Attributes:
        centers: mean scores of the dataset, for `center`.
        spans: span index of each token of the untruncated response, from 0, for `spans`.
    """

    centers: Centers | None = None
    spans: Sequence[int] | None = None


Function = Callable[["Tensor", Value, Context], "Tensor"]


@dataclass(frozen=True)
class Step:
    """One step: its function of the scores r [n] of a response, its value and the context; and its parameter."""

    function: Function
    param: Param


def _center(r: Tensor, value: Value, context: Context) -> Tensor:
    centers = context.centers
    if centers is None:
        raise ValueError("center needs the mean scores of the dataset")
    if value == "dataset":
        return r - centers.dataset
    return r - r.new_tensor([centers.at(t) for t in range(r.numel())])


def _spans(r: Tensor, _value: Value, context: Context) -> Tensor:
    if context.spans is None:
        raise ValueError("spans needs the span of each token")
    # An EOS that is weighed with its response is a separate span.
    spans = [*context.spans[: r.numel()]]
    spans += [spans[-1] + 1 if spans else 0] * (r.numel() - len(spans))
    index = r.new_tensor(spans).long()
    sums, counts = (r.new_zeros(spans[-1] + 1).index_add(0, index, values) for values in (r, r.new_ones(r.shape)))
    return (sums / counts)[index]


def _dead_zone(r: Tensor, value: Value, _context: Context) -> Tensor:
    return r.masked_fill(r.abs() <= float(value), 0.0)


def _decay(r: Tensor, value: Value, _context: Context) -> Tensor:
    return r * r.new_tensor([float(value) ** t for t in range(r.numel())])


_CENTER = Param(
    None,
    "subtract the train split's mean r: over all tokens (dataset) or at the token's position (position)",
    choices=("dataset", "position"),
)
_SPANS = Param(None, "replace r by its mean over each word, clause or sentence", choices=("word", "clause", "sentence"))
_DEAD_ZONE = Param(None, "set r to 0 where |r| is at most this (nats)", above=0.0)
_DECAY = Param(None, "multiply r by this value to the power of the token's position", above=0.0, under=1.0)

# In the order in which they run.
STEPS: dict[str, Step] = {
    "center": Step(_center, _CENTER),
    "spans": Step(_spans, _SPANS),
    "dead_zone": Step(_dead_zone, _DEAD_ZONE),
    "decay": Step(_decay, _DECAY),
}


def apply_steps(scores: Tensor, steps: Mapping[str, Value], context: Context) -> Tensor:
    """Apply steps to the scores [n] of a response, in the order of `STEPS`."""
    if not scores.numel():
        return scores
    for name, step in STEPS.items():
        if name in steps:
            scores = step.function(scores, steps[name], context)
    return scores


def centers_of(responses: Iterable[Sequence[float]]) -> Centers:
    """Compute the mean scores over the responses of a dataset, without EOS scores, in nats."""
    sums: list[float] = []
    counts: list[int] = []
    for scores in responses:
        missing = len(scores) - len(sums)
        sums += [0.0] * missing
        counts += [0] * missing
        for t, r in enumerate(scores):
            sums[t] += r
            counts[t] += 1
    reached = sum(count >= _MIN_RESPONSES for count in counts)
    positions = tuple(total / count for total, count in zip(sums[:reached], counts[:reached], strict=True))
    return Centers(_mean(sums, counts), positions, _mean(sums[reached:], counts[reached:]))


def _mean(sums: Sequence[float], counts: Sequence[int]) -> float:
    return sum(sums) / sum(counts) if counts else 0.0


# Where a clause or a sentence ends. Most marks end one only before white space: "3.14" and "a,b" do not. A run of marks
# matches from its first one only; otherwise a long run would be scanned again from each.
_CLOSERS = r"[\"'”’»)\]」』）*_`]*"


def _run_of(signs: str) -> str:
    return f"(?<![{signs}])[{signs}]+{_CLOSERS}"


_SENTENCE = rf"{_run_of('.!?…।॥؟۔։')}(?:\s*\n+|(?=\s))|{_run_of('。！？｡')}\n*|\n+"
_CLAUSE = rf"{_run_of(',;:—–،؛')}(?=\s)|{_run_of('，、；：､')}"
_ENDS = {"clause": re.compile(f"{_SENTENCE}|{_CLAUSE}"), "sentence": re.compile(_SENTENCE)}
# Inside a word: apostrophes, hyphens, and the replacement of a partial character.
_JOINING = "'’-\u2010\u2011_\ufffd"


def spans_of(text: str, offsets: Sequence[tuple[int, int]], unit: str) -> list[int]:
    """Return the span index of each token of a text, from 0.

    A word is a run of letters, digits, apostrophes and hyphens, or a run of other marks; scripts without spaces
    have one word between marks. A clause ends after `, ; : —` and at the end of a sentence; a sentence ends after
    `. ! ? …` and at a line break. The full-width marks of Chinese and Japanese need no white space after them.

    >>> spans_of("So sad, bye", [(0, 2), (2, 6), (6, 7), (7, 11)], "clause")
    [0, 0, 0, 1]

    Args:
        text: text of a response.
        offsets: (begin, end) of each token, in characters.
        unit: `word`, `clause` or `sentence`.
    """
    begins = _word_begins(text) if unit == "word" else [match.end() for match in _ENDS[unit].finditer(text)]
    ahead = _next_nonspace(text)
    spans: list[int] = []
    span = 0
    for begin, end in offsets:
        # White space belongs to what follows it, except a line break that ends a clause or sentence.
        first = ahead[begin]
        if unit != "word" and first >= end:
            first = begin
        while span < len(begins) and begins[span] <= first:
            span += 1
        spans.append(span)
    order = {span: number for number, span in enumerate(dict.fromkeys(spans))}
    return [order[span] for span in spans]


def _next_nonspace(text: str) -> list[int]:
    """The index of the next non-space character from each index of a text, its end included."""
    ahead = [len(text)]
    for i in range(len(text) - 1, -1, -1):
        ahead.append(ahead[-1] if text[i].isspace() else i)
    return ahead[::-1]


def _word_begins(text: str) -> list[int]:
    begins: list[int] = []
    before = ""
    for i, character in enumerate(text):
        kind = _kind(character, before)
        if i and kind and kind != before:
            begins.append(i)
        before = kind
    return begins


def _kind(character: str, before: str) -> str:
    """`w` inside words, `p` for other marks, empty for white space, given the kind of the previous character."""
    if character.isspace():
        return ""
    if character.isalnum() or character in _JOINING:
        return "w"
    category = unicodedata.category(character)
    # Combining marks and joiners belong to the character that they modify.
    return (before or "w") if category[0] == "M" or category == "Cf" else "p"
