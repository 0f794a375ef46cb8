"""Compiles chat templates in an immutable sandbox with a fixed date. Knows no tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from datetime import date
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

from tisdpo_cli.errors import DataError, ModelError

# Private characters around text of data that spells out a token of the frame.
START, END = "\ue0f8", "\ue0f9"
_CLOCK = "strftime_now"
# Steps of loops over ranges in one render, and characters of one repetition.
_MOST = 1_000_000
_NOT_ASCII = re.compile(f"[^\x00-\x7e{START}{END}]")


class CompiledTemplate:
    """A chat template, ready to render.

    Args:
        source: text of the template.
        day: what its clock says.

    Attributes:
        reads_clock: whether it asks what day it is.

    Raises:
        ModelError: the template has a syntax error.
    """

    def __init__(self, source: str, day: date) -> None:
        environment = _Sandbox(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["namespace"] = _namespace
        try:
            # What is a global counts as declared.
            self.reads_clock = _CLOCK in meta.find_undeclared_variables(environment.parse(source))
            environment.globals[_CLOCK] = day.strftime
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise ModelError(f"the chat template is not valid: {_sentence(error)}") from error

    def render(self, variables: dict[str, Any]) -> str:
        """Render the template.

        Raises:
            DataError: the template refuses the variables, fails, or does what a template may not.
        """
        try:
            return self._template.render({**variables, "range": _Ranges()})
        except SecurityError as error:
            raise DataError(f"the chat template does what it may not: {_sentence(error)}") from error
        except jinja2.UndefinedError as error:
            raise DataError(f"the chat template fails on this conversation: {_sentence(error)}") from error
        except jinja2.TemplateError as error:
            raise DataError(f"the chat template refuses this conversation: {_sentence(error)}") from error
        except Exception as error:
            # Whatever a template does, it concerns one row: types, keys, ranges that are too long, recursion.
            name = type(error).__name__
            raise DataError(f"the chat template fails on this conversation: {name}: {_sentence(error)}") from error


class _Sandbox(ImmutableSandboxedEnvironment):
    """A sandbox in which reaching for what is private is an error even if nothing is done with it."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Multiply, or raise to a power, up to numbers and lengths that any template needs."""
        numbers = [value for value in (left, right) if isinstance(value, (int, float))]
        if len(numbers) < 2 or operator == "**":
            size = max((len(value) for value in (left, right) if isinstance(value, (str, list, tuple))), default=1)
            if any(abs(number) * size > _MOST for number in numbers):
                raise OverflowError(f"too large for {operator!r}")
        return super().call_binop(context, operator, left, right)

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        raise SecurityError(f"it reads {attribute!r} of {type(obj).__name__!r}")


class _Ranges:
    """`range` of one render: all loops over ranges together are bounded."""

    def __init__(self) -> None:
        self._left = _MOST

    def __call__(self, *bounds: int) -> _Range:
        return _Range(range(*bounds), self)

    def _take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise OverflowError("its loops over ranges are too long")


class _Range(Sequence[int]):
    """A range that counts every loop over it."""

    def __init__(self, values: range, ranges: _Ranges) -> None:
        self._values, self._ranges = values, ranges

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        found = self._values[index]
        return _Range(found, self._ranges) if isinstance(found, range) else found

    def __iter__(self) -> Iterator[int]:
        self._ranges._take(len(self._values))
        return iter(self._values)


class _Generation(Extension):
    """`{% generation %}` marks what a model generates, for other trainers; here its content is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        scope = nodes.Scope(lineno=line)
        scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return scope


class _Attributes(Namespace):
    """A namespace of jinja without private names."""

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        super().__setitem__(name, value)


def _namespace(*args: Any, **kwargs: Any) -> _Attributes:
    for name in dict(*args, **kwargs):
        _check_public(name)
    return _Attributes(*args, **kwargs)


def _check_public(name: Any) -> None:
    if str(name).startswith("_"):
        raise SecurityError(f"it sets {name!r} of a namespace")


def _raise_exception(message: Any) -> NoReturn:
    raise jinja2.TemplateError(str(message))


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without escapes for HTML, in which the marks stay as they are."""
    text = json.dumps(value, ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys)
    return _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text) if ensure_ascii else text


def _sentence(error: BaseException) -> str:
    """What an error says, in one line and without marks."""
    text = " ".join(str(error).replace(START, "").replace(END, "").split())
    return text[:200] or type(error).__name__
