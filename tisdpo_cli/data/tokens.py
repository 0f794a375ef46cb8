"""Tokenizes and truncates preference pairs: the one function that all stages use.

Prompt and response are tokenized separately, without special tokens. A BOS precedes the prompt if the tokenizer adds
one, and an EOS ends each response. Knows no model, and a tokenizer only as a function.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from tisdpo_cli.data.vocabulary import Vocabulary


@dataclass(frozen=True)
class Limits:
    """Maximum lengths in tokens.

    Attributes:
        max_length: of prompt and response together.
        max_prompt_length: of a prompt, applied only to rows that exceed `max_length`.
        keep_prompt: which part of a truncated prompt to keep.
    """

    max_length: int = 512
    max_prompt_length: int = 256
    keep_prompt: Literal["end", "start"] = "end"


@dataclass(frozen=True)
class Response:
    """One tokenized response.

    Attributes:
        ids: tokens after truncation, with the EOS if the response was not truncated.
        has_eos: whether they end with the EOS.
        uncut: number of tokens before truncation, without the EOS.
    """

    ids: list[int]
    has_eos: bool
    uncut: int

    @property
    def kept(self) -> int:
        """Number of tokens after truncation, without the EOS."""
        return len(self.ids) - self.has_eos


@dataclass(frozen=True)
class EncodedPair:
    """A tokenized pair, whose prompt (with its BOS) is the same for both responses.

    Attributes:
        framed: the prompt under each prompt template, where the chat template rendered it; see `TemplateTokens` for
            texts.
        opening: number of ids at the end of the prompt that a chat template writes before every answer.
    """

    index: int
    where: str
    prompt: list[int]
    chosen: Response
    rejected: Response
    opening: int = 0
    framed: tuple[list[int], ...] = ()

    def swapped(self) -> EncodedPair:
        """Return the pair with chosen and rejected swapped."""
        return replace(self, chosen=self.rejected, rejected=self.chosen)

    @property
    def tokens(self) -> int:
        """Number of tokens of the prompt and both responses."""
        return len(self.prompt) + len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        """Number of tokens of the prompt and the longer response, which the model's positions must hold."""
        return len(self.prompt) + max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class TemplateTokens:
    """Token ids that a template puts around a prompt.

    Attributes:
        before: ids before the prompt, after its BOS.
        after: ids after the prompt, before the response.
    """

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def wrap(self, prompt: list[int], bos: int | None) -> list[int]:
        """Put the template around an already truncated prompt, with one BOS before everything.

        >>> TemplateTokens([5, 6], [7]).wrap([0, 1, 2], bos=0)
        [0, 5, 6, 1, 2, 7]
        """
        has_bos = bos is not None and prompt[:1] == [bos]
        head, rest = (prompt[:1], prompt[1:]) if has_bos else ([], prompt)
        before = self.before[1:] if has_bos and self.before[:1] == head else self.before
        return [*head, *before, *rest, *self.after]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass
class MarkedRows:
    """Counts rows whose text spells out special tokens, which stay text."""

    rows: int = 0
    marker: str = ""

    def count(self, marker: str | None) -> None:
        """Count a row with this marker, if any."""
        if marker is not None:
            self.rows += 1
            self.marker = self.marker or marker

    def add(self, other: MarkedRows) -> None:
        """Add what was counted over further rows."""
        self.rows += other.rows
        self.marker = self.marker or other.marker

    def warning(self, total: int) -> str | None:
        """Return what the user should know, or None."""
        if not self.rows:
            return None
        return (
            f"{self.rows} of {total} rows spell out special tokens such as {self.marker!r}, which are read as plain "
            "text; if a chat template rendered these rows, use --special-tokens-in-data parse"
        )


@dataclass
class TruncationStats:
    """Lengths and truncations of a split."""

    rows: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    merged_boundaries: int = 0
    marked: MarkedRows = field(default_factory=MarkedRows)
    prompt_lengths: array[int] = field(default_factory=lambda: array("i"))
    response_lengths: array[int] = field(default_factory=lambda: array("i"))

    def count(self, pair: EncodedPair, prompt: int, uncut: int) -> None:
        """Count a pair.

        Args:
            pair: after truncation.
            prompt: tokens of its prompt before truncation, without a BOS that the tokenizer adds.
            uncut: the same with this BOS.
        """
        self.rows += 1
        self.cut_prompts += len(pair.prompt) < uncut
        self.cut_responses += (not pair.chosen.has_eos) + (not pair.rejected.has_eos)
        self.prompt_lengths.append(prompt)
        self.response_lengths.extend((pair.chosen.uncut, pair.rejected.uncut))

    def add(self, other: TruncationStats) -> None:
        """Add what was counted over further pairs."""
        self.rows += other.rows
        self.cut_prompts += other.cut_prompts
        self.cut_responses += other.cut_responses
        self.merged_boundaries += other.merged_boundaries
        self.marked.add(other.marked)
        self.prompt_lengths += other.prompt_lengths
        self.response_lengths += other.response_lengths

    def messages(self, limits: Limits) -> list[str]:
        """Return messages for the user, one line each."""
        messages = [
            f"{self.rows} pairs; prompt tokens {_spread(self.prompt_lengths)}, response tokens "
            f"{_spread(self.response_lengths)} (median, 95 %, longest)"
        ]
        if self.cut_prompts or self.cut_responses:
            messages.append(
                f"truncated to {limits.max_length} tokens: {self.cut_prompts} prompts (to {limits.max_prompt_length}, "
                f"keeping the {limits.keep_prompt}), {self.cut_responses} responses"
            )
        if self.merged_boundaries:
            messages.append(
                f"{self.merged_boundaries} rows would tokenize differently with prompt and response joined; "
                "all stages tokenize them separately"
            )
        return messages

    def sizes(self) -> dict[str, Any]:
        """Plain values for JSON: counts, and the median, 95th percentile and maximum of the lengths."""
        return {
            "pairs": self.rows,
            "prompt_tokens": percentiles(self.prompt_lengths),
            "response_tokens": percentiles(self.response_lengths),
            "truncated_prompts": self.cut_prompts,
            "truncated_responses": self.cut_responses,
        }


