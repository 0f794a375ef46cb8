"""Models: loaded with every check that loading itself leaves out, made, saved.

Knows transformers; it knows no dataset rows, no settings and no training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.model.packed_attention import GROUPS, AttentionSpec
from tisdpo_cli.model.tokenizer import Tokenizer, first_line, load_backend, silence_transformers
from tisdpo_cli.model.varlen_attention import packed_attention


def check_fit(
    path: Path, tokenizer: Tokenizer, max_length: int, trust_remote_code: bool = False, template: int = 0
) -> None:
    """Compare a tokenizer and a maximal length with a model's configuration, before its weights are read.

    Args:
        path: the model's directory.
        tokenizer: in use with it.
        max_length: tokens of a row.
        trust_remote_code: whether code that comes with the model may run.
        template: tokens that a prompt template adds to a row.

    Raises:
        ModelError: ids of the tokenizer have no row in the embedding.
        UsageFault: `max_length` is beyond the positions that the model has.
    """
    config = _config(path, trust_remote_code).get_text_config()
    highest = max(tokenizer.backend.get_vocab().values())
    rows = getattr(config, "vocab_size", None)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, the model's embedding {rows} rows",
            where=str(path),
            fix="use the model's own tokenizer, or resize its embedding",
        )
    positions = _positions(config)
    if positions is not None and max_length + template > positions:
        added = f" with the {template} tokens of a template" if template else ""
        raise UsageError(
            f"max_length {max_length}{added} is beyond the {positions} positions of this model",
            where=f"--max-length {max_length}",
            fix=f"lower it to {positions - template}",
        )


def shape_of(path: Path, trust_remote_code: bool = False) -> tuple[int, int]:
    """Layers and width of a model, by its configuration."""
    config = _config(path, trust_remote_code).get_text_config()
    return config.num_hidden_layers, config.hidden_size


def positions_of(path: Path, trust_remote_code: bool = False) -> int | None:
    """How many positions a model has, or None where its configuration sets no limit."""
    return _positions(_config(path, trust_remote_code).get_text_config())


def _positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None)


def _config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as fault:
        raise ModelError(
            f"the configuration cannot be used: {first_line(fault)}", where=str(path / "config.json")
        ) from fault


def load_model(path: Path, trust_remote_code: bool = False) -> nn.Module:
    """Load a causal LM in float32 with dropout off; every weight must be there, fit and be finite.

    Raises:
        ModelError: a tensor is missing, has another shape or holds NaN; or the architecture is no causal LM.
    """
    from transformers import AutoModelForCausalLM

    config = _config(path, trust_remote_code)
    kept = _dropout_off(config)
    model = _load(AutoModelForCausalLM, path, config, trust_remote_code, "name a causal language model")
    model._tisdpo_dropout = kept
    return model


def move_to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device.

    On a CPU its weights leave the file that they were mapped from: whoever writes to that file would change them, and
    the first update of a training would copy it page by page, in ten times the time.
    """
    model = model.to(device)
    if device.type == "cpu":
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.data = tensor.data.clone()
    return model


def load_reward_model(path: Path) -> tuple[nn.Module, Any]:
    """Load a model that gives a text one number, with the checks of `load_model`, and its transformers tokenizer.

    Raises:
        ModelError: as in `load_model`; or it gives more numbers than one.
    """
    from transformers import AutoModelForSequenceClassification

    config = _config(path, False)
    if config.num_labels != 1:
        raise ModelError(f"a reward model gives one number, this one {config.num_labels}", where=str(path))
    _dropout_off(config)
    wanted = "name a sequence classification model with one output"
    return _load(AutoModelForSequenceClassification, path, config, False, wanted), load_backend(path, False)


