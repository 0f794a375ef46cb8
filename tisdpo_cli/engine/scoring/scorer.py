"""Log-probs of all rows under both sides of a contrast, in parts that survive an interruption.

Rows are split into batches once, by length, and every batch is always computed alone, on any process: the scored
dataset has the same bytes on one process or several, in one go or after an interruption. Finished work is kept in
parts, each with some batches under one side, until the dataset is written.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tisdpo_cli.data.splits import Split
from tisdpo_cli.data.tokens import EncodedPair, TemplateTokens
from tisdpo_cli.errors import Interrupted, ModelError, RankError
from tisdpo_cli.files import replacing, reporting_write_errors
from tisdpo_cli.model.directory import base_of, check_safetensors, is_quantized_adapter
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.logprobs import TokenScorer, batch_for, score
from tisdpo_cli.model.shared_models import SharedModels
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Progress
from tisdpo_cli.runs.runtime import Runtime, StopRequest, autocast_dtype

# Batches in a part: the most that an interruption costs, for each model.
_BATCHES_PER_PART = 16


@dataclass(frozen=True)
class Side:
    """One side of the contrast.

    Attributes:
        path: its model.
        template: tokens that its prompt template puts around prompts that are texts.
        number: of its prompt template, for prompts that a chat template rendered; see `EncodedPair.framed`.
    """

    name: str
    path: Path
    template: TemplateTokens
    number: int

    def prompt(self, pair: EncodedPair, bos: int | None) -> list[int]:
        """The prompt of a pair under the prompt template of this side."""
        return pair.framed[self.number] if pair.framed else self.template.wrap(pair.prompt, bos)

    def added(self, pair: EncodedPair) -> int:
        """The tokens that the prompt template adds to a pair."""
        return len(pair.framed[self.number]) - len(pair.prompt) if pair.framed else len(self.template)


@dataclass(frozen=True)
class Extent:
    """The most tokens of some pairs, which the positions of the models must hold.

    Attributes:
        longest: of a prompt with the longer response, without a prompt template.
        added: side to the most tokens that its prompt template adds.
    """

    longest: int
    added: Mapping[str, int]


def extent(pairs: Iterable[EncodedPair], sides: Sequence[Side]) -> Extent:
    """The extent of pairs, read once."""
    longest, added = 0, {side.name: 0 for side in sides}
    for pair in pairs:
        longest = max(longest, pair.longest)
        for side in sides:
            added[side.name] = max(added[side.name], side.added(pair))
    return Extent(longest, added)


@dataclass(frozen=True)
class Part:
    """Some batches of one split: the unit of work, of saving, and of sharing between processes.

    Attributes:
        rows: int array, the rows of all its batches in order.
        batch_size: rows of every batch but the last of the split.
    """

    split: str
    number: int
    rows: np.ndarray
    batch_size: int

    @property
    def batches(self) -> list[list[int]]:
        """Its batches, each with the numbers of its rows."""
        rows = self.rows.tolist()
        return [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]

    def name(self, side: str) -> str:
        """Its file for one of the sides."""
        return f"{self.split}-{self.number:06d}-{side}.safetensors"


def split_into_parts(split: str, encoded: Sequence[EncodedPair], batch_size: int, layout: str = "auto") -> list[Part]:
    """Batches of similar length, longest first, so that running out of memory shows at once.

    Separate rows are padded to the longest of their batch, so its length counts there.
    """
    lengths = (pair.longest if layout == "separate" else pair.tokens for pair in encoded)
    costs = np.fromiter(lengths, np.int64, len(encoded))
    order = np.argsort(-costs, kind="stable")
    size = batch_size * _BATCHES_PER_PART
    # A part is numbered by its first batch.
    return [Part(split, i // batch_size, order[i : i + size], batch_size) for i in range(0, len(order), size)]


@dataclass(frozen=True)
class ScoringConfig:
    """How models score.

    Attributes:
        batch_size: pairs per forward pass and process.
        layout: `auto`, `shared-prefix` or `separate`.
        sequential: whether one model is in memory at a time.
    """

    batch_size: int
    layout: str
    precision: Literal["bf16", "float32"]
    sequential: bool
    trust_remote_code: bool


class PartScorer:
    """Computes the parts that are missing, on this process's share of them."""

    def __init__(
        self,
        runtime: Runtime,
        config: ScoringConfig,
        tokenizer: Tokenizer,
        folder: Path,
        splits: Mapping[str, Split],
        reach: Extent,
    ) -> None:
        self.runtime, self.config, self.tokenizer, self.folder, self.splits, self.reach = (
            runtime, config, tokenizer, folder, splits, reach,
        )  # fmt: skip

    def run(self, sides: Sequence[Side], parts: Sequence[Part]) -> int:
        """Score all parts on both sides.

        Returns:
            The number of tokens that went through a model now.

        Raises:
            Interrupted: by a signal, between two batches; finished parts are kept.
            RankError: a log-prob is not finite, or a part cannot be written.
        """
        runtime = self.runtime
        mine = self._missing(sides, parts)
        groups = groups_of_models([side.path for side in sides], self.config.sequential)
        total = sum(len(part.rows) for _, part in mine)
        tokens = 0
        with StopRequest() as stop, runtime.reporter.progress("scoring", total, 0, "rows") as progress:
            models: dict[Path, TokenScorer] = {}
            for group in groups:
                work = [item for item in mine if item[0].path in group]
                if not work:
                    continue
                if models:
                    models.clear()
                    gc.collect()
                models = self._load_all(group, sides)
                for side, part in work:
                    tokens += self._score_part(models[side.path], side, part, progress, stop)
            _stop_if_asked(stop)
        return tokens

    def seconds_of_pass(self, side: Side, pairs: Sequence[EncodedPair]) -> float:
        """Seconds of a forward pass over some pairs, for which the model of a side is loaded."""
        scorer, took = self._load_all([side.path], [side])[side.path], []
        # The first one starts threads and finds kernels.
        for _ in range(2):
            started = time.perf_counter()
            score_pairs(scorer, side, pairs, self.tokenizer)
            took.append(time.perf_counter() - started)
        return min(took)

    def _missing(self, sides: Sequence[Side], parts: Sequence[Part]) -> list[tuple[Side, Part]]:
        """This process's share of the parts that are not there yet."""
        runtime = self.runtime
        every = [(side, part) for part in parts for side in sides]
        # Listed once for all: another process may finish a part while this one looks.
        there = set(runtime.on_main(lambda: [p.name(s.name) for s, p in every if self._is_there(p, s.name)]))
        todo = [(side, part) for side, part in every if part.name(side.name) not in there]
        if len(todo) < len(every):
            runtime.reporter.note(f"resuming: {len(every) - len(todo)} of {len(every)} parts are already scored")
        return [item for i, item in enumerate(todo) if i // 2 % runtime.world == runtime.rank]

    def _is_there(self, part: Part, side: str) -> bool:
        path = self.folder / part.name(side)
        try:
            if path.is_file():
                check_safetensors(path)
                return True
        except ModelError:
            self.runtime.reporter.warn(f"{path} is damaged; scoring it again")
        return False

    def _load_all(self, paths: Sequence[Path], sides: Sequence[Side]) -> dict[Path, TokenScorer]:
        """A scorer of each model; adapters of one base model share it."""
        every = [side.path for side in sides]
        shared = SharedModels(self.runtime.device, self.config.trust_remote_code, every)

        def load(layout: str) -> dict[Path, TokenScorer]:
            return {path: self._scorer(shared.load(path), path, sides, layout) for path in paths}

        scorers = load(self.config.layout)
        models = {id(scorer.model) for scorer in scorers.values()}
        if len({scorer.packed for scorer in scorers.values()}) > 1 and len(models) < len(scorers):
            # The attention of a model is one for all that share it.
            return load("separate")
        return scorers

    def _scorer(self, model: nn.Module, path: Path, sides: Sequence[Side], layout: str) -> TokenScorer:
        template = max(self.reach.added[side.name] for side in sides if side.path == path)
        longest = template + self.reach.longest
        autocast = autocast_dtype(self.config.precision)
        return make_scorer(model, layout, autocast, longest, self.runtime.reporter.note, str(path))

    def _score_part(self, scorer: TokenScorer, side: Side, part: Part, progress: Progress, stop: StopRequest) -> int:
        tensors, tokens = {}, 0
        encoded = self.splits[part.split].encoded
        for number, batch in enumerate(part.batches):
            _stop_if_asked(stop)
            started = time.perf_counter()
            logps, count = score_pairs(scorer, side, [encoded[i] for i in batch], self.tokenizer)
            if not torch.isfinite(logps).all():
                raise RankError("a log-prob is not finite", where=encoded[batch[0]].where, fix="use --dtype float32")
            tensors[str(number)] = logps
            tokens += count
            progress.advance(len(batch), {"tokens_per_second": count / (time.perf_counter() - started)})
        final = self.folder / part.name(side.name)
        with reporting_write_errors(final, kind=RankError), replacing(final) as partial:
            save_file(tensors, partial)
        return tokens


def groups_of_models(paths: Sequence[Path], sequential: bool) -> list[list[Path]]:
    """Which models are in memory together; those that share a base model always are."""
    if not sequential:
        return [list(dict.fromkeys(paths))]
    groups: dict[tuple[Path, bool], list[Path]] = {}
    for path in dict.fromkeys(paths):
        groups.setdefault((base_of(path).resolve(), is_quantized_adapter(path)), []).append(path)
    return list(groups.values())


def score_pairs(
    scorer: TokenScorer, side: Side, pairs: Sequence[EncodedPair], tokenizer: Tokenizer
) -> tuple[Tensor, int]:
    """Log-probs [N] of all response tokens of some pairs in one forward pass, and the tokens that went through it.

    All chosen responses come first, then all rejected ones.
    """
    groups = [(side.prompt(pair, tokenizer.bos), (pair.chosen.ids, pair.rejected.ids)) for pair in pairs]
    batch = batch_for(scorer, groups, tokenizer.pad)
    with torch.inference_mode():
        return score(scorer, batch).cpu().clone(), batch.real_tokens


def _stop_if_asked(stop: StopRequest) -> None:
    if stop.signal:
        raise Interrupted(
            stop.signal, "interrupted while scoring; finished parts are kept", fix="rerun the same command to resume"
        )
