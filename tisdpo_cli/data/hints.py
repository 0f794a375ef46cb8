"""Suggests column names, and recognizes JSON files of another shape. Guesses nothing without whole-word evidence."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from tisdpo_cli.data.rows import Row
from tisdpo_cli.data.source import GZIP, Source, converted, quoted
from tisdpo_cli.errors import DataError
from tisdpo_cli.formats import format_of

ROLES = ("prompt", "chosen", "rejected")
_PROMPT_WORDS = {"prompt", "question", "query", "instruction", "input"}
# Words that name a response on their own.
_STRONG = {
    "chosen": {"chosen", "preferred", "accepted"},
    "rejected": {"rejected", "reject", "dispreferred", "unpreferred", "nonpreferred"},
}
# Words that name a response only beside their opposite.
_OPPOSITES = (
    ("chosen", "rejected"), ("accept", "reject"), ("better", "worse"), ("best", "worst"), ("good", "bad"),
    ("winner", "loser"), ("winning", "losing"), ("win", "lose"), ("positive", "negative"), ("pos", "neg"),
    ("liked", "disliked"), ("preferred", "rejected"),
)  # fmt: skip
_NEGATIONS = {"not", "non", "no", "un", "never", "least", "less", "dis"}
# Words of columns that say something about a text instead of holding it.
_ABOUT = {
    "annotator", "by", "category", "class", "count", "date", "feedback", "hash", "id", "ids", "idx", "index", "key",
    "label", "lang", "language", "len", "length", "logps", "margin", "model", "models", "name", "num", "policy",
    "rank", "rate", "rating", "rationale", "reason", "reward", "score", "scores", "sha", "source", "task", "template",
    "time", "timestamp", "tokens", "topic", "type", "url", "uuid", "version", "weight", "weights",
}  # fmt: skip
# Columns that often belong to the context of a response; they are not used.
_CONTEXT_WORDS = {"system", "history", "context", "input", "tools", "documents"}
# Rows that are looked at.
SAMPLE_ROWS = 100


def words(name: str) -> list[str]:
    """Split a column name into lower-case words.

    >>> words("chosenResponse_2"), words("USER-Prompt")
    (['chosen', 'response', '2'], ['user', 'prompt'])
    """
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return [word.casefold() for word in re.findall(r"[^\W\d_]+|\d+", spaced)]


def missing_columns(
    path: Path, shown: str, sample: Sequence[Row], columns: Mapping[str, str], missing: Sequence[str]
) -> DataError:
    """Return the error if no row has some column, with the options that name the others.

    Args:
        path: file of the rows.
        shown: its name in messages.
        sample: its first valid JSON objects.
        columns: role to the name of its column.
        missing: the roles whose column no row has.
    """
    shape = other_shape(path, shown)
    if shape is not None:
        return shape
    present = sorted({key for row in sample for key in row.columns})
    taken = {name for role, name in columns.items() if role not in missing}
    texts = [name for name in _text_columns(sample) if name not in taken]
    what = f"expected columns {', '.join(columns.values())}; found {', '.join(present) or 'none'}"
    return DataError(what, where=shown, fix=_hint(missing, suggest(texts, missing), columns, texts))


def _hint(missing: Sequence[str], found: Mapping[str, str], columns: Mapping[str, str], texts: Sequence[str]) -> str:
    options = [f"--{role}-column {shlex.quote(found[role])}" for role in missing if role in found]
    unknown = [role for role in missing if role not in found]
    if not unknown:
        return f"try {' '.join(options)}"
    if options:
        named = " and ".join(f"--{role}-column" for role in unknown)
        return f"try {' '.join(options)}, and name the {' and '.join(unknown)} column with {named}"
    if not texts:
        return f"each row needs {' and '.join(repr(columns[role]) for role in unknown)}"
    return f"name the columns with {', '.join(f'--{role}-column' for role in unknown)}"


def _text_columns(rows: Sequence[Row]) -> list[str]:
    """Columns whose values are all text (or null), some of it not blank, and not names of other columns."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    texts = []
    for name in names:
        values = [row.columns[name] for row in rows if row.columns.get(name) is not None]
        if values and all(isinstance(value, str) for value in values) and any(value.strip() for value in values):
            others = {tuple(words(other))[-1:] for other in names if other != name}
            # Such as a column `winner` with the values `model_a` and `model_b`.
            if not all(tuple(words(value))[-1:] in others for value in values):
                texts.append(name)
    return texts


def suggest(names: Sequence[str], roles: Sequence[str]) -> dict[str, str]:
    """Return role to column for the roles that exactly one column is evidence for.

    >>> suggest(["id", "question", "good", "bad"], ["prompt", "chosen", "rejected"])
    {'prompt': 'question', 'chosen': 'good', 'rejected': 'bad'}
    >>> suggest(["question", "better", "chosen_by"], ["prompt", "chosen", "rejected"])
    {'prompt': 'question'}
    """
    usable = {name: set(words(name)) for name in names}
    usable = {name: found for name, found in usable.items() if not found & (_ABOUT | _NEGATIONS)}
    roles_of: dict[str, list[str]] = {role: _candidates(usable, role) for role in ROLES}
    suggested = {role: roles_of[role][0] for role in roles if len(roles_of[role]) == 1}
    # One column cannot have two roles.
    return {role: name for role, name in suggested.items() if list(suggested.values()).count(name) == 1}


