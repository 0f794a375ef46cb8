"""Loads a model that is sharded later, without a whole copy in float32 on every process, and shards it.

The first process loads it as it would alone, and finds out how it can be scored. The others hold it in the dtype of its
files, memory-mapped, until their shard is cut out.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.model.directory import base_of, stored_dtype
from tisdpo_cli.model.loading import move_to_device
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.quantization import is_quantized
from tisdpo_cli.model.sharding import shard
from tisdpo_cli.runs.runtime import Runtime


def dtype_to_load(runtime: Runtime, path: Path, dtype: torch.dtype) -> torch.dtype:
    """The dtype that this process loads weights in which are to have a dtype."""
    if is_light(runtime) and dtype == torch.float32:
        return getattr(torch, stored_dtype(base_of(path)) or "float32")
    return dtype


def place(runtime: Runtime, model: nn.Module) -> nn.Module:
    """Move a model to the device, unless only its shard will go there."""
    return model if is_light(runtime) else move_to_device(model, runtime.device)


def is_light(runtime: Runtime) -> bool:
    """Whether this process will hold a shard of a model that another one has whole."""
    return runtime.sharding is not None and not runtime.main


def shard_model(runtime: Runtime, policy: TokenScorer, reference: TokenScorer | None = None) -> None:
    """Split the weights of a policy, and of its reference if that is another scorer, over the processes, if asked for.

    Raises:
        UsageError: they are quantized.
        ModelError: they cannot be split.
    """
    if runtime.sharding is None:
        return
    models = {id(scorer.model): scorer.model for scorer in (policy, reference) if scorer is not None}.values()
    dtypes: dict[nn.Parameter, torch.dtype] = {}
    for model in models:
        if is_quantized(model):
            raise UsageError("weights in 4 bits cannot be sharded", where="--load-in-4bit", fix="use --shard none")
        dtypes |= _dtypes_of_first(runtime, model)
    if policy.rule.limits:
        raise ModelError(
            "the model cannot be sharded: which rows share a forward pass depends on their length",
            fix="use --shard none",
        )
    other = None if reference is policy else reference
    shard(policy, other, runtime.mesh(), runtime.sharding.offload, dtypes)
    for model in models:
        _share_buffers(runtime, model)
    where = ", in CPU memory while they are not in use" if runtime.sharding.offload else ""
    runtime.reporter.note(f"FSDP2: weights, gradients and optimizer are split over {runtime.world} processes{where}")


def _dtypes_of_first(runtime: Runtime, model: nn.Module) -> dict[nn.Parameter, torch.dtype]:
    """The dtypes that the first process has the parameters in."""
    shared = runtime.on_main(lambda: {name: parameter.dtype for name, parameter in model.named_parameters()})
    return {parameter: shared[name] for name, parameter in model.named_parameters()}


def _share_buffers(runtime: Runtime, model: nn.Module) -> None:
    """Give all processes the buffers of the first, which it computed in the right dtype."""
    kinds = runtime.on_main(lambda: {name: (tuple(b.shape), b.dtype) for name, b in model.named_buffers()})
    for name, (shape, dtype) in kinds.items():
        parent, _, leaf = name.rpartition(".")
        module = model.get_submodule(parent)
        values = torch.empty(shape, dtype=dtype, device=runtime.device)
        if runtime.main:
            values.copy_(module.get_buffer(leaf))
        dist.broadcast(values, 0)
        module._buffers[leaf] = values
