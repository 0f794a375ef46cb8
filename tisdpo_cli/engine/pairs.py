"""train-dpo, train-reverse and train: one training that differs in two values. Is the pair swapped? Which weights?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tisdpo_cli.artefacts import locate_model
from tisdpo_cli.data.reader import BadRow, find_splits, stop_or_skip
from tisdpo_cli.data.scored import Scores, hold_eos_scores, read_manifest, read_scores, require_scores, unscored_needed
from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.reporter import Reporter
from tisdpo_cli.engine.runtime import Runtime, autocast_dtype
from tisdpo_cli.engine.splits import Split, read_split, trainable
from tisdpo_cli.engine.training import Made, Ready, claim_output, describe, finished, plan_training, run_training
from tisdpo_cli.errors import DataError, ModelError, TrainingError
from tisdpo_cli.files import sha256
from tisdpo_cli.losses import pair_losses, response_sums
from tisdpo_cli.models import Tokenizer, check_fit, load_model, load_tokenizer
from tisdpo_cli.scoring import TokenScorer, collate, score
from tisdpo_cli.settings.commands import Train, TrainPairs, TrainReverse
from tisdpo_cli.weights import Recipe, Side, Stream, response_weights

# In float32 the policy and its reference are the same function before the first update.
_STEP0_TOLERANCE = 1e-4

_REWARDS = ("chosen", "rejected", "margins", "accuracies")
_PLAIN = ("loss", *(f"rewards/{name}" for name in _REWARDS), "logps/chosen", "logps/rejected")
_WEIGHTED = tuple(f"weighted_rewards/{name}" for name in _REWARDS)


@dataclass(frozen=True)
class WeightedPair:
    """A pair ready to be trained: its tokens, and the weights of its response tokens (None: all 1)."""

    tokens: EncodedPair
    chosen_weights: Tensor | None = None
    rejected_weights: Tensor | None = None


class PairTask:
    """The (token-weighted) DPO loss over pairs: what one forward pass computes.

    Attributes:
        metrics: names of the sums that `forward` gives, in order.
    """

    unit = "pairs"

    def __init__(
        self, pairs: Sequence[WeightedPair], reference: nn.Module, beta: float, pad: int, device: torch.device
    ) -> None:
        self.pairs, self.reference, self.beta, self.pad, self.device = pairs, reference, beta, pad, device
        self.weighted = any(pair.chosen_weights is not None for pair in pairs)
        self.metrics: tuple[str, ...] = _PLAIN + (_WEIGHTED if self.weighted else ())
        self.costs: list[int] = [pair.tokens.tokens for pair in pairs]

    def where(self, example: int) -> str:
        """FILE:LINE of a pair."""
        return self.pairs[example].tokens.where

    def normaliser(self, examples: Sequence[int]) -> float:
        """The number of pairs: every pair counts once."""
        return float(len(examples))

    def forward(self, scorer: nn.Module, examples: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Summed loss and summed metrics of some pairs; both responses of all pairs go through in one batch."""
        pairs = [self.pairs[i] for i in examples]
        sides: list[tuple[Sequence[int], Response]] = [(p.tokens.prompt, p.tokens.chosen) for p in pairs]
        sides += [(p.tokens.prompt, p.tokens.rejected) for p in pairs]
        batch = collate([(prompt, response.ids) for prompt, response in sides], self.pad).to(self.device)
        logps = score(scorer, batch)
        with torch.no_grad():
            ref_logps = score(self.reference, batch)
        result = pair_losses(logps, ref_logps, self._weights(pairs, logps), batch.owner, len(pairs), self.beta)
        sums = response_sums(logps.detach(), batch.owner, len(sides))
        r = result.rewards
        columns = [result.losses.detach(), *_rewards(r.chosen, r.rejected), sums[: len(pairs)], sums[len(pairs) :]]
        if self.weighted:
            columns += _rewards(r.weighted_chosen, r.weighted_rejected)
        return result.losses.sum(), torch.stack([column.double().sum() for column in columns])

    def _weights(self, pairs: Sequence[WeightedPair], like: Tensor) -> Tensor:
        if not self.weighted:
            return torch.ones_like(like)
        parts = [pair.chosen_weights for pair in pairs] + [pair.rejected_weights for pair in pairs]
        return torch.cat([part for part in parts if part is not None]).to(like.device)


def _rewards(chosen: Tensor, rejected: Tensor) -> list[Tensor]:
    return [chosen, rejected, chosen - rejected, (chosen > rejected).to(chosen.dtype)]


