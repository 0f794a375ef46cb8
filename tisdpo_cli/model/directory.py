"""Finds, checks and hashes model directories before anything heavy is imported. Knows no torch."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.files import is_unfinished, near_matches

_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")
_HUB_TIMEOUT_SECONDS = 1.5
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tekken.json",
    "chat_template.json",
    "chat_template.jinja",
)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What an adapter records of its base model.
BASE_RECORD = "base_model.json"
# The largest header of a safetensors file in its specification; no JSON file of a model is larger.
_MAX_HEADER = 100_000_000
# Configuration keys, at any depth, that name an implementation which transformers may fetch as native code.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def locate_model(name: str, option: str, trust_remote_code: bool = False) -> Path:
    """Find the directory of a model given by path or hub id, and check its files.

    Args:
        name: path or hub id.
        option: option that named the model, for messages.
        trust_remote_code: whether the model may come with custom code.

    Raises:
        UsageError: there is no such model, or it needs custom code and `trust_remote_code` is off.
        ModelError: a file is missing, damaged or of a kind that is never loaded.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        path = _from_hub(name, option)
    _refuse_unfinished(path)
    if is_adapter(path):
        _check_adapter(path)
        base = base_of(path)
        if is_adapter(base):
            raise ModelError("the base of this adapter is an adapter itself", where=str(path), fix="merge that one")
        locate_model(str(base), option, trust_remote_code)
        return path
    config = read_json(path / "config.json", "a model directory has a config.json")
    if not trust_remote_code:
        _refuse_code(config, f"{option} {name}")
    _refuse_adapter(path)
    _refuse_unsupported(config, path / "config.json")
    for other in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (path / other).is_file():
            read_json(path / other, "")
    for weights in weight_files(path):
        check_safetensors(weights)
    return path


def _refuse_code(config: Mapping[str, Any], where: str) -> None:
    if "auto_map" in config:
        raise UsageError("this model needs custom code", where=where, fix="allow it with --trust-remote-code")
    kernel = next((value for value in _implementations(config) if "/" in value), None)
    if kernel is not None:
        raise UsageError(
            f"this model asks for code from elsewhere: {kernel!r}",
            where=where,
            fix="remove the implementation from its config.json, or allow custom code with --trust-remote-code",
        )


def _implementations(config: object) -> Iterator[str]:
    """Names of attention or expert implementations anywhere in a configuration."""
    if isinstance(config, Mapping):
        for key, value in config.items():
            if any(name in key for name in _IMPLEMENTATIONS):
                yield from _strings(value)
            else:
                yield from _implementations(value)
    elif isinstance(config, list):
        for value in config:
            yield from _implementations(value)


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, (Mapping, list)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _strings(part)


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter rather than a whole model."""
    return (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file()


def base_of(path: Path) -> Path:
    """Return the directory of the base model of an adapter, or that of a whole model itself.

    Raises:
        ModelError: the base model of an adapter is not there.
    """
    if not is_adapter(path):
        return path
    name = read_json(path / ADAPTER_CONFIG, "").get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ModelError(f"{ADAPTER_CONFIG} names no base model", where=str(path), fix="add base_model_name_or_path")
    base = Path(name).expanduser()
    if base.is_dir():
        return base
    try:
        return _from_hub(name, "base model")
    except UsageError as error:
        raise ModelError(
            f"the base model of this adapter is not there: {name}",
            where=str(path),
            fix=f"put it back, or correct base_model_name_or_path in {ADAPTER_CONFIG}",
        ) from error


# What an adapter of peft may set so that it changes its base model, or acts at some tokens only, with what is allowed.
_PLAIN_LORA: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", None),
    "alora_invocation_tokens": (None,),
    "layer_replication": (None,),
}


def _check_adapter(path: Path) -> None:
    """Refuse damaged adapters, and those that do more than add to linear layers at every token."""
    config = read_json(path / ADAPTER_CONFIG, "")
    for name, allowed in _PLAIN_LORA.items():
        value = config.get(name)
        if value not in allowed:
            raise ModelError(
                f"an adapter with {name} {value!r}, which is not supported",
                where=str(path),
                fix="merge it into its base model with peft, and use the whole model",
            )
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"no {ADAPTER_WEIGHTS}", where=str(path), fix="save the adapter again, in safetensors")
    check_safetensors(path / ADAPTER_WEIGHTS)


def is_quantized_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter that was trained on a base model in 4 bits."""
    record = path / BASE_RECORD
    return is_adapter(path) and record.is_file() and bool(read_json(record, "").get("quantization"))


def _refuse_adapter(path: Path) -> None:
    """Refuse an adapter beside a whole model, which transformers would apply."""
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        if (path / name).exists():
            raise ModelError(
                "an adapter beside a whole model, so either could be meant",
                where=str(path / name),
                fix="move the adapter to another directory",
            )


def _refuse_unsupported(config: Mapping[str, Any], where: Path) -> None:
    if config.get("quantization_config"):
        raise ModelError(
            "quantized weights are not supported", where=str(where), fix="use the model before quantization"
        )
    if "transformers_weights" in config:
        raise ModelError(
            "transformers_weights names other weight files; they are not read",
            where=str(where),
            fix="remove this key and name the weights model.safetensors",
        )


