"""Hashes of what a command reads: models, adapters with their base models, and datasets. Knows no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from tisdpo_cli.errors import ModelError
from tisdpo_cli.files import sha256
from tisdpo_cli.model.directory import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    BASE_RECORD,
    base_of,
    is_adapter,
    is_quantized_adapter,
    read_json,
    tokenizer_files,
    weight_files,
)


def hash_model(path: Path) -> str:
    """Return SHA-256 over the names and bytes of a model's configuration, weights, tokenizer and custom code.

    That of an adapter covers its base model.

    Raises:
        ModelError: the base model of an adapter is not the one that it was trained on.
    """
    if is_adapter(path):
        base = hash_model(base_of(path))
        record = path / BASE_RECORD
        if record.is_file() and read_json(record, "").get("sha256") != base:
            raise ModelError(
                "the base model has changed since this adapter was trained",
                where=str(path),
                fix=f"restore it, or set sha256 in {BASE_RECORD} to {base}",
            )
        config = read_json(path / ADAPTER_CONFIG, "")
        # Where the base model lies says nothing about its content.
        shape = json.dumps({k: v for k, v in config.items() if k != "base_model_name_or_path"}, sort_keys=True)
        own = sha256(path / ADAPTER_WEIGHTS, *tokenizer_files(path), named=True)
        held = "in 4 bits" if is_quantized_adapter(path) else ""
        return hashlib.sha256(f"{base}{own}{shape}{held}".encode()).hexdigest()
    configs = [file for name in ("config.json", "generation_config.json") if (file := path / name).is_file()]
    tokenizer = [file for file in tokenizer_files(path) if file.suffix != ".py"]
    return sha256(*configs, *tokenizer, *weight_files(path), *_code(path), named=True)


def _code(path: Path) -> list[Path]:
    """Python files of a model that comes with custom code."""
    configs = (path / name for name in ("config.json", "tokenizer_config.json"))
    coded = any("auto_map" in read_json(config, "") for config in configs if config.is_file())
    return sorted(path.rglob("*.py")) if coded else []


def content_hashes(models: Mapping[str, Path | None], files: Iterable[Path]) -> dict[str, str]:
    """Hash the models and the dataset that a command reads, under the keys `content of NAME`.

    Args:
        models: option name to model directory, or None if the option is not set.
        files: of the dataset.
    """
    hashes = {f"content of {name}": hash_model(path) for name, path in models.items() if path is not None}
    return {**hashes, "content of dataset": sha256(*files, named=True)}
