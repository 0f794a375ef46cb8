"""Splits a model over processes with torch's FSDP2 (`fully_shard`), and puts it together again.

Every decoder layer is gathered while it runs. Everything else, the embedding and the head among it, belongs to the root
and is gathered for a whole forward and backward pass. The root is a module that holds the scorers, because the head
runs outside the model's own forward.

What torch needs for this takes most of a second to import, so only processes that shard import it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError
from tisdpo_cli.model.last_layer import decoder_layers
from tisdpo_cli.model.logprobs import ComparedLogps, TokenScorer

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor


class ScorerRoot(nn.Module):
    """The root of sharded scorers: a policy, and its reference if that is another one.

    Both are in one module, because comparing them needs the heads of both at once.
    """

    def __init__(self, policy: TokenScorer, reference: TokenScorer | None) -> None:
        super().__init__()
        self.policy, self.reference = policy, reference

    def forward(self, scorer: TokenScorer, *args: Any) -> Tensor | ComparedLogps:
        """Run one of the scorers."""
        return scorer(*args)


def shard(
    policy: TokenScorer,
    reference: TokenScorer | None,
    mesh: DeviceMesh,
    offload: bool,
    dtypes: Mapping[nn.Parameter, torch.dtype],
) -> None:
    """Split the weights of scorers over processes, which must hold the same weights.

    From then on both run through their `ScorerRoot`.

    Args:
        policy: scorer of the model to train.
        reference: of another scorer that runs beside it, or None.
        mesh: the processes.
        offload: whether shards stay in CPU memory while they are not in use.
        dtypes: of the shards. What is in another one is converted layer by layer: no process holds two models.

    Raises:
        ModelError: the model has no list of layers, or parameters that cannot be split.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    on_gpu = mesh.device_type == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    storage = CPUOffloadPolicy(pin_memory=on_gpu) if offload else OffloadPolicy()
    root = ScorerRoot(policy, reference)
    scorers = [policy] if reference is None else [policy, reference]
    try:
        for model in {id(scorer.model): scorer.model for scorer in scorers}.values():
            for layer in decoder_layers(model):
                _convert(layer, dtypes)
                fully_shard(layer, mesh=mesh, offload_policy=storage)
        _convert(root, dtypes)
        fully_shard(root, mesh=mesh, offload_policy=storage)
    except (ValueError, NotImplementedError) as error:
        message = f"the model cannot be sharded: {str(error).splitlines()[0]}"
        raise ModelError(message, fix="use --shard none") from error
    for scorer in scorers:
        scorer.run_in(root, device)


def _convert(module: nn.Module, dtypes: Mapping[nn.Parameter, torch.dtype]) -> None:
    for parameter in module.parameters():
        if not is_sharded(parameter):
            parameter.data = parameter.data.to(dtypes[parameter])


# Tensors of a sharded model ------------------------------------------------------------------------------------


def rows_of(tensor: Tensor) -> range | None:
    """Which rows of a tensor this process holds, or None if it is whole."""
    if not is_sharded(tensor):
        return None
    count, mesh = len(tensor), _sharded(tensor).device_mesh
    size = -(-count // mesh.size())
    first = min(count, size * mesh.get_local_rank())
    return range(first, min(count, first + size))


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only a part of a tensor."""
    return hasattr(tensor, "to_local")


def _sharded(tensor: Tensor) -> DTensor:
    return cast("DTensor", tensor)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, in the same memory."""
    return _sharded(tensor).to_local() if is_sharded(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor; every process must ask for it."""
    return _sharded(tensor).full_tensor() if is_sharded(tensor) else tensor


def split_like(values: Tensor, parameter: Tensor) -> Tensor:
    """A tensor that is split as a parameter is, from the rows that this process holds."""
    from torch.distributed.tensor import DTensor

    own, shape, stride = _sharded(parameter), parameter.shape, parameter.stride()
    values = values.to(local(parameter).device)
    return DTensor.from_local(values, own.device_mesh, own.placements, run_check=False, shape=shape, stride=stride)
