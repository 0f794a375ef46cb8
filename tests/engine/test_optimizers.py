"""Optimizers: each follows its gradients as its library does by hand, its parameters act, and it resumes exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Listener
from safetensors.torch import load_file
from test_pair_training import VOCAB, flat, make_pairs, task_of, tiny_model
from test_resume import assert_same, checkpoints, stop_after, train
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.optimization import Adafactor

from tisdpo_cli.engine.training.batching import Microbatching, Plan
from tisdpo_cli.engine.training.optimizer import OPTIMIZERS, Schedule, make_optimizer
from tisdpo_cli.engine.training.state import CheckpointConfig
from tisdpo_cli.engine.training.trainer import Trainer
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.runtime import Runtime, StopRequest
from tisdpo_cli.settings.optimization import _OPTIMIZER_PARAMS, Optim

STEPS, RATE, DECAY = 4, 1e-3, 0.1
ADAM = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-4}
BY_HAND = {"betas": (0.8, 0.95), "eps": 1e-4}
Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def made(kind: Any, **arguments: Any) -> Make:
    return lambda parameters: kind(parameters, lr=RATE, weight_decay=DECAY, **arguments)


CASES: dict[str, tuple[str, dict[str, float], Make]] = {
    "rmsprop": ("rmsprop", {}, made(torch.optim.RMSprop)),
    "rmsprop, momentum": ("rmsprop", {"momentum": 0.8}, made(torch.optim.RMSprop, momentum=0.8)),
    "adamw": ("adamw", {}, made(torch.optim.AdamW)),
    "adamw, parameters": ("adamw", ADAM, made(torch.optim.AdamW, **BY_HAND)),
    "adamw, second beta": ("adamw", {"adam_beta2": 0.95}, made(torch.optim.AdamW, betas=(0.9, 0.95))),
    "adam": ("adam", ADAM, made(torch.optim.Adam, **BY_HAND)),
    "sgd": ("sgd", {}, made(torch.optim.SGD)),
    "sgd, momentum": ("sgd", {"momentum": 0.9}, made(torch.optim.SGD, momentum=0.9)),
    "adafactor": ("adafactor", {}, made(Adafactor, scale_parameter=False, relative_step=False)),
    "adagrad": ("adagrad", {}, made(torch.optim.Adagrad)),
    "adamax": ("adamax", ADAM, made(torch.optim.Adamax, **BY_HAND)),
    "nadam": ("nadam", ADAM, made(torch.optim.NAdam, **BY_HAND)),
    "radam": ("radam", ADAM, made(torch.optim.RAdam, **BY_HAND)),
}


def trained(directory: Path, optimizer: str, params: dict[str, float]) -> tuple[nn.Module, list[list[Tensor]]]:
    """A model after a few updates, and the gradients that they followed."""
    policy, seen = tiny_model(1), []
    parameters = list(policy.parameters())
    schedule = Schedule(optimizer, RATE, "constant", 0, DECAY, 1e9, optimizer_params=params)
    trainer = Trainer(
        Runtime(Silent()), TokenScorer(policy), task_of(make_pairs(4), tiny_model(0)), Plan(4, 4, STEPS, 0),
        Microbatching(micro=8), schedule,
    )  # fmt: skip
    trainer.optimizer.register_step_pre_hook(lambda *_: seen.append([p.grad.clone() for p in parameters]))
    directory.mkdir(exist_ok=True)
    keeping = CheckpointConfig(directory / "checkpoints", None, 1, "never")
    trainer.train(directory / "metrics.jsonl", keeping, None, lambda _: None, StopRequest())
    return policy, seen


@pytest.mark.parametrize("name", CASES)
def test_an_optimizer_follows_its_gradients_as_by_hand(tmp_path: Path, name: str) -> None:
    optimizer, params, make = CASES[name]
    policy, seen = trained(tmp_path / "a", optimizer, params)
    expected = tiny_model(1)
    by_hand = make(expected.parameters())
    assert len(seen) == STEPS
    for gradients in seen:
        for parameter, gradient in zip(expected.parameters(), gradients, strict=True):
            parameter.grad = gradient
        by_hand.step()
    assert torch.equal(flat(policy), flat(expected))
    if params:
        plain, _ = trained(tmp_path / "b", optimizer, {})
        assert not torch.equal(flat(policy), flat(plain))


def test_every_optimizer_and_parameter_is_tried() -> None:
    eight_bits = {"adamw8bit", "paged_adamw8bit"}
    assert {optimizer for optimizer, _, _ in CASES.values()} == set(OPTIMIZERS) - eight_bits
    assert {name for _, params, _ in CASES.values() for name in params} == set(_OPTIMIZER_PARAMS)
    for name, (default, users) in _OPTIMIZER_PARAMS.items():
        for optimizer in set(users) - eight_bits:
            own = OPTIMIZERS[optimizer]([nn.Parameter(torch.zeros(2))], lr=1.0).defaults
            found = {"adam_beta1": 0, "adam_beta2": 1}.get(name)
            value = own[{"adam_epsilon": "eps"}.get(name, name)] if found is None else own["betas"][found]
            assert value == default, (name, optimizer)


# ---------------------------------------------------------------- weight decay


def with_biases() -> Qwen2ForCausalLM:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


@pytest.mark.parametrize("kinds", [(), ("norm",), ("bias",), ("bias", "norm")], ids=str)
def test_what_is_named_does_not_decay(kinds: tuple[str, ...]) -> None:
    """Without a gradient, decay alone moves a weight: by rate times decay."""
    model, before = with_biases(), with_biases().state_dict()
    optimizer = make_optimizer(model, Schedule("sgd", 0.5, "constant", 0, DECAY, 1.0, without_decay=kinds))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    spared = {
        name: ("norm" in kinds and "norm" in name) or ("bias" in kinds and name.endswith("bias"))
        for name, _ in model.named_parameters()
    }
    assert sum(spared.values()) == {(): 0, ("norm",): 3, ("bias",): 3}.get(kinds, 6)
    for name, parameter in model.named_parameters():
        factor = 1.0 if spared[name] else 1 - 0.5 * DECAY
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


def test_norms_are_known_by_class_or_name() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ln_1 = nn.LayerNorm(4)
            self.q_norm = nn.Linear(4, 4)
            self.up = nn.Linear(4, 4)

    optimizer = make_optimizer(Other(), Schedule("adamw", 0.1, "constant", 0, 0.1, 1.0, without_decay=("norm",)))
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 4]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


# ---------------------------------------------------------------- settings


def test_parameters_are_refused_where_they_have_no_effect() -> None:
    for settings, message in (
        ({"optimizer": "sgd", "adam_beta1": 0.5}, "optimizer sgd has no adam_beta1"),
        ({"optimizer": "adamw", "momentum": 0.5}, r"optimizer adamw has no momentum \(sgd, rmsprop have it\)"),
        ({"optimizer": "adamw", "adam_beta1": 1.0}, "less than 1"),
        ({"no_decay": "norm"}, "no_decay has no effect without weight_decay"),
        ({"no_decay": "norms", "weight_decay": 0.1}, "no_decay: unknown 'norms'; use norm or bias"),
    ):
        with pytest.raises(ValueError, match=message):
            Optim(**settings)


def test_defaults_count_the_same_given_or_left_out() -> None:
    given = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.1}
    one = Optim(optimizer="adamw", no_decay="norm,bias", **given)
    other = Optim(optimizer="adamw_torch", no_decay="bias, norm", weight_decay=0.1)
    assert one.in_force() == other.in_force()
    assert Optim(optimizer="sgd", momentum=0).in_force() == Optim(optimizer="sgd").in_force()


# ---------------------------------------------------------------- interrupted and resumed

# Every optimizer once, and every schedule.
RESUMED: dict[str, dict[str, Any]] = {
    "adamw": {**ADAM, "weight_decay": 0.1, "no_decay": "norm,bias", "lr_scheduler": "cosine"},
    "rmsprop": {"momentum": 0.9, "lr_scheduler": "linear"},
    "sgd": {"momentum": 0.9, "lr_scheduler": "cosine_with_restarts", "lr_scheduler_kwargs": '{"num_cycles": 2}'},
    "adafactor": {"lr_scheduler": "polynomial", "lr_scheduler_kwargs": '{"power": 2}'},
    "adagrad": {"lr_scheduler": "inverse_sqrt"},
    "adamax": {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_kwargs": '{"min_lr_rate": 0.1}'},
    "nadam": {
        "lr_scheduler": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": '{"min_lr_rate": 0.1, "warmup_lr_rate": 0.2}',
    },
    "radam": {"lr_scheduler": "warmup_stable_decay", "lr_scheduler_kwargs": '{"num_decay_steps": 3}'},
}


@pytest.mark.parametrize("optimizer", RESUMED)
def test_an_interrupted_run_ends_in_the_same_bytes(world: Path, tmp_path: Path, optimizer: str) -> None:
    torch.set_num_threads(1)
    settings = {**RESUMED[optimizer], "optimizer": optimizer, "warmup_steps": 2, "max_steps": 7, "eval_pairs": 0}
    train(world, tmp_path / "whole", **settings)
    stop_after(world, tmp_path / "out", 4, **settings)
    (checkpoint,) = checkpoints(tmp_path / "out")
    assert load_file(checkpoint / "optimizer.safetensors")
    listener = Listener()
    train(world, tmp_path / "out", listener, **settings)
    assert any("resuming from" in said for said in listener.said)
    assert_same(tmp_path / "out", tmp_path / "whole")
