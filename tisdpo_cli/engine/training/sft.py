"""train-sft: supervised fine-tuning on responses, of a model or of a new one made from the dataset."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from tisdpo_cli.data.chat_tokens import ChatStats, encode_chat
from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.examples import Target, read_examples
from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.splits import ReadOptions
from tisdpo_cli.data.stored_examples import (
    EncodedExample,
    EncodedExamples,
    Example,
    StoredExamples,
    holds_conversations,
    keep_encoded,
)
from tisdpo_cli.data.tokens import MarkedRows, Response, cut
from tisdpo_cli.data.vocabulary import Vocabulary
from tisdpo_cli.engine.arguments import find_dataset, read_options, reads_first
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.prepared import Prepared
from tisdpo_cli.engine.training.arguments import (
    asked_launch,
    claim_training_output,
    session_config,
    sharding_of,
    with_token_budget,
)
from tisdpo_cli.engine.training.dry_run import dry_run_result
from tisdpo_cli.engine.training.first_row import of_example
from tisdpo_cli.engine.training.outlines import ModelOutline, outline_policy, planned_examples
from tisdpo_cli.engine.training.policy import (
    base_model,
    check_start_adapter,
    load_policy,
    parameter_count,
    report_adapter,
)
from tisdpo_cli.engine.training.session import (
    SessionConfig,
    TrainingSetup,
    plan_training,
    report_end_token,
    run_training,
    session_scorer,
)
from tisdpo_cli.engine.training.sft_task import SftTask
from tisdpo_cli.engine.training.sharded_model import place, shard_model
from tisdpo_cli.errors import DataError, naming_out_of_memory
from tisdpo_cli.model.adapters import BaseModel
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.loading import check_fit, make_model, save_model
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer, make_tokenizer
from tisdpo_cli.reporter import Reporter, Silent
from tisdpo_cli.runs.outputs import Output
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, finished_result
from tisdpo_cli.settings.train_sft import TrainSft


@dataclass(frozen=True)
class NewModel:
    """The shape of a model that is made from the dataset."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    seed: int


@dataclass(frozen=True)
class _Source:
    """Where the examples and the model of a fine-tuning come from.

    Attributes:
        splits: `train` and perhaps `test`.
        target: which responses of a pair to learn.
        instruction_template: prompt of an instruction row.
        train_on_prompt: whether prompt tokens are learned too.
        eval_examples: test examples to evaluate, at most.
        model: the directory of the model, or the shape of a new one.
    """

    splits: Mapping[str, DatasetSplit]
    options: ReadOptions
    target: Target
    instruction_template: str
    train_on_prompt: bool
    eval_examples: int
    model: Path | NewModel
    trust_remote_code: bool


def train_sft(settings: TrainSft, reporter: Reporter) -> StageResult:
    """Run train-sft.

    Raises:
        TisdpoError: anything the user can fix; see the subclasses in `errors`.
    """
    path = locate_model(settings.model, "--model", settings.trust_remote_code) if settings.model else None
    splits = find_dataset(settings.dataset, settings.data, reporter)
    source = _source(settings, path, splits, reporter)
    prepared = Prepared(lambda to: _prepare(source, to))
    if reads_first(settings):
        prepared.start()
    runtime = Runtime(reporter, sharding_of(settings))
    settings = with_token_budget(runtime, settings, path)
    session = session_config(runtime, settings)
    if path is not None:
        check_start_adapter(session.adapter, session.quantized, path)
    claimed = nullcontext() if settings.dry_run else claim_training_output(runtime, settings, {"model": path}, splits)
    with claimed as output:
        if output is not None and output.state == "finished":
            return finished_result(runtime, output)
        tokenizer, task, eval_task = prepared.result(runtime.reporter)
        if path is not None:
            report_end_token(runtime.reporter, path, tokenizer, task.end(tokenizer.eos))
        plan = plan_training(runtime, session, task.pass_costs(session.layout), SftTask.unit)
        if output is None:
            trained = planned_examples(session, _outline(session, source, tokenizer), task, eval_task)
            row = of_example(task.examples[0], tokenizer)
            sizes = [{} if of is None else of.sizes() for of in (task, eval_task)]
            asked, directory = asked_launch(runtime, settings), Path(settings.output_dir)
            return dry_run_result(runtime, session, asked, plan, trained, row, sizes, directory)
        model = _model(runtime, session, source, tokenizer)
        longest = max(task.longest, eval_task.longest if eval_task is not None else 0)
        scorer = session_scorer(runtime, session, model, longest, settings.model or "the new model")
        runtime.reporter.note(f"model = {settings.model or 'new'} ({parameter_count(model)}), dropout off")
        shard_model(runtime, scorer)
        report_adapter(runtime.reporter, model)
        setup = TrainingSetup(
            task,
            eval_task,
            plan,
            scorer,
            tokenizer,
            lambda metrics: runtime.reporter.note(f"step-0 loss {metrics['loss']:.4f}"),
            _base(model, path, settings.model or "", output),
        )
        return run_training(runtime, session, output, setup)


