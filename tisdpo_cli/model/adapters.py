"""Adapters (LoRA) on a base model, by peft: attached, switched on and off, saved and merged.

A base model may carry several adapters, of which one or none is active. Knows no settings and no training.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tisdpo_cli.errors import ModelError, UsageError, is_out_of_memory
from tisdpo_cli.model.directory import ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD, read_json
from tisdpo_cli.model.quantization import keep_gradients, silence_bitsandbytes
from tisdpo_cli.model.tokenizer import first_line

# The name of the adapter that is trained and saved; peft writes an adapter of this name at the root of a directory.
TRAINED = "default"
# Every linear layer but the head.
ALL_LINEAR = ("all-linear",)
_INSTALL = "pip install 'tisdpo[peft]'"


@dataclass(frozen=True)
class LoraShape:
    """The shape of a new LoRA adapter (Hu et al., arXiv 2106.09685).

    Attributes:
        r: rank.
        alpha: the update is scaled by alpha / r, or by alpha / √r with `rslora`.
        dropout: share of the adapter's inputs that training drops.
        targets: names of linear layers, or `all-linear`.
        modules_to_save: names of modules that are trained whole and saved with the adapter.
        rslora: rank-stabilized scaling (arXiv 2312.03732).
        dora: weight-decomposed adaptation (arXiv 2402.09353).
    """

    r: int
    alpha: float
    dropout: float = 0.0
    targets: tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] = ()
    rslora: bool = False
    dora: bool = False

    def differences(self, config: Mapping[str, Any]) -> list[str]:
        """Return in what an `adapter_config.json` differs from this shape, as option names; names of layers aside."""
        recorded = {
            "r": config.get("r"),
            "alpha": config.get("lora_alpha"),
            "dropout": config.get("lora_dropout"),
            "rslora": bool(config.get("use_rslora")),
            "dora": bool(config.get("use_dora")),
        }
        return [name for name, value in recorded.items() if value != getattr(self, name)]


@dataclass(frozen=True)
class BaseModel:
    """What an adapter is put on.

    Attributes:
        name: absolute path or hub id.
        sha256: its content; see `hash_model`.
        quantization: how its weights are held, or None for as they are.
    """

    name: str
    sha256: str
    quantization: str | None = None


class Adapters:
    """The adapters of one base model. Not a module: the base model has one as an attribute.

    Attributes:
        active: name of the adapter that is switched on, or None.
    """

    def __init__(self, peft: Any, name: str, trained: bool) -> None:
        self._peft = peft
        self._trained = {name} if trained else set[str]()
        self.active: str | None = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Within this context, an adapter is active, or none."""
        before = self.active
        self.switch(name)
        try:
            yield
        finally:
            self.switch(before)

    def switch(self, name: str | None) -> None:
        """Make an adapter active, or none."""
        if name == self.active:
            return
        if name is None:
            self._peft.base_model.disable_adapter_layers()
        else:
            if self.active is None:
                self._peft.base_model.enable_adapter_layers()
            # An adapter that is not trained must not ask for gradients.
            self._peft.set_adapter(name, inference_mode=name not in self._trained)
        self.active = name

    def add(self, name: str, config: Any) -> None:
        """Add an adapter, and switch it on."""
        self.switch(self.active or next(iter(self._peft.peft_config)))
        self._peft.add_adapter(name, config)
        # What was added is in training mode.
        self._peft.eval()
        keep_gradients(self._peft)
        self._peft.set_adapter(name, inference_mode=True)
        self.active = name

    def remove(self, name: str) -> None:
        """Remove an adapter that is not needed any more."""
        self.switch(next(other for other in self._peft.peft_config if other != name))
        self._peft.delete_adapter(name)

    @property
    def names(self) -> list[str]:
        """All adapters."""
        return list(self._peft.peft_config)

    def kind(self, name: str) -> dict[str, Any]:
        """What else than plain LoRA an adapter is, which computes with other roundings than its base model."""
        config = self._peft.peft_config[name]
        kind = {"dora": config.use_dora, "modules_to_save": sorted(config.modules_to_save or ())}
        return {name: value for name, value in kind.items() if value}

    def load(self, name: str, tensors: Mapping[str, torch.Tensor]) -> list[str]:
        """Fill an adapter, and return the names of tensors that are missing or too many."""
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        expected = set(get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False))
        set_peft_model_state_dict(self._peft, dict(tensors), adapter_name=name)
        return sorted(expected ^ set(tensors))

    def save(self, directory: Path, base: BaseModel, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Write the trained adapter as peft does, and what its base model is.

        Args:
            directory: where to.
            base: what the adapter is put on.
            tensors: its tensors by their names in the base model, if the model itself has only parts of them.
        """
        prefix = "base_model.model."
        given = {} if tensors is None else {"state_dict": {f"{prefix}{name}": t for name, t in tensors.items()}}
        # Embeddings that are no part of the adapter are the base model's.
        self._peft.save_pretrained(directory, selected_adapters=[TRAINED], save_embedding_layers=False, **given)
        with suppress(FileNotFoundError):
            (directory / "README.md").unlink()
        config = read_json(directory / ADAPTER_CONFIG, "")
        # Sets of names have another order in every process.
        ordered = {key: sorted(value) if _is_names(value) else value for key, value in config.items()}
        _write_json(directory / ADAPTER_CONFIG, {**ordered, "base_model_name_or_path": base.name})
        _write_json(directory / BASE_RECORD, vars(base))

    def merge(self) -> nn.Module:
        """Add the active adapter to the weights of the base model, which is returned without any adapter."""
        merged = self._peft.merge_and_unload(safe_merge=True)
        del merged._tisdpo_adapters
        return merged

    def dropouts(self) -> list[nn.Module]:
        """The layers of adapters that drop inputs in training."""
        modules = self._peft.base_model.model.named_modules()
        return [m for name, m in modules if ".lora_dropout." in f"{name}." and isinstance(m, nn.Dropout) and m.p > 0]

    def describe(self) -> str:
        """`LoRA, r 8, alpha 16`."""
        config = self._peft.peft_config[TRAINED]
        kind = "DoRA" if config.use_dora else "LoRA"
        return f"{kind}, r {config.r}, alpha {config.lora_alpha:g}"


def adapters_of(model: nn.Module) -> Adapters | None:
    """The adapters that a base model carries, or None."""
    return getattr(model, "_tisdpo_adapters", None)


def remove_adapter(model: nn.Module, name: str | None) -> None:
    """Remove an adapter from a model that carries others too."""
    adapters = adapters_of(model)
    if adapters is not None and name is not None and len(adapters.names) > 1:
        adapters.remove(name)


@contextmanager
def adapter_dropout(model: nn.Module, seed: tuple[int, ...]) -> Iterator[None]:
    """Switch the dropout of adapters on within this context; it is off everywhere else.

    What they drop depends on the seed alone, so that a resumed training goes on as it would have.
    """
    adapters = adapters_of(model)
    layers = [] if adapters is None else adapters.dropouts()
    if layers:
        torch.manual_seed(hash(seed) % 2**63)
    for layer in layers:
        layer.training = True
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False


def attach_new(model: nn.Module, shape: LoraShape, seed: int) -> None:
    """Put a new adapter on a model, to be trained; everything else is frozen. It changes no log-prob at first.

    Raises:
        UsageError: peft is not installed, or the model has no layers of these names.
    """
    config = _peft().LoraConfig(
        r=shape.r,
        lora_alpha=int(shape.alpha) if shape.alpha == int(shape.alpha) else shape.alpha,
        lora_dropout=shape.dropout,
        target_modules=shape.targets[0] if shape.targets == ALL_LINEAR else list(shape.targets),
        modules_to_save=list(shape.modules_to_save) or None,
        use_rslora=shape.rslora,
        use_dora=shape.dora,
        task_type="CAUSAL_LM",
    )
    linear = {name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = f"its linear layers are {', '.join(sorted(linear))}"
    _check_names(model, shape.modules_to_save, "--lora-modules-to-save", "")
    _check_names(model, () if shape.targets == ALL_LINEAR else shape.targets, "--lora-target", known)
    torch.manual_seed(seed)
    try:
        _wrap(model, config, TRAINED, trained=True)
    except ValueError as error:
        raise UsageError(
            f"cannot be adapted: {first_line(error)}",
            where=f"--lora-target {' '.join(shape.targets)}",
            fix=known,
        ) from error


def _check_names(model: nn.Module, asked: Sequence[str], option: str, fix: str) -> None:
    """Check every name; peft is content if any of them matches."""
    names = [f".{name}" for name, _ in model.named_modules()]
    for name in asked:
        if not any(there.endswith(f".{name}") for there in names):
            raise UsageError("the model has no module of this name", where=f"{option} {name}", fix=fix)


def attach_saved(model: nn.Module, path: Path, trained: bool) -> None:
    """Put a saved adapter on its base model, beside those that are there, and switch it on.

    Args:
        model: base model.
        path: directory of the adapter.
        trained: whether to train it further.

    Raises:
        ModelError: the adapter does not fit the model, or its weights are not finite.
        UsageError: peft is not installed.
    """
    from safetensors.torch import load_file

    peft, there = _peft(), adapters_of(model)
    name = TRAINED if there is None else f"adapter-{len(there.names)}"
    try:
        config = peft.PeftConfig.from_pretrained(str(path))
        config.inference_mode = not trained
        if there is None:
            _wrap(model, config, name, trained)
        else:
            there.add(name, config)
        for parameter in (p for n, p in model.named_parameters() if f".{name}." in n):
            # Modules that were trained whole too, whatever the precision of the base model.
            parameter.data = parameter.data.float()
        wrong = _required(model).load(name, tensors := load_file(path / ADAPTER_WEIGHTS))
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(
            f"the adapter does not fit its base model: {first_line(error)}", where=str(path), fix="copy it again"
        ) from error
    if wrong:
        whole = any(name.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight")) for name in wrong)
        fix = "merge it into its base model with peft, and use the whole model" if whole else "copy it again"
        raise ModelError(f"tensors are missing or too many, such as {wrong[0]}", where=str(path), fix=fix)
    if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
        raise ModelError("weights are not finite", where=str(path), fix="train the adapter again")


def refuse_unfaithful_merge(model: nn.Module, where: str) -> None:
    """Refuse to merge an adapter that a whole model cannot express.

    Raises:
        ModelError: it changes one of two layers that share their weights.
    """
    first, last = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
    config = model.config.get_text_config()  # type: ignore[operator, union-attr]
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied and any(type(module).__module__.startswith("peft.") for module in (first, last)):
        raise ModelError(
            "the adapter changes the head or the embedding, which share their weights in this model: merged, it would "
            "change both",
            where=where,
            fix="keep the adapter, or train one without these layers",
        )


def _wrap(model: nn.Module, config: Any, name: str, trained: bool) -> None:
    with warnings.catch_warnings():
        # On tied weights, about which merging has its own say.
        warnings.simplefilter("ignore")
        peft = _peft().get_peft_model(model, config, adapter_name=name)
    model._tisdpo_adapters = Adapters(peft, name, trained)  # type: ignore[assignment]
    peft.eval()
    keep_gradients(model)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Trained whole modules too, whatever the precision of the base model.
            parameter.data = parameter.data.float()


def _required(model: nn.Module) -> Adapters:
    adapters = adapters_of(model)
    assert adapters is not None
    return adapters


def _peft() -> Any:
    silence_bitsandbytes()
    try:
        import peft
    except ImportError as error:
        raise UsageError("adapters need the package peft", fix=_INSTALL) from error
    return peft


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