def percentiles(lengths: Sequence[int]) -> dict[str, int]:
    """Median, 95th percentile and maximum of some lengths; empty without any."""
    if not len(lengths):
        return {}
    ordered = np.sort(np.asarray(lengths))
    places = {"median": len(ordered) // 2, "p95": math.ceil(0.95 * len(ordered)) - 1, "max": -1}
    return {name: int(ordered[place]) for name, place in places.items()}


def _spread(lengths: Sequence[int]) -> str:
    return "/".join(map(str, percentiles(lengths).values())) or "none"


def cut(
    prompt: list[int], responses: Sequence[list[int]], bos: int | None, eos: int, limits: Limits
) -> tuple[list[int], list[Response]]:
    """Add BOS and EOS, and truncate.

    If the prompt (with BOS) and the longest response (with EOS) exceed `max_length`, the prompt is truncated to
    `max_prompt_length` (never the BOS), then each response to the rest. A truncated response has no EOS.

    >>> cut([1, 2, 3], [[4, 5], [6]], None, 9, Limits(max_length=5, max_prompt_length=2))
    ([2, 3], [Response(ids=[4, 5, 9], has_eos=True, uncut=2), Response(ids=[6, 9], has_eos=True, uncut=1)])
    >>> cut([1, 2, 3], [[4, 5], [6]], 0, 9, Limits(max_length=4, max_prompt_length=2))
    ([0, 3], [Response(ids=[4, 5], has_eos=False, uncut=2), Response(ids=[6, 9], has_eos=True, uncut=1)])
    """
    head = [] if bos is None else [bos]
    longest = max(len(response) for response in responses) + 1
    if len(head) + len(prompt) + longest > limits.max_length:
        limit = max(0, limits.max_prompt_length - len(head))
        if len(prompt) > limit:
            prompt = prompt[len(prompt) - limit :] if limits.keep_prompt == "end" else prompt[:limit]
    prompt = head + prompt
    limit = limits.max_length - len(prompt)
    return prompt, [_cut_response(ids, eos, max(0, limit)) for ids in responses]


def _cut_response(ids: list[int], eos: int, limit: int) -> Response:
    if len(ids) + 1 <= limit:
        return Response([*ids, eos], True, len(ids))
    return Response(ids[:limit], False, len(ids))


def encode_pairs(
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    wheres: Sequence[str],
    vocabulary: Vocabulary,
    limits: Limits,
) -> tuple[list[EncodedPair], TruncationStats]:
    """Tokenize and truncate pairs of texts, in order. Keeps every row, even if no response token is left.

    Args:
        prompts: texts of the prompts.
        chosen: texts of the chosen responses.
        rejected: texts of the rejected responses.
        wheres: place of each row, for messages.
        vocabulary: tokenizer.
        limits: maximum lengths.
    """
    ids = [vocabulary.prompts(prompts), vocabulary.responses(chosen), vocabulary.responses(rejected)]
    stats = TruncationStats()
    pairs: list[EncodedPair] = []
    for i, (p, c, r) in enumerate(zip(*ids, strict=True)):
        prompt, (cut_chosen, cut_rejected) = cut(p, [c, r], vocabulary.bos, vocabulary.eos, limits)
        pairs.append(EncodedPair(i, wheres[i], prompt, cut_chosen, cut_rejected))
        stats.count(pairs[-1], len(p), len(p) + (vocabulary.bos is not None))
        texts = (prompts[i], chosen[i], rejected[i])
        stats.marked.count(next((marker for text in texts if (marker := vocabulary.marker(text))), None))
    joined = vocabulary.prompts([prompt + response for prompt, response in zip(prompts, chosen, strict=True)])
    stats.merged_boundaries = sum(j != p + c for j, p, c in zip(joined, ids[0], ids[1], strict=True))
    return pairs, stats


# Tokens can end inside a character; a longer run of tokens that spells no text is broken text.
_LONGEST_RUN = 16


def shared_characters(parts: Sequence[bytes]) -> list[tuple[int, int, str]]:
    """Find runs of tokens that only together spell characters, as (begin, end, text).

    >>> shared_characters([b"a", bytes([0xC3]), bytes([0xA9]), b"b"])
    [(1, 3, 'é')]
    """
    runs, begin = [], 0
    while begin < len(parts):
        end = begin + 1
        if _text(parts[begin]) is None:
            ends = range(begin + 2, min(begin + _LONGEST_RUN, len(parts)) + 1)
            run_end = next((i for i in ends if _spell(parts[begin:i])), None)
            if run_end is not None:
                runs.append((begin, run_end, _spell(parts[begin:run_end])))
                end = run_end
        begin = end
    return runs


def _spell(parts: Sequence[bytes]) -> str:
    """The text of concatenated bytes, or an empty string if they are not valid UTF-8."""
    return _text(b"".join(parts)) or ""


def _text(data: bytes) -> str | None:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None
