"""Config files that fight back: aliases that expand without bound, deep nesting, size, and values that are none."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from conftest import run_here

from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.yaml_files import read_yaml


def refused(path: Path, content: str | bytes) -> str:
    """The message for a config that must be refused at once, with exit 2 and one short line."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    began = time.monotonic()
    with pytest.raises(UsageError) as caught:
        read_yaml(path)
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(str(path))


def bomb(first: str, line: str, levels: int) -> str:
    """Lines of which each names the one before nine times."""
    rows = [f"k0: &a0 {first}"]
    rows += [f"k{i}: &a{i} {line.format(*[f'*a{i - 1}'] * 9)}" for i in range(1, levels)]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    ("first", "line"),
    [
        ("{x: 1, y: 2}", "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}, i: {}}}"),
        ("[1, 2]", "[{}, {}, {}, {}, {}, {}, {}, {}, {}]"),
        ("{x: 1}", "{{<<: [{}, {}, {}, {}, {}, {}, {}, {}, {}]}}"),
    ],
    ids=["mappings", "lists", "merge keys"],
)
def test_nested_aliases_are_refused_at_the_line_where_they_go_too_far(tmp_path: Path, first: str, line: str) -> None:
    message = refused(tmp_path / "c.yaml", bomb(first, line, 12))
    assert "10,000 values, with aliases expanded" in message
    assert message.split(":")[1] in ("4", "5")


def test_many_aliases_of_one_value_count_each_time(tmp_path: Path) -> None:
    shared = ", ".join(f"k{i}: 1" for i in range(500))
    text = f"a: &a {{{shared}}}\n" + "".join(f"b{i}: *a\n" for i in range(40))
    message = refused(tmp_path / "c.yaml", text)
    assert message.startswith(":10:"), message


@pytest.mark.parametrize("text", ["a: &a {x: *a}\n", "a: &a [1, [*a]]\n", "&a b: {c: &d {e: *d}}\n"])
def test_an_alias_inside_its_own_value_is_refused(tmp_path: Path, text: str) -> None:
    assert "an alias inside the value that it names" in refused(tmp_path / "c.yaml", text)


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 200_000,
        "a: " + "{a: " * 50_000,
        "- " * 100_000 + "1",
        "".join(f"{' ' * i}a:\n" for i in range(400)),
        "a: &a [1]\nb: " + "[" * 60 + "*a" + "]" * 60,
    ],
    ids=["lists", "mappings", "dashes", "indented", "around an alias"],
)
def test_deep_nesting_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    assert "nested more than 50 levels deep" in refused(tmp_path / "c.yaml", text)


def test_a_huge_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.touch()
    os.truncate(path, 2**40)
    with pytest.raises(UsageError, match="larger than 256 KiB"):
        read_yaml(path)
    with pytest.raises(UsageError, match="larger than 256 KiB"):
        read_yaml(Path("/dev/zero"))


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("seed: 1\nbeta: " + "1" * 5000 + "\n", ":2:7: invalid value"),
        ("a: !!timestamp x\n", ":1:4: invalid value"),
        ("a:\n  b: 2024-13-45\n", ":2:6: invalid value"),
        ("a: !!bool x\n", ":1:4: invalid value"),
        ("a: !!int ''\n", ":1:4: invalid value"),
        ("a: 1\nb: 2\0\n", ":2: character U+0000 is not allowed in YAML"),
        ("a: 1\n\n\x1b[31m: 2\n", ":3: character U+001B is not allowed in YAML"),
    ],
    ids=["digits", "timestamp", "date", "bool", "int", "nul", "escape"],
)
def test_a_value_that_is_none_has_its_place(tmp_path: Path, text: str, place: str) -> None:
    assert refused(tmp_path / "c.yaml", text).startswith(place)


def test_aliases_within_the_limits_work(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("train_dpo: &a {beta: 0.2}\ntrain_reverse: {<<: *a, seed: 1}\ntrain: *a\n")
    assert read_yaml(path) == {
        "train_dpo": {"beta": 0.2},
        "train_reverse": {"beta": 0.2, "seed": 1},
        "train": {"beta": 0.2},
    }


def test_the_program_refuses_such_a_file_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(bomb("{x: 1, y: 2}", "{{a: {}, b: {}, c: {}, d: {}, e: {}, f: {}, g: {}, h: {}, i: {}}}", 20))
    done = run_here("run", "-c", path, "--print-config")
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.error.startswith(f"error: {path}:")
