"""Config files: YAML read strictly, with its place in every error, and bounded in size, depth and expansion.

Knows no settings. A few hundred bytes of nested aliases can stand for billions of values, so aliases are counted as
what they expand to.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from tisdpo_cli.errors import UsageError

# All settings of the pipeline with comments take about 10 kB, a few hundred values, and three levels.
_MAX_BYTES = 256 * 1024
_MAX_VALUES = 10_000
_MAX_DEPTH = 50


class _StrictLoader(yaml.SafeLoader):
    """YAML that refuses duplicate keys, deep nesting, and aliases that contain themselves or expand without bound."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # Values so far with aliases expanded, and how many of them each finished node holds.
        self._values = 0
        self._sizes: dict[yaml.Node, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose a node within the limits."""
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        before = self._values
        self._values += 1
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {_MAX_DEPTH} levels deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        assert node is not None
        if not is_alias:
            self._sizes[node] = self._values - before
        elif node not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias inside the value that it names", problem_mark=mark)
        else:
            self._values = before + self._sizes[node]
        if self._values > _MAX_VALUES:
            problem = f"more than {_MAX_VALUES:,} values, with aliases expanded"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Turn a node into a value; what a constructor trips over has a place too."""
        try:
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except Exception as fault:  # such as `!!timestamp x`, or an integer of 5,000 digits
            raise yaml.MarkedYAMLError(problem="invalid value", problem_mark=node.start_mark) from fault


def _mapping_without_duplicates(loader: _StrictLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    # Before merged keys (<<) are inserted, which may be overridden.
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be a name", problem_mark=key_node.start_mark)
        if key_node.value in seen:
            raise yaml.MarkedYAMLError(problem=f"duplicate key {key_node.value!r}", problem_mark=key_node.start_mark)
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return loader.construct_mapping(node, deep=True)


_StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping_without_duplicates)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping from a file.

    Raises:
        UsageError: no such file, not YAML, a key given twice, not a mapping, or beyond a limit of size, depth or
            number of values.
    """
    text = _read_text(path)
    try:
        values = yaml.load(text, Loader=_StrictLoader)
    except yaml.reader.ReaderError as fault:
        place = f"{path}:{text.count(chr(10), 0, fault.position) + 1}"
        raise UsageError(f"character U+{fault.character:04X} is not allowed in YAML", where=place) from fault
    except yaml.YAMLError as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        raise UsageError(getattr(fault, "problem", None) or "not YAML", where=f"{path}{line}") from fault
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError("must be a mapping of settings to values", where=str(path))
    return values


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(_MAX_BYTES + 1)
        if len(content) <= _MAX_BYTES:
            return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as fault:
        reason = getattr(fault, "strerror", None) or "not UTF-8 text"
        raise UsageError(f"cannot read the config: {reason}", where=str(path)) from fault
    raise UsageError(f"larger than {_MAX_BYTES // 1024} KiB, the limit for a config file", where=str(path))