def train_pairs(settings: TrainPairs, reporter: Reporter) -> Made:
    """Run train-dpo, train-reverse or train, by the type of the settings.

    Raises:
        TisdpoError: anything the user can do something about; see the subclasses in `errors`.
    """
    command = describe(settings)
    model_path = locate_model(settings.model, "--model", settings.trust_remote_code)
    ref_path = (
        locate_model(settings.ref_model, "--ref-model", settings.trust_remote_code) if settings.ref_model else None
    )
    files = find_splits(settings.dataset)
    runtime = Runtime(reporter)
    models = {"model": model_path, "ref_model": ref_path}
    claimed = nullcontext() if settings.dry_run else claim_output(runtime, settings, command, models, files)
    with claimed as output:
        if output is not None and output.state == "finished":
            return finished(runtime, output)
        tokenizer = load_tokenizer(model_path, settings.trust_remote_code)
        check_fit(model_path, tokenizer, settings.data.max_length, settings.trust_remote_code)
        if ref_path is not None:
            _check_reference(settings, ref_path, tokenizer)
        train, held = _prepare(settings, runtime.reporter, files, tokenizer)
        plan = plan_training(runtime, settings, [pair.tokens.tokens for pair in train], PairTask.unit)
        reference = load_model(ref_path or model_path, settings.trust_remote_code)
        if output is None:
            _show_first(runtime.reporter, train[0], tokenizer)
            return Made(Path(settings.output_dir), {}, fresh=False)
        tasks = _tasks(runtime, settings, reference, tokenizer, train, held)
        policy = load_model(model_path, settings.trust_remote_code)
        _banner(runtime.reporter, settings, policy)
        return run_training(
            runtime,
            settings,
            output,
            Ready(*tasks, *plan),
            policy,
            tokenizer,
            settings.optim.learning_rate,
            lambda loss: _check_step0(loss, settings.ref_model is None, runtime.reporter),
        )


def _check_reference(settings: TrainPairs, path: Path, tokenizer: Tokenizer) -> None:
    """The reference must read the same ids.

    Raises:
        ModelError: it has another tokenizer, or too small an embedding.
    """
    if load_tokenizer(path, settings.trust_remote_code).digest != tokenizer.digest:
        where, fix = f"--ref-model {settings.ref_model}", "name a reference with the same one"
        raise ModelError("has another tokenizer than the model", where=where, fix=fix)
    check_fit(path, tokenizer, settings.data.max_length, settings.trust_remote_code)


def _tasks(
    runtime: Runtime,
    settings: TrainPairs,
    reference: nn.Module,
    tokenizer: Tokenizer,
    train: list[WeightedPair],
    held: list[WeightedPair],
) -> tuple[PairTask, PairTask | None]:
    """What is trained and what is evaluated, against one frozen reference."""
    precision = runtime.precision(settings.memory.dtype)
    scorer = TokenScorer(reference.to(runtime.device).requires_grad_(False), autocast_dtype(precision))

    def task(pairs: list[WeightedPair]) -> PairTask:
        return PairTask(pairs, scorer, settings.method.beta, tokenizer.pad, runtime.device)

    return task(train), task(held) if held else None


def _banner(reporter: Reporter, settings: TrainPairs, policy: nn.Module) -> None:
    size = sum(p.numel() for p in policy.parameters())
    reporter.note(
        f"policy = {settings.model} ({size / 1e6:.1f} M parameters, trainable), reference = "
        f"{settings.ref_model or settings.model} (frozen), dropout off"
    )
    if isinstance(settings, TrainReverse):
        reporter.note("reverse: in all metrics 'chosen' is the side preferred here, the dataset's rejected column")


def _check_step0(loss: float, same_start: bool, reporter: Reporter) -> None:
    """Before any update the margins are 0 and the loss is ln 2, or something is wrong with the models."""
    expected = math.log(2)
    if not same_start:
        reporter.note(f"step-0 loss {loss:.4f} (policy and reference differ)")
        return
    if not abs(loss - expected) <= _STEP0_TOLERANCE:
        raise TrainingError(
            f"the loss before the first update is {loss:.6f}, not ln 2 = {expected:.4f}: policy and reference do not "
            "agree though they are the same model",
            fix="the model is not deterministic in evaluation mode; look for active dropout or noise in its code",
        )
    reporter.note(f"step-0 loss {loss:.4f} = ln 2 as expected")


def _prepare(
    settings: TrainPairs, reporter: Reporter, files: dict[str, Path], tokenizer: Tokenizer
) -> tuple[list[WeightedPair], list[WeightedPair]]:
    """The pairs to train, and those to evaluate."""
    for notice in tokenizer.notices:
        reporter.note(notice)
    train = _weighted_pairs(settings, read_split(files["train"], settings.data, tokenizer), tokenizer, reporter)
    wanted = settings.evaluation.eval_pairs
    if "test" not in files or wanted == 0:
        return train, []
    return train, _weighted_pairs(
        settings, read_split(files["test"], settings.data, tokenizer, wanted), tokenizer, reporter
    )


