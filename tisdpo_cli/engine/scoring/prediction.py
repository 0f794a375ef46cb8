"""What `estimate` is predicted to need: from the shapes of models and the sizes of rows, and a measured pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.dry_run import (
    bytes_together,
    frozen_model,
    loading_bytes,
    memory_per_process,
    program_memory,
    rounded,
)
from tisdpo_cli.engine.scoring.scorer import Part, PartScorer, ScoringConfig, Side, groups_of_models
from tisdpo_cli.engine.training import planning
from tisdpo_cli.engine.training.batching import pair_costs
from tisdpo_cli.engine.training.dry_run import Examples, ExampleSize
from tisdpo_cli.engine.training.planning import PassSize, Prediction
from tisdpo_cli.runs.machine import free_disk, product_rate
from tisdpo_cli.runs.runtime import Runtime

# Bytes of a score in a text file and in a column of a Parquet file, and of a log-prob while parts are kept.
_TEXT_BYTES, _COLUMN_BYTES, _PART_BYTES = 22, 8, 4
# Models whose weight files are not larger are loaded for a pass that tells how fast this machine is.
_SOON_LOADED = 2**30


@dataclass(frozen=True)
class Scored:
    """What is written.

    Attributes:
        file_bytes: size of the dataset that is read.
        parquet: whether it is written as Parquet.
        columns: numbers for each token: the scores, and perhaps the log-probs behind them.
    """

    file_bytes: int
    parquet: bool
    columns: int


@dataclass(frozen=True)
class ScoringWork:
    """What is scored.

    Attributes:
        sides: of the contrast.
        splits: split to its pairs.
        parts: all work, the longest rows of each split first.
        bos: the token in front of every prompt, or None.
    """

    sides: Sequence[Side]
    splits: Mapping[str, Sequence[EncodedPair]]
    parts: Sequence[Part]
    bos: int | None


def predict_scoring(
    runtime: Runtime, scorer: PartScorer, processes: int, work: ScoringWork, scored: Scored, output: Path
) -> Prediction:
    """What scoring needs.

    Args:
        runtime: this process.
        scorer: does a forward pass that tells how fast this machine is, if the model is soon loaded.
        processes: how many are asked for.
        work: what is scored.
        scored: what is written.
        output: the output directory.

    Raises:
        ModelError: a model is damaged.
    """
    config, on_gpu = scorer.config, runtime.device.type == "cuda"
    sides, splits, bos = work.sides, work.splits, work.bos
    models = {side.path: frozen_model(side.path, config.trust_remote_code) for side in sides}
    together = [
        [models[path] for path in group] for group in groups_of_models(list(models), sequential=config.sequential)
    ]
    largest = max(together, key=bytes_together)
    passes = [_pass(side, splits[part.split], part, config, bos) for part in work.parts for side in sides]
    size = max(passes, key=lambda one: one.tokens)
    memory = {
        "program": program_memory(runtime),
        "weights": bytes_together(largest),
        "weight file": loading_bytes(largest, on_gpu),
        "forward pass": max(planning.forward_bytes(model.shape, size) for model in largest),
    }
    flops = {
        side.name: sum(
            planning.forward_flops(models[side.path].shape, _examples(side, pairs, config, bos).total())
            for pairs in splits.values()
        )
        for side in sides
    }
    measured = models[sides[0].path].file <= _SOON_LOADED and runtime.world == 1
    if measured:
        middle = work.parts[len(work.parts) // 2]
        batch = [splits[middle.split][i] for i in middle.batches[len(middle.batches) // 2]]
        done = planning.forward_flops(models[sides[0].path].shape, _examples(sides[0], batch, config, bos).total())
        rate = done / scorer.seconds_of_pass(sides[0], batch)
    else:
        rate = planning.share_of_rate(
            config.precision,
            product_rate(runtime.device, torch.bfloat16 if config.precision == "bf16" else torch.float32),
        )
    devices = processes if on_gpu else runtime.world
    tokens = sum(len(pair.chosen.ids) + len(pair.rejected.ids) for pairs in splits.values() for pair in pairs)
    each = _COLUMN_BYTES if scored.parquet else _TEXT_BYTES
    return Prediction(
        processes=processes,
        device=runtime.device.type,
        sharded=False,
        memory=rounded(memory),
        when="scoring",
        device_memory=memory_per_process(runtime, processes),
        disk={
            "scored dataset": scored.file_bytes + each * scored.columns * tokens,
            "parts while scoring": _PART_BYTES * len(sides) * tokens,
        },
        free_disk=free_disk(output),
        flops=flops,
        seconds={name: count / (rate * devices) for name, count in flops.items()},
        change=None,
        timed_by="forward pass" if measured else "matrix products",
    )


def _pass(side: Side, pairs: Sequence[EncodedPair], part: Part, config: ScoringConfig, bos: int | None) -> PassSize:
    """The first forward pass of a part, which has its longest rows."""
    batch = [pairs[i] for i in part.batches[0]]
    return _examples(side, batch, config, bos).pass_size(range(len(batch)))


def _examples(side: Side, pairs: Sequence[EncodedPair], config: ScoringConfig, bos: int | None) -> Examples:
    def size(number: int) -> ExampleSize:
        pair = pairs[number]
        return ExampleSize(len(side.prompt(pair, bos)), (len(pair.chosen.ids), len(pair.rejected.ids)))

    return Examples(pair_costs(pairs, packed=config.layout != "separate"), size)
