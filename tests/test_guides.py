"""The guides: every command runs with few steps, and the commands that cannot run here have options that exist.

A page's blocks marked `bash` run in order, by a real bash, in a directory as it is after the quickstart. `tisdpo` and
`python` are stand-ins: scripts that ask this process to run the program, which saves the seconds that a start takes. A
block marked `LANGUAGE file=NAME` is written to NAME first, and one marked `bash no-run` is parsed only.
"""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import select
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import Done, run_here

from tisdpo_cli.cli.options import spellings
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.names import second_names

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples"
PAGES = [REPOSITORY / "README.md", *sorted((EXAMPLES / "guides").glob("*.md"))]

# The README's commands for a fresh clone: `.ci/run` runs both.
INSTALL = (
    "python3 -m venv .venv && .venv/bin/pip install -q -e . && .venv/bin/tisdpo run --config examples/quickstart.yaml"
)
TEST = ".venv/bin/pip install -q -e '.[test]' && .venv/bin/pytest"

# The pages that have blocks marked `no-run`, and why.
NOT_RUN = {
    "adapters.md": "a pretrained model and a benchmark, minutes each",
    "contributing.md": "the checks, these tests among them",
    "experiments.md": "minutes to hours, or data from elsewhere",
    "outputs-and-metrics.md": "uploads, which need a login to the hub",
    "performance.md": "benchmarks, minutes each",
    "several-processes.md": "launchers for several processes or GPUs; tests/runs/test_processes.py runs two",
}

# What makes every command short: few steps, which would not always pass the checks of `inspect-weights`.
SHORT = {
    "TISDPO_MAX_STEPS": "2",
    "TISDPO_LEARNING_RATE": "2e-4",
    "TISDPO_WARMUP_STEPS": "0",
    "TISDPO_SAMPLE_PROMPTS": "4",
    "TISDPO_MAX_NEW_TOKENS": "8",
    "TISDPO_MIN_SEPARATION": "0",
    "TISDPO_MAX_CLIPPED": "1",
    "TISDPO_MAX_DRIFT": "100",
    "TISDPO_MAX_OFFSET": "100",
}
ROWS = {"train": 12, "test": 6}


@dataclass(frozen=True)
class Block:
    """A fenced block: its line in the page, the first word behind the fence, the others, and its text."""

    line: int
    language: str
    labels: tuple[str, ...]
    text: str

    @property
    def file(self) -> str | None:
        """The name of the file that it shows, if any."""
        return next((label[5:] for label in self.labels if label.startswith("file=")), None)


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    found, fence = [], None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.startswith("```"):
            continue
        if fence is None:
            fence = number, line[3:].split()
        else:
            begin, (language, *labels) = fence[0], fence[1] or [""]
            lines = page.read_text(encoding="utf-8").splitlines()[begin : number - 1]
            found.append(Block(begin, language, tuple(labels), "\n".join(lines) + "\n"))
            fence = None
    assert fence is None, f"{page.name}:{fence[0]}: this block has no end"
    return found


def runnable(page: Path) -> list[Block]:
    """The blocks whose commands run here."""
    return [
        block
        for block in blocks(page)
        if block.language == "bash" and "no-run" not in block.labels and block.text.strip() not in (INSTALL, TEST)
    ]


def parsed_only(page: Path) -> list[Block]:
    """The blocks whose commands are parsed only."""
    return [block for block in blocks(page) if block.language == "bash" and "no-run" in block.labels]


# Running a page ----------------------------------------------------------------------------------------------------

