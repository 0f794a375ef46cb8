"""Reads the tensors of a checkpoint, whole or only some rows of them, from the files of all processes that wrote it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tisdpo_cli.runs.checkpoints import Checkpoint


class SavedTensors:
    """Tensors of a checkpoint, read only where they are needed.

    Attributes:
        names: of all tensors.
    """

    def __init__(self, files: Sequence[Any], shapes: Mapping[str, Sequence[int]]) -> None:
        self._files, self._shapes = files, shapes
        # The first process writes all that is not split.
        self.names: list[str] = sorted(files[0].keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """The global shape of a tensor."""
        return tuple(self._shapes[name] if name in self._shapes else self._files[0].get_slice(name).get_shape())

    def read(self, name: str, first: int = 0, end: int | None = None) -> Tensor:
        """Rows [first, end) of a tensor, or all of it."""
        if not self.shape(name):
            return self._files[0].get_tensor(name)
        files = self._files if name in self._shapes else self._files[:1]
        end = self.shape(name)[0] if end is None else end
        parts, start = [], 0
        for file in files:
            rows = file.get_slice(name)
            count = rows.get_shape()[0]
            low, high = max(first - start, 0), min(end - start, count)
            if low < high:
                parts.append(rows[low:high])
            start += count
        return torch.cat(parts) if parts else files[0].get_tensor(name)[:0]


@contextmanager
def saved_tensors(checkpoint: Checkpoint, name: str) -> Iterator[SavedTensors]:
    """The tensors of one group of a checkpoint, to be read within this context."""
    with ExitStack() as stack:
        files = [stack.enter_context(safe_open(path, "pt")) for path in checkpoint.files(name)]
        yield SavedTensors(files, checkpoint.shapes.get(name, {}))
