"""The first loss of DPO on rows of messages, side by side with TRL's DPOTrainer, in float32 to 1e-5.

Policy and reference differ, so that the loss depends on every scored token. TRL scores what the template writes behind
the stop, such as the line end of ChatML, which no model generates; without it both score the same.
"""

import copy
import math
from pathlib import Path

import pytest
import torch
from bos_tokenizer import bos_tokenizer
from conftest import read_jsonl, run_here, write_jsonl
from test_trl import BETA, BOUND, Case, trl_trainer
from torch.nn.functional import logsigmoid
from transformers import LlamaConfig, LlamaForCausalLM

from tisdpo_cli.model.chat_template import ChatTemplate
from tisdpo_cli.model.tokenizer import describe_tokenizer

pytest.importorskip("trl")

TURN = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + END }}{% endfor %}"
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ENDS_WITH_STOP = (TURN + GENERATION).replace(" + END", "")
CHATML = (TURN + GENERATION).replace("END", r"'\n'")
ROWS = [
    {
        "prompt": [
            {"role": "system", "content": "Be kind."},
            {"role": "user", "content": "Hello?"},
            {"role": "assistant", "content": "Hello."},
            {"role": "user", "content": f"Question {i}"},
        ],
        "chosen": [{"role": "assistant", "content": "Gladly. " * (i + 1)}],
        "rejected": [{"role": "assistant", "content": f"No {i}."}],
    }
    for i in range(4)
]


def chat_model(template: str, seed: int, directory: Path) -> Case:
    """A small Llama with a chat template, saved."""
    backend = bos_tokenizer().backend
    backend.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    backend.chat_template = template
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(backend), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=512, initializer_range=0.2, bos_token_id=backend.bos_token_id,
        eos_token_id=backend.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(directory)
    backend.save_pretrained(directory)
    return Case(describe_tokenizer(backend, "here"), model, "sgd", "sgd", 1e-3)


def first_losses(template: str, directory: Path) -> tuple[float, float, Case, Case, list[dict[str, list[int]]]]:
    """Our first loss, that of TRL, policy, reference, and the ids that TRL trains."""
    policy, reference = (chat_model(template, k, directory / name) for k, name in enumerate(("policy", "reference")))
    data = write_jsonl(directory / "train.jsonl", ROWS)
    done = run_here(
        "train-dpo", "-m", directory / "policy", "--ref-model", directory / "reference", "-d", data, "-o",
        directory / "out", "--max-steps", "1", "--warmup-steps", "0", "--batch-size", str(len(ROWS)), "--beta",
        str(BETA), "--dtype", "float32",
    )  # fmt: skip
    assert done.code == 0, done.err
    ours = next(record["loss"] for record in read_jsonl(directory / "out" / "metrics.jsonl") if record["step"] == 1)
    trainer = trl_trainer(reference, copy.deepcopy(policy.model), ROWS, directory / "trl", len(ROWS))
    trained = list(trainer.train_dataset)
    trainer.train()
    return ours, trainer.losses[0], policy, reference, trained


def our_ids(case: Case) -> list[tuple[list[int], list[list[int]]]]:
    """Prompt and both responses of each row."""
    template = ChatTemplate(case.tokenizer.backend)
    encoded = [template.encode(row["prompt"], (*row["chosen"], *row["rejected"])) for row in ROWS]
    return [(row.prompt, [[*answer, row.stop] for answer in row.answers]) for row in encoded]


def test_the_first_loss_on_messages_equals_that_of_trl(tmp_path: Path) -> None:
    ours, theirs, policy, _, trained = first_losses(ENDS_WITH_STOP, tmp_path)
    assert ours == pytest.approx(theirs, abs=BOUND)
    assert abs(ours - math.log(2)) > 100 * BOUND, "every token must show"
    for row, (prompt, responses) in zip(trained, our_ids(policy), strict=True):
        assert [row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]] == [prompt, *responses]


@torch.inference_mode()
def log_ratios(policy: Case, reference: Case, prompt: list[int], response: list[int]) -> torch.Tensor:
    """Log π/π_ref of each token of a response."""
    ids = torch.tensor([prompt + response])
    logps = [case.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for case in (policy, reference)]
    at = ids[0, len(prompt) :, None]
    return (logps[0].gather(1, at) - logps[1].gather(1, at))[:, 0]


def test_trl_also_scores_the_line_end_behind_the_stop(tmp_path: Path) -> None:
    """The losses differ by the log-ratios of these tokens, and by nothing else."""
    ours, theirs, policy, reference, trained = first_losses(CHATML, tmp_path)
    (newline,) = policy.tokenizer.texts.encode(["\n"])
    expected: dict[str, list[torch.Tensor]] = {"ours": [], "theirs": []}
    for row, (prompt, responses) in zip(trained, our_ids(policy), strict=True):
        assert row["prompt_ids"] == prompt
        assert [row["chosen_ids"], row["rejected_ids"]] == [response + newline for response in responses]
        chosen, rejected = (log_ratios(policy, reference, prompt, response + newline) for response in responses)
        expected["ours"].append(chosen[:-1].sum() - rejected[:-1].sum())
        expected["theirs"].append(chosen.sum() - rejected.sum())
    losses = {name: float(-logsigmoid(BETA * torch.stack(margins)).mean()) for name, margins in expected.items()}
    assert ours == pytest.approx(losses["ours"], abs=BOUND)
    assert theirs == pytest.approx(losses["theirs"], abs=BOUND)
    assert abs(ours - theirs) > 10 * BOUND
