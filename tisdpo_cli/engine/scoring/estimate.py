"""estimate: score every response token of every split under both sides of a contrast, and write a scored dataset.

A side is a model and the template around its prompts; both sides may share one model, which is then loaded once. Rows
are truncated as in training, before the template is added: both sides score the same tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from tisdpo_cli.data.dataset import DatasetSplit
from tisdpo_cli.data.rows import Row
from tisdpo_cli.data.scored import scored_types
from tisdpo_cli.data.splits import ReadOptions, Split, read_split
from tisdpo_cli.data.tokens import TemplateTokens
from tisdpo_cli.engine.arguments import (
    contrast_paths,
    find_dataset,
    read_options,
    reads_first,
    recorded_reading,
    scoring_request,
)
from tisdpo_cli.engine.chat import ChatEncoder, vocabulary_of
from tisdpo_cli.engine.dry_run import DryRun
from tisdpo_cli.engine.prepared import Prepared
from tisdpo_cli.engine.scoring.agreement import Agreement, bf16_agreement
from tisdpo_cli.engine.scoring.prediction import Scored, ScoringWork, predict_scoring
from tisdpo_cli.engine.scoring.scored_output import ScoredOutput, write_scored_output
from tisdpo_cli.engine.scoring.scorer import Extent, Part, PartScorer, ScoringConfig, Side, extent, split_into_parts
from tisdpo_cli.engine.training.first_row import of_pair
from tisdpo_cli.engine.training.weighted_pairs import WeightedPair
from tisdpo_cli.errors import ModelError
from tisdpo_cli.method.prompt_templates import split_template
from tisdpo_cli.model.loading import check_fit
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Reporter, Silent
from tisdpo_cli.runs.outputs import Output
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, claim_output, finished_result
from tisdpo_cli.settings.datasets import text_of
from tisdpo_cli.settings.estimate import Estimate
from tisdpo_cli.settings.sources import to_yaml

_ABOUT_NULLS = (
    "train with these --max-length and --max-prompt-length; the authors' code cannot read null: for it, score with a "
    "--max-length that fits the longest row"
)


@dataclass(frozen=True)
class _Estimation:
    """An estimation as plain values.

    Attributes:
        paths: `model`, or `forward` and `reverse`, to the directory.
        models: side to what the user calls its model.
        templates: side to the text of its template.
        splits: what is scored.
        reading: how rows are read, for the manifest.
        parquet: whether the scored dataset is written as Parquet.
        config_yaml: the settings, written to `config.yaml`.
    """

    dataset: str
    paths: Mapping[str, Path]
    models: Mapping[str, str]
    templates: Mapping[str, str]
    splits: Mapping[str, DatasetSplit]
    options: ReadOptions
    reading: dict[str, Any]
    keep_logps: bool
    parquet: bool
    scoring: ScoringConfig
    config_yaml: str


def estimate(settings: Estimate, reporter: Reporter) -> StageResult:
    """Run estimate.

    Raises:
        TisdpoError: anything the user can fix; see the subclasses in `errors`.
    """
    paths = contrast_paths(settings)
    sources = find_dataset(settings.dataset, settings.data, reporter)
    # Rows do not depend on the precision, which the devices decide.
    estimation = _Estimation(
        dataset=text_of(settings.dataset),
        paths=paths,
        models=settings.models(),
        templates=settings.templates(),
        splits=sources,
        options=_with_templates(read_options(settings.data, reporter), settings.templates()),
        reading=recorded_reading(settings.dataset, settings.data),
        keep_logps=settings.keep_logps,
        parquet=settings.format == "parquet",
        scoring=ScoringConfig(
            settings.batch_size, settings.layout, "float32", settings.sequential, settings.trust_remote_code
        ),
        config_yaml=to_yaml(settings),
    )
    known = Prepared(lambda _: _tokenizer_and_sides(estimation))
    rows = Prepared(lambda _: _rows(estimation, known.result(Silent())[0]))
    if reads_first(settings):
        rows.start()
    runtime = Runtime(reporter)
    precision = runtime.precision(settings.dtype, scoring=True)
    estimation = replace(estimation, scoring=replace(estimation.scoring, precision=precision))
    request = scoring_request(runtime, settings, paths, sources)
    with nullcontext() if settings.dry_run else claim_output(runtime, request) as output:
        if output is not None and output.state == "finished":
            return finished_result(runtime, output)
        work = _prepare(estimation, runtime, known, rows)
        if output is None:
            return _dry_run(estimation, runtime, work, max(runtime.world, settings.num_processes), request.path)
        return _estimate(estimation, runtime, output, work)


def _with_templates(options: ReadOptions, templates: Mapping[str, str]) -> ReadOptions:
    return replace(options, templates=tuple(map(split_template, templates.values())))


def _tokenizer_and_sides(estimation: _Estimation) -> tuple[Tokenizer, list[Side]]:
    tokenizer = _shared_tokenizer(estimation)
    return tokenizer, _sides(estimation, tokenizer)


# What encodes conversations, and the splits by name.
_Rows = tuple[ChatEncoder, dict[str, Split]]


def _rows(estimation: _Estimation, tokenizer: Tokenizer) -> _Rows:
    chat = ChatEncoder(tokenizer, estimation.options.chat)
    vocabulary = vocabulary_of(tokenizer, chat)
    return chat, {name: read_split(split, estimation.options, vocabulary) for name, split in estimation.splits.items()}


@dataclass(frozen=True)
class _Work:
    """What is scored, and under what."""

    tokenizer: Tokenizer
    sides: list[Side]
    chat: ChatEncoder
    splits: dict[str, Split]
    reach: Extent


def _prepare(
    estimation: _Estimation, runtime: Runtime, known: Prepared[tuple[Tokenizer, list[Side]]], rows: Prepared[_Rows]
) -> _Work:
    """Everything that needs no weights, checked and reported."""
    reporter = runtime.reporter
    tokenizer, sides = known.result(reporter)
    chat, splits = rows.result(reporter)
    for notice in chat.notices():
        reporter.note(notice)
    for warning in (warning for split in splits.values() for warning in split.warnings):
        reporter.warn(warning)
    for notice in (*tokenizer.notices, *(notice for split in splits.values() for notice in split.notices)):
        reporter.note(notice)
    reach = extent(chain.from_iterable(split.encoded for split in splits.values()), sides)
    _report_templates(estimation, tokenizer, sides, reach, reporter)
    return _Work(tokenizer, sides, chat, splits, reach)


def _dry_run(estimation: _Estimation, runtime: Runtime, work: _Work, processes: int, output: Path) -> StageResult:
    """What scoring would need, and the first row of the first split as it would be scored."""
    splits = {name: split.encoded for name, split in work.splits.items()}
    size = sum(path.stat().st_size for split in estimation.splits.values() for path in split.paths if path.is_file())
    scored = Scored(size, estimation.parquet, 3 if estimation.keep_logps else 1)
    planned = ScoringWork(work.sides, splits, _parts(estimation, work.splits), work.tokenizer.bos)
    scorer = PartScorer(runtime, estimation.scoring, work.tokenizer, output, work.splits, work.reach)
    prediction = predict_scoring(runtime, scorer, processes, planned, scored, output)
    runtime.reporter.note("dry run: nothing was scored")
    row = of_pair(WeightedPair(next(iter(splits.values()))[0]), work.tokenizer, swapped=False)
    sizes = {name: split.sizes for name, split in work.splits.items()}
    return StageResult(output, {}, False, DryRun(estimation.config_yaml, sizes, row, prediction))


def _estimate(estimation: _Estimation, runtime: Runtime, output: Output, work: _Work) -> StageResult:
    reporter, tokenizer, sides, splits = runtime.reporter, work.tokenizer, work.sides, work.splits
    _warn_if_equal(sides, estimation, output, reporter)
    types = _parquet_types(estimation, splits) if estimation.parquet else None
    if estimation.scoring.precision == "bf16":
        _warn_of_bf16(estimation, runtime, tokenizer, sides, next(iter(splits.values())))
    started = time.time()
    if runtime.main:
        output.start(estimation.config_yaml)
        output.parts.mkdir(exist_ok=True)
    runtime.wait()
    parts = _parts(estimation, splits)
    scorer = PartScorer(runtime, estimation.scoring, tokenizer, output.parts, splits, work.reach)
    tokens = sum(runtime.on_all(lambda: [scorer.run(sides, parts)]))
    seconds = time.time() - started
    timing = {"seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 1)}
    scored = _scored_output(estimation, output, tokenizer, work.chat, splits, timing, types)
    runtime.on_main(lambda: write_scored_output(scored, output, tokenizer, splits, parts))
    result = StageResult(output.path, output.record(), fresh=True)
    _report_counts(result.record["counts"], reporter)
    runtime.wait()
    return result


def _shared_tokenizer(estimation: _Estimation) -> Tokenizer:
    """The one tokenizer of all models.

    Raises:
        ModelError: the models turn text into different ids.
    """
    trust = estimation.scoring.trust_remote_code
    first, *others = (load_tokenizer(path, trust, estimation.options.parse_data) for path in estimation.paths.values())
    if any(other.digest != first.digest for other in others):
        raise ModelError(
            "forward and reverse model have different tokenizers; their scores cannot be compared",
            where=str(estimation.paths["reverse"]),
            fix="train both from the same model",
        )
    return first


def _sides(estimation: _Estimation, tokenizer: Tokenizer) -> list[Side]:
    """Both sides, checked as far as possible without weights.

    Raises:
        ModelError: a model and the tokenizer do not fit.
        UsageError: rows with their templates would be longer than a model can read.
    """
    sides: list[Side] = []
    max_length, trust = estimation.options.limits.max_length, estimation.scoring.trust_remote_code
    for name, template in estimation.templates.items():
        before, after = tokenizer.encode_template(*split_template(template))
        side = Side(
            name, estimation.paths.get(name) or estimation.paths["model"], TemplateTokens(before, after), len(sides)
        )
        check_fit(side.path, tokenizer, max_length, trust, len(side.template))
        sides.append(side)
    return sides


def _report_templates(
    estimation: _Estimation, tokenizer: Tokenizer, sides: list[Side], reach: Extent, reporter: Reporter
) -> None:
    """Say how many tokens the prompt templates add, and check that the models can read them.

    Raises:
        UsageError: rows with their templates would be longer than a model can read.
    """
    max_length, trust = estimation.options.limits.max_length, estimation.scoring.trust_remote_code
    for side in sides:
        added, text = reach.added[side.name], estimation.templates[side.name]
        check_fit(side.path, tokenizer, max_length, trust, added)
        if added:
            reporter.note(f"{side.name}: prompt template {text!r} adds {added} tokens beyond --max-length")


def _warn_if_equal(sides: list[Side], estimation: _Estimation, output: Output, reporter: Reporter) -> None:
    contents = {output.made_from[f"content of {name}"] for name in estimation.paths}
    if len(contents) == 1 and sides[0].template == sides[1].template:
        reporter.warn("forward and reverse are the same model with the same prompts: every score will be 0")


def _warn_of_bf16(
    estimation: _Estimation, runtime: Runtime, tokenizer: Tokenizer, sides: list[Side], split: Split
) -> None:
    """Report how far bf16 scores can be trusted, by numbers of these very models and rows."""

    def measure() -> Agreement:
        return bf16_agreement(runtime, estimation.scoring, tokenizer, sides, split.encoded)

    agreement = runtime.on_main(measure)
    correlation = "undefined" if agreement.correlation is None else f"{agreement.correlation:.2f}"
    runtime.reporter.warn(
        f"scoring in bf16: on {agreement.rows} rows, r correlates with float32 by {correlation} and "
        f"{agreement.signs:.0%} of {agreement.tokens} signs agree; leave out --dtype bf16 for exact scores"
    )


def _chat_record(chat: ChatEncoder, splits: Mapping[str, Split]) -> dict[str, Any] | None:
    """The template and the ids that end responses, or None if the rows are texts."""
    record = chat.record()
    if record is None:
        return None
    return {**record, "stop_ids": sorted({stop for split in splits.values() for stop in split.stops})}


def _parts(estimation: _Estimation, splits: Mapping[str, Split]) -> list[Part]:
    size, layout = estimation.scoring.batch_size, estimation.scoring.layout
    return [part for name, split in splits.items() for part in split_into_parts(name, split.encoded, size, layout)]


def _scored_output(
    estimation: _Estimation,
    output: Output,
    tokenizer: Tokenizer,
    chat: ChatEncoder,
    splits: Mapping[str, Split],
    timing: Mapping[str, float],
    types: Mapping[str, Mapping[str, Any]] | None,
) -> ScoredOutput:
    limits = estimation.options.limits
    manifest: dict[str, Any] = {
        "models": {
            side: {"path": path, "sha256": output.made_from[f"content of {_content_name(estimation, side)}"]}
            for side, path in estimation.models.items()
        },
        "templates": estimation.templates,
        "reading": estimation.reading,
        "chat": _chat_record(chat, splits),
        "dataset": {"path": estimation.dataset, "sha256": output.made_from["content of dataset"]},
        "tokenizer": tokenizer.digest,
        "dtype": estimation.scoring.precision,
        "lengths": {
            "max_length": limits.max_length,
            "max_prompt_length": limits.max_prompt_length,
            "keep_prompt": limits.keep_prompt,
        },
    }
    return ScoredOutput(manifest, {**timing, "dtype": estimation.scoring.precision}, estimation.keep_logps, types)


def _parquet_types(estimation: _Estimation, splits: Mapping[str, Split]) -> dict[str, dict[str, Any]]:
    """The types of the columns of every split, known before anything is scored."""

    def rows(split: Split) -> Iterator[Row]:
        return (pair.row for pair in split.pairs)

    return {name: scored_types(partial(rows, split), estimation.keep_logps) for name, split in splits.items()}


def _content_name(estimation: _Estimation, side: str) -> str:
    return "model" if "model" in estimation.paths else side


def _report_counts(counts: Mapping[str, Mapping[str, int]], reporter: Reporter) -> None:
    for name, count in counts.items():
        reporter.note(
            f"{name}: scored {count['scored_tokens']} tokens of {count['rows']} pairs; "
            f"{count['unscored_tokens']} truncated tokens have no score (null)"
        )
    if any(count["unscored_tokens"] for count in counts.values()):
        reporter.note(_ABOUT_NULLS)
