"""Loads models with the checks that transformers leaves out, creates and saves them.

Knows transformers. Knows no dataset rows, no settings and no training.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError, UsageError, is_out_of_memory, naming_out_of_memory
from tisdpo_cli.model.adapters import BaseModel, adapters_of, attach_saved
from tisdpo_cli.model.directory import base_of, is_quantized_adapter
from tisdpo_cli.model.packed_attention import LAYOUT, AttentionSpec
from tisdpo_cli.model.quantization import compute_in, keep_gradients, quantization_config
from tisdpo_cli.model.randomness import disable_dropout_modules, disable_randomness, original_rates
from tisdpo_cli.model.tokenizer import Tokenizer, first_line, load_backend, silence_transformers
from tisdpo_cli.model.varlen_attention import packed_attention
from tisdpo_cli.model.weights_check import check_weights, untie_own_head

# In the error of transformers if a model has no such attention.
_NO_SDPA = ("scaled_dot_product_attention", "sdpa")


def check_fit(
    path: Path, tokenizer: Tokenizer, max_length: int, trust_remote_code: bool = False, template: int = 0
) -> None:
    """Check a tokenizer and a maximum length against a model's configuration, before its weights are read.

    Args:
        path: model directory.
        tokenizer: tokenizer to use with the model.
        max_length: maximum number of tokens of a row.
        trust_remote_code: whether custom code from the model repository may run.
        template: number of tokens that a prompt template adds to a row.

    Raises:
        ModelError: the tokenizer has ids without a row in the embedding.
        UsageError: `max_length` exceeds the positions of the model.
    """
    config = _config(path, trust_remote_code).get_text_config()
    highest = max(tokenizer.backend.get_vocab().values())
    rows = getattr(config, "vocab_size", None)
    if rows is not None and highest >= rows:
        raise ModelError(
            f"the tokenizer has ids up to {highest}, but the model's embedding has {rows} rows",
            where=str(path),
            fix="use the model's own tokenizer, or resize its embedding",
        )
    positions = _positions(config)
    if positions is not None and max_length + template > positions:
        added = f" plus {template} tokens of the template" if template else ""
        raise UsageError(
            f"max_length {max_length}{added} exceeds the {positions} positions of this model",
            where=f"--max-length {max_length}",
            fix=f"lower it to {positions - template}",
        )


def shape_of(path: Path, trust_remote_code: bool = False) -> tuple[int, int]:
    """Return the number of layers and the width of a model from its configuration."""
    config = _config(path, trust_remote_code).get_text_config()
    return config.num_hidden_layers, config.hidden_size


def positions_of(path: Path, trust_remote_code: bool = False) -> int | None:
    """Return the number of positions of a model, or None if its configuration sets no limit."""
    return _positions(_config(path, trust_remote_code).get_text_config())


def _positions(config: Any) -> int | None:
    return getattr(config, "max_position_embeddings", None)


def _config(path: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    path = base_of(path)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:
        raise ModelError(
            f"invalid model configuration: {first_line(error)}", where=str(path / "config.json")
        ) from error


def load_model(
    path: Path,
    trust_remote_code: bool = False,
    *,
    onto: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    quantized: bool = False,
    outline: bool = False,
) -> nn.Module:
    """Load a causal LM with nothing random in it, and check that every weight exists, fits and is finite.

    Args:
        path: directory of a model, or of an adapter, which is put on its base model.
        trust_remote_code: whether custom code from the model repository may run.
        onto: base model of the adapter, if it is loaded already; it is returned with the adapter switched on.
        dtype: of the weights.
        trained: whether an adapter will be trained.
        quantized: whether to hold linear layers in 4 bits; an adapter that was trained so is always loaded so.
        outline: whether to read names, shapes and dtypes of the tensors only, and leave their values out.

    Raises:
        ModelError: a tensor is missing, unexpected, has another shape or contains NaN; or the architecture is not a
            causal LM.
    """
    base = base_of(path)
    # What quantizes needs values.
    quantized = (quantized or is_quantized_adapter(path)) and not outline
    model = onto if onto is not None else _load_whole(base, trust_remote_code, dtype, quantized, outline)
    if base != path:
        with naming_out_of_memory("loading", str(path)):
            attach_saved(model, path, trained)
    return model


def _load_whole(path: Path, trust_remote_code: bool, dtype: torch.dtype, quantized: bool, outline: bool) -> nn.Module:
    from transformers import AutoModelForCausalLM

    hint, given = "use a causal language model", dict[str, Any]()
    if quantized:
        given["quantization_config"] = quantization_config(dtype)
    if outline:
        given["device_map"] = "meta"

    config = _config(path, trust_remote_code)
    rates = disable_randomness(config)
    model = _load(AutoModelForCausalLM, path, config, trust_remote_code, hint, dtype, given)
    keep_gradients(model)
    compute_in(model, dtype)
    model._tisdpo_notes += untie_own_head(model)
    model._tisdpo_rates = rates
    return model


def take_notes(model: nn.Module) -> list[str]:
    """Return what the user should know about how a model was loaded, once."""
    notes = list(getattr(model, "_tisdpo_notes", ()))
    model._tisdpo_notes = []  # type: ignore[assignment]
    return notes


def move_to_device(model: nn.Module, device: torch.device) -> nn.Module:
    """Move a model to a device.

    On a CPU its weights are copied from the memory-mapped file: writing to that file would change them, and the first
    optimizer step would copy it page by page, in ten times the time.
    """
    with naming_out_of_memory("loading", str(getattr(model, "name_or_path", ""))):
        model = model.to(device)
        if device.type == "cpu":
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.data = tensor.data.clone()
    return model


def load_reward_model(path: Path) -> tuple[nn.Module, Any]:
    """Load a reward model, with the checks of `load_model`, and its transformers tokenizer.

    Raises:
        ModelError: as in `load_model`; or the model has more than one output.
    """
    from transformers import AutoModelForSequenceClassification

    config = _config(path, False)
    if config.num_labels != 1:
        raise ModelError(f"a reward model has one output, this one has {config.num_labels}", where=str(path))
    disable_randomness(config)
    hint = "use a sequence classification model with one output"
    return _load(AutoModelForSequenceClassification, path, config, False, hint), load_backend(path, False)


def _load(
    auto_class: Any,
    path: Path,
    config: Any,
    trust_remote_code: bool,
    hint: str,
    dtype: torch.dtype = torch.float32,
    more: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    silence_transformers()
    with naming_out_of_memory("loading", str(path)):
        return _load_checked(auto_class, path, config, trust_remote_code, hint, dtype, more)


def _load_checked(
    auto_class: Any,
    path: Path,
    config: Any,
    trust_remote_code: bool,
    hint: str,
    dtype: torch.dtype,
    more: Mapping[str, Any],
) -> Any:
    def load(attention: str) -> tuple[Any, dict[str, Any]]:
        return auto_class.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            # Chosen here, never by config.json: an implementation there may name code to download.
            attn_implementation=attention,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            **more,
        )

    try:
        try:
            model, info = load("sdpa")
        except (ValueError, ImportError) as error:
            if not any(word in str(error) for word in _NO_SDPA):
                raise
            model, info = load("eager")
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the model cannot be loaded: {first_line(error)}", where=str(path), fix=f"copy it again, or {hint}"
        ) from error
    disable_dropout_modules(model)
    model._tisdpo_notes = check_weights(model, info, path)
    return model.eval()


# Name of our attention in transformers' `AttentionInterface`.
_ATTENTION = "tisdpo_packed"


def use_packed_attention(model: nn.Module) -> None:
    """Replace a model's attention with that of packed rows; `restore_attention` undoes this.

    The caller must check that the model still computes the same: some models bypass it.

    Raises:
        ValueError: the attention cannot be replaced.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(_ATTENTION, _attend)
    config: Any = model.config
    if config._attn_implementation == _ATTENTION:
        return
    model._tisdpo_attention = config._attn_implementation
    model.set_attn_implementation(_ATTENTION)  # type: ignore[operator]
    if config._attn_implementation != _ATTENTION:
        raise ValueError("the attention cannot be replaced")


