"""Loads tokenizers, finds out what the program needs of them, and trains them on data.

Knows transformers. Knows no models, no dataset rows and no settings.
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
    """A tokenizer with its special ids.

    Attributes:
        backend: the transformers tokenizer.
        bos: id that the tokenizer puts before a text, or None.
        eos: end-of-sequence id.
        pad: padding id.
        digest: SHA-256 of everything that determines the ids of a text.
        notices: messages for the user.
    """

    backend: Any
    bos: int | None
    eos: int
    pad: int
    digest: str
    notices: tuple[str, ...] = ()
    _pieces: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    def encode(self, texts: Sequence[str], markers: bool = False) -> list[list[int]]:
        """Encode texts to ids, without BOS and EOS.

        Args:
            texts: prompts or responses, or parts of a template.
            markers: whether text that spells a special token becomes that token, as in a template; data stays text.
        """
        return self._tokenize(texts, markers)["input_ids"] if texts else []

    def offsets(self, texts: Sequence[str]) -> list[list[tuple[int, int]]]:
        """Return (begin, end) of each token of `encode` in its text, in characters.

        Raises:
            ModelError: the tokenizer is not a fast one and has no offsets.
        """
        if not self.backend.is_fast:
            raise ModelError("this tokenizer provides no character offsets", fix="--spans needs a fast tokenizer")
        return self._tokenize(texts, return_offsets_mapping=True)["offset_mapping"] if texts else []

    def _tokenize(self, texts: Sequence[str], markers: bool = False, **kwargs: bool) -> Any:
        return self.backend(
            list(texts),
            add_special_tokens=False,
            split_special_tokens=not markers,
            return_attention_mask=False,
            verbose=False,
            **kwargs,
        )

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token within a text, with U+FFFD for a part of a character."""
        return [self._piece(token_id) for token_id in ids]

    def _piece(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            # Some tokenizers drop the leading space of the first token, so decode it after a letter.
            letter = self.encode(["a"])[0]
            alone, before, both = (self.text(ids) for ids in ([token_id], letter, [*letter, token_id]))
            piece = self._pieces[token_id] = both[len(before) :] if both.startswith(before) else alone
        return piece

    def labels(self, ids: Sequence[int]) -> list[str]:
        """Like `pieces`, with the bytes, such as `⟨f09f⟩`, of a token that is only a part of a character."""
        pieces = zip(self.pieces(ids), self.token_bytes(ids), strict=True)
        return [f"⟨{part.hex()}⟩" if "\ufffd" in piece and part else piece for piece, part in pieces]

    def text(self, ids: Sequence[int]) -> str:
        """Decode a sequence of tokens, special ones included."""
        return str(self.backend.decode(list(ids), clean_up_tokenization_spaces=False))

    def token_bytes(self, ids: Sequence[int]) -> list[bytes]:
        """Return the bytes of each token, also of parts of characters; empty if the tokenizer does not reveal them."""
        tokens = self.backend.convert_ids_to_tokens(list(ids))
        pairs = zip(self.pieces(ids), tokens, strict=True)
        return [_partial_bytes(token) if "\ufffd" in piece else piece.encode("utf-8") for piece, token in pairs]


def _partial_bytes(token: str) -> bytes:
    """Bytes of a token that is a part of a character: written `<0xF0>`, or in the alphabet of byte-level BPE."""
    if re.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes([int(token[3:5], 16)])
    alphabet = _byte_alphabet()
    return bytes(alphabet[ch] for ch in token) if all(ch in alphabet for ch in token) else b""


@cache
def _byte_alphabet() -> dict[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {character: byte for byte, character in bytes_to_unicode().items()}


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model directory.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    return describe_tokenizer(load_backend(path, trust_remote_code), str(path))


def load_backend(path: Path, trust_remote_code: bool) -> Any:
    """Load the transformers tokenizer of a model directory.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    silence_transformers()
    try:
        backend = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(error)}",
            where=str(path),
            fix="a model directory needs its tokenizer files",
        ) from error
    if len(backend.get_vocab()) <= len(backend.all_special_tokens):
        raise ModelError("no tokenizer files", where=str(path), fix="a model directory needs its tokenizer files")
    return backend


def describe_tokenizer(backend: Any, where: str) -> Tokenizer:
    """Find out which special ids a tokenizer uses.

    Args:
        backend: transformers tokenizer.
        where: its place in messages.

    Raises:
        ModelError: it has no end-of-sequence token.
    """
    eos = backend.eos_token_id
    if eos is None:
        raise ModelError(
            "the tokenizer has no end-of-sequence token", where=where, fix="set eos_token in tokenizer_config.json"
        )
    begins = backend("a", add_special_tokens=True)["input_ids"][:1]
    bos = backend.bos_token_id if backend.bos_token_id is not None and begins == [backend.bos_token_id] else None
    pad, notices = backend.pad_token_id, tuple[str, ...]()
    if pad is None:
        pad, notices = eos, (f"the tokenizer has no padding token; padding with {backend.eos_token!r} (masked)",)
    return Tokenizer(backend, bos, eos, pad, _digest(backend, bos, eos), notices)


def _digest(backend: Any, bos: int | None, eos: int) -> str:
    fast = getattr(backend, "backend_tokenizer", None)
    body = fast.to_str() if fast is not None else repr(sorted(backend.get_vocab().items()))
    return hashlib.sha256(f"{bos}/{eos}/{body}".encode()).hexdigest()


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer that has all 256 bytes, so that it can encode any text.

    Its class is that of the architecture of `make_model`: transformers rebuilds a tokenizer by the model type in the
    same directory, and silently loses any other pre-tokenization on reload.
    """
    from transformers import Qwen2Tokenizer

    silence_transformers()
    blank = Qwen2Tokenizer(vocab={}, merges=[], eos_token=EOS, pad_token=PAD, unk_token=None)
    trained = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    return describe_tokenizer(trained, "--init")


def silence_transformers() -> None:
    """Turn off transformers' log messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error of transformers, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
