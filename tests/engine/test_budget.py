"""The token budget of a forward pass: recorded with an output, and kept by whatever device continues it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from conftest import Listener

from tisdpo_cli.engine import train_pairs
from tisdpo_cli.engine.training import reference as module
from tisdpo_cli.errors import Interrupted, UsageError
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load


def train(world: Path, out: Path, listener: Listener | None = None, **more: str) -> StageResult:
    flags = {
        "model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(out), "max_steps": "6",
        "batch_size": "8", "warmup_steps": "0", "learning_rate": "1e-3", "eval_pairs": "0", **more,
    }  # fmt: skip
    return train_pairs(load(COMMANDS["train-dpo"].settings, flags, environ={}).settings, listener or Listener())


def on_a_device_with(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(Runtime, "token_budget", lambda *_: tokens)


def budget_of(out: Path) -> int:
    return yaml.safe_load((out / "config.yaml").read_text())["memory"]["tokens_per_microbatch"]


def test_a_finished_output_is_finished_on_another_device(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(world, tmp_path / "out")
    recorded = budget_of(tmp_path / "out")
    on_a_device_with(monkeypatch, 64)
    listener = Listener()
    assert not train(world, tmp_path / "out", listener).fresh
    assert any("nothing to do" in line for line in listener.said)
    assert budget_of(tmp_path / "out") == recorded
    # The same value counts the same, given or left out; another one is another setting.
    assert not train(world, tmp_path / "out", tokens_per_microbatch=str(recorded)).fresh
    with pytest.raises(UsageError, match="tokens_per_microbatch"):
        train(world, tmp_path / "out", tokens_per_microbatch="64")


def test_an_interrupted_run_keeps_its_budget_on_another_device(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_a_device_with(monkeypatch, 100)
    train(world, tmp_path / "whole", no_ref_cache="true")
    with pytest.raises(Interrupted):
        # 24 pairs of the reference come first.
        train(world, tmp_path / "out", Listener(stop_after=24 + 3), no_ref_cache="true")
    on_a_device_with(monkeypatch, 4096)
    assert train(world, tmp_path / "out", no_ref_cache="true").fresh
    assert budget_of(tmp_path / "out") == 100
    models = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "out")]
    assert models[0] == models[1]


def test_an_output_that_is_overwritten_gets_a_budget_of_its_own(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(world, tmp_path / "out")
    on_a_device_with(monkeypatch, 128)
    assert train(world, tmp_path / "out", overwrite="true", seed="3").fresh
    assert budget_of(tmp_path / "out") == 128


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(
    ("given", "most"),
    [({"tokens_per_microbatch": "120"}, None), ({"micro_batch_size": "2"}, 2)],
    ids=["tokens", "pairs"],
)
def test_the_reference_keeps_to_the_budget_of_the_user(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], most: int | None, dtype: str
) -> None:
    passes: list[tuple[int, int]] = []
    batch_for = module.batch_for

    def counted(scorer, groups, pad):
        tokens = sum(len(prompt) + sum(map(len, responses)) for prompt, responses in groups)
        passes.append((len(groups), tokens))
        return batch_for(scorer, groups, pad)

    monkeypatch.setattr(module, "batch_for", counted)
    train(world, tmp_path / "out", no_ref_cache="true", dtype=dtype, **given)
    assert len(passes) > 8
    for pairs, tokens in passes:
        assert pairs == 1 or (tokens <= 120 if most is None else pairs <= most)


@pytest.mark.parametrize(
    ("layers", "width", "tokens"),
    [(2, 16, 4096), (6, 256, 4096), (8, 512, 1792), (30, 576, 1024), (36, 4096, 1024)],
    ids=["tiny", "6.9M", "34M", "135M", "8B"],
)
def test_larger_models_get_smaller_passes_on_a_cpu(layers: int, width: int, tokens: int) -> None:
    assert Runtime(Listener()).token_budget(layers, width) == tokens