def _weighted_pairs(settings: TrainPairs, split: Split, tokenizer: Tokenizer, reporter: Reporter) -> list[WeightedPair]:
    kept, dropped = trainable(split)
    for notice in (*split.notices, *dropped):
        reporter.note(notice)
    if isinstance(settings, TrainReverse):
        return [WeightedPair(pair.swapped()) for pair in kept]
    if not isinstance(settings, Train):
        return [WeightedPair(pair) for pair in kept]
    return _with_weights(settings, split, kept, tokenizer, reporter)


def _with_weights(
    settings: Train, split: Split, kept: list[EncodedPair], tokenizer: Tokenizer, reporter: Reporter
) -> list[WeightedPair]:
    """Scores of the file become weights; rows are checked one by one and all faults are told together."""
    require_scores((pair.row for pair in split.pairs), str(split.path))
    manifest = read_manifest(Path(settings.dataset).expanduser())
    if manifest is not None and manifest.get("tokenizer") != tokenizer.digest:
        raise DataError(
            "was scored with another tokenizer than this model's",
            where=settings.dataset,
            fix="score it again with models that share the tokenizer",
        )
    for notice in _changed_since(split, manifest or {}):
        reporter.note(notice)
    eos_scores = hold_eos_scores(split.pairs[pair.index].row for pair in kept)
    recipe = settings.weights.recipe(eos_scores)
    reporter.note(f"{split.path.name}: weights by {recipe.describe()}" + _why_eos(settings, eos_scores))
    weighted, bad = [], []
    for pair in kept:
        made = _weigh(split, pair, recipe, settings.seed)
        bad.append(made) if isinstance(made, BadRow) else weighted.append(made)
    for line in stop_or_skip(bad, len(kept), settings.data.on_bad_row):
        reporter.warn(line)
    return weighted


def _changed_since(split: Split, manifest: dict[str, Any]) -> list[str]:
    """A notice where the file is no longer as it was scored; that is the user's right."""
    counts = manifest.get("counts")
    known = counts.get(split.path.stem) if isinstance(counts, dict) else None
    if not isinstance(known, dict) or known.get("sha256") == sha256(split.path):
        return []
    return [
        f"{split.path.name} has changed since it was scored ({known.get('rows')} rows then, {len(split.pairs)} now)"
    ]


def _why_eos(settings: Train, eos_scores: bool) -> str:
    if settings.weights.eos_weight != "auto":
        return ""
    return " (auto: the file holds EOS scores)" if eos_scores else " (auto: the file holds no EOS scores)"


def _weigh(split: Split, pair: EncodedPair, recipe: Recipe, seed: int) -> WeightedPair | BadRow:
    row, weights = split.pairs[pair.index].row, []
    sides: tuple[tuple[Side, Response], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
    for side, response in sides:
        scores = read_scores(row, side, response.uncut, "this model's tokenizer")
        if isinstance(scores, BadRow):
            return scores
        needs_eos = response.has_eos and recipe.eos_weight == "score"
        missing = unscored_needed(scores, response.kept, needs_eos)
        if missing:
            return BadRow(
                row.where,
                f"{side}: {missing}; score with this --max-length and --max-prompt-length, or train with "
                "those of estimate.json",
            )
        weights.append(side_weights(scores, response.kept, response.has_eos, recipe, Stream(seed, pair.index, side)))
    return WeightedPair(pair, *weights)


def side_weights(scores: Scores, kept: int, has_eos: bool, recipe: Recipe, stream: Stream) -> Tensor:
    """Weights [kept + EOS] float32 of one response from its scores."""
    known = torch.tensor([r for r in scores.tokens if r is not None], dtype=torch.float32)
    eos = None if scores.eos is None else torch.tensor([scores.eos], dtype=torch.float32)
    return response_weights(known, eos, kept, has_eos, recipe, stream)


def _show_first(reporter: Reporter, pair: WeightedPair, tokenizer: Tokenizer) -> None:
    """The first row as it will be trained: one BOS where there is one, and where the EOS is."""
    tokens = pair.tokens
    for name, ids in (("prompt", tokens.prompt), ("chosen", tokens.chosen.ids), ("rejected", tokens.rejected.ids)):
        shown = " ".join(f"{piece!r}" for piece in tokenizer.pieces(ids[:12]))
        ending = f" … {tokenizer.pieces(ids[-1:])[0]!r}" if len(ids) > 12 else ""
        reporter.note(f"first {name} ({len(ids)} tokens): {shown}{ending}")
    reporter.note("dry run: nothing was trained")
