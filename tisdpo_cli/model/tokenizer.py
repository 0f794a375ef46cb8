"""Tokenizers: loaded with their model, described, trained on data.

Knows transformers; it knows no models, no dataset rows and no settings.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import ModelError

EOS, PAD = "<|endoftext|>", "<|pad|>"


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer and what the program needs to know of it.

    Attributes:
        backend: the transformers tokenizer.
        bos: id that the tokenizer itself puts in front, or None.
        digest: SHA-256 of what decides how text becomes ids.
        notices: what to tell the user about it.
    """

    backend: Any
    bos: int | None
    eos: int
    pad: int
    digest: str
    notices: tuple[str, ...] = ()
    _pieces: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, texts: Sequence[str], markers: bool = False) -> list[list[int]]:
        """Ids of texts, without a BOS or EOS.

        Args:
            texts: of prompts and responses, or of a template.
            markers: whether text that spells a special token is that token, as in a template; data stays text.
        """
        return self._tokenized(texts, markers)["input_ids"] if texts else []

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Where the tokens of `encode` begin and end in each text, in characters.

        Raises:
            ModelError: the tokenizer does not know; only those of the `tokenizers` library do.
        """
        if not self.backend.is_fast:
            raise ModelError("this tokenizer does not say where its tokens are in the text", fix="leave out --spans")
        return self._tokenized(texts, return_offsets_mapping=True)["offset_mapping"] if texts else []

    def _tokenized(self, texts: Sequence[str], markers: bool = False, **more: bool) -> Any:
        return self.backend(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not markers,
            return_attention_mask=False,
            verbose=False,
            **more,
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """The text of each token inside a text; tokens that share a character get U+FFFD in the place of their part."""
        return [self._piece(at) for at in ids]

    def _piece(self, at: int) -> str:
        found = self._pieces.get(at)
        if found is None:
            # Some tokenizers drop the space of a token that comes first, so it is read behind a letter.
            letter = self.encode(["a"])[0]
            alone, before, both = (self.text(ids) for ids in ([at], letter, [*letter, at]))
            found = self._pieces[at] = both[len(before) :] if both.startswith(before) else alone
        return found

    def labels(self, ids: Sequence[int]) -> list[str]:
        """Like `pieces`, with `⟨f09f⟩`, its bytes, for a token that holds a part of a character only."""
        pieces = zip(self.pieces(ids), self.token_bytes(ids), strict=True)
        return [f"⟨{part.hex()}⟩" if "\ufffd" in piece and part else piece for piece, part in pieces]

    def text(self, ids: Sequence[int]) -> str:
        """The text of a sequence of tokens, special ones as they are written."""
        return str(self.backend.decode(list(ids), clean_up_tokenization_spaces=False))

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """The bytes of each token, of parts of characters too; empty where the tokenizer does not say."""
        tokens = self.backend.convert_ids_to_tokens(list(ids))
        pairs = zip(self.pieces(ids), tokens, strict=True)
        return [_bytes_of_part(token) if "\ufffd" in piece else piece.encode("utf-8") for piece, token in pairs]


def _bytes_of_part(token: str) -> bytes:
    """Bytes of a token that holds a part of a character: written `<0xF0>`, or in the alphabet of byte-level BPE."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    alphabet = _byte_alphabet()
    return bytes(alphabet[ch] for ch in token) if all(ch in alphabet for ch in token) else b""


@cache
def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Load a tokenizer.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    return describe_tokenizer(load_backend(path, trust_remote_code), str(path))


def load_backend(path: Path, trust_remote_code: bool) -> Any:
    """The transformers tokenizer of a model directory.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    silence_transformers()
    try:
        backend = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as fault:
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(fault)}",
            where=str(path),
            fix="a model directory needs its tokenizer files",
        ) from fault
    if len(backend.get_vocab()) <= len(backend.all_special_tokens):
        raise ModelError("no tokenizer files", where=str(path), fix="a model directory needs its tokenizer files")
    return backend


def describe_tokenizer(backend: Any, where: str) -> Tokenizer:
    """Find out how a tokenizer begins and ends a text, and what pads it."""
    eos = backend.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token", where=where, fix="set eos_token in tokenizer_config.json"
        )
    begins = backend("a", add_special_tokens=True)["input_ids"][:1]
    bos = backend.bos_token_id if backend.bos_token_id is not None and begins == [backend.bos_token_id] else None
    pad, notices = backend.pad_token_id, tuple[str, ...]()
    if pad is None:
        pad, notices = eos, (f"the tokenizer has no padding token; {backend.eos_token!r} pads (masked by length)",)
    return Tokenizer(backend, bos, eos, pad, _digest(backend, bos, eos), notices)


def _digest(backend: Any, bos: int | None, eos: int) -> str:
    fast = getattr(backend, "backend_tokenizer", None)
    body = fast.to_str() if fast is not None else repr(sorted(backend.get_vocab().items()))
    return hashlib.sha256(f"{bos}/{eos}/{body}".encode()).hexdigest()


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; all 256 bytes are in it, so that any text can be encoded.

    It is of the class that belongs to the architecture of `make_model`: transformers rebuilds a tokenizer by the
    type of the model beside it, and any other pre-tokenisation would be lost silently on reload.
    """
    from transformers import Qwen2Tokenizer

    silence_transformers()
    blank = Qwen2Tokenizer(vocab={}, merges=[], eos_token=EOS, pad_token=PAD, unk_token=None)
    trained = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    return describe_tokenizer(trained, "--init")


def silence_transformers() -> None:
    """Nothing of transformers speaks on the streams of this program."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(fault: BaseException) -> str:
    """What went wrong inside transformers, in one line."""
    lines = str(fault).strip().splitlines()
    return lines[0][:160] if lines else type(fault).__name__
