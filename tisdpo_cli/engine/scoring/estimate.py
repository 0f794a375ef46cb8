"""estimate: every response token of every split under both sides of a contrast, written back as a scored dataset.

A side is a model and what a template puts around its prompts; the two sides may share the model, which is then loaded
once. Rows are cut as training cuts them, before the template comes around the prompt: both sides score the same tokens.

The rows are cut into batches once, by length; a batch is always computed alone, whoever computes it, so that the
file has the same bytes on one process or several, in one go or after an interruption. What is done is kept in
parts, one for some batches under one model, until the dataset is written.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.data.scored import MANIFEST, Logps, Scores, scored_columns, write_rows
from tisdpo_cli.data.splits import Split, read_split
from tisdpo_cli.data.tokens import EncodedPair, Response, TemplateTokens
from tisdpo_cli.engine.arguments import limits_of, output_request, read_options, vocabulary_of
from tisdpo_cli.engine.training.session import resolved
from tisdpo_cli.errors import Interrupted, ModelError, RankError
from tisdpo_cli.files import PARTIAL, reporting_write_errors, sha256, sync, write_json
from tisdpo_cli.method.prompt_templates import around
from tisdpo_cli.model.directory import check_safetensors, locate_model
from tisdpo_cli.model.layout import make_scorer
from tisdpo_cli.model.loading import check_fit, load_model, move_to_device
from tisdpo_cli.model.logprobs import TokenScorer, batch_for, score
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Progress, Reporter
from tisdpo_cli.runs.outputs import Output, apply_umask, versions
from tisdpo_cli.runs.runtime import Runtime, StopRequest, autocast_dtype
from tisdpo_cli.runs.stage import StageResult, claim_output, finished_result
from tisdpo_cli.settings.estimate import CONTRAST, Estimate
from tisdpo_cli.settings.sources import to_yaml

# Batches in a part: what an interruption costs at most, for each model.
_BATCHES_PER_PART = 16

_ABOUT_NULLS = (
    "train with these --max-length and --max-prompt-length; the authors' code reads no null: for it, "
    "score with a --max-length that fits the longest row"
)


@dataclass(frozen=True)
class Side:
    """One side of the contrast: a model, and what is put around its prompts."""

    name: str
    path: Path
    frame: TemplateTokens


@dataclass(frozen=True)
class Part:
    """Some batches of one split: the unit of work, of keeping and of sharing between ranks."""

    split: str
    number: int
    batches: list[list[int]]

    def name(self, side: str) -> str:
        """Its file for one of the sides."""
        return f"{self.split}-{self.number:06d}-{side}.safetensors"


def estimate(settings: Estimate, reporter: Reporter) -> StageResult:
    """Run estimate.

    Raises:
        TisdpoError: anything the user can do something about; see the subclasses in `errors`.
    """
    options = ["model"] if settings.model is not None else list(CONTRAST)
    paths = {name: locate_model(getattr(settings, name), f"--{name}", settings.trust_remote_code) for name in options}
    files = find_splits(settings.dataset)
    runtime = Runtime(reporter)
    with claim_output(runtime, output_request(settings, resolved(runtime, settings), paths, files)) as output:
        if output.state == "finished":
            return finished_result(runtime, output)
        return _estimate(settings, runtime, output, paths, files)


def _estimate(
    settings: Estimate, runtime: Runtime, output: Output, paths: dict[str, Path], files: dict[str, Path]
) -> StageResult:
    tokenizer = _shared_tokenizer(settings, paths)
    sides = _sides(settings, paths, tokenizer)
    contents = {output.made_from[f"content of {name}"] for name in paths}
    if len(contents) == 1 and sides[0].frame == sides[1].frame:
        runtime.reporter.warn("forward and reverse are the same model under the same prompts: every score will be 0")
    splits = {
        name: read_split(path, read_options(settings.data), vocabulary_of(tokenizer)) for name, path in files.items()
    }
    for notice in (*tokenizer.notices, *(notice for split in splits.values() for notice in split.notices)):
        runtime.reporter.note(notice)
    for side in sides:
        if len(side.frame):
            told = f"{side.name}: prompts stand in {settings.templates()[side.name]!r}"
            runtime.reporter.note(f"{told}, {len(side.frame)} tokens beside those of --max-length")
    began = time.time()
    if runtime.main:
        output.start(to_yaml(settings))
        output.parts.mkdir(exist_ok=True)
    runtime.wait()
    parts = [part for name, split in splits.items() for part in _parts(name, split.encoded, settings.batch_size)]
    tokens = _Scorer(settings, runtime, tokenizer, output, splits).run(sides, parts)
    runtime.wait()
    tokens = sum(runtime.gather([tokens]))
    seconds = time.time() - began
    measured = {
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "dtype": output.made_from["dtype"],
    }
    runtime.on_main(lambda: _write(settings, output, tokenizer, splits, parts, measured))
    made = StageResult(output.path, output.record(), fresh=True)
    for name, counts in made.record["counts"].items():
        runtime.reporter.note(
            f"{name}: {counts['scored_tokens']} tokens of {counts['rows']} pairs scored, "
            f"{counts['unscored_tokens']} beyond the cut (null)"
        )
    if any(counts["unscored_tokens"] for counts in made.record["counts"].values()):
        runtime.reporter.note(_ABOUT_NULLS)
    runtime.wait()
    return made


def _shared_tokenizer(settings: Estimate, paths: dict[str, Path]) -> Tokenizer:
    """The tokenizer of all models, which must be one.

    Raises:
        ModelError: the two turn text into other ids.
    """
    first, *others = (load_tokenizer(path, settings.trust_remote_code) for path in paths.values())
    if any(other.digest != first.digest for other in others):
        raise ModelError(
            "forward and reverse model have different tokenizers, their scores cannot be compared",
            where=str(paths["reverse"]),
            fix="train both from the same model",
        )
    return first


def _sides(settings: Estimate, paths: dict[str, Path], tokenizer: Tokenizer) -> list[Side]:
    """Both sides, checked as far as no weights are needed.

    Raises:
        ModelError: a model and the tokenizer do not fit.
        UsageFault: rows with their templates would be longer than a model can read.
    """
    sides = []
    for name, template in settings.templates().items():
        before, after = tokenizer.encode(list(around(template)), markers=True)
        sides.append(Side(name, paths.get(name) or paths["model"], TemplateTokens(before, after)))
        check_fit(sides[-1].path, tokenizer, settings.data.max_length, settings.trust_remote_code, len(sides[-1].frame))
    return sides


def _parts(split: str, encoded: Sequence[EncodedPair], batch_size: int) -> list[Part]:
    """Batches of like length, longest first (what does not fit into memory shows at once), in parts."""
    order = sorted(range(len(encoded)), key=lambda i: -encoded[i].tokens)
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return [Part(split, i, batches[i : i + _BATCHES_PER_PART]) for i in range(0, len(batches), _BATCHES_PER_PART)]


class _Scorer:
    """Computes what is not there yet, on this rank's share of the parts."""

    def __init__(
        self, settings: Estimate, runtime: Runtime, tokenizer: Tokenizer, output: Output, splits: dict[str, Split]
    ) -> None:
        self.settings, self.runtime, self.tokenizer, self.splits = settings, runtime, tokenizer, splits
        self.folder, self.precision = output.parts, str(output.made_from["dtype"])

    def run(self, sides: list[Side], parts: list[Part]) -> int:
        """Score all parts on both sides; returns the number of tokens that went through a model now."""
        # Listed once for all: another rank may finish a part while this one looks.
        every = [(side, part) for part in parts for side in sides]
        there = set(self.runtime.on_main(lambda: [p.name(s.name) for s, p in every if self._is_there(p, s.name)]))
        todo = [(side, part) for side, part in every if part.name(side.name) not in there]
        if len(todo) < len(every):
            self.runtime.reporter.note(f"going on: {len(every) - len(todo)} of {len(every)} parts are scored already")
        mine = [item for i, item in enumerate(todo) if i // 2 % self.runtime.world == self.runtime.rank]
        paths = list(dict.fromkeys(side.path for side in sides))
        groups = [[path] for path in paths] if self.settings.sequential else [paths]
        total = sum(len(batch) for _, part in mine for batch in part.batches)
        tokens = 0
        with (
            StopRequest() as stop,
            self.runtime.reporter.progress("scoring both sides", total, 0, "scoring") as progress,
        ):
            models: dict[Path, TokenScorer] = {}
            for group in groups:
                work = [item for item in mine if item[0].path in group]
                if not work:
                    continue
                if models:
                    models.clear()
                    gc.collect()
                models = {path: self._load(path, sides) for path in group}
                for side, part in work:
                    tokens += self._part(models[side.path], side, part, progress, stop)
            _stop_if_asked(stop)
        return tokens

    def _is_there(self, part: Part, side: str) -> bool:
        path = self.folder / part.name(side)
        try:
            if path.is_file():
                check_safetensors(path)
                return True
        except ModelError:
            self.runtime.reporter.warn(f"{path} is damaged; it is scored again")
        return False

    def _load(self, path: Path, sides: Sequence[Side]) -> TokenScorer:
        model = move_to_device(load_model(path, self.settings.trust_remote_code), self.runtime.device).requires_grad_(
            False
        )
        template = max(len(side.frame) for side in sides if side.path == path)
        longest = template + max(pair.longest for split in self.splits.values() for pair in split.encoded)
        reporter, precision = self.runtime.reporter, autocast_dtype(self.precision)
        return make_scorer(model, self.settings.layout, precision, longest, reporter.note, str(path))

    def _part(self, scorer: TokenScorer, side: Side, part: Part, progress: Progress, stop: StopRequest) -> int:
        tensors, tokens = {}, 0
        encoded = self.splits[part.split].encoded
        for number, batch in enumerate(part.batches):
            _stop_if_asked(stop)
            began = time.perf_counter()
            logps, count = self._batch(scorer, side.frame, [encoded[i] for i in batch])
            if not torch.isfinite(logps).all():
                raise RankError("a log-prob is not finite", where=encoded[batch[0]].where, fix="use --dtype float32")
            tensors[str(number)] = logps
            tokens += count
            progress.advance(len(batch), {"tokens_per_second": count / (time.perf_counter() - began)})
        final, partial = (self.folder / f"{prefix}{part.name(side.name)}" for prefix in ("", PARTIAL))
        with reporting_write_errors(final, kind=RankError):
            save_file(tensors, partial)
            sync([partial])
            partial.replace(final)
        return tokens

    def _batch(self, scorer: TokenScorer, frame: TemplateTokens, pairs: list[EncodedPair]) -> tuple[Tensor, int]:
        """Log-probs [N] of all response tokens of some pairs: all chosen responses, then all rejected ones."""
        groups = [
            (frame.around(pair.prompt, self.tokenizer.bos), (pair.chosen.ids, pair.rejected.ids)) for pair in pairs
        ]
        batch = batch_for(scorer, groups, self.tokenizer.pad)
        with torch.inference_mode():
            return score(scorer, batch).cpu().clone(), batch.real_tokens


def _stop_if_asked(stop: StopRequest) -> None:
    if stop.signal:
        raise Interrupted(
            stop.signal, "stopped while scoring; finished parts are kept", fix="the same command goes on from there"
        )


@dataclass(frozen=True)
class _Scored:
    """Both responses of a row: scores r = log π⁺ − log π⁻, and the log-probs that they are made of."""

    scores: tuple[Scores, Scores]
    logps: tuple[Logps, Logps]


def _scores_of(split: Split, parts: Sequence[Part], folder: Path) -> list[_Scored]:
    """What was found for every row of a split, in the order of the rows."""
    found: dict[int, _Scored] = {}
    for part in parts:
        forward, reverse = (load_file(folder / part.name(side)) for side in CONTRAST)
        for number, batch in enumerate(part.batches):
            plus, minus = forward[str(number)], reverse[str(number)]
            columns = [iter(values.tolist()) for values in (plus - minus, plus, minus)]
            chosen, rejected = (
                [_take(columns, side) for side in sides]
                for sides in ([split.encoded[i].chosen for i in batch], [split.encoded[i].rejected for i in batch])
            )
            for i, one, other in zip(batch, chosen, rejected, strict=True):
                found[i] = _Scored((one[0], other[0]), (one[1], other[1]))
    return [found[i] for i in range(len(split.encoded))]


def _take(columns: Sequence[Iterator[float]], side: Response) -> tuple[Scores, Logps]:
    """The next response of the columns r, log π⁺ and log π⁻."""
    taken = [[*islice(column, side.kept), *[None] * (side.uncut - side.kept)] for column in columns]
    eos = [next(column) if side.has_eos else None for column in columns]
    logps = {name: [*taken[i], eos[i]] for i, name in enumerate(CONTRAST, start=1)}
    return Scores(taken[0], eos[0]), logps


def _write(
    settings: Estimate,
    output: Output,
    tokenizer: Tokenizer,
    splits: dict[str, Split],
    parts: list[Part],
    measured: dict[str, Any],
) -> None:
    """Write the scored dataset, its manifest and its tokenizer, and mark it as finished."""
    counts = {}
    with reporting_write_errors(output.path):
        staged = output.staging()
        for name, split in splits.items():
            scored = _scores_of(split, [part for part in parts if part.split == name], output.parts)
            rows = (
                scored_columns(pair.row, *row.scores, row.logps if settings.keep_logps else None)
                for pair, row in zip(split.pairs, scored, strict=True)
            )
            write_rows(staged / f"{name}.jsonl", rows)
            counts[name] = {**_counts([row.scores for row in scored]), "sha256": sha256(staged / f"{name}.jsonl")}
        tokenizer.backend.save_pretrained(staged)
        write_json(staged / MANIFEST, _manifest(settings, output, tokenizer, counts, measured["dtype"]))
        apply_umask(list(staged.iterdir()))
        files = output.publish(staged)
    output.finish({**measured, "counts": counts}, files)


def _counts(scores: Sequence[tuple[Scores, Scores]]) -> dict[str, Any]:
    sides = [side for both in scores for side in both]
    return {
        "rows": len(scores),
        "scored_tokens": sum(r is not None for side in sides for r in side.tokens),
        "unscored_tokens": sum(r is None for side in sides for r in side.tokens),
        "scored_eos": sum(side.eos is not None for side in sides),
    }


def _manifest(
    settings: Estimate, output: Output, tokenizer: Tokenizer, counts: dict[str, dict[str, Any]], dtype: str
) -> dict[str, Any]:
    limits = limits_of(settings.data)
    return {
        "models": {
            side: {"path": path, "sha256": output.made_from[f"content of {'model' if settings.model else side}"]}
            for side, path in settings.models().items()
        },
        "templates": settings.templates(),
        "dataset": {"path": settings.dataset, "sha256": output.made_from["content of dataset"]},
        "tokenizer": tokenizer.digest,
        "dtype": dtype,
        "lengths": {
            "max_length": limits.max_length,
            "max_prompt_length": limits.max_prompt_length,
            "keep_prompt": limits.keep_prompt,
        },
        "counts": counts,
        "sign": "files hold -r = log pi_reverse - log pi_forward",
        "versions": versions(),
    }
