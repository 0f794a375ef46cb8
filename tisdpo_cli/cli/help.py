"""Help screens: options in panels, never cut and never broken inside a word, at any width.

Typer's own tables cut long option names and split choice lists at 80 columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import typer.core
from pydantic.fields import FieldInfo
from rich.console import Console
from rich.text import Text

from tisdpo_cli.cli.options import COMMON_HELP, common_names, is_on_by_default, metavar, spellings
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS, CommandSpec
from tisdpo_cli.settings.fields import PANELS, meta

_HELP_OPTION = ("-h, --help", "show this message and exit")
_CONFIGURATION = "Configuration"
# Width of the column of options, as a share of the line, and at most.
_SHARE, _WIDEST = 0.4, 40

Row = tuple[str, str]


class CommandWithHelp(typer.core.TyperCommand):
    """A command whose help is made from its settings."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the command."""
        formatter.write(_render(_command_help(COMMANDS[str(ctx.info_name)])))


class GroupWithHelp(typer.core.TyperGroup):
    """The program, whose help lists the commands in their panels."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write the help of the program."""
        formatter.write(_render(_program_help(str(self.help), self.params)))


def _render(lines: Iterable[Text]) -> str:
    # Colors only where stdout shows them; the width is that of the terminal, or COLUMNS.
    console = Console(highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        for line in lines:
            console.print(line, soft_wrap=True)
    return captured.get()


def _width() -> int:
    return Console().width


def _command_help(spec: CommandSpec) -> list[Text]:
    name = spec.settings.command
    paths = leaf_paths(spec.settings)
    positional = f" [{spec.positional.upper()}]" if spec.positional else ""
    positional += "..." if spec.positional and meta(paths[spec.positional])["many"] else ""
    lines = [_usage(f"tisdpo {name} [OPTIONS]{positional}"), Text()]
    lines += _paragraphs(spec.settings.__doc__ or "")
    panels: dict[str, list[Row]] = {panel: [] for panel in (*PANELS, _CONFIGURATION)}
    for path, info in paths.items():
        panels[meta(info)["panel"]].append((_option(path, info, spec.positional), _description(info)))
    common = common_names(bool(paths))
    panels[_CONFIGURATION] = [*(COMMON_HELP[name] for name in common), _HELP_OPTION]
    lines += _panels(panels)
    return [*lines, Text(), Text.assemble(("Example: ", "bold"), spec.example)]


def _program_help(text: str, params: Sequence[Any]) -> list[Text]:
    lines = [_usage("tisdpo [OPTIONS] COMMAND [ARGS]..."), Text(), *_paragraphs(text)]
    panels: dict[str, list[Row]] = {}
    for spec in COMMANDS.values():
        summary = (spec.settings.__doc__ or "").split("\n\n")[0]
        panels.setdefault(spec.panel, []).append((spec.settings.command, " ".join(summary.split())))
    options = [(", ".join(sorted(param.opts, key=len)), _as_help(param.help)) for param in params if not param.hidden]
    panels["Options"] = [row for row in options if "--help" not in row[0]] + [_HELP_OPTION]
    return lines + _panels(panels)


def _usage(text: str) -> Text:
    return Text.assemble(("Usage: ", "bold"), text)


def _paragraphs(text: str) -> list[Text]:
    width = _width()
    return [
        Text(line)
        for number, paragraph in enumerate(text.split("\n\n"))
        for line in ([""] if number else []) + _wrap(" ".join(paragraph.split()), width)
    ]


def _option(path: str, info: FieldInfo, positional: str | None) -> str:
    long, *others = spellings(path, info)
    name = ", ".join([long, *others] if is_on_by_default(info) else [*others, long])
    if path == positional:
        name = f"{path.upper()}, {name}"
    return f"{name} {metavar(info)}".rstrip()


def _description(info: FieldInfo) -> str:
    text, default = info.description or "", info.default
    if info.is_required():
        return f"{text} (required)"
    if default is None or isinstance(default, bool) or (isinstance(default, str) and not default.isprintable()):
        return text
    return f"{text} (default: {default:g})" if isinstance(default, float) else f"{text} (default: {default})"


def _as_help(text: str | None) -> str:
    """Help of an option that Typer defines, in the style of ours: lower case, no full stop."""
    text = (text or "").rstrip(".")
    return text[:1].lower() + text[1:]


def _panels(panels: dict[str, list[Row]]) -> list[Text]:
    width = _width()
    column = min(_WIDEST, int(width * _SHARE))
    lines: list[Text] = []
    for panel, rows in panels.items():
        if rows:
            lines += [Text(), Text(f"{panel}:", style="bold")]
            lines += [line for row in rows for line in _row(row, column, width)]
    return lines


def _row(row: Row, column: int, width: int) -> list[Text]:
    """An option and its description beside it, or below it where the option is too long for its column."""
    option, text = row
    # Options without a short form are aligned with those that have one.
    head = f"  {option}" if not option.startswith("--") else f"      {option}"
    wrapped = _wrap(text, width - column) or [""]
    first = Text(head, style="cyan")
    if len(head) > column - 2:
        return [first, *(Text(" " * column + line) for line in wrapped)]
    first.append(" " * (column - len(head)) + wrapped[0], style="default")
    return [first, *(Text(" " * column + line) for line in wrapped[1:])]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width` characters, broken at spaces only."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + 1 + len(word) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
