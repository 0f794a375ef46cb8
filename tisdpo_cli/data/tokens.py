"""Text becomes token ids, and responses are cut: the one function that every stage uses.

It knows a tokenizer only by what it is called with, and no model. Prompt and response are tokenised apart,
without special tokens; a BOS goes in front where the tokenizer adds one, an EOS behind each response.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

Encode = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Vocabulary:
    """What tokenisation needs of a tokenizer: texts to ids without special tokens, and the ids put around them."""

    encode: Encode
    bos: int | None
    eos: int


@dataclass(frozen=True)
class Limits:
    """How long sequences may be, in tokens; a prompt is cut to `max_prompt_length` only where it must be."""

    max_length: int = 512
    max_prompt_length: int = 256
    keep_prompt: Literal["end", "start"] = "end"


@dataclass(frozen=True)
class Response:
    """One tokenised response.

    Attributes:
        ids: the tokens that are kept, with the EOS where the response was not cut.
        has_eos: whether the EOS is among them.
        uncut: number of tokens before the cut, the EOS not counted.
    """

    ids: list[int]
    has_eos: bool
    uncut: int

    @property
    def kept(self) -> int:
        """Tokens that are kept, the EOS not counted."""
        return len(self.ids) - self.has_eos


@dataclass(frozen=True)
class EncodedPair:
    """A tokenised pair: the prompt (with its BOS) is the same for both responses."""

    index: int
    where: str
    prompt: list[int]
    chosen: Response
    rejected: Response

    def swapped(self) -> EncodedPair:
        """The pair with the preference the other way round."""
        return EncodedPair(self.index, self.where, self.prompt, self.rejected, self.chosen)

    @property
    def tokens(self) -> int:
        """Tokens of the prompt and both responses."""
        return len(self.prompt) + len(self.chosen.ids) + len(self.rejected.ids)

    @property
    def longest(self) -> int:
        """Tokens of the prompt and the longer response: what a model's positions must hold."""
        return len(self.prompt) + max(len(self.chosen.ids), len(self.rejected.ids))


@dataclass(frozen=True)
class TemplateTokens:
    """Token ids that a template puts around a prompt.

    Attributes:
        before: in front of the prompt, behind its BOS.
        after: behind it, in front of the response.
    """

    before: list[int] = field(default_factory=list)
    after: list[int] = field(default_factory=list)

    def around(self, prompt: list[int], bos: int | None) -> list[int]:
        """The prompt, already cut, in its frame; a BOS stands in front of all, once.

        >>> TemplateTokens([5, 6], [7]).around([0, 1, 2], bos=0)
        [0, 5, 6, 1, 2, 7]
        """
        begins = bos is not None and prompt[:1] == [bos]
        head, rest = (prompt[:1], prompt[1:]) if begins else ([], prompt)
        before = self.before[1:] if begins and self.before[:1] == head else self.before
        return [*head, *before, *rest, *self.after]

    def __len__(self) -> int:
        return len(self.before) + len(self.after)


@dataclass
class TruncationStats:
    """What truncation and tokenisation did to a split, counted."""

    rows: int = 0
    cut_prompts: int = 0
    cut_responses: int = 0
    merged_boundaries: int = 0
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)

    def sentences(self, limits: Limits) -> list[str]:
        """What to tell the user, one line each."""
        said = [
            f"{self.rows} pairs; prompt tokens {_spread(self.prompt_lengths)}, response tokens "
            f"{_spread(self.response_lengths)} (median, 95 %, longest)"
        ]
        if self.cut_prompts or self.cut_responses:
            said.append(
                f"cut to {limits.max_length} tokens: {self.cut_prompts} prompts (to {limits.max_prompt_length}, "
                f"their {limits.keep_prompt} kept), {self.cut_responses} responses"
            )
        if self.merged_boundaries:
            said.append(
                f"{self.merged_boundaries} rows would tokenise differently with prompt and response joined; "
                "they are tokenised apart in every stage"
            )
        return said


def _spread(lengths: list[int]) -> str:
    if not lengths:
        return "none"
    ordered = sorted(lengths)
    return f"{ordered[len(ordered) // 2]}/{ordered[int(0.95 * (len(ordered) - 1))]}/{ordered[-1]}"


