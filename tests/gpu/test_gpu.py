"""On a GPU: what the tests prove on a CPU, by one command: `pytest -m gpu -n 0 -s`. Skipped where there is none.

`GPU_TESTS_DEVICE=cpu` runs what does not need CUDA itself on a CPU, to develop these tests.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Done, run_tisdpo
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from tisdpo_cli.model.batch import collate
from tisdpo_cli.model.head import PlainHead
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.outputs import read_metrics
from tisdpo_cli.runs.runtime import Runtime

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA only")
VOCABULARY = 512
# Per token: two layouts in float32, and bf16 against float32 in the mean over tokens (4 layers, random weights).
FLOAT32_BOUND, BF16_MEAN_BOUND = 1e-4, 5e-2
SHAPE = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "qwen2, sliding window"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """A random model with grouped queries, on the device."""
    torch.manual_seed(0)
    if request.param == "llama":
        made = LlamaForCausalLM(LlamaConfig(**SHAPE))
    else:
        window = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 0}
        made = Qwen2ForCausalLM(Qwen2Config(**SHAPE, **window))
    return made.eval().to(DEVICE).requires_grad_(False)


@pytest.fixture(scope="module")
def groups() -> list[tuple[list[int], list[list[int]]]]:
    """Prompts with two responses each, of many lengths."""
    draw = random.Random(7)

    def ids(count: int) -> list[int]:
        return [draw.randrange(VOCABULARY) for _ in range(count)]

    return [(ids(draw.randrange(2, 90)), [ids(draw.randrange(1, 60)), ids(draw.randrange(1, 60))]) for _ in range(24)]


@pytest.fixture(scope="module")
def dense(model: torch.nn.Module, groups: list[tuple[list[int], list[list[int]]]]) -> torch.Tensor:
    """Log-probs by plain forward passes of one row each, in the token order of a batch."""
    parts = []
    for side in (0, 1):
        for prompt, responses in groups:
            row = torch.tensor([prompt + responses[side]], device=DEVICE)
            with torch.no_grad():
                logits = model(row).logits[0, len(prompt) - 1 : -1].float()
            targets = torch.tensor(responses[side], device=DEVICE)
            parts.append(logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    return torch.cat(parts)


def score(model: torch.nn.Module, groups: list, layout: str, dtype: torch.dtype | None) -> torch.Tensor:
    scorer = make_scorer(model, layout, dtype, 160, lambda text: None, "model")
    assert scorer.packed == (layout != "separate")
    with torch.no_grad():
        return scorer(collate(groups, 0, scorer.packed).to(torch.device(DEVICE)))


@pytest.mark.parametrize("layout", ["shared-prefix", "separate"])
def test_layouts_agree_with_dense_rows_in_float32(
    model: torch.nn.Module, groups: list, dense: torch.Tensor, layout: str
) -> None:
    assert (score(model, groups, layout, None) - dense).abs().max() <= FLOAT32_BOUND


@pytest.mark.parametrize("layout", ["shared-prefix", "separate"])
def test_layouts_are_within_bf16_of_dense_rows(
    model: torch.nn.Module, groups: list, dense: torch.Tensor, layout: str
) -> None:
    """In packed rows by the variable-length kernel, where there is one."""
    assert (score(model, groups, layout, torch.bfloat16) - dense).abs().mean() <= BF16_MEAN_BOUND


@needs_cuda
@pytest.mark.parametrize("window", [None, 32])
@pytest.mark.parametrize("heads", [(8, 8, 64), (14, 2, 64), (16, 8, 128)], ids=str)
def test_the_variable_length_kernel_agrees_with_segments(heads: tuple[int, int, int], window: int | None) -> None:
    """Values and gradients; a kernel that is not there, or does not agree, is not used: say which is."""
    from tisdpo_cli.model import varlen_attention as varlen
    from tisdpo_cli.model.packed_attention import AttentionSpec

    spec, device = AttentionSpec(None, window), torch.device("cuda", torch.cuda.current_device())
    kernels = {kernel.__name__: kernel for kernel in (varlen._by_flash_attn, varlen._by_torch)}
    agreeing = [name for name, kernel in kernels.items() if varlen.agrees(kernel, heads, spec, torch.bfloat16, device)]
    print(f"\nheads {heads}, window {window}: {', '.join(agreeing) or 'no kernel'}")
    assert agreeing, "packed attention runs segment by segment on this GPU"


@needs_cuda
def test_memory_of_the_head_does_not_grow_with_tokens_times_vocabulary() -> None:
    vocabulary, hidden, tokens = 151_936, 256, 8_192
    torch.manual_seed(0)
    head = PlainHead(torch.nn.Linear(hidden, vocabulary, bias=False, device=DEVICE))
    states = torch.randn(tokens, hidden, device=DEVICE, requires_grad=True)
    targets = torch.randint(vocabulary, (tokens,), device=DEVICE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    head.logps(states, targets, None).sum().backward()
    added = torch.cuda.max_memory_allocated() - before
    print(f"\nhead of {tokens} tokens, vocabulary {vocabulary}: {added / 2**20:.0f} MiB")
    assert added < tokens * vocabulary * 4 / 8


@needs_cuda
def test_the_token_budget_comes_from_the_memory_of_the_gpu() -> None:
    small, large = Runtime(Silent()).token_budget(24, 896), Runtime(Silent()).token_budget(80, 8192)
    assert 1024 <= large < small <= 65_536


def train(world: Path, out: Path, *more: str | Path, command: str = "train-dpo") -> Done:
    done = run_tisdpo(
        command, "-m", world / "sft", "-d", world / "data", "-o", out, "--batch-size", "8", "--warmup-steps", "0",
        "--lr", "1e-3", "--no-ref-cache", *more,
    )  # fmt: skip
    assert done.code == 0, done.err
    return done


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize(
    "objective", [("dpo",), ("dpo", "--alpha", "0.5"), ("ipo",), ("tdpo1",), ("tdpo2",)], ids=" ".join
)
def test_step_0_is_as_expected(world: Path, tmp_path: Path, objective: tuple[str, ...], dtype: str) -> None:
    done = train(world, tmp_path / "out", "--max-steps", "1", "--dtype", dtype, "--loss", *objective)
    print(f"\n{' '.join(objective)} {dtype}: {[line for line in done.err.splitlines() if 'step-0' in line]}")
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert abs(first["rewards/margins"]) <= (1e-5 if dtype == "float32" else 0.05)
    assert "step-0" in done.err


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_the_same_bytes_twice_and_after_a_resume(world: Path, tmp_path: Path, dtype: str) -> None:
    options = ("--dtype", dtype, "--max-steps", "6", "--save-every", "3")
    train(world, tmp_path / "one", *options)
    train(world, tmp_path / "two", *options)
    checkpoint = tmp_path / "two" / "checkpoints" / "step-00000003"
    train(world, tmp_path / "three", *options, "--resume", checkpoint)
    one, two, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) and torch.equal(one[name], three[name]) for name in one)


def test_scores_are_in_float32_by_default(contrast: Path) -> None:
    import json

    assert json.loads((contrast / "scored" / "estimate.json").read_text())["dtype"] == "float32"


@needs_cuda
def test_the_benchmark_against_trl(capsys: pytest.CaptureFixture[str]) -> None:
    """No bound: it prints what this GPU does."""
    program = Path(__file__).parents[1] / "benchmarks" / "train_vs_trl.py"
    done = subprocess.run(
        [sys.executable, program, "--rounds", "2", "--dtype", "bf16"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with capsys.disabled():
        print(f"\n{torch.cuda.get_device_name()}\n{done.stdout}")