_STAND_IN = """#!{python} -IS
import json, os, socket, sys
connection = socket.socket(socket.AF_UNIX)
connection.connect({address!r})
settings = {{name: value for name, value in os.environ.items() if name.startswith("TISDPO_")}}
with connection.makefile("rw", encoding="utf-8") as stream:
    stream.write(json.dumps([os.path.basename(sys.argv[0]), sys.argv[1:], settings]) + "\\n")
    stream.flush()
    code, out, err = json.loads(stream.readline())
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


def run_shortened(arguments: Sequence[str]) -> Done:
    """Run the program here, with few steps."""
    done = run_here(
        *(
            SHORT["TISDPO_MAX_STEPS"] if before == "--max-steps" else word
            for before, word in zip(["", *arguments], arguments, strict=False)
        )
    )
    return Done(int(done.code or 0), done.out, done.err)


def run_script(arguments: Sequence[str]) -> Done:
    """Run a script of Python here, as if it were a program of its own."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", list(arguments))
        patch.syspath_prepend(str(Path(arguments[0]).parent))
        try:
            runpy.run_path(arguments[0], run_name="__main__")
        except SystemExit as left:
            code = int(left.code or 0)
        except Exception:
            code = 1
            traceback.print_exc()
    return Done(code, out.getvalue(), err.getvalue())


class Shell:
    """Runs scripts of bash in which `tisdpo` and `python` are this process; keeps every call."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self._monkeypatch = monkeypatch
        # The path of a socket must be short.
        self._home = Path(tempfile.mkdtemp(prefix="tisdpo-"))
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(self._home / "socket"))
        self._server.listen()
        for name in ("tisdpo", "python"):
            program = self._home / name
            program.write_text(_STAND_IN.format(python=sys.executable, address=str(self._home / "socket")))
            program.chmod(0o755)
        monkeypatch.chdir(folder)

    def run(self, script: str) -> None:
        """Run a script; the first command that fails ends it, and the test."""
        path = os.pathsep.join([str(self._home), os.environ["PATH"]])
        # Not a pipe: it would fill up while the program runs here.
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", script],
                stdout=subprocess.DEVNULL, stderr=errors, env={**os.environ, **SHORT, "PATH": path},
            )  # fmt: skip
            while process.poll() is None:
                if select.select([self._server], [], [], 0.02)[0]:
                    self._answer()
            errors.seek(0)
            assert process.returncode == 0, f"{errors.read()[-3000:]}\nthe last call: {[*self.calls, ''][-1]}"

    def _answer(self) -> None:
        connection, _ = self._server.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            program, arguments, settings = json.loads(stream.readline())
            self.calls.append(shlex.join([program, *arguments]))
            with self._monkeypatch.context() as patch:
                for name, value in settings.items():
                    patch.setenv(name, value)
                done = {"tisdpo": run_shortened, "python": run_script}[program](arguments)
            stream.write(json.dumps([done.code, done.out, done.err]) + "\n")

    def close(self) -> None:
        """Leave nothing behind."""
        self._server.close()
        shutil.rmtree(self._home)


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as it is after the quickstart, with a few pairs, and names for the placeholders of the guides."""
    root = tmp_path_factory.mktemp("quickstart")
    shutil.copytree(EXAMPLES, root / "examples", ignore=shutil.ignore_patterns("guides", "planted", "*.svg", "*.png"))
    for split, rows in ROWS.items():
        path = root / "examples" / "quickstart_data" / f"{split}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        shell = Shell(root, patch)
        shell.run("tisdpo run --config examples/quickstart.yaml")
        shell.close()
    for placeholder in ("SFT", "MODEL"):
        (root / placeholder).symlink_to("out/quickstart/sft")
    (root / "DATA").symlink_to("examples/quickstart_data")
    return root


