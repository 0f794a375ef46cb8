"""Models and tokenizers: loaded with every check that loading itself leaves out, made from data, saved.

Knows transformers; it knows no dataset rows, no settings and no training.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.attention import GROUPS, Rule, grouped_attention
from tisdpo_cli.errors import ModelError, UsageFault

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
    return describe_tokenizer(_backend(path, trust_remote_code), str(path))


def _backend(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    _quiet()
    try:
        backend = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as fault:
        raise ModelError(
            f"the tokenizer cannot be loaded: {_first_line(fault)}",
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


def check_fit(
    path: Path, tokenizer: Tokenizer, max_length: int, trust_remote_code: bool = False, template: int = 0
) -> None:
    """Compare a tokenizer and a maximal length with a model's configuration, before its weights are read.

    Args:
        path: the model's directory.
        tokenizer: in use with it.
        max_length: tokens of a row.
        trust_remote_code: whether code that comes with the model may run.
        template: tokens that a prompt template adds to a row.

    Raises:
        ModelError: ids of the tokenizer have no row in the embedding.
        UsageFault: `max_length` is beyond the positions that the model has.
    """
    config = _config(path, trust_remote_code).get_text_config()
    highest = max(tokenizer.backend.get_vocab().values())
    rows = getattr(config, "vocab_size", None)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model's embedding {rows} rows",
            where=str(path),
            fix="use the model's own tokenizer, or resize its embedding",
        )
    positions = positions_of(path, trust_remote_code)
    if positions is not None and max_length + template > positions:
        added = f" with the {template} tokens of a template" if template else ""
        raise UsageFault(
            f"max_length {max_length}{added} is beyond the {positions} positions of this model",
            where=f"--max-length {max_length}",
            fix=f"lower it to {positions - template}",
        )


def shape_of(path: Path, trust_remote_code: bool = False) -> tuple[int, int]:
    """Layers and width of a model, by its configuration."""
    config = _config(path, trust_remote_code).get_text_config()
    return config.num_hidden_layers, config.hidden_size


def positions_of(path: Path, trust_remote_code: bool = False) -> int | None:
    """How many positions a model has, or None where its configuration sets no limit."""
    return getattr(_config(path, trust_remote_code).get_text_config(), "max_position_embeddings", None)


def _config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as fault:
        raise ModelError(
            f"the configuration cannot be used: {_first_line(fault)}", where=str(path / "config.json")
        ) from fault


def load_model(path: Path, trust_remote_code: bool = False) -> nn.Module:
    """Load a causal LM in float32 with dropout off; every weight must be there, fit and be finite.

    Raises:
        ModelError: a tensor is missing, has another shape or holds NaN; or the architecture is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    config = _config(path, trust_remote_code)
    kept = _dropout_off(config)
    model = _load(AutoModelForCausalLM, path, config, trust_remote_code, "name a causal language model")
    model._tisdpo_dropout = kept
    return model


def load_reward_model(path: Path) -> tuple[nn.Module, Any]:
    """Load a model that gives a text one number, with the checks of `load_model`, and its transformers tokenizer.

    Raises:
        ModelError: as in `load_model`; or it gives more numbers than one.
    """
    from transformers import AutoModelForSequenceClassification

    config = _config(path, False)
    if config.num_labels != 1:
        raise ModelError(f"a reward model gives one number, this one {config.num_labels}", where=str(path))
    _dropout_off(config)
    wanted = "name a sequence classification model with one output"
    return _load(AutoModelForSequenceClassification, path, config, False, wanted), _backend(path, False)


def _load(kind: Any, path: Path, config: Any, trust_remote_code: bool, wanted: str) -> Any:
    _quiet()
    try:
        model, info = kind.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as fault:
        raise ModelError(
            f"the model cannot be loaded: {_first_line(fault)}", where=str(path), fix=f"copy it again, or {wanted}"
        ) from fault
    _refuse_mismatched(info.get("mismatched_keys", ()), path)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights, {missing[0]} first",
            where=str(path),
            fix="copy the model again; in their place would be random values",
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"tensor {name} holds NaN or infinity", where=str(path), fix="take an earlier checkpoint of it"
            )
    return model.eval()


def _refuse_mismatched(mismatched: Iterable[Any], path: Path) -> None:
    for entry in sorted(mismatched, key=str):
        name, *shapes = entry if isinstance(entry, (tuple, list)) else (entry,)
        told = " where the configuration wants ".join(str(list(shape)) for shape in shapes)
        what = f"tensor {name} has the wrong shape" + (f": {told}" if told else "")
        raise ModelError(what, where=str(path), fix="take weights and config.json from the same model")


def _dropout_off(config: Any) -> dict[str, float]:
    """Set every dropout rate of a configuration to zero; returns what was set before."""
    names = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value > 0]
    kept = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, 0.0)
    return kept


# What transformers calls our attention.
_ATTENTION = "tisdpo_groups"


def attend_in_groups(model: nn.Module) -> Callable[[], None]:
    """Give a model the attention that packed rows need; returns what gives it back the one it had.

    Whether the model then computes what it did before is for the caller to find out: some go around it.

    Raises:
        ValueError: its attention cannot be replaced.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config: Any = model.config
    before = config._attn_implementation
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
    if config._attn_implementation != _ATTENTION:
        raise ValueError("its attention cannot be replaced")
    return lambda: model.set_attn_implementation(before)  # type: ignore[operator]


def _attend(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    rule = Rule(more.get("scaling"), more.get("sliding_window"), more.get("softcap"))
    return grouped_attention(query, key, value, more[GROUPS], rule).transpose(1, 2).contiguous(), None


def save_model(model: nn.Module, tokenizer: Tokenizer, directory: Path) -> None:
    """Save model and tokenizer in the layout of `save_pretrained`; the dropout rates of the configuration come back."""
    kept = getattr(model, "_tisdpo_dropout", {})
    for name, value in kept.items():
        setattr(model.config, name, value)
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.backend.save_pretrained(directory)
    for name in kept:
        setattr(model.config, name, 0.0)


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE tokenizer; all 256 bytes are in it, so that any text can be encoded.

    It is of the class that belongs to the architecture of `make_model`: transformers rebuilds a tokenizer by the
    type of the model beside it, and any other pre-tokenisation would be lost silently on reload.
    """
    from transformers import Qwen2Tokenizer

    _quiet()
    blank = Qwen2Tokenizer(vocab={}, merges=[], eos_token=EOS, pad_token=PAD, unk_token=None)
    trained = blank.train_new_from_iterator(texts, vocab_size, show_progress=False)
    return describe_tokenizer(trained, "--init")


def make_model(
    tokenizer: Tokenizer, *, hidden_size: int, layers: int, heads: int, positions: int, seed: int
) -> nn.Module:
    """A small random causal LM of the Qwen2 architecture with tied embeddings.

    Args:
        tokenizer: decides the vocabulary and the special ids.
        hidden_size: width; the feed-forward layers are 8/3 of it, rounded up to a multiple of 32.
        layers: depth.
        heads: attention heads.
        positions: longest sequence.
        seed: of the initial weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    _quiet()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer.backend),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 96) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    return Qwen2ForCausalLM(config).eval()


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _first_line(fault: BaseException) -> str:
    lines = str(fault).strip().splitlines()
    return lines[0][:160] if lines else type(fault).__name__
