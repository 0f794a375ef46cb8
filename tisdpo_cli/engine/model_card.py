"""The model card: the README.md beside a trained model, which says how it was made.

It says nothing that depends on the clock or on where the output lies, so that the same training makes the same card.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.text import visible

CARD_FILE = "README.md"
# What stands for the output directory in the command line.
OUTPUT = "OUTPUT_DIR"
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_OF_THE_CLOCK = "_per_second"
_LICENSE = (
    "Not stated. Before you share this model, add a `license:` line to the metadata at the top of this file; the "
    "licenses of the base model and of the data may bind you."
)
_CITATION = (
    "The method is that of [TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization With Estimated "
    "Weights](https://openreview.net/forum?id=oF6e2WwxX0) (Liu et al., ICLR 2025); the program is an independent "
    "implementation."
)


@dataclass(frozen=True)
class CardFacts:
    """What the settings of a command tell of a model, as plain values.

    Attributes:
        title: the method, for the heading.
        summary: one paragraph on what the model is.
        command_line: makes it again; `OUTPUT` stands for its output directory.
        base: path or hub id of the model that it starts from, or None for a new one.
        base_name: the same as it is shown.
        datasets: paths or hub ids of the data.
        tags: for the hub.
        rows: of the table on the training, name to text.
    """

    title: str
    summary: str
    command_line: str
    base: str | None
    base_name: str
    datasets: tuple[str, ...]
    tags: tuple[str, ...]
    rows: Mapping[str, str]


def model_card(facts: CardFacts, made_from: Mapping[str, Any], record: Mapping[str, Any], base: str | None) -> str:
    """Render the card.

    Args:
        facts: of the command.
        made_from: settings in force and hashes of the inputs, as in `run.json`.
        record: results, as in `run.json`.
        base: path or hub id of the base model of an adapter, or None for a whole model.
    """
    start = f" of {facts.base_name}" if facts.base is not None else ""
    hashes = {f"SHA-256 of {name[11:]}": code(made_from[name]) for name in made_from if name.startswith("content of ")}
    rows = {**facts.rows, **_progress(record), **hashes}
    metrics = {
        name: f"{value:.6g}"
        for name, value in record.get("final_metrics", {}).items()
        if name not in ("step", "epoch") and not name.endswith(_OF_THE_CLOCK)
    }
    installed = {name: version for name, version in versions().items() if version != "not installed"}
    in_force = {name: code(json.dumps(made_from[name], ensure_ascii=False)) for name in _settings(made_from)}
    sections = [
        f"# {text(facts.title)}{text(start)}",
        facts.summary,
        _section("Training", _table(("", ""), rows)),
        _section("Command", f"```bash\n{visible(facts.command_line)}\n```"),
        _section("Final metrics", _table(("metric", "value"), metrics)) if metrics else "",
        _section("Versions", _table(("package", "version"), installed)),
        _section("Settings", f"<details><summary>All settings in force</summary>\n\n{_table(('', ''), in_force)}"
                             "\n\n</details>") if in_force else "",
        _section("License", _LICENSE),
        _section("Citation", _CITATION),
    ]  # fmt: skip
    front = _metadata(facts, base)
    return f"---\n{front}---\n\n" + "\n\n".join(section for section in sections if section) + "\n"


def _metadata(facts: CardFacts, base: str | None) -> str:
    """The metadata of the card in YAML, in the hub's own words."""
    from huggingface_hub import ModelCardData

    known = hub_base(base or facts.base)
    relation = {"base_model": known, "base_model_relation": "adapter" if base else "finetune"} if known else {}
    datasets = sorted({name for name in map(_dataset_id, facts.datasets) if name is not None})
    data = ModelCardData(
        library_name="peft" if base else "transformers",
        pipeline_tag="text-generation",
        tags=["tisdpo", *facts.tags, *(["lora"] if base else [])],
        **({"datasets": datasets} if datasets else {}),
        **relation,
    )
    return data.to_yaml() + "\n"


def hub_base(name: str | None) -> str | None:
    """The hub id of a base model: of a model made here, the one that its card names; None if there is none."""
    if name is None:
        return None
    path = Path(name).expanduser()
    if not path.is_dir():
        return name if _HUB_ID.fullmatch(name) else None
    found = card_metadata(path).get("base_model")
    return found if isinstance(found, str) and _HUB_ID.fullmatch(found) else None


def card_metadata(directory: Path) -> dict[str, Any]:
    """The metadata of the card in a model directory; empty if it has none that can be read."""
    from huggingface_hub import metadata_load

    # The card is the user's to edit, and no reason to fail.
    with suppress(Exception):
        return dict(metadata_load(directory / CARD_FILE) or {})
    return {}


def _dataset_id(name: str) -> str | None:
    plain = re.split("[:@]", name)[0]
    is_id = "/" in plain and _HUB_ID.fullmatch(plain) is not None
    return plain if is_id and not Path(name).expanduser().exists() else None


def _progress(record: Mapping[str, Any]) -> dict[str, str]:
    counts = {"updates": "steps", "batch_size": "batch size", "pairs": "pairs", "examples": "examples", "seed": "seed"}
    return {name: str(record[key]) for key, name in counts.items() if key in record}


def _settings(made_from: Mapping[str, Any]) -> list[str]:
    return [name for name, value in made_from.items() if not name.startswith("content of ") and value is not None]


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}"


def _table(heads: Iterable[str], rows: Mapping[str, str]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---|---|", *(f"| {text(name)} | {rows[name]} |" for name in rows)]
    return "\n".join(lines)


def text(value: str) -> str:
    """Text of any source as it is, in Markdown and in a cell of a table."""
    # An underscore inside a word is one.
    return re.sub(r"([\\`*\[\]<>|#]|(?<!\w)_|_(?!\w))", r"\\\1", visible(value))


def code(value: str) -> str:
    """Text of any source as code, in a cell of a table."""
    shown = visible(value)
    longest = max((len(run) for run in re.findall("`+", shown)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{shown}{space}{fence}".replace("|", "\\|")