def _load(kind: Any, path: Path, config: Any, trust_remote_code: bool, wanted: str) -> Any:
    silence_transformers()
    try:
        model, info = kind.from_pretrained(
            path,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
        )
    except Exception as fault:
        raise ModelError(
            f"the model cannot be loaded: {first_line(fault)}", where=str(path), fix=f"copy it again, or {wanted}"
        ) from fault
    _refuse_mismatched(info.get("mismatched_keys", ()), path)
    missing = sorted(info.get("missing_keys", ()))
    if missing:
        raise ModelError(
            f"{len(missing)} tensors are missing from the weights, {missing[0]} first",
            where=str(path),
            fix="copy the model again; in their place would be random values",
        )
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ModelError(
                f"tensor {name} holds NaN or infinity", where=str(path), fix="take an earlier checkpoint of it"
            )
    return model.eval()


def _refuse_mismatched(mismatched: Iterable[Any], path: Path) -> None:
    for entry in sorted(mismatched, key=str):
        name, *shapes = entry if isinstance(entry, (tuple, list)) else (entry,)
        told = " where the configuration wants ".join(str(list(shape)) for shape in shapes)
        what = f"tensor {name} has the wrong shape" + (f": {told}" if told else "")
        raise ModelError(what, where=str(path), fix="take weights and config.json from the same model")


def _dropout_off(config: Any) -> dict[str, float]:
    """Set every dropout rate of a configuration to zero; returns what was set before."""
    names = [name for name, value in vars(config).items() if "drop" in name and isinstance(value, float) and value > 0]
    kept = {name: getattr(config, name) for name in names}
    for name in names:
        setattr(config, name, 0.0)
    return kept


# What transformers calls our attention.
_ATTENTION = "tisdpo_groups"


def use_packed_attention(model: nn.Module) -> None:
    """Give a model the attention that packed rows need; `restore_attention` takes it away again.

    Whether the model then computes what it did before is for the caller to find out: some go around it.

    Raises:
        ValueError: its attention cannot be replaced.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config: Any = model.config
    if config._attn_implementation == _ATTENTION:
        return
    model._tisdpo_attention = config._attn_implementation
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
    if config._attn_implementation != _ATTENTION:
        raise ValueError("its attention cannot be replaced")


def restore_attention(model: nn.Module) -> None:
    """Give a model back the attention that it had before `use_packed_attention`, where it was called."""
    before = getattr(model, "_tisdpo_attention", None)
    if before is not None:
        model.set_attn_implementation(before)  # type: ignore[operator]


def _attend(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **more: Any
) -> tuple[Tensor, None]:
    rule = AttentionSpec(more.get("scaling"), more.get("sliding_window"), more.get("softcap"))
    return packed_attention(query, key, value, more[GROUPS], rule).transpose(1, 2).contiguous(), None


def save_model(model: nn.Module, tokenizer: Tokenizer, directory: Path) -> None:
    """Save model and tokenizer in the layout of `save_pretrained`; the dropout rates of the configuration come back."""
    kept = getattr(model, "_tisdpo_dropout", {})
    for name, value in kept.items():
        setattr(model.config, name, value)
    model.save_pretrained(directory)  # type: ignore[operator]
    tokenizer.backend.save_pretrained(directory)
    for name in kept:
        setattr(model.config, name, 0.0)


def make_model(
    tokenizer: Tokenizer, *, hidden_size: int, layers: int, heads: int, positions: int, seed: int
) -> nn.Module:
    """A small random causal LM of the Qwen2 architecture with tied embeddings.

    Args:
        tokenizer: decides the vocabulary and the special ids.
        hidden_size: width; the feed-forward layers are 8/3 of it, rounded up to a multiple of 32.
        layers: depth.
        heads: attention heads.
        positions: longest sequence.
        seed: of the initial weights.
    """
    from transformers import Qwen2Config, Qwen2ForCausalLM

    silence_transformers()
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer.backend),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 96) * 32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos,
        pad_token_id=tokenizer.pad,
    )
    return Qwen2ForCausalLM(config).eval()