def make_untrained(settings: TrainSft, directory: Path) -> None:
    """Write the new model that a fine-tuning with --init would start from, with its tokenizer.

    Raises:
        TisdpoError: the dataset is unusable.
    """
    source = _source(settings, None, find_dataset(settings.dataset, settings.data, Silent()), Silent())
    assert isinstance(source.model, NewModel)
    tokenizer = _tokenizer(source, Silent())
    directory.mkdir()
    save_model(_new_model(source, source.model, tokenizer), tokenizer, directory)


def _source(settings: TrainSft, path: Path | None, splits: Mapping[str, DatasetSplit], reporter: Reporter) -> _Source:
    return _Source(
        splits=splits,
        options=read_options(settings.data, reporter),
        target=settings.target,
        instruction_template=settings.data.instruction_template,
        train_on_prompt=settings.train_on_prompt,
        eval_examples=settings.evaluation.eval_pairs,
        model=path
        if path is not None
        else NewModel(settings.vocab_size, settings.hidden_size, settings.layers, settings.heads, settings.seed),
        trust_remote_code=settings.trust_remote_code,
    )


def _base(model: nn.Module, path: Path | None, name: str, output: Output) -> BaseModel | None:
    return None if path is None else base_model(model, path, name, output.made_from["content of model"])


# Below this line there are no settings ----------------------------------------------------------------------------


def _prepare(source: _Source, reporter: Reporter) -> tuple[Tokenizer, SftTask, SftTask | None]:
    tokenizer = _tokenizer(source, reporter)
    return tokenizer, *_tasks(source, tokenizer, reporter)


@naming_out_of_memory("reading")
def _tasks(source: _Source, tokenizer: Tokenizer, reporter: Reporter) -> tuple[SftTask, SftTask | None]:
    """What is trained, and what is evaluated."""
    train = _read(source, source.splits["train"], reporter)
    task = SftTask(_encode(source, train, tokenizer, source.splits["train"], reporter), tokenizer.pad)
    if "test" not in source.splits or not source.eval_examples:
        return task, None
    test = _read(source, source.splits["test"], reporter)[: source.eval_examples]
    return task, SftTask(_encode(source, test, tokenizer, source.splits["test"], reporter), tokenizer.pad)


def _examples(source: _Source, split: DatasetSplit, target: Target) -> tuple[StoredExamples, list[str]]:
    options = source.options
    return read_examples(split, target, source.instruction_template, options.on_bad_row, options.store)


def _read(source: _Source, split: DatasetSplit, reporter: Reporter) -> StoredExamples:
    examples, notices = _examples(source, split, source.target)
    for notice in notices:
        reporter.note(notice)
    return examples


def _tokenizer(source: _Source, reporter: Reporter) -> Tokenizer:
    if isinstance(source.model, NewModel):
        # Whatever is learned first, both sides of the pairs will be tokenized with it.
        examples, _ = _examples(source, source.splits["train"], "both")
        texts = (text for example in examples for text in (example.prompt, example.response))
        tokenizer = make_tokenizer(texts, source.model.vocab_size, source.options.parse_data)
        reporter.note(f"new byte-level BPE tokenizer with {len(tokenizer.backend)} tokens")
        return tokenizer
    tokenizer = load_tokenizer(source.model, source.trust_remote_code, source.options.parse_data)
    check_fit(source.model, tokenizer, source.options.limits.max_length, source.trust_remote_code)
    for notice in tokenizer.notices:
        reporter.note(notice)
    return tokenizer


@naming_out_of_memory("loading")
def _model(runtime: Runtime, session: SessionConfig, source: _Source, tokenizer: Tokenizer) -> nn.Module:
    if not isinstance(source.model, NewModel):
        return load_policy(runtime, session, source.model, source.trust_remote_code)
    return place(runtime, _new_model(source, source.model, tokenizer))


