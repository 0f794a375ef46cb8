"""The model of a training: loaded whole or with an adapter, and described."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tisdpo_cli.engine.training.session import SessionConfig
from tisdpo_cli.engine.training.sharded_model import dtype_to_load, place
from tisdpo_cli.errors import UsageError
from tisdpo_cli.model.adapters import ALL_LINEAR, BaseModel, LoraShape, adapters_of, attach_new
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.model.directory import ADAPTER_CONFIG, base_of, is_adapter, is_quantized_adapter, read_json
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.model.quantization import NF4, is_quantized
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.runtime import Runtime


def load_policy(runtime: Runtime, config: SessionConfig, path: Path, trust_remote_code: bool) -> nn.Module:
    """Load the model to train onto the device: whole, with a new adapter, or as the adapter that it is.

    Raises:
        UsageError: it is an adapter of another shape than the config asks for.
    """
    adapted = config.adapter is not None or is_adapter(path)
    # Weights that no update changes need no more precision than the computation.
    dtype = torch.bfloat16 if adapted and config.precision == "bf16" else torch.float32
    dtype = dtype_to_load(runtime, path, dtype)
    model = load_model(path, trust_remote_code, dtype=dtype, quantized=config.quantized)
    if config.adapter is not None and adapters_of(model) is None:
        attach_new(model, config.adapter, config.seed)
    return place(runtime, model)


def check_start_adapter(shape: LoraShape | None, quantized: bool, path: Path) -> None:
    """Check that an adapter to train further has the shape that is asked for.

    Raises:
        UsageError: it has another one.
    """
    if shape is None or not is_adapter(path):
        return
    if quantized != is_quantized_adapter(path):
        was = "was not" if quantized else "was"
        raise UsageError(f"{path} is an adapter that {was} trained on a base model in 4 bits", where="--load-in-4bit")
    config = read_json(path / ADAPTER_CONFIG, "")
    different = shape.differences(config)
    if shape.targets != ALL_LINEAR and sorted(shape.targets) != sorted(config.get("target_modules") or ()):
        different.append("target")
    if shape.modules_to_save and sorted(shape.modules_to_save) != sorted(config.get("modules_to_save") or ()):
        different.append("modules_to_save")
    if different:
        name = different[0]
        raise UsageError(
            f"{path} is an adapter with another {name}, and it is trained further",
            where=f"--{name if name in ('rslora', 'dora') else f'lora-{name}'}".replace("_", "-"),
            fix="leave out the options of the adapter, or merge it first with `tisdpo merge`",
        )


def base_model(model: nn.Module, path: Path, name: str, content: str) -> BaseModel:
    """What the adapter that a training makes is put on.

    Args:
        model: the model with its adapter.
        path: directory that the training starts from.
        name: what the user calls it.
        content: its hash.
    """
    quantization = NF4 if is_quantized(model) else None
    if is_adapter(path):
        base = str(read_json(path / ADAPTER_CONFIG, "")["base_model_name_or_path"])
        base = str(Path(base).resolve()) if Path(base).is_dir() else base
        return BaseModel(base, hash_model(base_of(path)), quantization)
    return BaseModel(str(path.resolve()) if Path(name).expanduser().is_dir() else name, content, quantization)


def report_adapter(reporter: Reporter, model: nn.Module) -> None:
    """Say what is trained of a model with an adapter, if it has one, and which promises its dropout breaks."""
    adapters = adapters_of(model)
    if adapters is None:
        return
    frozen = next(p for p in model.parameters() if not p.requires_grad)
    dtype = str(frozen.dtype).removeprefix("torch.")
    if is_quantized(model):
        # Experts and embeddings stay as they are.
        dtype = f"4 bits (nf4; {_share_in_4_bits(model):.0%} of them)"
    reporter.note(f"adapter: {adapters.describe()}; the weights of its base model are frozen, in {dtype}")
    if adapters.dropouts():
        reporter.warn(
            "--lora-dropout is above 0: the result depends on how a batch is split into forward passes, and responses "
            "of a pair share what is dropped of their prompt; a resumed run is still the same"
        )


def _share_in_4_bits(model: nn.Module) -> float:
    """The share of the frozen weights that are in 4 bits, two in a byte."""
    frozen = [p for p in model.parameters() if not p.requires_grad]
    low = sum(2 * p.numel() for p in frozen if p.dtype == torch.uint8)
    return low / (low + sum(p.numel() for p in frozen if p.dtype != torch.uint8))


def parameter_count(model: nn.Module) -> str:
    """`494.0 M parameters`, or `1.2 M of 494.0 M parameters` if the others are frozen."""
    # A byte holds two weights in 4 bits.
    size = sum(p.numel() * (2 if p.dtype == torch.uint8 else 1) for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if trained < size:
        return f"{_number(trained)} of {_number(size)} parameters"
    return f"{_number(size)} parameters"


def _number(size: int) -> str:
    return f"{size / 1e6:.1f} M" if size >= 1e5 else str(size)
