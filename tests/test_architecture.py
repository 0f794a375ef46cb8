"""The shape of the project: who may import whom (DESIGN 5), and small manners that no linter checks."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import tisdpo_cli
from tisdpo_cli.settings.commands import COMMANDS

ROOT = Path(tisdpo_cli.__file__).parent
PACKAGE = "tisdpo_cli"
FILES = sorted(ROOT.rglob("*.py"))


@dataclass(frozen=True)
class Import:
    """One imported module or name: `tisdpo_cli.data.reader.Row`, `torch`."""

    name: str
    line: int
    in_function: bool
    for_types: bool


def module_name(path: Path) -> str:
    """`tisdpo_cli.data.reader`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_for_types(node: ast.AST) -> bool:
    """`if TYPE_CHECKING:`."""
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports_of(path: Path) -> list[Import]:
    """Everything a file imports, also inside functions."""
    return list(_imports(ast.parse(path.read_text(encoding="utf-8")), module_name(path), False, False))


def _imports(node: ast.AST, module: str, in_function: bool, for_types: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function, for_types)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: imports are absolute"
            for alias in child.names:
                yield Import(f"{child.module}.{alias.name}", child.lineno, in_function, for_types)
        else:
            function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from _imports(child, module, in_function or function, for_types or is_for_types(child))


def part_of(name: str) -> str:
    """The part of the project that a name belongs to: `data`, `models`, `errors`, `__version__`; empty outside."""
    first, _, rest = name.partition(".")
    return rest.split(".")[0] if first == PACKAGE else ""


def files_of(part: str) -> list[Path]:
    """The files of a part: one file, or a package."""
    single = ROOT / f"{part}.py"
    return [single] if single.exists() else sorted((ROOT / part).glob("**/*.py"))


def broken(part: str, allowed: set[str], names: set[str] | None = None, run_time_only: bool = False) -> list[str]:
    """`file:line imports name` for each project import of a part that goes elsewhere than allowed.

    Args:
        part: whose imports.
        allowed: parts that may be imported.
        names: single names that may be imported beside them.
        run_time_only: leave out what is imported for type checkers.
    """
    found = []
    for path in files_of(part):
        for item in imports_of(path):
            target = part_of(item.name)
            if not target or target in allowed | {part} or item.name in (names or set()):
                continue
            if not (run_time_only and item.for_types):
                found.append(f"{path.relative_to(ROOT)}:{item.line} imports {item.name}")
    return found


def outside(part: str, run_time_only: bool = True) -> dict[str, str]:
    """First names of what a part imports from outside the project, with where."""
    return {
        item.name.split(".")[0]: f"{path.relative_to(ROOT)}:{item.line}"
        for path in files_of(part)
        for item in imports_of(path)
        if not part_of(item.name) and item.name.split(".")[0] != PACKAGE and not (run_time_only and item.for_types)
    }


HEAVY = {"torch", "transformers", "accelerate", "datasets", "safetensors", "tokenizers"}
# Which room may import which: cli → engine → (runs, data, model) → (files, errors, text); the maths knows none of them.
ARROWS = {
    "errors": set(),
    "text": set(),
    "formats": set(),
    "files": {"errors"},
    "cached_files": {"errors", "files"},
    "reporter": set(),
    "method": set(),
    "library": {"method"},
    "settings": {"errors", "formats"},
    "data": {"errors", "files", "formats", "cached_files"},
    "model": {"errors", "files"},
    "runs": {"errors", "files", "reporter", "cached_files", "__version__"},
    "engine": {"settings", "data", "model", "runs", "method", "reporter", "errors", "files", "text"},
    "cli": {"settings", "engine", "data", "model", "runs", "reporter", "errors", "files", "text", "__version__"},
}
_RECIPE_NAMES = ("PRESETS", "EosWeight", "Recipe", "final_recipe", "resolve_recipe")
# What the settings may read of the maths: its registries, and what resolves names and parameters.
REGISTRIES = {
    *(f"{PACKAGE}.method.recipe.{name}" for name in _RECIPE_NAMES),
    *(f"{PACKAGE}.method.objectives.{name}" for name in ("OBJECTIVES", "Loss", "resolve_loss")),
    *(f"{PACKAGE}.method.prompt_templates.{name}" for name in ("TEMPLATES", "template_text")),
    f"{PACKAGE}.method.transforms.TRANSFORMS",
    f"{PACKAGE}.method.steps.STEPS",
    *(f"{PACKAGE}.method.schedules.{name}" for name in ("SCHEDULES", "resolve_schedule")),
    f"{PACKAGE}.method.params.Param",
}


