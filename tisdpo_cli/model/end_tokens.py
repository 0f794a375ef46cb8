"""With which tokens a model ends a response. Knows no torch."""

from __future__ import annotations

from pathlib import Path

from tisdpo_cli.model.directory import base_of, read_json


def end_ids(path: Path) -> list[int]:
    """Ids of the tokens with which a model ends a response, from its generation config or else its configuration."""
    path = base_of(path)
    generation = path / "generation_config.json"
    config = read_json(generation if generation.is_file() else path / "config.json", "")
    ids = config.get("eos_token_id")
    if ids is None and not generation.is_file() and isinstance(config.get("text_config"), dict):
        ids = config["text_config"].get("eos_token_id")
    return sorted({i for i in (ids if isinstance(ids, list) else [ids]) if type(i) is int and i >= 0})
