"""Rewards of responses: from a sequence classification model, or from a function of the user's own.

It knows texts and numbers, and nothing of where the responses come from.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.errors import DataError, ModelError, TisdpoError, UsageError
from tisdpo_cli.model.loading import load_reward_model, move_to_device

# Prompts and responses, side by side, to one number each; larger is better.
Rewarder = Callable[[Sequence[str], Sequence[str]], list[float]]


def scorer_rewarder(name: str) -> Rewarder:
    """Rewards by `module:function`, called once with the lists of prompts and responses.

    The module is looked for where Python looks, and in the current directory.

    Raises:
        UsageFault: there is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    function = getattr(_imported(module_name, name), function_name, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {function_name}", where=f"--scorer {name}")

    def rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        try:
            given = list(function(list(prompts), list(responses)))
        except Exception as fault:
            said = f"{type(fault).__name__}: {fault}".splitlines()[0]
            raise TisdpoError(f"the function has failed: {said}", where=f"--scorer {name}") from fault
        return _checked(given, len(responses), f"--scorer {name}")

    return rewards


def _imported(module: str, name: str) -> Any:
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except Exception as fault:
        said = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        fix = "write module:function, of a module here or on PYTHONPATH"
        raise UsageError(f"cannot be imported: {said}", where=f"--scorer {name}", fix=fix) from fault
    finally:
        sys.path.remove(here)


def _checked(given: list[Any], count: int, where: str) -> list[float]:
    if len(given) != count:
        raise DataError(f"gave {len(given)} numbers for {count} responses", where=where)
    try:
        numbers = [float(value) for value in given]
    except (TypeError, ValueError) as fault:
        raise DataError("gave something that is no number", where=where) from fault
    if not all(map(math.isfinite, numbers)):
        raise DataError("gave a number that is not finite", where=where)
    return numbers


def model_rewarder(path: Path, device: torch.device, batch_size: int) -> Rewarder:
    """Rewards by a model that reads prompt and response as one text, with the special tokens its tokenizer adds.

    A text longer than the model can read loses its start.

    Raises:
        ModelError: it cannot be loaded, or is no such model.
    """
    model, tokenizer = load_reward_model(path)
    model = move_to_device(model, device).requires_grad_(False)
    # Texts of equal length go together, so that nothing is padding: an EOS that ends a text is read as one.
    configs: list[Any] = [model.config, model.config.get_text_config()]  # type: ignore[operator, union-attr]
    for config in configs:
        config.pad_token_id = -1
    longest = getattr(configs[1], "max_position_embeddings", None)
    tokenizer.truncation_side = "left"
    limit = {"truncation": True, "max_length": longest} if longest else {}

    def rewards(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
        texts = [prompt + response for prompt, response in zip(prompts, responses, strict=True)]
        rows = tokenizer(texts, return_attention_mask=False, verbose=False, **limit)["input_ids"]
        found: dict[int, float] = {}
        for batch in _of_equal_length(rows, batch_size):
            found |= zip(batch, _read(model, [rows[i] for i in batch], device), strict=True)
        given = [found[i] for i in range(len(rows))]
        if not all(map(math.isfinite, given)):
            raise ModelError("gave a reward that is not finite", where=str(path))
        return given

    return rewards


def _of_equal_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    return [same[k : k + batch_size] for same in by_length.values() for k in range(0, len(same), batch_size)]


@torch.inference_mode()
def _read(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    logits = model(input_ids=torch.tensor(rows, device=device)).logits
    return logits.float()[:, 0].tolist()