def test_the_rooms_of_the_project_are_known() -> None:
    """A new room gets its place in the arrows."""
    top = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in FILES}
    assert top - {"__init__", "__main__"} == set(ARROWS)


@pytest.mark.parametrize("room", ARROWS)
def test_a_room_imports_only_what_is_below_it(room: str) -> None:
    assert broken(room, ARROWS[room], REGISTRIES if room == "settings" else None) == []


def test_no_two_files_import_each_other() -> None:
    """Imports of modules form no circle, those inside functions included."""
    modules = {module_name(path): path for path in FILES}

    def target(name: str) -> str | None:
        return name if name in modules else name.rpartition(".")[0] if name.rpartition(".")[0] in modules else None

    below = {
        module: {found for item in imports_of(path) if (found := target(item.name)) and not item.for_types} - {module}
        for module, path in modules.items()
    }
    below.pop(PACKAGE)
    while leaves := [module for module, found in below.items() if not found & set(below)]:
        for module in leaves:
            del below[module]
    assert below == {}


@pytest.mark.parametrize(
    "module", ["batch", "logprobs", "packed_attention", "varlen_attention", "head", "last_layer", "row_lengths"]
)
def test_the_forward_pass_knows_torch_only(module: str) -> None:
    standard = {
        "__future__", "typing", "collections", "contextlib", "dataclasses", "functools", "importlib", "itertools",
    }  # fmt: skip
    assert set(outside(f"model/{module}")) - standard == {"torch"}


@pytest.mark.parametrize("path", files_of("method"), ids=module_name)
def test_the_registries_load_without_torch(path: Path) -> None:
    early = {item.name.split(".")[0] for item in imports_of(path) if not item.in_function and not item.for_types}
    assert not HEAVY & early


@pytest.mark.parametrize(
    "part", ["settings", "data", "runs/outputs", "runs/checkpoints", "model/directory", "errors", "files", "cli"]
)
def test_parts_that_need_no_tensors_import_no_torch(part: str) -> None:
    found = {name: where for name, where in outside(part).items() if name in {"torch", "transformers", "accelerate"}}
    assert found == {}


# Settings stop at the engine's door: the entry points, and what turns settings into plain arguments for them.
DOORS = {
    "engine/arguments.py",
    "engine/exporting.py",
    "engine/merging.py",
    "engine/pipeline.py",
    "engine/curves/report.py",
    "engine/pipeline_plan.py",
    "engine/stand_ins.py",
    "engine/evaluation/evaluate.py",
    "engine/inspection/inspect_weights.py",
    "engine/scoring/estimate.py",
    "engine/training/arguments.py",
    "engine/training/card.py",
    "engine/training/preference.py",
    "engine/training/sft.py",
}


def test_settings_stop_at_the_door_of_the_engine() -> None:
    inside = {
        str(path.relative_to(ROOT))
        for path in files_of("engine")
        for item in imports_of(path)
        if part_of(item.name) == "settings"
    }
    assert inside == DOORS


def test_the_entry_points_of_the_engine_are_loaded_when_used() -> None:
    code = (
        "import sys, tisdpo_cli.engine as engine\n"
        "assert 'torch' not in sys.modules\n"
        "assert all(callable(getattr(engine, name)) for name in engine.__all__)\n"
        "print(*engine.__all__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [
        "estimate", "evaluate", "export", "inspect_weights", "merge", "report", "run", "train_pairs", "train_sft",
    ]  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_entry_point(name: str) -> None:
    module, _, function = COMMANDS[name].run.partition(":")
    assert callable(getattr(importlib.import_module(f"{PACKAGE}.{module}"), function))


