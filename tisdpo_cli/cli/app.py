"""The program `tisdpo`: commands, what they print on stdout, and the one place where errors become exit codes."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Optional

import typer

from tisdpo_cli import __version__
from tisdpo_cli.cli.console import TerminalReporter, print_error
from tisdpo_cli.cli.faults import explain
from tisdpo_cli.cli.options import Common, command_function, normalize_options
from tisdpo_cli.errors import DataError, Interrupted, RankError, TisdpoError
from tisdpo_cli.files import write_text
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.evaluate import Evaluate
from tisdpo_cli.settings.inspect_weights import InspectWeights
from tisdpo_cli.settings.sources import load, to_yaml
from tisdpo_cli.text import visible

if TYPE_CHECKING:
    from tisdpo_cli.reporter import Reporter

_METHOD, _AROUND = "The method", "Around it"

app = typer.Typer(
    name="tisdpo",
    help="Token-level Importance Sampling for Direct Preference Optimization (TIS-DPO): train two contrastive "
    "models, score every token with them, and train with the scores as token weights.",
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

_EXAMPLES = {
    "train-dpo": "tisdpo train-dpo -m MODEL -d pairs.jsonl -o out/dpo --max-steps 200",
    "train-reverse": "tisdpo train-reverse -m MODEL -d pairs.jsonl -o out/reverse --max-steps 200",
    "estimate": "tisdpo estimate --forward out/dpo --reverse out/reverse -d pairs.jsonl -o out/scored",
    "train": "tisdpo train -m MODEL -d out/scored -o out/tisdpo --transform rank_based",
    "inspect-weights": "tisdpo inspect-weights out/scored --index 3 --transform exp",
    "run": "tisdpo run --config examples/quickstart.yaml",
    "train-sft": "tisdpo train-sft --init -d pairs.jsonl -o out/sft",
    "evaluate": "tisdpo evaluate -m out/tisdpo --baseline out/dpo --ref-model SFT -d DATA --samples samples.jsonl",
}
_NOT_OF_THE_METHOD = ("train-sft", "evaluate")


def _prepare(command: type[Command], flags: dict[str, Any], common: Common) -> Command | None:
    """Settings of a command, checked as far as nothing heavy is needed; None where only they were asked for."""
    loaded = load(command, flags, config=common.config, sets=common.sets, environ=os.environ)
    if common.print_config:
        _stdout(to_yaml(loaded.settings, loaded.origins).rstrip("\n"))
        return None
    from tisdpo_cli.cli.preflight import check

    check(loaded.settings)
    for notice in loaded.notices:
        _reporter().note(notice)
    return loaded.settings


def _make(engine: Callable[[], Callable[[Any, Any], Any]], name: str) -> Callable[[dict[str, Any], Common], None]:
    """The body of a command that makes a directory and prints its path."""

    def body(flags: dict[str, Any], common: Common) -> None:
        settings = _prepare(COMMANDS[name], flags, common)
        if settings is None:
            return
        reporter = _reporter()
        made = engine()(settings, reporter)
        if not made.record:
            return  # a dry run made nothing
        if _first_rank():
            reporter.note(f"next: {_next(name, settings, flags, common)}")
        _result({"path": str(made.path), **made.record}, str(made.path), common.as_json)

    return body


def _next(name: str, settings: Any, flags: Mapping[str, Any], common: Common) -> str:
    """The command that usually follows; MODEL and out/… stand for what only the user knows."""
    out, data = shlex.quote(settings.output_dir), shlex.quote(settings.dataset)
    # Two models make no starting model: which one it was, the user knows.
    model = shlex.quote(getattr(settings, "model", None) or "MODEL")
    # How rows are read must stay the same in every stage; the mirror is trained with all the same settings.
    rows, same = _repeated(flags, common, "data."), _repeated(flags, common, "")
    beside = Path(settings.dataset).expanduser() / "tokenizer_config.json"
    tokenizer = "" if beside.is_file() else f" --tokenizer {out}"
    return {
        "train-sft": f"tisdpo train-dpo --model {out} --dataset {data}{rows} --output-dir out/dpo",
        "train-dpo": f"tisdpo train-reverse --model {model} --dataset {data}{same} --output-dir out/reverse",
        "train-reverse": f"tisdpo estimate --forward out/dpo --reverse {out} --dataset {data}{rows}"
        " --output-dir out/scored",
        "estimate": f"tisdpo train --model {model} --dataset {out}{rows} --output-dir out/tisdpo",
        "train": f"tisdpo inspect-weights {data}{rows}{_repeated(flags, common, 'weights.')}{tokenizer}",
    }[name]


def _repeated(flags: Mapping[str, Any], common: Common, prefix: str) -> str:
    """Options that were given, to be given again: those of a group, or all but the paths."""
    words = []
    for path, value in flags.items():
        if path.startswith(prefix) and path not in (
            "model",
            "dataset",
            "output_dir",
            "overwrite",
            "forward",
            "reverse",
            "profile",
        ):
            option = "--" + path.rpartition(".")[2].replace("_", "-")
            words += [option] if value is True else [option, str(value)]
    if not prefix:
        words += [word for item in common.sets for word in ("--set", item)]
        words += ["--config", str(common.config)] if common.config is not None else []
    return "".join(f" {shlex.quote(word)}" for word in words)


def _pairs_engine() -> Callable[[Any, Any], Any]:
    from tisdpo_cli.engine.training.preference import train_pairs

    return train_pairs


def _sft_engine() -> Callable[[Any, Any], Any]:
    from tisdpo_cli.engine.training.sft import train_sft

    return train_sft


def _estimate_engine() -> Callable[[Any, Any], Any]:
    from tisdpo_cli.engine.scoring.estimate import estimate

    return estimate


def _inspect(flags: dict[str, Any], common: Common) -> None:
    settings = _prepare(COMMANDS["inspect-weights"], flags, common)
    if settings is None:
        return
    assert isinstance(settings, InspectWeights)
    from tisdpo_cli.cli.inspection_view import picture, render
    from tisdpo_cli.engine.inspection.inspect_weights import inspect_weights
    from tisdpo_cli.engine.inspection.report.page import page
    from tisdpo_cli.engine.inspection.report.table import origin, table

    inspection = inspect_weights(settings, shlex.join(["tisdpo", *sys.argv[1:]]))
    for notice in inspection.notices:
        _reporter().warn(notice)
    writers = {
        settings.svg: lambda: picture(inspection),
        settings.html: lambda: page(inspection),
        settings.table: lambda: "".join(table(inspection)),
        settings.table and f"{settings.table}.json": lambda: origin(inspection),
    }
    for path, written in writers.items():
        if path is not None:
            write_text(Path(path).expanduser(), written())
            _reporter().note(f"written: {path}")
    if common.as_json:
        _stdout(json.dumps(inspection.as_dict(), ensure_ascii=True))
    else:
        _stdout(render(inspection, settings.limit or 1))
    failed = [check.name for check in inspection.checks if not check.passed]
    if settings.check and failed:
        raise DataError(f"{len(failed)} checks failed: {', '.join(failed)}", where=settings.scored)


def _evaluate(flags: dict[str, Any], common: Common) -> None:
    settings = _prepare(COMMANDS["evaluate"], flags, common)
    if settings is None:
        return
    assert isinstance(settings, Evaluate)
    from tisdpo_cli.cli.evaluation_view import render
    from tisdpo_cli.engine.evaluation.evaluate import evaluate

    found = evaluate(settings, _reporter())
    _stdout(json.dumps(found.as_dict()) if common.as_json else render(found))


def _run(flags: dict[str, Any], common: Common) -> None:
    settings = _prepare(COMMANDS["run"], flags, common)
    if settings is None:
        return
    from tisdpo_cli.cli.inspection_view import pair_view, picture, stage_rows, stage_table
    from tisdpo_cli.engine.inspection.report.page import page
    from tisdpo_cli.engine.pipeline import run

    reporter = _reporter()
    made = run(settings, reporter, shlex.join(["tisdpo", *sys.argv[1:]]))  # type: ignore[arg-type]
    if _first_rank():
        for notice in made.inspection.notices:
            reporter.warn(notice)
        reporter.stage("what the weights say")
        reporter.note(f"weights: {made.inspection.transform}")
        reporter.show(pair_view(made.inspection))
        reporter.stage("what was made")
        reporter.show(stage_table(made))
        write_text(made.path / "report.svg", picture(made.inspection, made))
        write_text(made.path / "report.html", page(made.inspection, stage_rows(made)))
        reporter.note(f"the report: {made.path / 'report.html'}, and as a picture {made.path / 'report.svg'}")
        weighed = settings.inspect_weights.weights.model_dump(exclude_defaults=True)  # type: ignore[attr-defined]
        same = _repeated({f"weights.{name}": value for name, value in weighed.items()}, common, "weights.")
        reporter.note(f"next: tisdpo inspect-weights {shlex.quote(made.inspection.source)}{same}")
    _result(made.as_dict(), str(made.path), common.as_json)


def _env() -> None:
    """Show versions, machine and settings from the environment, for bug reports."""
    from tisdpo_cli.runs.env import environment

    for name, value in environment().items():
        _stdout(visible(f"{name}: {value}"))
    for name in sorted(n for n in os.environ if n.startswith("TISDPO_")):
        _stdout(visible(f"{name}={os.environ[name]}"))


def _reporter() -> Reporter:
    """Only the first process of a run speaks."""
    from tisdpo_cli.reporter import Silent

    return TerminalReporter() if _first_rank() else Silent()


def _first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _result(record: dict[str, Any], line: str, as_json: bool) -> None:
    if _first_rank():
        _stdout(json.dumps(record) if as_json else line)


def _stdout(text: str) -> None:
    """Write the result.

    Raises:
        TisdpoError: stdout is closed or full; what was made is not lost.
    """
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except (OSError, ValueError, AttributeError) as fault:  # AttributeError: closed before the start, it is None
        # Python would try to flush once more at exit, and complain.
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
        raise TisdpoError(
            "stdout cannot be written", fix="what was made is whole; run again to see its path"
        ) from fault


def _version(show: bool) -> None:
    if show:
        _stdout(f"tisdpo {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Optional[bool] = typer.Option(  # noqa: UP045
        None, "--version", help="Show the version and stop.", callback=_version, is_eager=True
    ),
) -> None:
    """Nothing happens without a command."""


def _register() -> None:
    bodies: dict[str, Callable[[dict[str, Any], Common], None]] = {
        "train-dpo": _make(_pairs_engine, "train-dpo"),
        "train-reverse": _make(_pairs_engine, "train-reverse"),
        "estimate": _make(_estimate_engine, "estimate"),
        "train": _make(_pairs_engine, "train"),
        "inspect-weights": _inspect,
        "run": _run,
        "train-sft": _make(_sft_engine, "train-sft"),
        "evaluate": _evaluate,
    }
    for name, command in COMMANDS.items():
        positional = "scored" if name == "inspect-weights" else None
        function = command_function(command, bodies[name], positional)
        panel = _AROUND if name in _NOT_OF_THE_METHOD else _METHOD
        app.command(name, help=command.__doc__, epilog=f"Example: {_EXAMPLES[name]}", rich_help_panel=panel)(function)
    app.command("env", help=_env.__doc__, rich_help_panel=_AROUND)(_env)


_register()


def main() -> NoReturn:
    """Run the program and exit with the code of DESIGN: 0, 1, 2, 130 or 143."""
    configure_openmp()
    arguments = normalize_options(sys.argv[1:], COMMANDS)
    if not arguments:
        app(args=["--help"], prog_name="tisdpo", standalone_mode=False)
        sys.exit(2)
    signal.signal(signal.SIGTERM, _terminated)
    try:
        code = app(args=arguments, prog_name="tisdpo", standalone_mode=False)
    except BaseException as fault:
        if isinstance(fault, SystemExit):
            raise
        if "--debug" in arguments:
            import traceback

            print(visible(traceback.format_exc(), keep_lines=True), file=sys.stderr)
        _fail(fault)
    _leave(code if isinstance(code, int) else 0)


def configure_openmp() -> None:
    """Let idle threads of a matrix product spin for microseconds, not milliseconds, before they sleep.

    Must happen before torch is loaded. On free cores it changes nothing; on cores that other programs use, small
    models train several times faster, because a thread that spins no longer keeps out the one it waits for.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _terminated(number: int, _frame: Any) -> None:
    raise Interrupted(number, "stopped", fix="run the same command again")


def _fail(fault: BaseException) -> NoReturn:
    told = explain(fault)
    # The other ranks meet the same fault in the same data; a fault of their own they must tell themselves.
    if _first_rank() or type(told) is TisdpoError or isinstance(told, RankError):
        for line in told.details:
            print(visible(line), file=sys.stderr)
        if isinstance(told, Interrupted):
            print(f"go on with: {shlex.join(['tisdpo', *sys.argv[1:]])}", file=sys.stderr)
        print_error(told)
    _leave(told.exit_code)


def _leave(code: int) -> NoReturn:
    """Exit; in a process group at once, without taking the interpreter down.

    After a fault the others may wait for this process in a collective call, and its end ends them too. After a success
    the threads of the group, which `destroy_process_group` does not always end, still let go of tensors: the
    interpreter of Python 3.11 ends a thread that asks for it while it shuts down, and that aborts the process.
    """
    # A launcher makes a group for one process too.
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        sys.exit(code)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
    except (OSError, ValueError):
        code = code or 1
    finally:
        os._exit(code)
