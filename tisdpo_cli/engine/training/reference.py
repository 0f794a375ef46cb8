"""Log-probs of all responses under the frozen reference: computed once, before training, and kept for the next one.

Every training of the method has the same reference and the same pairs. What is kept depends on the order of nothing:
pairs go in parts of the dataset, each with a key of everything that its values depend on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tisdpo_cli.data.tokens import EncodedPair
from tisdpo_cli.engine.training.batching import Microbatching
from tisdpo_cli.errors import DataError
from tisdpo_cli.model.logprobs import REVISION, TokenScorer, batch_for, score
from tisdpo_cli.reporter import Progress
from tisdpo_cli.runs.cache import TensorCache, key_of
from tisdpo_cli.runs.outputs import versions
from tisdpo_cli.runs.runtime import Runtime

_PAIRS_PER_PART = 512

# Log-probs of a pair's chosen and of its rejected response, each [tokens] float32 on the CPU.
Logps = tuple[Tensor, Tensor]


class ReferencePass:
    """The reference over pairs.

    Args:
        runtime: this process.
        scorer: the reference.
        pad: the padding id.
        tokens: of a forward pass.
        of: hash of the reference's files, precision and the like: what its log-probs depend on beside the pairs.
        cache: where they are kept, or None.
    """

    def __init__(
        self,
        runtime: Runtime,
        scorer: TokenScorer,
        pad: int,
        tokens: int,
        of: Mapping[str, Any],
        cache: TensorCache | None,
    ) -> None:
        self.runtime, self.scorer, self.pad, self.cache = runtime, scorer, pad, cache
        self.cutting = Microbatching(tokens=tokens)
        computing = ("torch", "transformers", "flash-attn")
        packages = {name: version for name, version in versions().items() if name in computing}
        # How work is shared between threads, and what shares a matrix product, moves the last bits.
        layout = {"packed": scorer.packed, "tokens": tokens, "pairs": _PAIRS_PER_PART, "code": REVISION}
        kind = runtime.device.type
        device = torch.cuda.get_device_name(runtime.device) if kind == "cuda" else kind
        machine = {"device": device, "threads": torch.get_num_threads()}
        self.depends_on = {**of, **packages, **layout, **machine}

    def run(self, pairs: Sequence[EncodedPair]) -> list[Logps]:
        """Log-probs of all responses, pair by pair; parts are shared between the processes.

        Raises:
            DataError: a log-prob is not finite.
        """
        runtime = self.runtime
        parts = [list(range(i, min(i + _PAIRS_PER_PART, len(pairs)))) for i in range(0, len(pairs), _PAIRS_PER_PART)]
        mine: list[tuple[int, Tensor]] = []
        fresh = 0
        title = f"reference log-probs of {len(pairs)} pairs"
        with runtime.reporter.progress(title, len(pairs), 0, "reference") as progress:
            for number in range(runtime.rank, len(parts), runtime.world):
                some = [pairs[i] for i in parts[number]]
                key = key_of({**self.depends_on, "rows": [[p.prompt, p.chosen.ids, p.rejected.ids] for p in some]})
                flat = self.cache.read(key) if self.cache is not None else None
                if flat is None:
                    flat = self._compute(some, progress)
                    fresh += len(some)
                    if self.cache is not None:
                        self.cache.write(key, flat)
                mine.append((number, flat))
        fresh = sum(runtime.gather([fresh]))
        if fresh < len(pairs) and self.cache is not None:
            runtime.reporter.note(
                f"reference log-probs of {len(pairs) - fresh} pairs were kept in {self.cache.directory}"
            )
        flat = torch.cat([part for _, part in sorted(runtime.gather(mine), key=lambda item: item[0])])
        lengths = [len(response.ids) for pair in pairs for response in (pair.chosen, pair.rejected)]
        both = flat.split(lengths)
        return list(zip(both[::2], both[1::2], strict=True))

    @torch.no_grad()
    def _compute(self, pairs: Sequence[EncodedPair], progress: Progress) -> Tensor:
        """Of these pairs, one after the other, chosen before rejected: [N]."""
        found: dict[int, Logps] = {}
        for some in self.cutting.split(range(len(pairs)), [pair.tokens for pair in pairs], world=1)[0]:
            groups = [(pairs[i].prompt, [pairs[i].chosen.ids, pairs[i].rejected.ids]) for i in some]
            logps = score(self.scorer, batch_for(self.scorer, groups, self.pad)).cpu()
            if not torch.isfinite(logps).all():
                bad = "a log-prob under the reference is not finite"
                raise DataError(bad, where=pairs[some[0]].where, fix="use --dtype float32, or another model")
            sides = [
                logps_of.split([len(r[k]) for _, r in groups]) for k, logps_of in enumerate(_halves(logps, groups))
            ]
            found.update(zip(some, zip(*sides, strict=True), strict=True))
            progress.advance(len(some), {})
        return torch.cat([logps for i in range(len(pairs)) for logps in found[i]])


def _halves(logps: Tensor, groups: Sequence[tuple[list[int], list[list[int]]]]) -> tuple[Tensor, Tensor]:
    chosen = sum(len(responses[0]) for _, responses in groups)
    return logps[:chosen], logps[chosen:]
