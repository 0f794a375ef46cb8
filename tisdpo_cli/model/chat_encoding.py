"""Turns rendered conversations into ids: what the template writes may be tokens, what the data holds is text.

Knows transformers' tokenizers as objects. Knows no templates and no messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from tisdpo_cli.errors import DataError
from tisdpo_cli.model.template_sandbox import END, START
from tisdpo_cli.model.text_encoding import TextEncoding

_MARKS = re.compile(f"[{START}{END}]")


@dataclass(frozen=True)
class ChatEncoding(TextEncoding):
    """How one tokenizer encodes what a chat template renders.

    Attributes:
        frame: tokens that are not special and that the template writes around turns.
    """

    frame: tuple[str, ...] = ()
    _begins: dict[str, bool] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def controls(self) -> list[str]:
        """The added tokens besides the special ones that data never becomes: here those of the template's frame."""
        return sorted(self.frame)

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Text to id of every token that the template may write and data may not become."""
        ids = {token.content: i for i, token in self._added.items() if token.special or token.content in self.frame}
        return {text: i for text, i in ids.items() if text.strip()}

    def mark(self, value: Any) -> Any:
        """Put marks around each such token that is spelled out in a value of a row, in keys too."""
        if isinstance(value, str):
            text = self.unmark(value)
            return self._tokens.sub(lambda match: f"{START}{match[0]}{END}", text) if self.tokens else text
        if isinstance(value, dict):
            return {self.mark(key): self.mark(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.mark(inner) for inner in value]
        return value

    @staticmethod
    def unmark(marked: str) -> str:
        """Remove the marks."""
        return _MARKS.sub("", marked)

    def find(self, marked: str) -> re.Match[str] | None:
        """Return the first token that the template writes itself, as group `token`, or None."""
        return next((match for match in self._scan.finditer(marked) if match["token"]), None)

    def encode_marked(self, marked: str, behind: int | None = None) -> list[int]:
        """Encode rendered text whose data is marked.

        Args:
            marked: rendered text.
            behind: id of the token before it, or None at the start of a sequence.

        Raises:
            DataError: the tokenizer makes such a token from text.
        """
        if behind is None and START not in marked:
            # What nobody marked is encoded as a whole, as transformers does it.
            ids = self._tokenize([marked], special=True)["input_ids"][0]
            if self._count(ids) == sum(1 for match in self._scan.finditer(marked) if self._is_guarded(match["token"])):
                return ids
        return self.encode_behind([marked], behind)[0]

    def encode_behind(self, texts: Sequence[str], behind: int | None) -> list[list[int]]:
        """Encode several rendered texts whose data is marked, each behind the same token, in one call.

        Args:
            texts: rendered texts.
            behind: id of the token before each of them, or None at the start of a sequence.

        Raises:
            DataError: the tokenizer makes a token of the template from text.
        """
        plans = [list(self._plan(self._pieces(marked), behind)) for marked in texts]
        runs = dict.fromkeys((run, continued) for plan in plans for run, continued, _ in plan if run)
        encoded: dict[tuple[str, bool], list[int]] = {}
        for continued in (False, True):
            keys = [key for key in runs if key[1] == continued]
            encoded |= zip(keys, self.encode([run for run, _ in keys], continued), strict=True)
        if not all(map(self._guarded.isdisjoint, encoded.values())):
            raise DataError("the tokenizer turns text of this conversation into a special token")
        joined = []
        for plan in plans:
            ids: list[int] = []
            for run, continued, token in plan:
                ids += encoded[run, continued] if run else []
                ids += [self.tokens[token]] if token else []
            joined.append(ids)
        return joined

    def _plan(self, pieces: list[tuple[str, str]], behind: int | None) -> Iterator[tuple[str, bool, str]]:
        """Pieces (text, token after it or empty) as runs of text, whether each continues another, and its token."""
        texts = {int(id_) for id_ in self.tokens.values()}
        before = "" if behind not in texts else self._added[behind].content
        continued = behind is not None and not (before and self._begins_behind(before))
        for i, (text, token) in enumerate(pieces):
            # A token that takes in the blanks beside it does so with those of its own string.
            run = text.lstrip() if i and self._flag(before, "rstrip") else text
            run = run.rstrip() if self._flag(token, "lstrip") else run
            yield run, continued, token
            if token:
                before, continued = token, not self._begins_behind(token)

    def _pieces(self, marked: str) -> list[tuple[str, str]]:
        pieces, text, at = [], "", 0
        for match in self._scan.finditer(marked):
            text, at = text + marked[at : match.start()] + (match["data"] or ""), match.end()
            if match["token"]:
                pieces.append((text, match["token"]))
                text = ""
        return [*pieces, (text + marked[at:], "")]

    def _begins_behind(self, token: str) -> bool:
        """Whether text behind this token is encoded as at the start of a text, with the space put before it if any."""
        if token not in self._begins:
            alone, both = self._tokenize(["a"])["input_ids"][0], self._tokenize([token + "a"], True)["input_ids"][0]
            self._begins[token] = both == [self.tokens[token], *alone]
        return self._begins[token]

    def _count(self, ids: list[int]) -> int:
        return sum(1 for i in ids if i in self._guarded)

    def _is_guarded(self, token: str | None) -> bool:
        return token is not None and self.tokens[token] in self._guarded

    def _flag(self, token: str, name: str) -> bool:
        return bool(token) and getattr(self._added[self.tokens[token]], name)

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self.backend.added_tokens_decoder

    @cached_property
    def _guarded(self) -> frozenset[int]:
        """Ids that text must not become; what is unknown to the vocabulary may become the unknown token."""
        return frozenset(self.tokens.values()) - {self.backend.unk_token_id}

    @cached_property
    def _alternatives(self) -> str:
        return "|".join(map(re.escape, sorted(self.tokens, key=lambda text: (-len(text), text)))) or "(?!)"

    @cached_property
    def _tokens(self) -> re.Pattern[str]:
        return re.compile(self._alternatives)

    @cached_property
    def _scan(self) -> re.Pattern[str]:
        """Marked data, a mark that is left alone, or a token of the template."""
        return re.compile(f"{START}(?P<data>{self._alternatives}){END}|[{START}{END}]|(?P<token>{self._alternatives})")