def _candidates(usable: Mapping[str, set[str]], role: str) -> list[str]:
    if role == "prompt":
        responses = {word for words_ in _STRONG.values() for word in words_}
        return _plainest({name: found & _PROMPT_WORDS for name, found in usable.items() if not found & responses})
    side = ("chosen", "rejected").index(role)
    other = _STRONG["rejected" if role == "chosen" else "chosen"]
    strong = {name: found & _STRONG[role] for name, found in usable.items() if not found & other}
    if any(strong.values()):
        return _plainest(strong)
    for pair in _OPPOSITES:
        both = [
            [name for name, found in usable.items() if pair[k] in found and pair[1 - k] not in found] for k in (0, 1)
        ]
        if len(both[0]) == len(both[1]) == 1:
            return both[side]
    return []


def _plainest(evidence: Mapping[str, set[str]]) -> list[str]:
    """Columns with evidence; of several, the only one that is nothing but the word."""
    found = [name for name, hits in evidence.items() if hits]
    plain = [name for name in found if len(words(name)) == 1]
    return plain if len(found) > 1 and len(plain) == 1 else found


class UnusedContext:
    """Finds the columns that look like context of the responses and are not used."""

    def __init__(self) -> None:
        self._rows = 0
        self._counts: dict[str, int] = {}

    def add(self, columns: Mapping[str, Any]) -> None:
        """Look at a row."""
        self._rows += 1
        for name, value in columns.items():
            if _names_context(name) and isinstance(value, (str, list)) and value and str(value).strip():
                self._counts[name] = self._counts.get(name, 0) + 1

    def notices(self, shown: str, used: Sequence[str]) -> list[str]:
        """Return a message that names them."""
        named = {name: count for name, count in self._counts.items() if name not in used}
        if not named:
            return []
        listed = ", ".join(f"{name!r} (in {count} of {self._rows} rows)" for name, count in named.items())
        return [f"{shown}: not used: column {listed}; to train with it, put its text into the prompt"]


@lru_cache(maxsize=1024)
def _names_context(name: str) -> bool:
    found = set(words(name))
    return bool(found & _CONTEXT_WORDS) and not found & _ABOUT


# JSON of another shape -----------------------------------------------------------------------------------------

# Larger files are not read as a whole to explain what is wrong with them.
_WHOLE = 64 * 2**20


def other_shape(path: Path, shown: str) -> DataError | None:
    """Return the error for a JSON file that holds its rows in another shape, with the command that converts it."""
    if path.is_dir() or not path.is_file() or format_of(path.name) not in ("JSON", "JSONL", None):
        return None
    with Source(path, shown).open() as stream:
        content = stream.read(_WHOLE + 1)
    try:
        text = content.decode("utf-8-sig").strip()
        if len(content) > _WHOLE or not text.startswith("{"):
            return None
        value, end = json.JSONDecoder().raw_decode(text)
        rest = text[end:].lstrip()
    except (ValueError, RecursionError):
        return None
    if "\n" not in content.decode("utf-8-sig").strip() and "\r" in text and rest:
        return DataError("old Mac line ends (\\r)", where=shown, fix=_command("tr '\\r' '\\n' <", path))
    if rest:
        spread = "\n" in text[:end]
        return _converted("rows spread over several lines", shown, path, ".") if spread else None
    return _wrapped(value, shown, path) or (
        _converted("a row spread over several lines", shown, path, ".") if "\n" in text else None
    )


def _wrapped(value: Mapping[str, Any], shown: str, path: Path) -> DataError | None:
    """The error for rows below a key, or a list of values for each column."""
    below = [key for key, inner in value.items() if _is_list_of(inner, dict)]
    if below and not any(isinstance(inner, str) for key, inner in value.items() if key in ROLES):
        named = " and ".join(repr(key) for key in below[:3])
        return _converted(f"the rows are below {named}, not at the top", shown, path, f".{_key(below[0])}[]")
    lists = [key for key, inner in value.items() if _is_list_of(inner, str)]
    if len(lists) < 2 or len({len(value[key]) for key in lists}) > 1 or any(isinstance(v, str) for v in value.values()):
        return _of_dicts(value, shown, path)
    columns = ",".join(f".{_key(key)}" for key in lists)
    names = ",".join(f"{json.dumps(key)}:.[{index}]" for index, key in enumerate(lists))
    return _converted(
        "one list per column, not one object per row", shown, path, f"[{columns}]|transpose[]|{{{names}}}"
    )


def _of_dicts(value: Mapping[str, Any], shown: str, path: Path) -> DataError | None:
    """The error for what pandas writes: an object of values by row number for each column, or the rows by number."""
    inner = list(value.values())
    if len(inner) < 2 or not all(isinstance(v, dict) and v for v in inner):
        return None
    if all(isinstance(v, str) or v is None for column in inner for v in column.values()) and any(
        set(words(key)) & (_PROMPT_WORDS | _STRONG["chosen"] | _STRONG["rejected"]) for key in value
    ):
        program = "[to_entries[]|.key as $k|.value|to_entries|map({($k):.value})]|transpose[]|add"
        return _converted("one object per column, not one per row", shown, path, program)
    return _converted("the rows are the values of one object", shown, path, ".[]")


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(inner, kind) for inner in value)


def _key(name: str) -> str:
    return name if re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name) else f"[{json.dumps(name)}]"


def _converted(what: str, shown: str, path: Path, program: str) -> DataError:
    return DataError(what, where=shown, fix=_command(f"jq -c {shlex.quote(program)}", path))


def _command(program: str, path: Path) -> str:
    target = quoted(converted(path, "-rows.jsonl"))
    if path.suffix.lower() == GZIP:
        return f"convert it: gunzip -c {quoted(path)} | {program.removesuffix(' <')} > {target}"
    return f"convert it: {program} {quoted(path)} > {target}"
