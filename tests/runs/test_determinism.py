"""Trainings ask torch for deterministic kernels as errors, and nothing of this reaches the user's screen raw."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from conftest import run_here

from tisdpo_cli.cli.error_messages import explain
from tisdpo_cli.engine.training.pair_task import PairTask
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.runtime import Runtime, deterministic_training

MESSAGE = (
    "cumsum_cuda_kernel does not have a deterministic implementation, but you set "
    "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation"
)


def train(world: Path, out: Path):
    return run_here(
        "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, "--max-steps", "2", "--warmup-steps", "0"
    )


def test_trainings_run_with_errors_and_what_follows_without(world: Path, tmp_path: Path, monkeypatch) -> None:
    seen, forward = [], PairTask.forward

    def record(*args):
        seen.append(torch.get_deterministic_debug_mode())
        return forward(*args)

    monkeypatch.setattr(PairTask, "forward", record)
    assert train(world, tmp_path / "out").code == 0
    assert set(seen) == {2}
    assert torch.get_deterministic_debug_mode() == 1


def test_an_operation_without_a_deterministic_kernel_is_one_clear_line(world, tmp_path, monkeypatch) -> None:
    def fail(*_args):
        raise RuntimeError(MESSAGE)

    monkeypatch.setattr(PairTask, "forward", fail)
    done = train(world, tmp_path / "out")
    assert done.code == 1
    assert "cumsum_cuda_kernel has no deterministic kernel on this device" in done.error
    assert "use_deterministic_algorithms" not in done.err
    assert "bug" not in str(explain(RuntimeError(MESSAGE)))


def test_torch_warns_nobody(recwarn) -> None:
    with warnings.catch_warnings():
        warnings.resetwarnings()
        Runtime(Silent())
        for text in (MESSAGE, "Flash Attention defaults to a non-deterministic algorithm. To explicitly enable"):
            warnings.warn(text, UserWarning, stacklevel=1)
    assert [str(w.message) for w in recwarn if "determin" in str(w.message)] == []


def test_the_mode_is_restored_after_an_error() -> None:
    def fail() -> None:
        with deterministic_training():
            assert torch.are_deterministic_algorithms_enabled()
            assert not torch.is_deterministic_algorithms_warn_only_enabled()
            raise ValueError("x")

    before = torch.get_deterministic_debug_mode()
    with pytest.raises(ValueError, match="x"):
        fail()
    assert torch.get_deterministic_debug_mode() == before
