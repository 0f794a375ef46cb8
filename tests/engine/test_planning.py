"""What a dry run predicts: memory, disk, FLOPs and time."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from tisdpo_cli.engine.training.batching import Microbatching, PaddedCosts
from tisdpo_cli.engine.training.dry_run import Examples, ExampleSize
from tisdpo_cli.engine.training.fitting import Choices, best_change, with_adapter
from tisdpo_cli.engine.training.optimizer import OPTIMIZERS
from tisdpo_cli.engine.training.planning import (
    STATE_BYTES,
    Launch,
    OtherModel,
    PassSize,
    Work,
    forward_flops,
    predict_disk,
    predict_memory,
    seconds_of,
    state_bytes,
    training_flops,
)
from tisdpo_cli.engine.training.state import optimizer_tensors
from tisdpo_cli.model.shapes import ModelShape, measure

# About Qwen2.5-3B.
SHAPE = ModelShape(
    layers=36, width=2048, feed_forward=11_008, attention=2048, vocabulary=151_936, root_frozen=0,
    root_trained=311_000_000, body_frozen=0, body_trained=2_775_000_000, largest_layer=77_000_000,
    active=2_775_000_000, linear=0, features=36 * 50_000, trains_head=True,
)  # fmt: skip
ADAPTED = replace(with_adapter(SHAPE, 8), linear=2_700_000_000)
GPU = Launch(
    processes=1, on_gpu=True, sharded=False, offload=False, precision="bf16", optimizer="rmsprop",
    gradient_checkpointing=False, quantized=False,
)  # fmt: skip
SIZE = PassSize(4096, 3000)
OTHER = OtherModel(size=6 * 10**9, file=6 * 10**9, in_training=True)


def memory(shape: ModelShape = SHAPE, size: PassSize = SIZE, other: OtherModel | None = None, **changed: Any) -> dict:
    return dict(predict_memory(shape, replace(GPU, **changed), size, 10**9, 12 * 10**9, other).parts)


def total(*args: Any, **changed: Any) -> int:
    return sum(memory(*args, **changed).values())


def test_a_whole_model_has_weights_gradients_and_states_in_float32() -> None:
    parts = memory()
    assert parts["weights"] == parts["gradients"] == parts["optimizer"] == 4 * SHAPE.total
    assert memory(optimizer="adamw")["optimizer"] == 8 * SHAPE.total
    assert "optimizer" not in memory(optimizer="sgd")
    assert memory(optimizer="sgd", momentum=True)["optimizer"] == 4 * SHAPE.total
    assert memory(momentum=True)["optimizer"] == 8 * SHAPE.total
    assert memory(processes=2)["communication"] == 4 * SHAPE.total


def test_every_optimizer_is_known() -> None:
    assert set(STATE_BYTES) == set(OPTIMIZERS)


@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_states_are_as_large_as_those_of_the_optimizers() -> None:
    """Steps and tables apart; of a weight that is large enough for states in 8 bits."""
    for name, make in OPTIMIZERS.items():
        if name.endswith("8bit") and find_spec("bitsandbytes") is None:
            continue
        for momentum in (0.0, 0.9) if name in ("sgd", "rmsprop") else (0.0,):
            weight = torch.nn.Parameter(torch.randn(512, 1024))
            optimizer = make([weight], lr=1e-3, **({"momentum": momentum} if momentum else {}))
            weight.grad = torch.randn_like(weight)
            optimizer.step()
            held = sum(tensor.numel() * tensor.element_size() for tensor in optimizer_tensors(optimizer).values())
            assert held / weight.numel() == pytest.approx(state_bytes(name, momentum > 0), rel=0.02, abs=0.01), name


def test_an_adapter_holds_its_base_in_the_precision_of_the_computation() -> None:
    parts = memory(ADAPTED)
    assert parts["weights"] == 4 * ADAPTED.trained + 2 * SHAPE.total
    assert parts["gradients"] == 4 * ADAPTED.trained
    assert memory(ADAPTED, precision="float32")["weights"] == 4 * (ADAPTED.trained + SHAPE.total)
    low = memory(ADAPTED, quantized=True)["weights"]
    assert low == pytest.approx(parts["weights"] - 1.48 * ADAPTED.linear, rel=0.01)


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_sharding_divides_what_is_held(processes: int) -> None:
    whole, sharded = memory(processes=processes), memory(processes=processes, sharded=True)
    for name in ("weights", "gradients", "optimizer"):
        assert sharded[name] == whole[name] // processes
    assert "communication" not in sharded
    assert sharded["gathered"] > 4 * SHAPE.root
    offloaded = memory(processes=processes, sharded=True, offload=True)
    assert "weights" not in offloaded
    assert offloaded["gathered"] == sharded["gathered"]


@pytest.mark.parametrize(
    ("less", "more"),
    [
        ({"gradient_checkpointing": True}, {}),
        ({"size": PassSize(1024, 700)}, {}),
        ({"precision": "bf16"}, {"precision": "float32"}),
        ({"shape": ADAPTED}, {}),
        ({"shape": ADAPTED, "quantized": True}, {"shape": ADAPTED}),
        ({"optimizer": "adamw8bit"}, {"optimizer": "adamw"}),
        ({"processes": 4, "sharded": True}, {"processes": 2, "sharded": True}),
        ({}, {"other": OTHER}),
    ],
)
def test_what_should_lower_memory_does(less: dict, more: dict) -> None:
    assert total(**less) < total(**more)


def test_a_reference_for_the_pass_before_is_not_there_in_training() -> None:
    before = replace(OTHER, in_training=False)
    assert total(other=before) == total()
    assert memory(other=OTHER)["reference"] == OTHER.size
    # Then both are there, while the second is loaded.
    parts = predict_memory(
        ADAPTED, replace(GPU, on_gpu=False), PassSize(8, 4), 10**9, 10**9, replace(before, size=10**11)
    )
    assert parts.when == "loading"
    assert parts.parts["reference"] == 10**11


# Disk ------------------------------------------------------------------------------------------------------------


def test_disk_holds_checkpoints_with_states_the_model_and_the_cache() -> None:
    disk = predict_disk(SHAPE, "adamw", False, 3, 1000)
    assert disk == {
        "checkpoints": 3 * 12 * SHAPE.total, "model": 4 * SHAPE.total, "reference cache": 4000,
    }  # fmt: skip
    assert predict_disk(ADAPTED, "sgd", True, 0, 0) == {"model": 4 * ADAPTED.trained}


# FLOPs -----------------------------------------------------------------------------------------------------------


def counted(train: bool, adapter: bool) -> tuple[float, ModelShape]:
    """What torch counts for one row of 64 tokens."""
    config = Qwen2Config(
        vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = Qwen2ForCausalLM(config)
    if adapter:
        from tisdpo_cli.model.adapters import LoraShape, attach_new

        attach_new(model, LoraShape(4, 8), 0)
    with FlopCounterMode(display=False) as counter:
        loss = model(input_ids=torch.arange(64)[None]).logits.sum()
        if train:
            loss.backward()
    return counter.get_total_flops(), measure(model)


@pytest.mark.parametrize("adapter", [False, True])
def test_flops_are_those_that_torch_counts(adapter: bool) -> None:
    # Eager attention computes the masked half too.
    work = Work(64, 64, 64 * 64)
    flops, shape = counted(False, adapter)
    assert forward_flops(shape, work) == pytest.approx(flops, rel=0.03)
    flops, shape = counted(True, adapter)
    assert training_flops(shape, work, False) == pytest.approx(flops, rel=0.05)
    assert training_flops(shape, work, True) == pytest.approx(flops + 2 * shape.active * 64, rel=0.05)


def test_time_is_work_over_the_rate_of_all_devices() -> None:
    assert seconds_of(1e12, 1e12, "float32", 1) == 2
    assert seconds_of(1e12, 1e12, "float32", 4) == 0.5


# Sizes -----------------------------------------------------------------------------------------------------------


def test_a_pair_has_its_prompt_once_or_twice() -> None:
    size = ExampleSize(10, (4, 6))
    packed, separate = size.work(True), size.work(False)
    assert (packed.tokens, separate.tokens) == (20, 30)
    assert packed.scored == separate.scored == 10
    # Both responses see the prompt, which sees itself once or twice.
    assert packed.seen == 14**2 / 2 + 16**2 / 2 - 10**2 / 2
    assert separate.seen == 14**2 / 2 + 16**2 / 2


def test_a_pass_in_separate_rows_is_padded() -> None:
    sizes = [ExampleSize(10, (4, 6)), ExampleSize(2, (3, 1))]
    packed = Examples([20, 6], sizes.__getitem__)
    assert packed.pass_size([0, 1]) == PassSize(26, 14)
    separate = Examples(PaddedCosts([32, 10]), sizes.__getitem__)
    assert separate.pass_size([0, 1]) == PassSize(64, 14)
    assert packed.mean().tokens == 13


# What to change --------------------------------------------------------------------------------------------------


def change(limit: float, split: Microbatching = Microbatching(tokens=4096), **changed: Any) -> Any:  # noqa: B008
    choices = Choices(SHAPE, replace(GPU, **changed), SIZE, split, 1000, adaptable=True)

    def predict(shape: ModelShape, launch: Launch, size: PassSize) -> int:
        return predict_memory(shape, launch, size, 10**9, 0).total

    found = best_change(choices, round(limit), predict)
    return found and (found.setting, found.value)


def test_the_cheapest_change_that_suffices_is_named() -> None:
    now = total()
    assert change(now * 0.95) == ("tokens_per_microbatch", 2048)
    assert change(now * 0.95, Microbatching(micro=8)) == ("micro_batch_size", 4)
    assert change(now * 0.95, Microbatching(passes=2)) == ("gradient_accumulation", 4)
    assert change(total(gradient_checkpointing=True)) == ("gradient_checkpointing", True)
    assert change(total(ADAPTED, gradient_checkpointing=True), gradient_checkpointing=True) == ("lora_r", 8)
    assert change(total(processes=8) * 0.55, processes=8) == ("shard", "full")
    assert change(total(processes=8, sharded=True) * 0.6, processes=8, sharded=True)[0] in (
        "tokens_per_microbatch", "gradient_checkpointing", "cpu_offload",
    )  # fmt: skip
    # Nothing suffices: what saves most.
    assert change(1) == ("gradient_checkpointing", True)
