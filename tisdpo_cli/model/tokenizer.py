"""Loads tokenizers, finds out what the program needs of them, and trains them on data.

Knows transformers. Knows no models, no dataset rows and no settings.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import ModelError, is_out_of_memory
from tisdpo_cli.model.directory import base_of, check_tokenizer_files, has_vocabulary, is_adapter, tokenizer_files
from tisdpo_cli.model.text_encoding import TextEncoding

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
        parses_data: whether special tokens spelled out in data become these tokens.
        source: directory it was loaded from, or None for a new one.
    """

    backend: Any
    bos: int | None
    eos: int
    pad: int
    digest: str
    notices: tuple[str, ...] = ()
    parses_data: bool = False
    source: Path | None = None
    _pieces: dict[int, str] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def texts(self) -> TextEncoding:
        """How texts become ids."""
        return TextEncoding(self.backend, self.parses_data)

    def encode_prompts(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode prompts to ids, without BOS and EOS. A parsed prompt loses its own BOS."""
        bos = self.backend.bos_token
        if self.parses_data and self.bos is not None and bos:
            texts = [text.removeprefix(bos) for text in texts]
        return self.texts.encode(texts)

    def encode_responses(self, texts: Sequence[str], at_start: bool = False) -> list[list[int]]:
        """Encode responses to ids, without EOS, as texts that continue the prompt. A parsed one loses its own EOS.

        Args:
            texts: responses.
            at_start: whether to encode them as at the start of a text, as the authors' code does.
        """
        return self.texts.encode([self._without_end(text) for text in texts], continued=not at_start)

    def marker(self, text: str) -> str | None:
        """Return the first special token or other marker that a text spells out and that stays text, or None."""
        return None if self.parses_data else self.texts.marker(text)

    def encode_template(self, before: str, after: str) -> tuple[list[int], list[int]]:
        """Encode what a template puts before and after a prompt; it may spell out special tokens."""
        (first,) = self.texts.encode([before], markers=True)
        (last,) = self.texts.encode([after], continued=True, markers=True)
        return first, last

    def offsets(self, texts: Sequence[str], at_start: bool = False) -> list[list[tuple[int, int]]]:
        """Return (begin, end) of each token of `encode_responses` in its text, in characters.

        Raises:
            ModelError: the tokenizer is not a fast one and has no offsets.
        """
        if not self.backend.is_fast:
            raise ModelError("this tokenizer provides no character offsets", fix="--spans needs a fast tokenizer")
        return self.texts.offsets([self._without_end(text) for text in texts], continued=not at_start)

    def spelled(self, ids: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
        """Return the text that ids spell, and (begin, end) of each of them in it, in characters."""
        parts = self.token_bytes(ids)
        # Every byte of UTF-8 but the first of a character has the bits 10 in front.
        firsts = [[byte & 0xC0 != 0x80 for byte in part] for part in parts]
        ends = list(accumulate(map(sum, firsts)))
        begins = [end - sum(first) - bool(first and not first[0]) for end, first in zip(ends, firsts, strict=True)]
        text = b"".join(parts).decode("utf-8", errors="replace")
        return text, list(zip(begins, ends, strict=True))

    def _without_end(self, text: str) -> str:
        """A response without the EOS at its end, which is added later, and the blanks behind it."""
        eos = self.backend.eos_token
        if self.parses_data and eos and text.rstrip().endswith(eos):
            return text.rstrip().removesuffix(eos)
        return text

    def save(self, directory: Path) -> None:
        """Save the tokenizer: the very files it was loaded from, since those of transformers may encode differently."""
        if self.source is None:
            self.backend.save_pretrained(directory)
            return
        for file in tokenizer_files(self.source, self.backend.vocab_files_names.values()):
            target = directory / file.relative_to(self.source)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(file.read_bytes())

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text of each token within a text, with U+FFFD for a part of a character."""
        return [self._piece(token_id) for token_id in ids]

    def _piece(self, token_id: int) -> str:
        piece = self._pieces.get(token_id)
        if piece is None:
            # Some tokenizers drop the leading space of the first token, so decode it after a letter.
            (letter,) = self.texts.encode(["a"])
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


def load_tokenizer(path: Path, trust_remote_code: bool = False, parse_data: bool = False) -> Tokenizer:
    """Load the tokenizer of a model directory; that of an adapter without one is its base model's.

    Args:
        path: directory of a model or an adapter.
        trust_remote_code: whether custom code from the model repository may run.
        parse_data: whether special tokens spelled out in data become these tokens.

    Raises:
        ModelError: there is none, or it has no end-of-sequence token.
    """
    if is_adapter(path) and not has_vocabulary(path):
        path = base_of(path)
    backend = load_backend(path, trust_remote_code)
    return describe_tokenizer(backend, str(path), source=path, parse_data=parse_data)


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
        if is_out_of_memory(error):
            raise
        check_tokenizer_files(path)
        raise ModelError(
            f"the tokenizer cannot be loaded: {first_line(error)}",
            where=str(path),
            fix="a model directory needs its tokenizer files",
        ) from error
    if len(backend.get_vocab()) <= len(backend.all_special_tokens):
        raise ModelError("no tokenizer files", where=str(path), fix="a model directory needs its tokenizer files")
    return backend


def describe_tokenizer(backend: Any, where: str, source: Path | None = None, parse_data: bool = False) -> Tokenizer:
    """Find out which special ids a tokenizer uses, and how it encodes texts.

    Args:
        backend: transformers tokenizer.
        where: its place in messages.
        source: directory it was loaded from.
        parse_data: whether special tokens spelled out in data become these tokens.

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
    pad, notices = backend.pad_token_id, []
    if pad is None:
        pad = eos
        notices.append(f"the tokenizer has no padding token; padding with {backend.eos_token!r} (masked)")
    if bos is None and source is not None and _asks_for_bos(source):
        notices.append(
            f"{where}: tokenizer_config.json sets add_bos_token, but the tokenizer adds no BOS in this version of "
            f"transformers; prompts get none ({backend.bos_token!r})"
        )
    scheme = TextEncoding(backend, parse_data).scheme
    digest = _digest(backend, bos, eos, scheme)
    return Tokenizer(backend, bos, eos, pad, digest, tuple(notices), parse_data, source)


def _asks_for_bos(source: Path) -> bool:
    try:
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("add_bos_token") is True


def _digest(backend: Any, bos: int | None, eos: int, scheme: str) -> str:
    fast = getattr(backend, "backend_tokenizer", None)
    body = fast.to_str() if fast is not None else repr(sorted(backend.get_vocab().items()))
    return hashlib.sha256(f"{bos}/{eos}/{body}{scheme}".encode()).hexdigest()


def make_tokenizer(texts: Iterable[str], vocab_size: int, parse_data: bool = False) -> Tokenizer:
    """Train a byte-level BPE tokenizer that has all 256 bytes, so that it can encode any text.

    Its class is that of the architecture of `make_model`: transformers rebuilds a tokenizer by the model type in the
    same directory, and silently loses any other pre-tokenization on reload.
    """
    from transformers import Qwen2Tokenizer

    silence_transformers()
    blank = Qwen2Tokenizer(vocab={}, merges=[], eos_token=EOS, pad_token=PAD, unk_token=None)
    trained = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    return describe_tokenizer(trained, "--init", parse_data=parse_data)


def silence_transformers() -> None:
    """Turn off transformers' log messages and progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    """Return the first line of an error of transformers, shortened."""
    lines = str(error).strip().splitlines()
    return lines[0][:160] if lines else type(error).__name__
