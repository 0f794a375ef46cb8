"""What `evaluate` is predicted to need, from the shapes of its models and the sizes of its rows. Weights are not read.

Responses are taken to reach the limit of new tokens, so their time is an upper bound. A reward model is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from tisdpo_cli.engine.evaluation.policies import EvaluationTask, PolicyRef
from tisdpo_cli.engine.training import planning
from tisdpo_cli.engine.training.batching import pair_costs
from tisdpo_cli.engine.training.dry_run import Examples, ExampleSize
from tisdpo_cli.engine.training.planning import PassSize, Prediction, Work
from tisdpo_cli.runs.machine import free_disk, product_rate

# Bytes of a token in a file of samples.
_TOKEN_BYTES = 6


def predict_evaluation(
    task: EvaluationTask, processes: int, policies: Sequence[PolicyRef], reference: PolicyRef, samples: Path | None
) -> Prediction:
    """What an evaluation needs.

    Args:
        task: what every policy is evaluated on.
        processes: how many are asked for.
        policies: models and baseline.
        reference: of KL and implicit rewards.
        samples: the file that responses are written to, or None.

    Raises:
        ModelError: a model is damaged.
    """
    runtime, new_tokens = task.runtime, task.sampling.new_tokens
    on_gpu = runtime.device.type == "cuda"
    models = [frozen_model(policy.path, task.trust_remote_code) for policy in policies]
    base = frozen_model(reference.path, task.trust_remote_code)
    largest = max(([model, base] for model in models), key=bytes_together)
    prompts = [len(prompt.ids) for prompt in task.prompts]
    rows = min(task.batch_size, max(2 * len(task.pairs), len(prompts)))
    longest = max((pair.longest for pair in task.pairs), default=0)
    generated = max(prompts, default=0) + new_tokens if prompts else 0
    size = PassSize(rows * max(longest, generated), rows * max(longest, new_tokens if prompts else 0))
    memory = {
        "program": program_memory(runtime),
        "weights": bytes_together(largest),
        "weight file": loading_bytes(largest, on_gpu),
        # Both are asked for the same rows.
        "forward pass": sum(planning.forward_bytes(model.shape, size) for model in largest),
        "keys and values": max(model.cache_bytes for model in [*models, base]) * rows * generated,
    }
    read = _pairs_work(task.pairs)
    answered = Work(sum(prompts) + new_tokens * len(prompts), new_tokens * len(prompts), _seen(prompts, new_tokens))
    asked = [*models, *([base] if task.sample_reference else [])]
    flops = {
        "pairs": sum(planning.forward_flops(m.shape, read) + planning.forward_flops(base.shape, read) for m in models),
        # The log-probs of the responses under both.
        "samples": sum(
            planning.forward_flops(m.shape, answered) + planning.forward_flops(base.shape, answered) for m in asked
        ),
    }
    decoding = sum(planning.forward_flops(model.shape, answered) for model in asked)
    low = task.sampling.autocast is not None
    dtype, precision = (torch.bfloat16, "bf16") if low else (torch.float32, "float32")
    devices = processes if on_gpu else runtime.world
    rate = product_rate(runtime.device, dtype)
    seconds = {stage: planning.seconds_of(count, rate, precision, devices) for stage, count in flops.items()}
    if prompts:
        # Token by token, so that few rows are multiplied with all weights.
        skinny = product_rate(runtime.device, dtype, rows=rows)
        seconds["samples"] += planning.seconds_of(decoding, skinny, precision, devices)
        flops["samples"] += decoding
    size_of_samples = _TOKEN_BYTES * sum(length + new_tokens for length in prompts) * len(asked)
    return Prediction(
        processes=processes,
        device=runtime.device.type,
        sharded=False,
        memory=rounded(memory),
        when="evaluating",
        device_memory=memory_per_process(runtime, processes),
        disk={} if samples is None else {"samples": size_of_samples},
        free_disk=free_disk(samples or Path()),
        flops={stage: count for stage, count in flops.items() if count},
        seconds={stage: seconds[stage] for stage, count in flops.items() if count},
        change=None,
    )


def _pairs_work(pairs: Sequence[EncodedPair]) -> Work:
    def size(number: int) -> ExampleSize:
        pair = pairs[number]
        return ExampleSize(len(pair.prompt), (len(pair.chosen.ids), len(pair.rejected.ids)))

    return Examples(pair_costs(pairs, packed=False), size).total()


def _seen(prompts: Sequence[int], new_tokens: int) -> float:
    """The sum over all tokens of responses at their longest of the tokens that each sees."""
    return sum((length + new_tokens) ** 2 / 2 for length in prompts)
