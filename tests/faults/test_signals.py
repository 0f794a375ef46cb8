"""SIGINT, SIGTERM and SIGHUP at any moment: one error line, the way on before it, 128 and the number as exit code."""

from __future__ import annotations

import importlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Done, Listener, run_here

from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}
SHORT = ("--max-steps", "2", "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0")


def assert_interrupted(done: Done, number: int) -> None:
    """The error is the last line, the command to resume with the one before it."""
    assert done.code == SIGNALS[signal.Signals(number)], done.err
    assert done.out == ""
    *_, before, last = done.err.splitlines()
    assert last.startswith("error: interrupted"), done.err
    assert before.startswith("resume with: tisdpo "), done.err
    assert "Traceback" not in done.err
    assert done.err.endswith("\n")
    assert done.err.count("error:") == 1


def signal_at(patch: pytest.MonkeyPatch, target: str, number: int) -> None:
    """Send this process a signal when a function, `module:name` or `module:Class.name`, is called."""
    module, _, name = target.partition(":")
    *inside, name = name.split(".")
    owner: Any = importlib.import_module(f"tisdpo_cli.{module}")
    for part in inside:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **kwargs)

    patch.setattr(owner, name, interrupted)


def arguments(world: Path, command: str, out: Path) -> list[str | Path]:
    if command == "estimate":
        return [command, "--forward", world / "dpo", "--reverse", world / "reverse", "-d", world / "data", "-o", out]
    if command == "evaluate":
        return [
            command,
            "-m",
            world / "dpo",
            "--ref-model",
            world / "sft",
            "-d",
            world / "data",
            "--max-new-tokens",
            "4",
        ]
    if command == "inspect-weights":
        return [command, world / "scored"]
    return [command, "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT, "--cache-dir", out.parent / "cache"]


MOMENTS = {
    "settings": ("train-dpo", "cli.execute:load"),
    "checks of paths": ("train-dpo", "cli.preflight:check"),
    "start": ("train-dpo", "runs.runtime:Runtime.__init__"),
    "hashing": ("train-dpo", "engine.arguments:content_hashes"),
    "tokenizer": ("train-dpo", "engine.training.preference:load_tokenizer"),
    "tokenising": ("train-dpo", "model.tokenizer:Tokenizer.encode_prompts"),
    "loading": ("train-dpo", "engine.training.policy:load_model"),
    "reference pass": ("train-dpo", "engine.training.reference:score"),
    "estimate: tokenising": ("estimate", "model.tokenizer:Tokenizer.encode_prompts"),
    "estimate: loading": ("estimate", "model.shared_models:load_model"),
    "estimate: scoring": ("estimate", "engine.scoring.scorer:score"),
    "evaluate: loading": ("evaluate", "model.shared_models:load_model"),
    "evaluate: scoring": ("evaluate", "engine.evaluation.policies:compare"),
    "evaluate: generating": ("evaluate", "engine.evaluation.policies:sample"),
    "inspect-weights: reading": ("inspect-weights", "engine.inspection.inspect_weights:read_weighted_split"),
    "inspect-weights: showing": ("inspect-weights", "cli.inspection_view:render"),
}
ALL = [(moment, signal.SIGINT) for moment in MOMENTS] + [
    (moment, number)
    for moment in ("settings", "loading", "estimate: scoring", "evaluate: generating")
    for number in (signal.SIGTERM, signal.SIGHUP)
]


@pytest.mark.parametrize(("moment", "number"), ALL, ids=lambda value: str(getattr(value, "name", value)))
def test_a_signal_outside_the_loop(
    contrast: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, number: signal.Signals
) -> None:
    command, target = MOMENTS[moment]
    line = arguments(contrast, command, tmp_path / "out")
    # Nothing has been tokenized before.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        signal_at(patch, target, number)
        done = run_here(*line)
    assert_interrupted(done, number)
    (way_on,) = [text for text in done.err.splitlines() if text.startswith("resume with: ")]
    assert shlex.split(way_on.removeprefix("resume with: ")) == ["tisdpo", *map(str, line)]
    assert signal.getsignal(number) is before
    assert not list(tmp_path.rglob("run.json"))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_in_the_loop_keeps_a_checkpoint(world: Path, tmp_path: Path, number: signal.Signals) -> None:
    given = {"model": world / "sft", "dataset": world / "data", "output_dir": tmp_path / "out"}
    flags = {**given, "max_steps": 4, "batch_size": 4, "eval_pairs": 0, "warmup_steps": 0}
    settings = load(COMMANDS["train-dpo"].settings, {name: str(value) for name, value in flags.items()}).settings
    torch.set_num_threads(1)
    with pytest.raises(Interrupted, match="interrupted after step 2 of 4; checkpoint saved") as caught:
        train_pairs(settings, Listener(2, number))
    assert caught.value.exit_code == SIGNALS[number]
    assert (tmp_path / "out" / "checkpoints" / "step-00000002").is_dir()
    listener = Listener()
    train_pairs(settings, listener)
    assert any("2 of 4 steps done" in note for note in listener.said)


# ---------------------------------------------------------------- what libraries do to an interruption


def _swallow() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        return


def _convert() -> None:
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException as fault:
        raise ImportError("a module failed to import") from fault


@pytest.mark.parametrize("library", [_swallow, _convert])
def test_an_interruption_that_a_library_hides_is_still_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("tisdpo_cli.cli.preflight.check", lambda _settings: library())
        done = run_here(*arguments(world, "train-dpo", tmp_path / "out"), "--dry-run")
    assert_interrupted(done, signal.SIGINT)


# ---------------------------------------------------------------- processes of their own

# Sends signals to itself when a module is imported, before any of it runs.
AT_IMPORT = """
import os, sys

_, number, module, *arguments = sys.argv

class Trap:
    def find_spec(self, name, path=None, target=None):
        if name == module:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), int(number))

sys.meta_path.insert(0, Trap())
from tisdpo_cli.__main__ import main
sys.argv = ["tisdpo", *arguments]
main()
"""


def run_script(script: str, *arguments: str | Path) -> Done:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("module", "number"),
    [
        ("tisdpo_cli.cli.app", signal.SIGINT),
        ("typer", signal.SIGTERM),
        ("pydantic_core", signal.SIGHUP),
        ("tisdpo_cli.settings.sources", signal.SIGINT),
        ("numpy", signal.SIGINT),
        ("torch._C", signal.SIGINT),
    ],
    ids=str,
)
def test_a_signal_during_the_imports(tmp_path: Path, module: str, number: signal.Signals) -> None:
    done = run_script(AT_IMPORT, int(number), module, "env", "--json")
    assert_interrupted(done, number)
    assert done.err.splitlines()[-2] == "resume with: tisdpo env --json"


