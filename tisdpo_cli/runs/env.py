"""env: what a bug report needs to know about the machine, and the caches."""

from __future__ import annotations

import os
import platform
from typing import Protocol

import torch

from tisdpo_cli.cached_files import BOUND, reference_files, row_files
from tisdpo_cli.runs.cache import cpu_model
from tisdpo_cli.runs.outputs import versions


class EnvOptions(Protocol):
    """The settings of `env`."""

    clear_cache: bool


def environment(settings: EnvOptions) -> dict[str, str]:
    """Versions, machine, devices and cache; the cache is emptied first if the settings say so."""
    caches = {"reference log-probs": reference_files(), "tokenized datasets": row_files()}
    cleared = [cache.clear() for cache in caches.values()] if settings.clear_cache else []
    freed = {"freed": _files_and_size(*map(sum, zip(*cleared, strict=True)))} if cleared else {}
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores of {cpu_model()}",
        "devices": f"{', '.join(gpus) or 'cpu'}; {torch.get_num_threads()} threads",
        **{
            name: f"{cache.directory}, {_files_and_size(*cache.size())}, at most {BOUND / 2**30:.0f} GiB"
            for name, cache in caches.items()
        },
        **freed,
    }


def _files_and_size(files: int, size: int) -> str:
    return f"{files} files, {size / 2**20:.1f} MiB"
