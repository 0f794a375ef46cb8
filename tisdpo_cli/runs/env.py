"""env: what a bug report needs to know about the machine."""

from __future__ import annotations

import os
import platform

import torch

from tisdpo_cli.runs.cache import reference_directory, size_of
from tisdpo_cli.runs.outputs import versions


def environment() -> dict[str, str]:
    """Versions, machine, devices, cache and `TISDPO_*` variables."""
    cache = reference_directory()
    files, size = size_of(cache)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        **versions(),
        "machine": f"{platform.platform()}, {os.cpu_count()} cores",
        "devices": f"{', '.join(gpus) or 'cpu'}; {torch.get_num_threads()} threads",
        "reference log-probs": f"{cache}, {files} files, {size / 2**20:.1f} MiB",
        **{name: os.environ[name] for name in sorted(os.environ) if name.startswith("TISDPO_")},
    }