def _new_model(source: _Source, shape: NewModel, tokenizer: Tokenizer) -> nn.Module:
    return make_model(
        tokenizer,
        hidden_size=shape.hidden_size,
        layers=shape.layers,
        heads=shape.heads,
        positions=max(2048, source.options.limits.max_length),
        seed=shape.seed,
    )


def _outline(session: SessionConfig, source: _Source, tokenizer: Tokenizer) -> ModelOutline:
    """The model of a training without its weights."""
    if not isinstance(source.model, NewModel):
        return outline_policy(session, source.model, source.trust_remote_code)
    with torch.device("meta"):
        return ModelOutline(_new_model(source, source.model, tokenizer), 0, adaptable=False)


def _encode(
    source: _Source, examples: Sequence[Example], tokenizer: Tokenizer, split: DatasetSplit, reporter: Reporter
) -> EncodedExamples:
    encoding = _Encoding(source, examples, tokenizer)
    encoded = keep_encoded(encoding.run, source.options.store)
    for notice in encoding.notices:
        reporter.note(notice)
    warning = encoding.marked.warning(len(examples))
    if warning:
        reporter.warn(f"{split.name}: {warning}")
    if encoding.truncated:
        limit = source.options.limits.max_length
        reporter.note(f"{split.name}: truncated {encoding.truncated} examples to {limit} tokens")
    if encoding.dropped:
        reporter.note(f"{split.name}: dropped {encoding.dropped} examples without a response token after truncation")
    if not encoded:
        raise DataError(
            f"none of {len(examples)} examples has a response token after truncation",
            where=split.where,
            fix="raise --max-length",
        )
    reporter.note(f"{split.name}: {len(encoded)} examples, {encoded.lengths()[:, 1].sum()} learned tokens")
    return encoded


# An example with its prompt and response after truncation, the tokens of its prompt before, and those of its opening.
_Cut = tuple[Example, list[int], Response, int, int]
# Examples that are tokenized together.
_BLOCK = 1000


class _Encoding:
    """Tokenizes and truncates examples, block by block; what is to be said of them is known at the end."""

    def __init__(self, source: _Source, examples: Sequence[Example], tokenizer: Tokenizer) -> None:
        self._source, self._examples, self._tokenizer = source, examples, tokenizer
        self._limits = source.options.limits

    def run(self) -> Iterator[EncodedExample]:
        """The examples that have a token to learn.

        Raises:
            DataError: the chat template cannot show one, and such rows are not skipped.
        """
        chat = ChatEncoder(self._tokenizer, self._source.options.chat)
        vocabulary = vocabulary_of(self._tokenizer, chat)
        self.marked, self.notices = MarkedRows(), list[str]()
        self.dropped = self.truncated = 0
        conversations = holds_conversations(self._examples)
        for cut_one in (self._conversations if conversations else self._texts)(vocabulary):
            example, given, response, whole, opening = cut_one
            self.truncated += len(given) < whole or not response.has_eos
            left_out = response.uncut + 1 - len(response.ids)
            if not response.kept:
                self.dropped += 1
            elif self._source.train_on_prompt:
                learned = given[1:] + response.ids
                yield EncodedExample(example.where, given[:1], learned, response.has_eos, 0, left_out)
            else:
                yield EncodedExample(example.where, given, response.ids, response.has_eos, opening, left_out)
        self.notices += chat.notices()

    def _texts(self, vocabulary: Vocabulary) -> Iterator[_Cut]:
        every = iter(self._examples)
        while block := list(islice(every, _BLOCK)):
            prompts = vocabulary.prompts([example.prompt for example in block])
            responses = vocabulary.responses([example.response for example in block])
            for example, prompt, ids in zip(block, prompts, responses, strict=True):
                given, (response,) = cut(prompt, [ids], vocabulary.bos, vocabulary.eos, self._limits)
                self.marked.count(vocabulary.marker(example.prompt) or vocabulary.marker(example.response))
                yield example, given, response, len(prompt) + (vocabulary.bos is not None), 0

    def _conversations(self, vocabulary: Vocabulary) -> Iterator[_Cut]:
        stats, bad = ChatStats(), list[BadRow]()
        for example in self._examples:
            assert example.conversation is not None
            chat = encode_chat(
                example.conversation, example.where, vocabulary.chat, vocabulary.bos, self._limits, stats
            )
            if isinstance(chat, BadRow):
                bad.append(chat)
            else:
                yield example, chat.prompt, chat.responses[0], chat.whole_prompt, chat.opening
        self.notices += handle_bad_rows(bad, len(self._examples), self._source.options.on_bad_row)
        self.notices += stats.notices(self._limits)
