"""A program for several processes: every family sharded, against a whole copy. Prints the worst differences as JSON."""

from __future__ import annotations

import copy
import json
import os

import torch
import torch.distributed as dist
from test_logprobs import FAMILIES, random_model
from torch.distributed.device_mesh import init_device_mesh

from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.layout import make_scorer, scorer_with
from tisdpo_cli.model.logprobs import compare, score
from tisdpo_cli.model.sharding import is_sharded, local, rows_of, shard, whole

GROUPS = [([1, 2, 3], [[4, 5], [6, 7, 8]]), ([9, 10], [[11], [12, 13, 14, 15]])]


def gradients(scorer, reference, batch):
    """Log-probs, divergences and gradients by name; the weights differ for each token."""
    compared = compare(scorer, reference, batch, "policy||reference")
    values = compared.logps + compared.kl
    (values * torch.cos(torch.arange(len(values)))).sum().backward()
    return values.detach(), {name: p.grad for name, p in scorer.model.named_parameters() if p.grad is not None}


def differences(family: str) -> dict[str, float]:
    """The largest ones between a sharded model and the whole one."""
    model, reference = random_model(family), random_model(family, seed=1).requires_grad_(False)
    alone = [make_scorer(m, "auto", None, 16, print, "") for m in (copy.deepcopy(model), copy.deepcopy(reference))]
    # As on other processes than the first, which do not look at the numbers.
    scorers = [scorer_with(m, one.traits, None) for m, one in zip((model, reference), alone, strict=True)]
    dtypes = {p: torch.float32 for m in (model, reference) for p in m.parameters()}
    shard(*scorers, init_device_mesh("cpu", (dist.get_world_size(),)), False, dtypes)
    batch = collate(GROUPS, 0, alone[0].packed)
    with torch.no_grad():
        # Twice: what the first leaves must not be in the way of the second.
        pairs = [*zip(scorers, alone, strict=True)] * 2
        forward = max(float((score(s, batch) - score(a, batch)).abs().max()) for s, a in pairs)
    values, sharded = gradients(*scorers, batch)
    expected, grads = gradients(*alone, batch)
    assert sharded.keys() == grads.keys()
    assert all(map(is_sharded, sharded.values()))
    held = sum(local(p).numel() for p in model.parameters())
    rows = all(len(rows_of(p)) == len(local(p)) for p in model.parameters())
    return {
        "forward": forward,
        "values": float((values - expected).abs().max()),
        "gradients": max(float((whole(sharded[n]) - grads[n]).norm() / (1 + grads[n].norm())) for n in grads),
        "held": held / sum(p.numel() for p in model.parameters()),
        "rows": rows,
    }


if __name__ == "__main__":
    dist.init_process_group("gloo")
    found = {family: differences(family) for family in FAMILIES}
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.barrier()
    # Threads of the group would abort an interpreter that shuts down.
    os._exit(0)
