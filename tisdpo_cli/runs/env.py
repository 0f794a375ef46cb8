"""env: what a bug report needs to know about the machine, and the cache of reference log-probs."""

from __future__ import annotations

import os
import platform
from typing import Protocol

import torch

from tisdpo_cli.runs.cache import BOUND, clear, cpu_model, reference_directory, size_of
from tisdpo_cli.runs.outputs import versions


class EnvOptions(Protocol):
    """The settings of `env`."""

    clear_cache: bool


def environment(settings: EnvOptions) -> dict[str, str]:
    """Versions, machine, devices and cache; the cache is emptied first if the settings say so."""
    cache = reference_directory()
    freed = {"freed": _files_and_size(*clear(cache))} if settings.clear_cache else {}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores of {cpu_model()}",
        "devices": f"{', '.join(gpus) or 'cpu'}; {torch.get_num_threads()} threads",
        "reference log-probs": f"{cache}, {_files_and_size(*size_of(cache))}, at most {BOUND / 2**30:.0f} GiB",
        **freed,
    }


def _files_and_size(files: int, size: int) -> str:
    return f"{files} files, {size / 2**20:.1f} MiB"
