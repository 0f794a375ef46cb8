"""Windows and macOS: what only Linux or POSIX has is missing there, and nothing may need it.

The program is not run on these systems here; a process without these modules and names stands for them.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tisdpo_cli
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load, to_yaml

ROOT = Path(tisdpo_cli.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# Modules and names that Windows does not have.
_MODULES = ("fcntl", "resource", "termios", "tty", "pty", "pwd", "grp", "syslog")
_OS = (
    "fork", "forkpty", "getuid", "geteuid", "getgid", "getegid", "getpgid", "getpgrp", "setsid", "killpg", "sysconf",
    "sched_getaffinity", "sched_setaffinity", "posix_fallocate", "O_NOFOLLOW", "O_DIRECTORY", "uname",
    "wait", "WNOHANG", "mkfifo", "chown", "getloadavg", "nice", "sync",
)  # fmt: skip
_SIGNALS = (
    "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGCHLD", "SIGQUIT", "SIGCONT", "SIGTSTP",
    "pthread_sigmask", "alarm", "setitimer", "sigwait",
)  # fmt: skip

_WITHOUT_POSIX = f"""
import importlib, os, pkgutil, signal, sys
import tisdpo_cli

def load_all():
    for module in pkgutil.walk_packages(tisdpo_cli.__path__, "tisdpo_cli."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)

# Libraries have their own ways on other systems: they are loaded as they are.
load_all()
for name in [name for name in sys.modules if name.split(".")[0] == "tisdpo_cli"]:
    del sys.modules[name]
for name in {_MODULES!r}:
    sys.modules[name] = None
for place, names in ((os, {_OS!r}), (signal, {_SIGNALS!r})):
    for name in names:
        if hasattr(place, name):
            delattr(place, name)
import tisdpo_cli
load_all()
"""

_USES = """
from pathlib import Path
import torch
from tisdpo_cli.data.spawning import Spawning
from tisdpo_cli.engine.inspection.disk_arrays import BLOCK, empty
from tisdpo_cli.files import sync, write_json
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.machine import device_memory, free_disk, resident_memory
from tisdpo_cli.runs.outputs import claim
from tisdpo_cli.runs.runtime import StopRequest
from tisdpo_cli.cli.signals import SignalHandlers

folder = Path(sys.argv[1])
write_json(folder / "a.json", {"a": 1})
sync([folder, folder / "a.json"])
assert (folder / "a.json").read_bytes().endswith(b"}\\n")
with claim(folder / "out", "train-dpo", {}, overwrite=False) as output:
    output.start("a: 1\\n")
    output.finish({}, [])
assert sorted(path.name for path in (folder / "out").iterdir()) == ["config.yaml", "run.json"]
with SignalHandlers(), StopRequest() as stop:
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
assert device_memory(torch.device("cpu")) > 0
assert free_disk(folder) > 0
assert len(empty(BLOCK + 1, "float32")) == BLOCK + 1
print("used")
"""


def test_nothing_that_only_posix_has_is_needed(tmp_path: Path) -> None:
    code = _WITHOUT_POSIX + _USES
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=280, check=False
    )
    assert (done.returncode, done.stdout) == (0, "used\n"), done.stderr[-2000:]


def _text_files(path: Path) -> list[tuple[int, str, set[str]]]:
    """Calls that open, read or write a file as text: line, name of the call, keywords."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        keywords = {keyword.arg for keyword in node.keywords if keyword.arg}
        modes = [arg.value for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
        text = any(mode in ("w", "a", "r", "x", "r+", "w+") for mode in modes)
        if name in ("read_text", "write_text") and isinstance(node.func, ast.Attribute):
            found.append((node.lineno, name, keywords))
        elif name == "open" and text:
            found.append((node.lineno, "r" if modes == ["r"] else "w", keywords))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_have_one_encoding_and_one_line_end_everywhere(path: Path) -> None:
    for line, name, keywords in _text_files(path):
        wanted = {"encoding"} if name in ("read_text", "r") else {"encoding", "newline"}
        assert wanted <= keywords, f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("path", ["C:\\new\\table", "\\\\server\\share", "two\nlines", "a: b #c", " space "])
def test_paths_of_other_systems_go_through_a_config_file(tmp_path: Path, path: str) -> None:
    flags = {"model": path, "dataset": path, "output_dir": path}
    config = tmp_path / "c.yaml"
    config.write_text(to_yaml(load(COMMANDS["train-dpo"].settings, flags, environ={}).settings), encoding="utf-8")
    again = load(COMMANDS["train-dpo"].settings, {}, config=config, environ={}).settings
    assert {name: getattr(again, name) for name in flags} == flags