def cut(
    prompt: list[int], responses: Sequence[list[int]], bos: int | None, eos: int, limits: Limits
) -> tuple[list[int], list[Response]]:
    """Put BOS and EOS around, and cut what is too long.

    If the prompt (BOS included) and the longest response (EOS included) exceed `max_length`, the prompt is cut
    to `max_prompt_length`, never the BOS; then each response to what is left. A cut response has no EOS.

    >>> cut([1, 2, 3], [[4, 5], [6]], None, 9, Limits(max_length=5, max_prompt_length=2))
    ([2, 3], [Response(ids=[4, 5, 9], has_eos=True, uncut=2), Response(ids=[6, 9], has_eos=True, uncut=1)])
    >>> cut([1, 2, 3], [[4, 5], [6]], 0, 9, Limits(max_length=4, max_prompt_length=2))
    ([0, 3], [Response(ids=[4, 5], has_eos=False, uncut=2), Response(ids=[6, 9], has_eos=True, uncut=1)])
    """
    head = [] if bos is None else [bos]
    longest = max(len(response) for response in responses) + 1
    if len(head) + len(prompt) + longest > limits.max_length:
        room = max(0, limits.max_prompt_length - len(head))
        if len(prompt) > room:
            prompt = prompt[len(prompt) - room :] if limits.keep_prompt == "end" else prompt[:room]
    prompt = head + prompt
    room = limits.max_length - len(prompt)
    return prompt, [_cut_response(ids, eos, max(0, room)) for ids in responses]


def _cut_response(ids: list[int], eos: int, room: int) -> Response:
    if len(ids) + 1 <= room:
        return Response([*ids, eos], True, len(ids))
    return Response(ids[:room], False, len(ids))


def encode_pairs(
    prompts: Sequence[str],
    chosen: Sequence[str],
    rejected: Sequence[str],
    wheres: Sequence[str],
    vocabulary: Vocabulary,
    limits: Limits,
) -> tuple[list[EncodedPair], TruncationStats]:
    """Tokenise and cut pairs of texts, in order; every row is kept, also one with nothing left to train."""
    encode = vocabulary.encode
    ids = [encode(texts) for texts in (prompts, chosen, rejected)]
    cuts, pairs = TruncationStats(rows=len(prompts)), []
    for i, (p, c, r) in enumerate(zip(*ids, strict=True)):
        prompt, (cut_chosen, cut_rejected) = cut(p, [c, r], vocabulary.bos, vocabulary.eos, limits)
        pairs.append(EncodedPair(i, wheres[i], prompt, cut_chosen, cut_rejected))
        cuts.cut_prompts += len(prompt) < len(p) + (vocabulary.bos is not None)
        cuts.cut_responses += (not cut_chosen.has_eos) + (not cut_rejected.has_eos)
        cuts.prompt_lengths.append(len(p))
        cuts.response_lengths += [len(c), len(r)]
    joined = encode([prompt + response for prompt, response in zip(prompts, chosen, strict=True)])
    cuts.merged_boundaries = sum(j != p + c for j, p, c in zip(joined, ids[0], ids[1], strict=True))
    return pairs, cuts


# Tokens can end in the midst of one character and of the next; what spells nothing after so many is broken text.
_LONGEST_RUN = 16


def shared_characters(parts: Sequence[bytes]) -> list[tuple[int, int, str]]:
    """Runs of tokens that spell characters together, each having a part of the bytes only: (begin, end, text).

    >>> shared_characters([b"a", bytes([0xC3]), bytes([0xA9]), b"b"])
    [(1, 3, 'é')]
    """
    runs, begin = [], 0
    while begin < len(parts):
        end = begin + 1
        if _text(parts[begin]) is None:
            ends = range(begin + 2, min(begin + _LONGEST_RUN, len(parts)) + 1)
            found = next((i for i in ends if _spell(parts[begin:i])), None)
            if found is not None:
                runs.append((begin, found, _spell(parts[begin:found])))
                end = found
        begin = end
    return runs


def _spell(parts: Sequence[bytes]) -> str:
    return _text(b"".join(parts)) or ""


def _text(part: bytes) -> str | None:
    try:
        return part.decode("utf-8")
    except UnicodeDecodeError:
        return None
