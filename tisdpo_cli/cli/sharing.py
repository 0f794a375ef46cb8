"""`--push-to-hub`: which outputs of a command are uploaded, checked before it runs and done when it has."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tisdpo_cli.cli.process import is_first_rank
from tisdpo_cli.errors import UsageError
from tisdpo_cli.files import RUN_FILE
from tisdpo_cli.model.directory import ADAPTER_CONFIG, is_adapter, read_json
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.settings.base import Command
from tisdpo_cli.settings.groups import Hub
from tisdpo_cli.settings.run import Run


def _pushed(settings: Command) -> Iterator[tuple[str, Path, Hub]]:
    """Command, output and repository of everything that is to be uploaded."""
    for stage in settings.stages().values() if isinstance(settings, Run) else [settings]:
        hub = getattr(stage, "hub", None)
        if isinstance(hub, Hub) and hub.push_to_hub is not None:
            yield stage.command, Path(getattr(stage, "output_dir", "")), hub


def check_sharing(settings: Command) -> None:
    """Check the logins and repositories of all uploads.

    Raises:
        UsageError: one cannot be used.
    """
    seen: set[str] = set()
    for _, _, hub in _pushed(settings):
        if not is_first_rank():
            return
        from tisdpo_cli.runs.hub import check_upload

        repo = check_upload(str(hub.push_to_hub), hub.hub_private)
        if repo in seen:
            raise UsageError("named for two stages", where=f"--push-to-hub {repo}", fix="use one repository for each")
        seen.add(repo)


def share(settings: Command, reporter: Reporter) -> None:
    """Upload the finished outputs of a command.

    Raises:
        TrainingError: an upload failed; the outputs are complete.
    """
    for command, directory, hub in _pushed(settings):
        if not is_first_rank() or getattr(settings, "dry_run", False):
            return
        from tisdpo_cli.runs.hub import upload

        directory, repo = directory.expanduser(), str(hub.push_to_hub)
        _warn_of_local_base(directory, reporter)
        reporter.note(f"uploading {directory} to {repo}")
        files = [str(name) for name in read_json(directory / RUN_FILE, "").get("files", ())]
        url = upload(directory, files, repo, hub.hub_private, f"Upload from tisdpo {command}")
        reporter.note(f"uploaded to {url}")


def _warn_of_local_base(directory: Path, reporter: Reporter) -> None:
    if not is_adapter(directory):
        return
    base = str(read_json(directory / ADAPTER_CONFIG, "").get("base_model_name_or_path"))
    if Path(base).is_dir():
        reporter.warn(
            f"the base model of this adapter is a directory of this machine, {base}: others cannot load the adapter "
            f"before they correct {ADAPTER_CONFIG}; `tisdpo merge` makes a whole model"
        )
