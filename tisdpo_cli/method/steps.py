"""What may happen to the scores r of a response before they become weights: composable steps, all off by default.

The order is that of `STEPS`, whatever order they are asked for in: `center`, `spans`, `dead_zone`, `decay`. A new
step is one function and one entry there. Pure maths on one response at a time; like `weights` it never imports torch
itself, so that the settings can read the registry.
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

# A position that fewer responses reach shares its mean with the others of that kind: a mean of three is noise.
_ENOUGH = 20


@dataclass(frozen=True)
class Centers:
    """Mean scores of a dataset in nats: over all tokens, and over the tokens at each position.

    Attributes:
        dataset: over all tokens of both sides.
        positions: at positions 0, 1, … as far as at least 20 responses reach.
        tail: over all tokens beyond.
    """

    dataset: float
    positions: tuple[float, ...]
    tail: float

    def at(self, position: int) -> float:
        """The mean at a position."""
        return self.positions[position] if position < len(self.positions) else self.tail


@dataclass(frozen=True)
class Context:
    """What steps know of a response beside its scores.

    Attributes:
        centers: of the dataset, where `center` is asked for.
        spans: the span of each token of the uncut response, counted from 0, where `spans` is asked for.
    """

    centers: Centers | None = None
    spans: Sequence[int] | None = None


Function = Callable[["Tensor", Value, Context], "Tensor"]


@dataclass(frozen=True)
class Step:
    """One step: a function of the scores r [n] of a response, the step's value and the context; and that value."""

    function: Function
    param: Param


def _center(r: Tensor, value: Value, context: Context) -> Tensor:
    centers = context.centers
    if centers is None:
        raise ValueError("center needs the means of the dataset")
    if value == "dataset":
        return r - centers.dataset
    return r - r.new_tensor([centers.at(t) for t in range(r.numel())])


def _spans(r: Tensor, _value: Value, context: Context) -> Tensor:
    if context.spans is None:
        raise ValueError("spans needs the span of each token")
    # An EOS that is weighed with its response is a span of its own.
    groups = [*context.spans[: r.numel()]]
    groups += [groups[-1] + 1 if groups else 0] * (r.numel() - len(groups))
    index = r.new_tensor(groups).long()
    sums, counts = (r.new_zeros(groups[-1] + 1).index_add(0, index, values) for values in (r, r.new_ones(r.shape)))
    return (sums / counts)[index]


def _dead_zone(r: Tensor, value: Value, _context: Context) -> Tensor:
    return r.masked_fill(r.abs() <= float(value), 0.0)


def _decay(r: Tensor, value: Value, _context: Context) -> Tensor:
    return r * r.new_tensor([float(value) ** t for t in range(r.numel())])


_CENTER = Param(
    None,
    "subtract the mean r of the train split, over all its tokens or those at the position",
    choices=("dataset", "position"),
)
_SPANS = Param(
    None, "give all tokens of a word, clause or sentence their mean r", choices=("word", "clause", "sentence")
)
_DEAD_ZONE = Param(None, "take an r of at most this size for 0, in nats", above=0.0)
_DECAY = Param(None, "multiply r by this to the power of the position", above=0.0, under=1.0)

# In the order in which they are done.
STEPS: dict[str, Step] = {
    "center": Step(_center, _CENTER),
    "spans": Step(_spans, _SPANS),
    "dead_zone": Step(_dead_zone, _DEAD_ZONE),
    "decay": Step(_decay, _DECAY),
}


def apply_steps(scores: Tensor, steps: Mapping[str, Value], context: Context) -> Tensor:
    """Scores [n] of a response after the steps that are asked for, in the order of `STEPS`."""
    if not scores.numel():
        return scores
    for name, step in STEPS.items():
        if name in steps:
            scores = step.function(scores, steps[name], context)
    return scores


def centers_of(responses: Iterable[Sequence[float]]) -> Centers:
    """Mean scores over the responses of a dataset (scores in nats, the EOS left out)."""
    sums: list[float] = []
    counts: list[int] = []
    for scores in responses:
        missing = len(scores) - len(sums)
        sums += [0.0] * missing
        counts += [0] * missing
        for t, r in enumerate(scores):
            sums[t] += r
            counts[t] += 1
    reached = sum(count >= _ENOUGH for count in counts)
    positions = tuple(total / count for total, count in zip(sums[:reached], counts[:reached], strict=True))
    return Centers(_mean(sums, counts), positions, _mean(sums[reached:], counts[reached:]))


def _mean(sums: Sequence[float], counts: Sequence[int]) -> float:
    return sum(sums) / sum(counts) if counts else 0.0


# Where a clause or a sentence ends. Most signs end one only before white space: "3.14" and "a,b" go on. A run of signs
# is tried from its first one only, or a long run would be read again from each.
_CLOSERS = r"[\"'”’»)\]」』）*_`]*"


def _run_of(signs: str) -> str:
    return f"(?<![{signs}])[{signs}]+{_CLOSERS}"


_SENTENCE = rf"{_run_of('.!?…।॥؟۔։')}(?:\s*\n+|(?=\s))|{_run_of('。！？｡')}\n*|\n+"
_CLAUSE = rf"{_run_of(',;:—–،؛')}(?=\s)|{_run_of('，、；：､')}"
_ENDS = {"clause": re.compile(f"{_SENTENCE}|{_CLAUSE}"), "sentence": re.compile(_SENTENCE)}
# Inside a word: apostrophes, hyphens, and what stands for a piece of a character.
_JOINING = "'’-\u2010\u2011_\ufffd"


def spans_of(text: str, offsets: Sequence[tuple[int, int]], unit: str) -> list[int]:
    """The span of each token of a text, counted from 0.

    A word is a run of letters, digits, apostrophes and hyphens, or a run of other signs; scripts without spaces
    have one word from sign to sign. A clause ends after `, ; : —` and with a sentence, a sentence after `. ! ? …`
    and at a line break; the full-width signs of Chinese and Japanese need no white space behind them.

    >>> spans_of("So sad, bye", [(0, 2), (2, 6), (6, 7), (7, 11)], "clause")
    [0, 0, 0, 1]

    Args:
        text: the text of a response.
        offsets: (begin, end) of each token in it, in characters.
        unit: `word`, `clause` or `sentence`.
    """
    begins = _word_begins(text) if unit == "word" else [match.end() for match in _ENDS[unit].finditer(text)]
    ahead = _next_sign(text)
    spans: list[int] = []
    span = 0
    for begin, end in offsets:
        # White space belongs to what comes after it, but for a line break that ends a clause or sentence.
        first = ahead[begin]
        if unit != "word" and first >= end:
            first = begin
        while span < len(begins) and begins[span] <= first:
            span += 1
        spans.append(span)
    order = {span: number for number, span in enumerate(dict.fromkeys(spans))}
    return [order[span] for span in spans]


def _next_sign(text: str) -> list[int]:
    """At each index of a text, and at its end, where the next character is that is no white space."""
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
    """`w` inside words, `p` for other signs, empty for white space, given the kind of the character before."""
    if character.isspace():
        return ""
    if character.isalnum() or character in _JOINING:
        return "w"
    category = unicodedata.category(character)
    # Marks and joiners belong to the character that they change.
    return (before or "w") if category[0] == "M" or category == "Cf" else "p"
