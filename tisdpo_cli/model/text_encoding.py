"""Turns the text of prompts and responses into ids: data is always text, and nothing is added that is not in it.

Knows transformers' tokenizers as objects. Knows no files, no rows and no settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Offsets = list[tuple[int, int]]
# Texts that a continued text is put behind, so that no space is added before it.
_ANCHORS = ("\n", "a", ".")
_ANGLE_BARS = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)
_BRACKETS = re.compile(r"<[^\s<>]+>|\[[^\s\[\]]+\]")
# These frame a part of a response, which the model itself generates; they open no turn.
_REASONING = re.compile(r"</?(think|thinking|reasoning)>")


@dataclass(frozen=True)
class TextEncoding:
    """How one tokenizer encodes texts, without BOS and EOS.

    Attributes:
        backend: the transformers tokenizer.
        parse: whether special tokens spelled out in data become these tokens.
    """

    backend: Any
    parse: bool = False

    def encode(self, texts: Sequence[str], continued: bool = False, markers: bool = False) -> list[list[int]]:
        """Encode texts to ids.

        Args:
            texts: prompts, responses, or parts of a template.
            continued: whether they continue another text, as responses do; some tokenizers put a space before a text.
            markers: whether special tokens spelled out in them become these tokens even if data is not parsed.
        """
        if not texts:
            return []
        special = markers or self.parse
        runs = [[text] if special else list(self._runs(text)) for text in texts]
        if not (continued and self.adds_space) and all(len(parts) == 1 for parts in runs):
            return self._tokenize(texts, special)["input_ids"]
        return [ids for ids, _ in self._encode_runs(runs, continued, special, offsets=False)]

    def offsets(self, texts: Sequence[str], continued: bool = False) -> list[Offsets]:
        """Return (begin, end) of each token of `encode` in its text, in characters; only fast tokenizers know it."""
        if not texts:
            return []
        runs = [[text] if self.parse else list(self._runs(text)) for text in texts]
        return [offsets for _, offsets in self._encode_runs(runs, continued, self.parse, offsets=True)]

    def marker(self, text: str) -> str | None:
        """Return the first special token or other marker that is spelled out in a text, or None."""
        found = self._markers.search(text) if self._markers is not None else None
        return found[0] if found else None

    @cached_property
    def adds_space(self) -> bool:
        """Whether the tokenizer puts a space before a text that does not begin with one."""
        newline, letter, both = (self._tokenize([text])["input_ids"][0] for text in ("\n", "a", "\na"))
        return bool(newline) and both != [*newline, *letter] and both[: len(newline)] == newline

    @cached_property
    def controls(self) -> list[str]:
        """Added tokens that frame turns though they are not marked special: data never becomes these."""
        template = str(getattr(self.backend, "chat_template", None) or "")
        return sorted(
            token.content
            for token in self.backend.added_tokens_decoder.values()
            if not token.special and _is_control(token.content, template)
        )

    @property
    def scheme(self) -> str:
        """What distinguishes these ids from those of the bare tokenizer; empty where nothing does."""
        controls = "" if self.parse or not self.controls else f"text:{'|'.join(self.controls)}"
        return f"{'parse ' if self.parse else ''}{'continued ' if self.adds_space else ''}{controls}".strip()

    @cached_property
    def _control(self) -> re.Pattern[str] | None:
        return _any_of(self.controls)

    @cached_property
    def _markers(self) -> re.Pattern[str] | None:
        special = [token.content for token in self.backend.added_tokens_decoder.values() if token.special]
        return _any_of([text for text in special if not text.isspace()] + self.controls)

    def _runs(self, text: str) -> Iterator[str]:
        """The parts of a text that are encoded one by one: each control token is broken after its first character."""
        begin = 0
        if self._control is not None:
            match = self._control.search(text)
            while match is not None:
                yield text[begin : match.start() + 1]
                begin = match.start() + 1
                match = self._control.search(text, begin)
        yield text[begin:]

    def _encode_runs(
        self, runs: Sequence[Sequence[str]], continued: bool, special: bool, offsets: bool
    ) -> Iterator[tuple[list[int], Offsets]]:
        """Ids and offsets of texts given by their runs; every run but the first continues a text."""
        flat = [(part, continued or number > 0) for parts in runs for number, part in enumerate(parts)]
        encoded = iter(self._encode_all(flat, special, offsets))
        for parts in runs:
            ids: list[int] = []
            places: Offsets = []
            begin = 0
            for part in parts:
                part_ids, part_places = next(encoded)
                ids += part_ids
                places += [(start + begin, end + begin) for start, end in part_places]
                begin += len(part)
            yield ids, places

    def _encode_all(
        self, parts: Sequence[tuple[str, bool]], special: bool, offsets: bool
    ) -> list[tuple[list[int], Offsets]]:
        results: list[tuple[list[int], Offsets] | None] = [None] * len(parts)
        if self.adds_space:
            waiting = [i for i, (part, continues) in enumerate(parts) if continues and part]
            for anchor in _ANCHORS:
                before = self._tokenize([anchor], special)["input_ids"][0]
                for i, (ids, places) in zip(
                    waiting, self._pairs([anchor + parts[i][0] for i in waiting], special, offsets), strict=True
                ):
                    if ids[: len(before)] == before:
                        shifted = [(max(0, a - len(anchor)), b - len(anchor)) for a, b in places[len(before) :]]
                        results[i] = (ids[len(before) :], shifted)
                waiting = [i for i in waiting if results[i] is None]
        rest = [i for i, result in enumerate(results) if result is None]
        for i, result in zip(rest, self._pairs([parts[i][0] for i in rest], special, offsets), strict=True):
            results[i] = result
        return [result for result in results if result is not None]

    def _pairs(self, texts: Sequence[str], special: bool, offsets: bool) -> list[tuple[list[int], Offsets]]:
        if not texts:
            return []
        encoded = self._tokenize(texts, special, **({"return_offsets_mapping": True} if offsets else {}))
        places = encoded["offset_mapping"] if offsets else [[] for _ in texts]
        return list(zip(encoded["input_ids"], places, strict=True))

    def _tokenize(self, texts: Sequence[str], special: bool = False, **kwargs: bool) -> Any:
        return self.backend(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not special,
            return_attention_mask=False,
            verbose=False,
            **kwargs,
        )


def _is_control(text: str, template: str) -> bool:
    """Whether an added token frames turns: by its shape, or by its shape and its place in the chat template."""
    if _REASONING.fullmatch(text):
        return False
    return bool(_ANGLE_BARS.fullmatch(text) or (_BRACKETS.fullmatch(text) and text in template))


def _any_of(texts: Sequence[str]) -> re.Pattern[str] | None:
    longest_first = sorted({text for text in texts if len(text) > 1}, key=lambda text: (-len(text), text))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