def restore_attention(model: nn.Module) -> None:
    """Restore the attention that a model had before `use_packed_attention`, if that was called."""
    original = getattr(model, "_tisdpo_attention", None)
    if original is not None:
        model.set_attn_implementation(original)  # type: ignore[operator]


def _attend(
    _module: nn.Module, query: Tensor, key: Tensor, value: Tensor, _mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    spec = AttentionSpec(kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"))
    return packed_attention(query, key, value, kwargs[LAYOUT], spec).transpose(1, 2).contiguous(), None


def save_model(
    model: nn.Module,
    tokenizer: Tokenizer,
    directory: Path,
    base: BaseModel | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Save model and tokenizer in the layout of `save_pretrained`, with the model's original rates of dropout and
    noise; of a model with an adapter, the adapter alone.

    Args:
        model: with or without an adapter.
        tokenizer: saved beside it.
        directory: where to.
        base: what the adapter is put on.
        tensors: trained tensors and buffers by name, each tied one once, if the model itself has only parts of them.
    """
    adapters = adapters_of(model)
    if adapters is not None:
        assert base is not None
        adapters.save(directory, base, tensors)
        tokenizer.save(directory)
        return
    with original_rates(model.config, getattr(model, "_tisdpo_rates", [])):
        given = {} if tensors is None else {"state_dict": dict(tensors)}
        model.save_pretrained(directory, **given)  # type: ignore[operator]
    tokenizer.save(directory)


def make_model(
    tokenizer: Tokenizer, *, hidden_size: int, layers: int, heads: int, positions: int, seed: int
) -> nn.Module:
    """Create a small random causal LM of the Qwen2 architecture with tied embeddings.

    Args:
        tokenizer: sets the vocabulary size and the special ids.
        hidden_size: width; that of the feed-forward layers is 8/3 of it, rounded up to a multiple of 32.
        layers: number of layers.
        heads: number of attention heads.
        positions: maximum sequence length.
        seed: seed of the initial weights.
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