def test_the_command_line_imports_the_engine_inside_function_bodies_only() -> None:
    early = [
        f"{path.name}:{item.line} imports {item.name}"
        for path in files_of("cli")
        for item in imports_of(path)
        if part_of(item.name) == "engine" and not item.in_function and not item.for_types
    ]
    assert early == []


def test_the_engine_knows_no_terminal() -> None:
    assert not {"rich", "typer", "click"} & set(outside("engine", run_time_only=False))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nothing_imports_click(path: Path) -> None:
    """Typer vendors Click privately."""
    names = {item.name for item in imports_of(path)}
    assert not [name for name in names if name.split(".")[0] == "click" or "_click" in name]


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_module_imports(path: Path) -> None:
    importlib.import_module(module_name(path))


@pytest.mark.parametrize("path", [p for p in FILES if "cli" not in p.relative_to(ROOT).parts], ids=module_name)
def test_only_the_command_line_prints(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    assert not [f"{path.name}:{node.lineno}" for node in calls if ast.unparse(node.func) in ("print", "pprint")]


def public(node: ast.Module | ast.ClassDef) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    """Public classes and functions of a module, and public methods of those classes."""
    for child in node.body:
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from public(child)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_everything_public_says_what_it_is(path: Path) -> None:
    module = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(module)
    inherited = {"get_field_value", "settings_customise_sources"}
    silent = [node for node in public(module) if not ast.get_docstring(node) and node.name not in inherited]
    assert [f"{path.name}:{node.lineno} {node.name}" for node in silent] == []


# Size and map -------------------------------------------------------------------------------------------------------

REPOSITORY = ROOT.parent
LONGEST_FILE, LONGEST_FUNCTION = 350, 80


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_files_and_functions_are_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= LONGEST_FILE
    functions = [
        node for node in ast.walk(ast.parse(text)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > LONGEST_FUNCTION]
    assert long == []


@pytest.mark.skipif(not (REPOSITORY / "README.md").is_file(), reason="not in a checkout")
def test_every_file_of_the_package_is_on_the_map_of_rooms() -> None:
    guide = (REPOSITORY / "examples" / "guides" / "contributing.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w/]+\.py)`", guide))
    present = {str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py"}
    assert present - named == set(), "not on the map"
    mapped = {name for name in named if not name.startswith(("tests/", "examples/"))}
    assert mapped - {str(path.relative_to(ROOT)) for path in FILES} == set(), "on the map, but not there"


# Names of packages that differ from the name of their import.
DISTRIBUTIONS = {"yaml": "pyyaml"}


@pytest.mark.skipif(not (REPOSITORY / "pyproject.toml").is_file(), reason="not in a checkout")
def test_the_declared_dependencies_are_those_imported() -> None:
    text = (REPOSITORY / "pyproject.toml").read_text(encoding="utf-8")
    block = re.search(r"^dependencies = \[(.*?)^\]", text, re.M | re.S)
    assert block is not None
    declared = {
        re.split(r"[<>=\[]", entry)[0].lower().replace("-", "_") for entry in re.findall(r'"([^"]+)"', block[1])
    }
    # flash-attn is used where it is installed; these are extras.
    extras = {"peft": "peft", "bitsandbytes": "bitsandbytes", "report": "matplotlib"}
    imported = {
        DISTRIBUTIONS.get(first, first).lower()
        for path in FILES
        for item in imports_of(path)
        if (first := item.name.split(".")[0]) != PACKAGE and first not in sys.stdlib_module_names
    }
    assert imported - set(extras.values()) == declared
    assert all(re.search(rf'^{name} = \["{package}>=', text, re.M) for name, package in extras.items())
