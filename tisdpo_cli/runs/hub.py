"""Sharing an output on the Hugging Face hub, when that is asked for: the checks before, and the upload after.

The login is the hub's own (`hf auth login`, `HF_TOKEN`); no token is taken, shown or kept here.
"""

from __future__ import annotations

import glob
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tisdpo_cli.errors import TrainingError, UsageError
from tisdpo_cli.runs.outputs import METRICS_FILE

# A login may belong to organizations that it can only read.
_READS = "read"


def check_upload(repo: str, private: bool) -> str:
    """Check that the login and the repository can be used, before any work is done; creates nothing.

    Args:
        repo: `NAME`, or `OWNER/NAME`.
        private: whether a new repository is to be private.

    Returns:
        `OWNER/NAME`.

    Raises:
        UsageError: offline, not logged in, not allowed to write there, or it exists and others can read it.
    """
    import huggingface_hub
    from huggingface_hub.constants import is_offline_mode
    from huggingface_hub.errors import HfHubHTTPError

    where = f"--push-to-hub {repo}"
    if is_offline_mode():
        raise UsageError(
            "HF_HUB_OFFLINE is set, so nothing can be uploaded", where=where, fix="unset it, or leave the option out"
        )
    if huggingface_hub.get_token() is None:
        raise UsageError("not logged in to the hub", where=where, fix="run `hf auth login` first")
    api = huggingface_hub.HfApi()
    try:
        login = api.whoami()
    except HfHubHTTPError as error:
        refused = error.response is not None and error.response.status_code in (401, 403)
        what = "the hub refuses the login" if refused else f"the hub does not answer: {_reason(error)}"
        raise UsageError(what, where=where, fix="run `hf auth login` again" if refused else "try again") from error
    except Exception as error:
        raise UsageError(f"the hub cannot be reached: {type(error).__name__}", where=where) from error
    full = repo if "/" in repo else f"{login['name']}/{repo}"
    _refuse_foreign(login, full.partition("/")[0], where)
    if private and _is_public(api, full, where):
        raise UsageError(f"{full} exists and is public", where=where, fix=_PUBLISHES)
    return full


def _refuse_foreign(login: dict[str, Any], owner: str, where: str) -> None:
    """Refuse a login that cannot write to the repositories of an owner."""
    token = login.get("auth", {}).get("accessToken", {})
    if token.get("role") == _READS:
        raise UsageError("the token of this login may only read", where=where, fix="log in with one that may write")
    roles = {entry["name"]: entry.get("roleInOrg") for entry in login.get("orgs", ())}
    if owner != login["name"] and roles.get(owner, _READS) == _READS:
        what = f"the login {login['name']} cannot write to repositories of {owner}"
        raise UsageError(what, where=where, fix=f"use {login['name']}/NAME, or another login")


# An upload keeps a repository as public as it is.
_PUBLISHES = "add --no-hub-private to publish, or use another name"


def _is_public(api: Any, repo: str, where: str) -> bool:
    """Whether a repository exists and others can read it."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.repo_info(repo).private is False
    except RepositoryNotFoundError:
        return False
    except Exception as error:
        raise UsageError(f"the hub does not answer: {_reason(error)}", where=where, fix="try again") from error


def upload(directory: Path, files: Sequence[str], repo: str, private: bool, message: str) -> str:
    """Upload the files of a finished output and its metrics, and nothing else that lies there.

    Args:
        directory: the output.
        files: names of files and directories in it.
        repo: `NAME` or `OWNER/NAME`; created if it does not exist.
        private: whether it is to be private.
        message: of the commit.

    Returns:
        Its address.

    Raises:
        TrainingError: it failed; the output is as it was.
    """
    import huggingface_hub

    names = [name for name in (*files, METRICS_FILE) if (directory / name).exists()]
    patterns = [glob.escape(name) + ("/*" if (directory / name).is_dir() else "") for name in names]
    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo, private=private, exist_ok=True)
        if private and _is_public(api, url.repo_id, ""):
            raise UsageError("it is public", fix=_PUBLISHES)
        api.upload_folder(repo_id=url.repo_id, folder_path=directory, allow_patterns=patterns, commit_message=message)
    except Exception as error:
        raise TrainingError(
            f"upload failed: {_reason(error)}",
            where=repo,
            fix=f"the output is complete; rerun the same command, or: {_by_hand(directory, repo, private)}",
        ) from error
    return str(url)


def _by_hand(directory: Path, repo: str, private: bool) -> str:
    words = ["hf", "upload", repo, str(directory), "."]
    for name in ("checkpoints/*", "config.yaml", "run.json"):
        words += ["--exclude", name]
    return shlex.join([*words, "--private" if private else "--no-private"])


def _reason(error: Exception) -> str:
    """What an error of the hub says in a line, without the token."""
    import huggingface_hub

    first = (str(error).strip().splitlines() or [""])[0]
    token = huggingface_hub.get_token()
    shown = first.replace(token, "…") if token else first
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__