SECOND = """
import os, signal, sys
from tisdpo_cli.cli.signals import SignalHandlers

sys.argv = ["tisdpo", "env"]
with SignalHandlers():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        print("still there")
"""

IN_A_FINALIZER = """
import os, signal, sys
from tisdpo_cli.cli.signals import SignalHandlers

class Fragile:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # a handler runs between two instructions
            pass

sys.argv = ["tisdpo", "env"]
with SignalHandlers():
    Fragile()
    print("still there")
"""


@pytest.mark.parametrize("script", [SECOND, IN_A_FINALIZER], ids=["second", "finalizer"])
def test_a_second_signal_and_one_in_a_finalizer_end_at_once(script: str) -> None:
    assert_interrupted(run_script(script), signal.SIGINT)


def test_an_interruption_that_is_swallowed_ends_the_process_after_a_while() -> None:
    script = "import signal, os, sys, tisdpo_cli.cli.signals as signals\nsys.argv = ['tisdpo', 'env']\n"
    script += "signals._GRACE_SECONDS = 0.01\n"
    script += (
        "with signals.SignalHandlers():\n    try: os.kill(os.getpid(), signal.SIGINT)\n    except BaseException: pass\n"
    )
    script += "    while True: pass\n"
    assert_interrupted(run_script(script), signal.SIGINT)


def test_nohup_is_respected() -> None:
    script = "import os, signal, sys\nfrom tisdpo_cli.cli.signals import SignalHandlers\n"
    script += "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script += "with SignalHandlers():\n    os.kill(os.getpid(), signal.SIGHUP)\n    print('still there')\n"
    assert run_script(script) == Done(0, "still there\n", "")


def test_what_starts_first_is_light() -> None:
    """Handlers are in place before anything that takes long to import."""
    script = "import sys\nimport tisdpo_cli.__main__\nprint(*sys.modules)"
    modules = set(run_script(script).out.split())
    assert not modules & {"typer", "rich", "pydantic", "yaml", "torch", "numpy", "tisdpo_cli.settings.commands"}
