"""The README is a front door: short, true to the program, and every link of it and of the guides leads somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from tisdpo_cli.method.transforms import TRANSFORMS
from tisdpo_cli.settings.commands import COMMANDS

REPOSITORY = Path(__file__).parents[1]
README = REPOSITORY / "README.md"
GUIDES = sorted((REPOSITORY / "examples" / "guides").glob("*.md"))
PAGES = [README, *GUIDES]


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose_of(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


def links_of(page: Path) -> list[str]:
    """Targets of links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose_of(page))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives to headings."""
    headings = re.findall(r"^#+ +(.+?)\s*$", prose_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_readme_is_short() -> None:
    assert len(README.read_bytes()) <= 12_288
    assert len(text_of(README).splitlines()) <= 200


def test_the_first_table_says_what_the_program_does_and_does_not_do() -> None:
    head = text_of(README).partition("## ")[0]
    assert "| What it does | What it does not do yet |" in head
    cells = [line.strip("| ").split(" | ") for line in head.splitlines() if line.startswith("|")][2:]
    assert all(1 <= len(row) <= 2 for row in cells)
    missing = " ".join(row[1] for row in cells if len(row) == 2)
    for limit in ("DeepSpeed", "GPUs", "Several machines", "Windows"):
        assert limit in missing
    commands = re.search(r"commands `([\w-]+)` .*?`([\w-]+)`", missing)
    assert commands is None or not set(commands.groups()) & set(COMMANDS), "this command is there now"


def test_the_two_commands_are_there() -> None:
    blocks = re.findall(r"^```bash\n(.*?)^```$", text_of(README), re.M | re.S)
    assert blocks[0] == (
        "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/tisdpo run --config"
        " examples/quickstart.yaml\n"
    )
    assert blocks[1] == ".venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest\n"


def test_every_transform_is_in_the_table_with_its_parameters() -> None:
    rows = {line.split("`")[1]: line for line in text_of(README).splitlines() if line.startswith("| `")}
    for name, transform in TRANSFORMS.items():
        options = re.findall(r"`--([\w-]+)` ([−\d.]+)", rows[name])
        written = {option.replace("-", "_"): float(value.replace("−", "-")) for option, value in options}
        assert written == {param: entry.default for param, entry in transform.params.items()}, name


def test_every_guide_is_linked_from_the_readme() -> None:
    linked = {(README.parent / link.partition("#")[0]).resolve() for link in links_of(README)}
    assert {guide.name for guide in GUIDES if guide.resolve() not in linked} == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for link in links_of(page):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_and_examples_that_are_named_exist(page: Path) -> None:
    named = re.findall(r"(?:tests|examples)/[\w./-]*\w\.(?:py|yaml|md|jsonl|svg|png)", text_of(page))
    assert [name for name in named if not (REPOSITORY / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_not_endless(page: Path) -> None:
    """Tables and blocks cannot be broken; everything else is."""
    long = [line for line in prose_of(page).splitlines() if len(line) > 150 and not line.startswith("|")]
    assert long == []
