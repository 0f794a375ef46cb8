"""The tests' own tiny world: a few pairs, a two-layer model, a byte-level tokenizer, and the program run for real."""

from __future__ import annotations

import atexit
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tisdpo_cli.reporter import Silent

# On models this small a second thread only waits for the first.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Under nohup, or behind `&` in a script, these are ignored, and so they would be in the programs that tests interrupt.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
# What is kept between runs stays out of the user's own cache, and comes from this session alone.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="tisdpo-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

QUESTIONS = ("How do I bake bread?", "Where can I sleep?", "What is a good book?", "Can you fix my bike?")
GOOD = (" I would gladly help you with that.", " Please take your time, gently.", " Thank you, let us look together.")
BAD = (" Whatever, just guess.", " That is boring and obvious.", " Hurry, I do not care at all.")


@dataclass(frozen=True)
class Done:
    """What a run of the program left: exit code, and both streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on stderr."""
        return self.err.strip().splitlines()[-1] if self.err.strip() else ""


Tisdpo = Callable[..., Done]


def run_tisdpo(*arguments: str | Path, env: Mapping[str, str] | None = None, timeout: float = 300) -> Done:
    """Run `python -m tisdpo_cli` in a process of its own."""
    command = [sys.executable, "-m", "tisdpo_cli", *map(str, arguments)]
    full = {**os.environ, **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=full, timeout=timeout, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


def run_here(*arguments: str | Path) -> Done:
    """Run the program in this process: the same, without the seconds that a start takes."""
    from tisdpo_cli.cli.app import main

    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    handler = signal.getsignal(signal.SIGTERM)
    sys.argv = ["tisdpo", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left:
            main()
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, handler)
    return Done(left.value.code, out.getvalue(), err.getvalue())


def pair_rows(count: int) -> list[dict[str, str]]:
    """Preference pairs in which a few words carry the preference."""
    return [
        {
            "prompt": f"\n\nHuman: {QUESTIONS[i % len(QUESTIONS)]} ({i})\n\nAssistant:",
            "chosen": GOOD[i % 3] + " Take care." * (i % 2),
            "rejected": BAD[(i // 3) % 3] + " Bye." * (i % 4),
        }
        for i in range(count)
    ]


def write_jsonl(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """Write rows as JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Listener(Silent):
    """Keeps what is said, and sends this process a signal after so many units of work."""

    def __init__(self, stop_after: int | None = None, number: int = signal.SIGTERM) -> None:
        self.said: list[str] = []
        self.warned: list[str] = []
        self.titles: list[str] = []
        self.left, self.number = stop_after, number

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.warned.append(text)

    def stage(self, title: str) -> None:
        self.titles.append(title)

    def progress(self, title: str, total: int, done: int, unit: str) -> Listener:
        return self

    def advance(self, units: int, figures: Mapping[str, float]) -> None:
        if self.left is not None:
            before, self.left = self.left, self.left - units
            if before > 0 >= self.left:
                os.kill(os.getpid(), self.number)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        return None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files of this process cannot grow beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `data/` (24 train and 8 test pairs) and `sft/` (a starting model with 2 layers, width 32)."""
    root = tmp_path_factory.mktemp("world")
    rows = pair_rows(32)
    write_jsonl(root / "data" / "train.jsonl", rows[:24])
    write_jsonl(root / "data" / "test.jsonl", rows[24:])
    done = run_tisdpo(
        "train-sft", "--init", "-d", root / "data", "-o", root / "sft", "--vocab-size", "320", "--hidden-size", "32",
        "--layers", "2", "--heads", "2", "--max-steps", "6", "--warmup-steps", "0", "--target", "both",
    )  # fmt: skip
    assert done.code == 0, done.err
    return root


@pytest.fixture(scope="session")
def contrast(world: Path) -> Path:
    """The world with `dpo/`, `reverse/` and `scored/` made, each by its command."""
    for command, name in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
        done = run_tisdpo(
            command, "-m", world / "sft", "-d", world / "data", "-o", world / name, "--max-steps", "8",
            "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0",
        )  # fmt: skip
        assert done.code == 0, done.err
    done = run_tisdpo(
        "estimate", "--forward", world / "dpo", "--reverse", world / "reverse", "-d", world / "data",
        "-o", world / "scored",
    )  # fmt: skip
    assert done.code == 0, done.err
    return world


@pytest.fixture(autouse=True)
def imported_modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Forget modules that a test wrote and imported: another test may write one of the same name."""
    yield
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and "." not in name and tmp_path_factory.getbasetemp() in Path(file).parents:
            del sys.modules[name]


@pytest.fixture
def tisdpo() -> Tisdpo:
    """Runs the program in a process of its own."""
    return run_tisdpo


# In a browser -----------------------------------------------------------------------------------------------------

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
QUIET = (
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """A browser, where there is one."""
    if CHROMIUM is None:
        pytest.skip("no Chromium here")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def opened(chromium: Any) -> Iterator[Callable[..., Any]]:
    """Open a page that must not log, request anything, or open a dialog."""
    contexts, heard = [], []

    def open_page(path: Path, fragment: str = "", width: int = 1280, **options: Any) -> Any:
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda message: heard.append(message.text))
        tab.on("pageerror", lambda error: heard.append(str(error)))
        tab.on("dialog", lambda dialog: (heard.append("dialog"), dialog.dismiss()))
        tab.on("request", lambda request: heard.append(request.url) if not request.url.startswith("file:") else None)
        requests: list[str] = []
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(path.as_uri() + fragment)
        assert len(requests) == 1
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert heard == []
