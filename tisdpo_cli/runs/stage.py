"""One stage of the method as an output directory: claimed by its command, or found finished."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import UsageError
from tisdpo_cli.runs.outputs import Output, claim, refuse_links
from tisdpo_cli.runs.runtime import Runtime


@dataclass(frozen=True)
class StageResult:
    """The output of a command.

    Attributes:
        path: the output directory.
        record: its `run.json`; empty after a dry run.
        fresh: whether this run created it, rather than finding it finished.
        dry_run: what a dry run found, or None; see `engine/dry_run.py`.
    """

    path: Path
    record: dict[str, Any]
    fresh: bool
    dry_run: Any = None


@dataclass(frozen=True)
class OutputRequest:
    """Which output a command wants to create.

    Attributes:
        path: the output directory.
        command: name of the command.
        fingerprint: settings that shape the result, by dotted name, with their values in force.
        inputs: files and directories that the command reads.
        content_hashes: hashes the inputs, by the name under which they are recorded; called on the first process.
        overwrite: replace an output created with other settings.
        restart: drop the progress of an unfinished run instead of resuming it.
    """

    path: Path
    command: str
    fingerprint: Mapping[str, Any]
    inputs: Sequence[Path]
    content_hashes: Callable[[], Mapping[str, str]]
    overwrite: bool
    restart: bool


def claim_output(runtime: Runtime, request: OutputRequest) -> Output:
    """Claim an output directory on the first process and tell every process its state.

    Raises:
        UsageError: the directory is in use, is an input, or was created with other settings or inputs.
    """
    claimed: list[Output] = []

    def claim_on_first() -> Output:
        refuse_links(request.path)
        _refuse_own_input(request.path, request.inputs)
        made_from = {**request.fingerprint, **request.content_hashes()}
        output = claim(request.path, request.command, made_from, overwrite=request.overwrite, restart=request.restart)
        claimed.append(output)
        return output.without_lock()

    shared = runtime.on_main(claim_on_first)
    return claimed[0] if claimed else shared


def _refuse_own_input(output: Path, inputs: Sequence[Path]) -> None:
    """An output that is, or contains, an input would be removed before it is read."""
    for path in inputs:
        if output.resolve() in (path.resolve(), *path.resolve().parents):
            what = f"would overwrite {path}, an input of this command"
            raise UsageError(what, where=f"--output-dir {output}", fix="choose another directory")


def finished_stage(runtime: Runtime, path: Path, command: str) -> StageResult:
    """The result of an output that is known to be finished, which nobody has to claim."""
    return finished_result(runtime, Output(path, command, {}, "finished"))


def finished_result(runtime: Runtime, output: Output) -> StageResult:
    """The result of an output that is already finished."""
    runtime.reporter.note(f"{output.path} is already finished with these settings; nothing to do")
    # The first process must not exit while it still broadcasts to another.
    runtime.wait()
    return StageResult(output.path, output.record(), fresh=False)
