"""Rewards of responses, from a sequence classification model or from a Python function of the user.

A prompt is a text or a conversation; a response is a text. It knows no policies, only numbers come back.
"""

from __future__ import annotations

import copy
import importlib
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.data.messages import Conversation
from tisdpo_cli.engine.chat import DEFAULT_DAY
from tisdpo_cli.errors import DataError, ModelError, TisdpoError, UsageError, naming_out_of_memory
from tisdpo_cli.model.chat_template import ChatTemplate
from tisdpo_cli.model.loading import load_reward_model, move_to_device
from tisdpo_cli.model.tokenizer import load_backend

# Prompts and their responses to one reward per response; higher is better.
RewardFunction = Callable[[Sequence[str | Conversation], Sequence[str]], list[float]]


def rewards_from_function(name: str) -> RewardFunction:
    """Rewards from `module:function`, called once with the lists of prompts and responses.

    A prompt is a text, or the list of messages of a conversation. Modules are imported from the Python path and from
    the current directory.

    Raises:
        UsageError: the module or function does not exist.
    """
    module_name, _, function_name = name.partition(":")
    function = getattr(_import_module(module_name, name), function_name, None)
    if not callable(function):
        raise UsageError(f"{module_name} has no function {function_name}", where=f"--scorer {name}")

    def rewards(prompts: Sequence[str | Conversation], responses: Sequence[str]) -> list[float]:
        # A function may change the messages that it gets.
        given = [prompt if isinstance(prompt, str) else copy.deepcopy(prompt.prompt) for prompt in prompts]
        try:
            values = list(function(given, list(responses)))
        except Exception as fault:
            message = f"{type(fault).__name__}: {fault}".splitlines()[0]
            raise TisdpoError(f"the function failed: {message}", where=f"--scorer {name}") from fault
        return _checked(values, len(responses), f"--scorer {name}")

    return rewards


def _import_module(module: str, name: str) -> Any:
    directory = str(Path.cwd())
    sys.path.insert(0, directory)
    try:
        return importlib.import_module(module)
    except Exception as fault:
        message = str(fault).splitlines()[0] if str(fault) else type(fault).__name__
        fix = "write module:function with a module in this directory or on PYTHONPATH"
        raise UsageError(f"cannot import {module}: {message}", where=f"--scorer {name}", fix=fix) from fault
    finally:
        sys.path.remove(directory)


def _checked(values: list[Any], count: int, where: str) -> list[float]:
    if len(values) != count:
        raise DataError(f"returned {len(values)} rewards for {count} responses", where=where)
    try:
        rewards = [float(value) for value in values]
    except (TypeError, ValueError) as fault:
        raise DataError("returned a reward that is not a number", where=where) from fault
    if not all(map(math.isfinite, rewards)):
        raise DataError("returned a reward that is not finite", where=where)
    return rewards


def rewards_from_model(path: Path, device: torch.device, batch_size: int) -> RewardFunction:
    """Rewards from a model that reads prompt and response as one text, with the special tokens its tokenizer adds.

    Conversations are rendered by the chat template of its own tokenizer, which writes all special tokens itself. What
    is longer than the model supports loses its start.

    Args:
        path: directory of a sequence classification model with one output.
        device: to run it on.
        batch_size: rows per forward pass.

    Raises:
        ModelError: the model cannot be loaded, or has another kind of output.
        DataError: its chat template refuses a conversation.
    """
    model, tokenizer = load_reward_model(path)
    model = move_to_device(model, device).requires_grad_(False)
    # Batches hold texts of equal length only, so nothing is padded, and an EOS at the end of a text is read as one
    # even where it is also the padding token.
    configs: list[Any] = [model.config, model.config.get_text_config()]  # type: ignore[operator, union-attr]
    for config in configs:
        config.pad_token_id = -1
    longest = getattr(configs[1], "max_position_embeddings", None)
    tokenizer.truncation_side = "left"
    limit = {"truncation": True, "max_length": longest} if longest else {}

    def rewards(prompts: Sequence[str | Conversation], responses: Sequence[str]) -> list[float]:
        if any(isinstance(prompt, Conversation) for prompt in prompts):
            rows = [row[-longest:] if longest else row for row in _rendered(tokenizer, path, prompts, responses)]
        else:
            texts = [f"{prompt}{response}" for prompt, response in zip(prompts, responses, strict=True)]
            rows = tokenizer(texts, return_attention_mask=False, verbose=False, **limit)["input_ids"]
        by_row: dict[int, float] = {}
        for batch in _batches_of_equal_length(rows, batch_size):
            by_row |= zip(batch, _logits(model, [rows[i] for i in batch], device), strict=True)
        values = [by_row[i] for i in range(len(rows))]
        if not all(map(math.isfinite, values)):
            raise ModelError("returned a reward that is not finite", where=str(path))
        return values

    return rewards


def check_renders(path: Path, prompts: Sequence[str | Conversation]) -> None:
    """Check that the chat template of a reward model renders conversations, before anything is computed.

    Raises:
        ModelError: its tokenizer has no chat template, or an invalid one.
        DataError: the template refuses a conversation.
    """
    if any(isinstance(prompt, Conversation) for prompt in prompts):
        _rendered(load_backend(path, False), path, prompts, ["."] * len(prompts))


def _rendered(
    backend: Any, path: Path, prompts: Sequence[str | Conversation], responses: Sequence[str]
) -> list[list[int]]:
    """Ids of conversations with their answers, as the chat template of a reward model renders them."""
    if not backend.chat_template:
        raise ModelError(
            "the rows hold conversations, but the tokenizer of the reward model has no chat template",
            where=f"--reward-model {path}",
            fix="use a reward model for conversations, or --scorer",
        )
    where, rows = f"--reward-model {path}", []
    try:
        template = ChatTemplate(backend, day=DEFAULT_DAY)
        for prompt, response in zip(prompts, responses, strict=True):
            assert isinstance(prompt, Conversation)
            rows.append(template.encode_whole(prompt.prompt, response, prompt.tools))
    except ModelError as error:
        raise ModelError(error.what, where=where, fix=error.fix) from error
    except DataError as error:
        raise DataError(error.what, where=where, fix="use another reward model, or --scorer") from error
    return rows


def _batches_of_equal_length(rows: Sequence[Sequence[int]], batch_size: int) -> list[list[int]]:
    by_length: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        by_length.setdefault(len(row), []).append(i)
    return [same[k : k + batch_size] for same in by_length.values() for k in range(0, len(same), batch_size)]


@naming_out_of_memory("generating")
@torch.inference_mode()
def _logits(model: nn.Module, rows: Sequence[Sequence[int]], device: torch.device) -> list[float]:
    logits = model(input_ids=torch.tensor(rows, device=device)).logits
    return logits.float()[:, 0].tolist()
