"""Base models in 4 bits, by bitsandbytes: NF4 with double quantization (QLoRA, Dettmers et al., arXiv 2305.14314).

Knows transformers and bitsandbytes. Only the weights of linear layers inside the model are quantized.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from tisdpo_cli.errors import UsageError

NF4 = "nf4"
_INSTALL = "pip install 'tisdpo[bitsandbytes]'"


def quantization_config(dtype: torch.dtype) -> Any:
    """What transformers quantizes by while it loads a model.

    Args:
        dtype: of the matrix products, for which the weights are expanded.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    bitsandbytes()
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=NF4,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def silence_bitsandbytes() -> None:
    """Turn off its messages: at import, by peft too, it says which kernels it could not fetch."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def bitsandbytes() -> Any:
    """The package.

    Raises:
        UsageError: it is not installed, or does not run on this machine.
    """
    silence_bitsandbytes()
    try:
        import bitsandbytes
    except Exception as error:
        raise UsageError("needs the package bitsandbytes, for this machine", fix=_INSTALL) from error
    return bitsandbytes


def is_quantized(model: nn.Module) -> bool:
    """Whether linear layers of a model are in 4 bits."""
    return any(True for _ in quantized_layers(model))


def quantized_layers(model: nn.Module) -> Iterator[Any]:
    """The linear layers in 4 bits."""
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module, "compute_type_is_set"):
            yield module


def keep_gradients(model: nn.Module) -> None:
    """Keep the quantized layers of a model in a form that has gradients, whatever mode the rest is in.

    On CPUs a layer in evaluation mode packs its weights at the first forward pass without gradients, and from then on
    its inputs get none, without a word.
    """
    for layer in quantized_layers(model):
        layer.training = True


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Fix what quantized layers compute in; by themselves they take the dtype of the first input that they see."""
    for layer in quantized_layers(model):
        layer.compute_dtype, layer.compute_type_is_set = dtype, True


def dequantized(model: nn.Module) -> nn.Module:
    """Expand the quantized layers of a model to float32: the values that it computes with."""
    return model.dequantize().float()  # type: ignore[operator]


@contextmanager
def computing_in_float32(model: nn.Module) -> Iterator[None]:
    """Within this context, quantized layers compute in float32."""
    before = [(layer, layer.compute_dtype) for layer in quantized_layers(model)]
    compute_in(model, torch.float32)
    try:
        yield
    finally:
        for layer, dtype in before:
            layer.compute_dtype = dtype
