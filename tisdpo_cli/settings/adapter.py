"""The group of settings that make a training train an adapter instead of the whole model."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from tisdpo_cli.settings.fields import Group, PositiveFloat, PositiveInt, setting


class Adapter(Group):
    """A LoRA adapter."""

    lora_r: PositiveInt | None = setting(
        None, "train a LoRA adapter of this rank, and nothing else (default: every parameter is trained)", "Adapter"
    )
    lora_alpha: PositiveFloat | None = setting(None, "scale of the adapter (default: twice its rank)", "Adapter")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = setting(
        0.0, "share of the adapter's inputs to drop in training", "Adapter"
    )
    lora_target: str = setting(
        "all-linear", "names of the layers to adapt, or all-linear", "Adapter", "--lora-target-modules",
        metavar="NAMES",
    )  # fmt: skip
    lora_modules_to_save: str | None = setting(
        None, "names of modules to train whole and save with the adapter", "Adapter", metavar="NAMES"
    )
    rslora: bool = setting(False, "scale by alpha / √rank, not alpha / rank", "Adapter", "--use-rslora")
    dora: bool = setting(False, "adapt direction and size of weights apart (DoRA)", "Adapter", "--use-dora")

    load_in_4bit: bool = setting(
        False, "hold the base model's linear layers in 4 bits (QLoRA): NF4, double quantization", "Adapter"
    )

    @model_validator(mode="after")
    def _has_a_rank(self) -> Adapter:
        if self.lora_r is None:
            idle = [n for n, info in type(self).model_fields.items() if getattr(self, n) != info.get_default()]
            if idle:
                raise ValueError(f"{', '.join(idle)} shape an adapter and need lora_r")
        if not self.targets():
            raise ValueError("lora_target: name at least one layer, or all-linear")
        if "all-linear" in self.targets() and len(self.targets()) > 1:
            raise ValueError("lora_target: give all-linear alone, or the names of layers")
        return self

    @classmethod
    def none(cls) -> dict[str, Any]:
        """The settings of a training without an adapter, by dotted name."""
        return {f"adapter.{name}": info.get_default() for name, info in cls.model_fields.items()}

    def targets(self) -> tuple[str, ...]:
        """The layers to adapt."""
        return _names(self.lora_target)

    def modules_to_save(self) -> tuple[str, ...]:
        """The modules to train whole."""
        return _names(self.lora_modules_to_save or "")

    def alpha(self) -> float | None:
        """The scale in force, or None without an adapter."""
        return self.lora_alpha if self.lora_alpha is not None or self.lora_r is None else 2.0 * self.lora_r

    def in_force(self) -> dict[str, Any]:
        """The settings with the scale resolved, and without the order of names."""
        names = {"lora_target": sorted(self.targets()), "lora_modules_to_save": sorted(self.modules_to_save())}
        return {**super().in_force(), "lora_alpha": self.alpha(), **names}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.replace(",", " ").split())
