"""Liger's kernels: which are asked for, on which models, and what is refused. Stand-ins take their place on CPUs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tisdpo_cli.errors import ModelError, UsageError
from tisdpo_cli.model import fused_kernels as module
from tisdpo_cli.model.fused_kernels import fuse_elementwise, fused_by

CPU = torch.device("cpu")
Apply = Callable[..., None]


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def norms(model: nn.Module) -> list[Any]:
    return [part for part in model.modules() if type(part).__name__ == "LlamaRMSNorm"]


def with_norms_of(change: float) -> Apply:
    """Gives a model norms that are computed otherwise, times a factor."""

    def apply(model: nn.Module, **asked: bool) -> None:
        assert asked == {"cross_entropy": False, "fused_linear_cross_entropy": False}
        for norm in norms(model):
            norm.forward = lambda x, norm=norm: (
                change * nn.functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)
            )

    return apply


@pytest.fixture
def liger(monkeypatch: pytest.MonkeyPatch) -> Callable[[Apply], None]:
    """Puts a stand-in in the place of the package, for models on CPUs."""
    monkeypatch.setattr(module, "_DEVICES", ("cpu",))
    monkeypatch.setattr(module, "version", lambda _: "0.8")

    def install(apply: Apply) -> None:
        stand_in: Any = ModuleType("monkey_patch")
        stand_in.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": None}
        stand_in._apply_liger_kernel_to_instance = apply
        for name in ("liger_kernel", "liger_kernel.transformers"):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        monkeypatch.setitem(sys.modules, "liger_kernel.transformers.monkey_patch", stand_in)

    return install


@pytest.mark.parametrize("adapted", [False, True])
def test_a_model_gets_kernels_once_and_says_which(liger: Callable[[Apply], None], adapted: bool) -> None:
    calls: list[nn.Module] = []

    def apply(model: nn.Module, **asked: bool) -> None:
        calls.append(model)
        with_norms_of(1.0)(model, **asked)

    liger(apply)
    base = llama()
    model = get_peft_model(base, LoraConfig(target_modules=["q_proj"])) if adapted else base
    assert fused_by(model) is None
    for _ in range(2):
        fuse_elementwise(model, CPU)
    assert calls == [base]
    assert fused_by(model) == "liger-kernel 0.8"


def test_kernels_that_compute_something_else_are_refused(liger: Callable[[Apply], None]) -> None:
    liger(with_norms_of(1.01))
    with pytest.raises(ModelError, match="change log-probs"):
        fuse_elementwise(llama(), CPU)


def test_kernels_that_give_no_numbers_are_refused(liger: Callable[[Apply], None]) -> None:
    liger(with_norms_of(float("nan")))
    with pytest.raises(ModelError, match="nan"):
        fuse_elementwise(llama(), CPU)


def test_a_model_without_kernels_is_refused(liger: Callable[[Apply], None]) -> None:
    liger(with_norms_of(1.0))
    model = llama()
    model.config.model_type = "new"
    with pytest.raises(UsageError, match="no Liger kernels for a model of type new"):
        fuse_elementwise(model, CPU)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DEVICES", ("cpu",))
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(UsageError, match="needs the package liger-kernel") as raised:
        fuse_elementwise(llama(), CPU)
    assert raised.value.fix == "pip install liger-kernel"


def test_a_cpu_is_refused() -> None:
    with pytest.raises(UsageError, match="need a GPU"):
        fuse_elementwise(llama(), CPU)


@pytest.mark.gpu
def test_the_package_agrees_with_the_models_own_code() -> None:
    pytest.importorskip("liger_kernel")
    model = llama().cuda()
    fuse_elementwise(model, model.device)
    assert str(fused_by(model)).startswith("liger-kernel")
