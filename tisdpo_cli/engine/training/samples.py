"""Samples of the policy while it is trained, to a few prompts, in a file of JSON lines.

They draw no random numbers that a training draws, and leave its model as it is: the training ends in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from tisdpo_cli.engine.evaluation.sampling import Sampling, sample_all, uniform_draws
from tisdpo_cli.model.loading import restore_attention, use_packed_attention
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.row_lengths import forget_lengths
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.runs.outputs import MetricsFile


@dataclass(frozen=True)
class SampleConfig:
    """What is sampled.

    Attributes:
        path: the file.
        every: updates between samples; before the first and after the last there are some too.
        prompts: FILE:LINE and token ids of each.
        scorer: of the policy.
        sampling: how.
        seed: of the run.
        batch_size: prompts per forward pass.
        text: text of token ids.
        starts_as_reference: whether the policy is the reference before the first update.
    """

    path: Path
    every: int
    prompts: Sequence[tuple[str, Sequence[int]]]
    scorer: TokenScorer
    sampling: Sampling
    seed: int
    batch_size: int
    text: Callable[[Sequence[int]], str]
    starts_as_reference: bool

    def due(self, step: int) -> bool:
        """Whether there are samples after a step."""
        return step % self.every == 0


@dataclass(frozen=True)
class SampleOptions:
    """What a user decides about samples.

    Attributes:
        every: updates between them.
        prompts: number of prompts.
        new_tokens: maximum tokens of a response.
        temperature: 0 is greedy.
        seed: of the run.
        batch_size: prompts per forward pass.
    """

    every: int
    prompts: int
    new_tokens: int
    temperature: float
    seed: int
    batch_size: int


def sample_config(
    options: SampleOptions,
    path: Path,
    prompts: Sequence[tuple[str, Sequence[int]]],
    scorer: TokenScorer,
    tokenizer: Tokenizer,
    autocast: torch.dtype | None,
    starts_as_reference: bool,
) -> SampleConfig:
    """What is sampled of a model.

    Args:
        options: what the user decides.
        path: the file.
        prompts: FILE:LINE and token ids of each.
        scorer: of the policy, whose generation config says which tokens end a response besides the tokenizer's.
        tokenizer: of the model.
        autocast: dtype to compute in, or None for that of the weights.
        starts_as_reference: whether the policy is the reference before the first update.
    """
    ends = getattr(scorer.model.generation_config, "eos_token_id", None)
    eos = {tokenizer.eos, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
    sampling = Sampling(eos, tokenizer.pad, options.new_tokens, options.temperature, autocast)
    return SampleConfig(
        path,
        options.every,
        prompts,
        scorer,
        sampling,
        options.seed,
        options.batch_size,
        tokenizer.text,
        starts_as_reference,
    )


class SampleLog:
    """The file of samples."""

    def __init__(self, config: SampleConfig, resume_step: int | None, warn: Callable[[str], None]) -> None:
        self._config = config
        self._file = MetricsFile(config.path, resume_step, warn)

    def write(self, step: int) -> None:
        """Sample one response to each prompt."""
        config = self._config
        # The same draws every time: what changes is the model.
        keys = [(number, 0) for number in range(len(config.prompts))]
        draws = uniform_draws(config.seed, keys, config.sampling.new_tokens)
        with _undisturbed(config.scorer) as model:
            samples = sample_all(model, [ids for _, ids in config.prompts], draws, config.sampling, config.batch_size)
        role = "reference" if step == 0 and config.starts_as_reference else "policy"
        for (where, ids), sample in zip(config.prompts, samples, strict=True):
            self._file.write(
                {
                    "step": step,
                    "role": role,
                    "where": where,
                    "prompt": config.text(ids),
                    "response": config.text(sample.ids),
                    "tokens": len(sample.ids),
                    "ended": sample.ended,
                }
            )


@contextmanager
def _undisturbed(scorer: TokenScorer) -> Iterator[nn.Module]:
    """The model for a while as it is without a training: with its own attention, and no recomputed activations, which
    would keep no cache.
    """
    model = scorer.model
    recomputing = [
        module for module in model.modules() if module.training and hasattr(module, "gradient_checkpointing")
    ]
    mode = torch.get_deterministic_debug_mode()
    for module in recomputing:
        module.training = False
    # Sums over a vocabulary have no deterministic kernel on GPUs; no training depends on these.
    torch.set_deterministic_debug_mode("warn")
    restore_attention(model)
    try:
        with scorer.using_adapter():
            yield model
    finally:
        if scorer.packed:
            use_packed_attention(model)
        torch.set_deterministic_debug_mode(mode)
        for module in recomputing:
            module.training = True
        forget_lengths(model)
