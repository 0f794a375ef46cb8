"""Log-probs of all responses under the frozen reference: computed once, before training, and cached for the next one.

All trainings of the method share the reference and the pairs. In float32 the cache does not depend on any order: pairs
go in parts of the dataset, each under a key of everything that its values depend on. In bf16 a log-prob depends on the
rows that share its forward pass, by several hundredths of a nat; there the reference is computed in the very passes of
the training, so that log-ratios are differences of the weights alone and exactly 0 before the first update.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.data.stored_tokens import pair_lengths
from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.training.batching import Microbatching, pair_costs
from tisdpo_cli.engine.training.float_pairs import Both, FloatPairs, FloatValues, FloatWriter
from tisdpo_cli.errors import RankError, naming_out_of_memory
from tisdpo_cli.model.adapters import adapters_of
from tisdpo_cli.model.batch import Group
from tisdpo_cli.model.fused_kernels import fused_by
from tisdpo_cli.model.logprobs import REVISION, TokenScorer, batch_for, score
from tisdpo_cli.model.quantization import is_quantized
from tisdpo_cli.reporter import Progress
from tisdpo_cli.runs.cache import TensorCache, cpu_model, key_of
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.runs.runtime import Runtime

PAIRS_PER_PART = 512

# The pairs of a forward pass, in order.
Pass = tuple[int, ...]


class ReferencePass:
    """The reference over pairs.

    Args:
        runtime: this process.
        scorer: the reference.
        pad: the padding id.
        microbatching: how pairs are split into forward passes.
        source: hash of the reference's files, its precision: what its log-probs depend on besides the pairs.
        cache: where log-probs are kept, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        scorer: TokenScorer,
        pad: int,
        microbatching: Microbatching,
        source: Mapping[str, Any],
        cache: TensorCache | None,
    ) -> None:
        self.runtime, self.scorer, self.pad, self.cache = runtime, scorer, pad, cache
        self.microbatching = microbatching
        computing = ("torch", "transformers", "flash-attn")
        packages = {name: version for name, version in versions().items() if name in computing}
        # Threads and the shape of a matrix product change the last bits.
        split = vars(microbatching)
        # Separate rows are grouped by their padded length.
        grouping = {} if scorer.packed else {"grouping": "padded"}
        parts = {**scorer.cut_short, "weights": str(next(scorer.parameters()).dtype)}
        parts |= {"quantized": True} if is_quantized(scorer.model) else {}
        fused = fused_by(scorer.model)
        parts |= {"kernels": fused} if fused is not None else {}
        adapters = adapters_of(scorer.model)
        if adapters is not None and scorer.adapter is not None:
            parts |= adapters.kind(scorer.adapter)
        layout = {"packed": scorer.packed, **grouping, **split, **parts, "pairs": PAIRS_PER_PART, "code": REVISION}
        kind = runtime.device.type
        device = torch.cuda.get_device_name(runtime.device) if kind == "cuda" else f"{kind}: {cpu_model()}"
        machine = {"device": device, "threads": torch.get_num_threads()}
        self.depends_on = {**source, **packages, **layout, **machine}

    def run(self, pairs: Sequence[EncodedPair]) -> FloatPairs:
        """Log-probs of all responses, pair by pair; parts are split among the processes.

        They are gathered in rounds of one part of each process, so that no process holds all of them.

        Raises:
            RankError: a log-prob is not finite.
        """
        runtime, written = self.runtime, FloatWriter()
        parts = [range(i, min(i + PAIRS_PER_PART, len(pairs))) for i in range(0, len(pairs), PAIRS_PER_PART)]
        computed = 0
        with runtime.reporter.progress("reference log-probs", len(pairs), 0, "pairs") as progress:
            for first in range(0, len(parts), runtime.world):
                mine: list[Tensor] = []
                for number in parts[first + runtime.rank : first + runtime.rank + 1]:
                    part = [pairs[i] for i in number]
                    key = key_of({**self.depends_on, "rows": [[p.prompt, p.chosen.ids, p.rejected.ids] for p in part]})
                    length = sum(len(p.chosen.ids) + len(p.rejected.ids) for p in part)
                    flat = self.cache.read(key, length) if self.cache is not None else None
                    if flat is None:
                        flat = self._compute(part, progress)
                        computed += len(part)
                        if self.cache is not None:
                            self.cache.write(key, flat)
                    mine.append(flat)
                self._take_part(pairs[0])
                for values in runtime.gather(mine):
                    written.append(values)
        self._report_cached(len(pairs) - sum(runtime.gather([computed])))
        return FloatPairs(written.values(), pair_lengths(pairs)[:, 1:])

    def run_passes(self, pairs: Sequence[EncodedPair], passes: Sequence[Sequence[int]]) -> PassLogps:
        """Log-probs of the very forward passes of this process: pass to values [N] in the token order of its batch.

        Args:
            pairs: in the order of their responses in the training.
            passes: the pairs of each forward pass.

        Raises:
            RankError: a log-prob is not finite.
        """
        written = FloatWriter()
        lengths_of: dict[Pass, int] = {}
        total, from_cache = sum(map(len, passes)), 0
        with self.runtime.reporter.progress("reference log-probs", total, 0, "pairs") as progress:
            for part in _parts_of(passes):
                rows = [[[pairs[i].prompt, pairs[i].chosen.ids, pairs[i].rejected.ids] for i in some] for some in part]
                key = key_of({**self.depends_on, "passes": rows})
                lengths = [sum(len(pairs[i].chosen.ids) + len(pairs[i].rejected.ids) for i in some) for some in part]
                values = self.cache.read(key, sum(lengths)) if self.cache is not None else None
                if values is None:
                    values = torch.cat([self._score([pairs[i] for i in some], progress)[0] for some in part])
                    if self.cache is not None:
                        self.cache.write(key, values)
                else:
                    from_cache += sum(map(len, part))
                written.append(values)
                lengths_of.update(zip(map(tuple, part), lengths, strict=True))
            self._take_part(pairs[0])
        self._report_cached(from_cache)
        return PassLogps(written.values(), lengths_of)

    def _report_cached(self, pairs: int) -> None:
        if pairs and self.cache is not None:
            self.runtime.reporter.note(
                f"reference log-probs of {pairs} pairs read from the cache in {self.cache.directory}"
            )

    @torch.no_grad()
    def _compute(self, pairs: Sequence[EncodedPair], progress: Progress) -> Tensor:
        """Log-probs [N] of these pairs, one after the other, chosen before rejected."""
        computed: dict[int, Both] = {}
        costs = pair_costs(pairs, self.scorer.packed)
        for batch in self.microbatching.split(range(len(pairs)), costs, world=1)[0]:
            logps, groups = self._score([pairs[i] for i in batch], progress)
            sides = [
                logps_of.split([len(r[k]) for _, r in groups]) for k, logps_of in enumerate(_halves(logps, groups))
            ]
            computed.update(zip(batch, zip(*sides, strict=True), strict=True))
        return torch.cat([logps for i in range(len(pairs)) for logps in computed[i]])

    @torch.no_grad()
    def _take_part(self, pair: EncodedPair) -> None:
        """Take part in the passes of other processes, if the reference is sharded, until they have no more."""
        while self._passes_under_way(0):
            score(self.scorer, batch_for(self.scorer, [(pair.prompt, [pair.chosen.ids, pair.rejected.ids])], self.pad))

    def _passes_under_way(self, mine: int) -> bool:
        if self.scorer.root is None:
            return False
        return int(self.runtime.total(torch.tensor([mine], device=self.runtime.device))) > 0

    @naming_out_of_memory("reference")
    @torch.no_grad()
    def _score(self, pairs: Sequence[EncodedPair], progress: Progress) -> tuple[Tensor, list[Group]]:
        """Log-probs [N] of one forward pass, all chosen responses before all rejected ones, and its groups."""
        self._passes_under_way(1)
        groups: list[Group] = [(pair.prompt, [pair.chosen.ids, pair.rejected.ids]) for pair in pairs]
        logps = score(self.scorer, batch_for(self.scorer, groups, self.pad)).cpu()
        if not torch.isfinite(logps).all():
            what = "a log-prob under the reference is not finite"
            raise RankError(what, where=pairs[0].where, fix="use --dtype float32, or another model")
        progress.advance(len(pairs), {})
        return logps, groups


class PassLogps(Mapping[Pass, Tensor]):
    """Log-probs [N] of each forward pass."""

    def __init__(self, values: FloatValues, lengths: Mapping[Pass, int]) -> None:
        """Divide values among passes, in the order of their lengths."""
        ends = accumulate(lengths.values())
        self._values = values
        self._places = {some: (end - lengths[some], end) for some, end in zip(lengths, ends, strict=True)}

    def __getitem__(self, some: Pass) -> Tensor:
        return self._values.between(*self._places[some])

    def __iter__(self) -> Iterator[Pass]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _parts_of(passes: Sequence[Sequence[int]]) -> list[list[Sequence[int]]]:
    """Consecutive passes, each once, in parts of at least so many pairs as a cache file holds."""
    parts: list[list[Sequence[int]]] = [[]]
    for some in dict.fromkeys(map(tuple, passes)):
        if sum(map(len, parts[-1])) >= PAIRS_PER_PART:
            parts.append([])
        parts[-1].append(some)
    return [part for part in parts if part]


def _halves(logps: Tensor, groups: Sequence[Group]) -> tuple[Tensor, Tensor]:
    chosen = sum(len(responses[0]) for _, responses in groups)
    return logps[:chosen], logps[chosen:]