def _from_hub(name: str, option: str) -> Path:
    near = near_matches(Path(name).expanduser(), directories=True)
    where = f"{option} {name}"
    if Path(name).expanduser().exists():
        raise UsageError("is a file", where=where, fix="a model is a directory or a hub id")
    if near or not _HUB_ID.match(name) or ("/" in name and Path(name.split("/")[0]).is_dir()):
        raise UsageError(f"no such directory{near}", where=where)
    import huggingface_hub

    patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
    with suppress(Exception):  # not in the cache, or only part of it: ask the hub
        cached = Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, local_files_only=True))
        if not (is_adapter(cached) and (cached / ADAPTER_WEIGHTS).is_file()):
            read_json(cached / "config.json", "")
            weight_files(cached)
        return cached
    try:
        # One quick request first: a download retries for long.
        huggingface_hub.HfApi().model_info(name, timeout=_HUB_TIMEOUT_SECONDS)
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:
        reason = f"hub: {type(error).__name__}"
        raise UsageError(f"no such directory, and no model to download by this name ({reason})", where=where) from error


def _refuse_unfinished(path: Path) -> None:
    if is_unfinished(path):
        raise ModelError("incomplete output", where=str(path), fix="rerun the command that created it to resume")


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        ModelError: it is not there (with `hint` as what to do), or damaged.
    """
    if not path.is_file():
        raise ModelError("not found", where=str(path), fix=hint)
    if path.stat().st_size > _MAX_HEADER:
        raise ModelError("damaged: larger than 100 MB", where=str(path), fix="copy the model again")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ModelError("damaged: nested too deeply", where=str(path), fix="copy the model again") from error
    except (ValueError, OSError) as error:
        raise ModelError("damaged: invalid JSON", where=str(path), fix="copy the model again") from error
    if not isinstance(content, dict):
        raise ModelError("damaged: not a JSON object", where=str(path), fix="copy the model again")
    return content


def weight_files(path: Path) -> list[Path]:
    """Return the weight files of a model that transformers loads: `model.safetensors`, or else the shards of its index.

    Raises:
        ModelError: there are none, or the index is damaged.
    """
    single = path / "model.safetensors"
    if single.is_file():
        return [single]
    index = path / "model.safetensors.index.json"
    if index.is_file():
        return [path / shard for shard in _shards(index)]
    if list(path.glob("*.bin")) or list(path.glob("*.pt")) or list(path.glob("*.pth")):
        raise ModelError(
            "has only pickled weights, which can run code and are never loaded",
            where=str(path),
            fix="if you trust the model, load it with transformers and save it with save_pretrained",
        )
    raise ModelError("no model.safetensors", where=str(path), fix="a model directory needs weights in safetensors")


def _shards(index: Path) -> list[str]:
    weight_map = read_json(index, "").get("weight_map")
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise ModelError("damaged: lists no weight files", where=str(index), fix="copy the model again")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise ModelError(f"lists a file outside the model: {shard}", where=str(index), fix="copy the model again")
        if not (index.parent / shard).is_file():
            where = str(index.parent / shard)
            raise ModelError("not found, but listed in the index", where=where, fix="copy the model again")
    return shards


def check_safetensors(path: Path) -> None:
    """Check the header of a safetensors file against the file's size.

    Raises:
        ModelError: the file is empty, truncated or not a safetensors file.
    """
    size = path.stat().st_size
    try:
        length, header = _header(path)
        ends = [entry["data_offsets"][1] for entry in header.values()]
        complete = 8 + length + max(ends, default=0) == size
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        complete = False
    if not complete:
        raise ModelError("damaged: truncated or not a safetensors file", where=str(path), fix="copy it again")


def stored_dtype(path: Path) -> Literal["bfloat16", "float16"] | None:
    """The dtype of all tensors in the weight files of a model if it is one of 16 bits, or None."""
    kinds = {entry.get("dtype") for file in weight_files(path) for entry in _header(file)[1].values()}
    names: dict[Any, Literal["bfloat16", "float16"]] = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(next(iter(kinds))) if len(kinds) == 1 else None


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Length of the header of a safetensors file, and its entries by tensor name."""
    with path.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        if length > min(_MAX_HEADER, path.stat().st_size):
            raise ValueError("the header is longer than the file or the format allows")
        header = json.loads(stream.read(length))
    return length, {name: entry for name, entry in header.items() if name != "__metadata__"}


def check_tokenizer_files(path: Path) -> None:
    """Check that the JSON files of a tokenizer can be read.

    Raises:
        ModelError: one is damaged.
    """
    for name in _TOKENIZER_FILES:
        if name.endswith(".json") and (path / name).is_file():
            read_json(path / name, "")


def tensor_names(path: Path) -> list[str]:
    """Return the names of all tensors in the weight files of a model, whose headers are sound."""
    return sorted({name for weights in weight_files(path) for name in _header(weights)[1]})


def tokenizer_files(path: Path, more: Iterable[str] = ()) -> list[Path]:
    """Return the files of the tokenizer in a model directory.

    Args:
        path: model directory.
        more: names of further files that its class reads.
    """
    names = dict.fromkeys([*_TOKENIZER_FILES, *more])
    found = [path / name for name in names if (path / name).is_file()]
    config = path / "tokenizer_config.json"
    coded = config.is_file() and "auto_map" in read_json(config, "")
    return [*found, *sorted(path.glob("chat_templates/*.jinja")), *(sorted(path.glob("*.py")) if coded else [])]


def has_vocabulary(path: Path) -> bool:
    """Whether a directory holds a tokenizer, rather than a chat template or settings of one alone."""
    names = set(_TOKENIZER_FILES) - {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    return any((path / name).is_file() for name in names if not name.startswith("chat_template"))