@pytest.mark.parametrize("page", [page for page in PAGES if runnable(page)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, quickstart: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "here"
    # Nothing writes into a finished output, so its files need no copies.
    shutil.copytree(quickstart, folder, symlinks=True, copy_function=os.link)
    for block in blocks(page):
        if block.file is not None:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    shell = Shell(folder, monkeypatch)
    try:
        shell.run("".join(block.text for block in runnable(page)))
    finally:
        shell.close()
    assert shell.calls


# Commands that are parsed only -------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The words of each command of a block, without comments and variables in front."""
    lines = [line for line in re.sub(r"\\\n\s*", "", text).splitlines() if line.strip()]
    found = [shlex.split(line, comments=True) for line in lines]
    return [[word for i, word in enumerate(words) if i or not re.match(r"\w+=", word)] for words in found if words]


def program_arguments(words: list[str]) -> list[str] | None:
    """What the program itself gets, under a launcher too; None for another program."""
    if words[0] == "tisdpo":
        return words[1:]
    if words[0] == "sbatch":
        return words[words.index("examples/launch/slurm.sh") + 1 :]
    return words[words.index("tisdpo_cli") + 1 :] if "tisdpo_cli" in words else None


def check_launcher(words: list[str]) -> None:
    """Its options exist: its own parser takes them."""
    if words[0] == "torchrun":
        from torch.distributed.run import get_args_parser

        get_args_parser().parse_args(words[1:])
    elif words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        launch_command_parser().parse_args(words[2:])
    else:
        assert words[0] in ("tisdpo", "sbatch"), f"no launcher is known by this name: {words[0]}"


def check_script(words: list[str]) -> None:
    """A script of the repository exists, and its options are named in it or in the scripts beside it."""
    script = REPOSITORY / words[1]
    assert script.is_file(), words[1]
    sources = "".join(path.read_text(encoding="utf-8") for path in script.parent.glob("*.py"))
    for option in (word for word in words if word.startswith("--")):
        assert f'"{option}"' in sources, f"{words[1]} has no option {option}"


def check_developer_command(words: list[str]) -> None:
    """What it names is there."""
    known = ("git", ".ci/run", *(f".venv/bin/{name}" for name in ("pip", "pytest", "ruff", "mypy")))
    assert words[0] in known, f"a command that no test knows: {shlex.join(words)}"
    for word in words:
        if "/" in word and not word.startswith(".venv/"):
            assert (REPOSITORY / word.partition("::")[0]).exists(), word


@pytest.mark.parametrize("page", [page for page in PAGES if parsed_only(page)], ids=lambda page: page.name)
def test_commands_that_do_not_run_here_have_options_that_exist(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    for words in (words for block in parsed_only(page) for words in commands(block.text)):
        arguments = program_arguments(words)
        if arguments is not None:
            check_launcher(words)
            done = run_here(*arguments, "--print-config")
            assert not done.code, f"{shlex.join(words)}\n{done.err}"
        elif words[0] == "python":
            check_script(words)
        else:
            check_developer_command(words)


def test_the_pages_with_commands_that_do_not_run_are_known() -> None:
    assert {page.name for page in PAGES if parsed_only(page)} == set(NOT_RUN)


# Everything else that a page shows ---------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_say_what_they_are(page: Path) -> None:
    """Output is no command, and a command is no output."""
    for block in blocks(page):
        assert block.language in ("bash", "bibtex", "jinja", "json", "mermaid", "python", "text", "yaml"), block
        assert set(block.labels) <= {"no-run", f"file={block.file}"}, block
        if block.language == "bash":
            assert not re.search(r"^\$ |^error: |…", block.text, re.M), block


# Of programs that the guides also speak of: launchers, scripts, Python's own tools.
FOREIGN_OPTIONS = {
    "evaluation.md": {"--model_args", "--model_outputs", "--reference_outputs"},
    "experiments.md": {"--seeds", "--flip"},
    "performance.md": {"--rounds", "--lengths", "--pairs"},
    "README.md": {"--rounds"},
    "several-processes.md": {"--multi_gpu", "--machine_rank"},
}
# These pages name options of other programs throughout; what they say of ours runs in their blocks.
ABOUT_OTHERS = ("coming-from-trl.md", "coming-from-the-authors-code.md", "own-trainer.md")


def known_options() -> set[str]:
    """Every option of every command."""
    names = {"config", "set", "print-config", "json", "debug", "help", "version", "schema"}
    names |= {"install-completion", "show-completion"}
    spelled: set[str] = set()
    for spec in COMMANDS.values():
        names |= set(second_names(spec.settings))
        spelled |= {word for path, info in leaf_paths(spec.settings).items() for word in spellings(path, info)}
    return spelled | {f"--{name.replace('_', '-')}" for name in names}


@pytest.mark.parametrize("page", [p for p in PAGES if p.name not in ABOUT_OTHERS], ids=lambda page: page.name)
def test_options_that_are_spoken_of_exist(page: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    spoken = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", prose))
    assert spoken - known_options() - FOREIGN_OPTIONS.get(page.name, set()) == set()
