"""train-sft: supervised fine-tuning on responses, from a model or from nothing but the dataset."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from tisdpo_cli.data.examples import Example, Target, read_examples
from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.tokens import cut
from tisdpo_cli.engine.arguments import columns_of, limits_of, output_request
from tisdpo_cli.engine.training.session import (
    TrainingSetup,
    parameter_count,
    plan_training,
    resolved,
    run_training,
    scorer_of,
    with_token_budget,
)
from tisdpo_cli.errors import DataError
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.loading import check_fit, load_model, make_model, move_to_device
from tisdpo_cli.model.logprobs import batch_for, score
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, claim_output, finished_result
from tisdpo_cli.settings.train_sft import TrainSft


@dataclass(frozen=True)
class EncodedExample:
    """A tokenised example: given tokens, and learned tokens."""

    where: str
    given: list[int]
    learned: list[int]


class SftTask:
    """Mean cross-entropy per learned token."""

    unit = "examples"
    metrics: tuple[str, ...] = ("loss", "token_probability")

    def __init__(self, examples: Sequence[EncodedExample], pad: int) -> None:
        self.examples, self.pad = examples, pad
        self.costs: list[int] = [len(e.given) + len(e.learned) for e in examples]

    @property
    def longest(self) -> int:
        """Tokens of the longest example."""
        return max(self.costs)

    def where(self, example: int) -> str:
        """FILE:LINE of an example."""
        return self.examples[example].where

    def normaliser(self, examples: Sequence[int]) -> float:
        """The number of learned tokens."""
        return float(sum(len(self.examples[i].learned) for i in examples))

    def forward(self, scorer: nn.Module, examples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy, and the sums of the metrics."""
        groups = [(self.examples[i].given, [self.examples[i].learned]) for i in examples]
        logps = score(scorer, batch_for(scorer, groups, self.pad))
        loss = -logps.sum()
        return loss, torch.stack([loss.detach().double(), logps.detach().double().exp().sum()])


def train_sft(settings: TrainSft, reporter: Reporter) -> StageResult:
    """Run train-sft.

    Raises:
        TisdpoError: anything the user can do something about; see the subclasses in `errors`.
    """
    path = locate_model(settings.model, "--model", settings.trust_remote_code) if settings.model else None
    files = find_splits(settings.dataset)
    runtime = Runtime(reporter)
    settings = with_token_budget(runtime, settings, path)
    claimed = (
        nullcontext()
        if settings.dry_run
        else claim_output(runtime, output_request(settings, resolved(runtime, settings), {"model": path}, files))
    )
    with claimed as output:
        if output is not None and output.state == "finished":
            return finished_result(runtime, output)
        tokenizer = _tokenizer(settings, path, files["train"], runtime.reporter)
        train, held = _tasks(settings, files, tokenizer, runtime)
        plan = plan_training(runtime, settings, train.costs, SftTask.unit)
        if output is None:
            runtime.reporter.note("dry run: nothing was trained")
            return StageResult(Path(settings.output_dir), {}, fresh=False)
        model = move_to_device(_model(settings, path, tokenizer), runtime.device)
        longest = max(task.longest for task in (train, held) if task is not None)
        scorer = scorer_of(runtime, settings, model, longest, settings.model or "the new model")
        runtime.reporter.note(f"model = {settings.model or 'new'} ({parameter_count(model)}), dropout off")
        return run_training(
            runtime,
            settings,
            output,
            TrainingSetup(train, held, *plan),
            scorer,
            tokenizer,
            settings.learning_rate(),
            lambda loss: runtime.reporter.note(f"step-0 loss {loss:.4f}"),
        )


def _tasks(
    settings: TrainSft, files: dict[str, Path], tokenizer: Tokenizer, runtime: Runtime
) -> tuple[SftTask, SftTask | None]:
    """What is learned, and what is evaluated."""
    train = _encode(
        settings, _read(settings, files["train"], runtime.reporter), tokenizer, files["train"], runtime.reporter
    )
    task = SftTask(train, tokenizer.pad)
    wanted = settings.evaluation.eval_pairs
    if "test" not in files or not wanted:
        return task, None
    held = _read(settings, files["test"], runtime.reporter)[:wanted]
    encoded = _encode(settings, held, tokenizer, files["test"], runtime.reporter)
    return task, SftTask(encoded, tokenizer.pad)


def _examples(settings: TrainSft, path: Path, target: Target) -> tuple[list[Example], list[str]]:
    data = settings.data
    return read_examples(path, columns_of(data), target, data.instruction_template, data.on_bad_row)


def _read(settings: TrainSft, path: Path, reporter: Reporter) -> list[Example]:
    examples, notices = _examples(settings, path, settings.target)
    for notice in notices:
        reporter.note(notice)
    return examples


def _tokenizer(settings: TrainSft, path: Path | None, data: Path, reporter: Reporter) -> Tokenizer:
    if path is None:
        # Whatever is learned first, both sides of the pairs will be tokenised with it.
        examples, _ = _examples(settings, data, "both")
        texts = (text for example in examples for text in (example.prompt, example.response))
        tokenizer = make_tokenizer(texts, settings.vocab_size)
        reporter.note(f"new byte-level BPE tokenizer with {len(tokenizer.backend)} tokens")
        return tokenizer
    tokenizer = load_tokenizer(path, settings.trust_remote_code)
    check_fit(path, tokenizer, settings.data.max_length, settings.trust_remote_code)
    for notice in tokenizer.notices:
        reporter.note(notice)
    return tokenizer


def _model(settings: TrainSft, path: Path | None, tokenizer: Tokenizer) -> nn.Module:
    if path is not None:
        return load_model(path, settings.trust_remote_code)
    positions = max(2048, settings.data.max_length)
    return make_model(
        tokenizer,
        hidden_size=settings.hidden_size,
        layers=settings.layers,
        heads=settings.heads,
        positions=positions,
        seed=settings.seed,
    )


def _encode(
    settings: TrainSft, examples: Sequence[Example], tokenizer: Tokenizer, path: Path, reporter: Reporter
) -> list[EncodedExample]:
    prompts = tokenizer.encode([example.prompt for example in examples])
    responses = tokenizer.encode([example.response for example in examples])
    limits, encoded, dropped, cut_short = limits_of(settings.data), [], 0, 0
    for example, prompt, ids in zip(examples, prompts, responses, strict=True):
        given, (response,) = cut(prompt, [ids], tokenizer.bos, tokenizer.eos, limits)
        cut_short += len(given) < len(prompt) + (tokenizer.bos is not None) or not response.has_eos
        if not response.kept:
            dropped += 1
        elif settings.train_on_prompt:
            encoded.append(EncodedExample(example.where, given[:1], given[1:] + response.ids))
        else:
            encoded.append(EncodedExample(example.where, given, response.ids))
    if cut_short:
        reporter.note(f"{path.name}: {cut_short} examples cut to {limits.max_length} tokens")
    if dropped:
        reporter.note(f"{path.name}: {dropped} examples dropped, the cut left no response token")
    if not encoded:
        raise DataError(
            f"none of {len(examples)} examples has a response token left", where=str(path), fix="raise --max-length"
        )
    tokens = sum(len(e.learned) for e in encoded)
    reporter.note(f"{path.name}: {len(encoded)} examples, {tokens} learned tokens")
    return encoded
