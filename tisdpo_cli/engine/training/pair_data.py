"""The pairs of a training, read, cut and weighed, and what is told of them."""

from __future__ import annotations

from pathlib import Path

from tisdpo_cli.data.rows import BadRow, handle_bad_rows
from tisdpo_cli.data.scored import check_unchanged, has_weights, missing_score, read_manifest, require_scores
from tisdpo_cli.data.splits import Split, drop_untrainable, read_split
from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.arguments import read_options, vocabulary_of
from tisdpo_cli.engine.scoring.token_weights import TokenWeighter, fit_centers, token_weighter, weight_warnings
from tisdpo_cli.engine.training.pair_task import WeightedPair
from tisdpo_cli.errors import DataError
from tisdpo_cli.method.recipe import Recipe
from tisdpo_cli.method.steps import Centers, Context
from tisdpo_cli.method.transforms import Side
from tisdpo_cli.model.tokenizer import Tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.settings.train_pairs import Train, TrainPairs, TrainReverse


def prepare_pairs(
    settings: TrainPairs, reporter: Reporter, files: dict[str, Path], tokenizer: Tokenizer
) -> tuple[list[WeightedPair], list[WeightedPair]]:
    """The pairs to train, and those to evaluate."""
    for notice in tokenizer.notices:
        reporter.note(notice)
    train = read_split(files["train"], read_options(settings.data), vocabulary_of(tokenizer))
    centers = None
    if isinstance(settings, Train):
        tokens = [(pair.chosen.uncut, pair.rejected.uncut) for pair in train.encoded]
        centers = fit_centers(settings.weights, train.pairs, tokens)
        idle_steps = settings.weights.recipe(eos_scores=True).idle_steps()
        if idle_steps:
            reporter.warn(idle_steps)
    elif has_weights(pair.row for pair in train.pairs):
        reporter.note(
            "this dataset has token weights, which are not read here: `tisdpo train` is what trains with them"
        )
    wanted = settings.evaluation.eval_pairs
    splits = [train]
    if "test" in files and wanted:
        splits.append(read_split(files["test"], read_options(settings.data), vocabulary_of(tokenizer), wanted))
    made = [_weighted_pairs(settings, split, tokenizer, centers, reporter) for split in splits]
    return made[0], made[1] if len(made) > 1 else []


def _weighted_pairs(
    settings: TrainPairs, split: Split, tokenizer: Tokenizer, centers: Centers | None, reporter: Reporter
) -> list[WeightedPair]:
    kept, dropped = drop_untrainable(split)
    for notice in (*split.notices, *dropped):
        reporter.note(notice)
    if isinstance(settings, TrainReverse):
        return [WeightedPair(pair.swapped()) for pair in kept]
    if not isinstance(settings, Train):
        return [WeightedPair(pair) for pair in kept]
    _check_scored(settings, split, tokenizer, reporter)
    how = token_weighter(
        settings.weights, settings.seed, tokenizer, [split.pairs[pair.index] for pair in kept], centers
    )
    reporter.note(f"{split.path.name}: weights by {how.recipe.describe()}" + _why_eos(settings, how.recipe))
    weighted, bad = [], []
    contexts = how.contexts_of_pairs([split.pairs[pair.index] for pair in kept])
    for pair, both in zip(kept, contexts, strict=True):
        made = _weigh(split, pair, how, both)
        bad.append(made) if isinstance(made, BadRow) else weighted.append(made)
    for line in handle_bad_rows(bad, len(kept), settings.data.on_bad_row):
        reporter.warn(line)
    known = [pair.weights for pair in weighted if pair.weights is not None]
    chosen, rejected = ([weights[side] for weights in known] for side in (0, 1))
    for line in weight_warnings(chosen, rejected, how.recipe.final):
        reporter.warn(f"{split.path.name}: {line}")
    return weighted


def _check_scored(settings: Train, split: Split, tokenizer: Tokenizer, reporter: Reporter) -> None:
    """The file holds what the settings say it does, made with this tokenizer."""
    final = settings.weights.weights_are == "final"
    require_scores((pair.row for pair in split.pairs), str(split.path), final)
    manifest = read_manifest(Path(settings.dataset).expanduser())
    if manifest is None:
        return
    if manifest.get("tokenizer") != tokenizer.digest:
        raise DataError(
            "was scored with another tokenizer than this model's",
            where=settings.dataset,
            fix="score it again with models that share the tokenizer",
        )
    changed = check_unchanged(manifest, split.path, final)
    if changed:
        (reporter.warn if final else reporter.note)(changed)


def _why_eos(settings: Train, recipe: Recipe) -> str:
    if settings.weights.eos_weight != "auto":
        return ""
    what = "weights" if recipe.final else "scores"
    return f" (auto: the file holds {'' if recipe.eos_weight == 'score' else 'no '}EOS {what})"


_REMEDY = {
    False: "tokens beyond the cut of `estimate` have none: score with this --max-length and --max-prompt-length, or "
    "train with those of estimate.json; for an end of the sequence without a score set --eos-weight zero or one",
    True: "give every token that is trained a weight; for the end of the sequence set --eos-weight zero or one",
}


def _weigh(
    split: Split, pair: EncodedPair, how: TokenWeighter, contexts: tuple[Context, Context]
) -> WeightedPair | BadRow:
    weights = []
    sides: tuple[tuple[Side, Response], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
    for (side, response), context in zip(sides, contexts, strict=True):
        scores = how.read(split.pairs[pair.index], side, response.uncut, "this model's tokenizer")
        if isinstance(scores, BadRow):
            return scores
        needs_eos = response.has_eos and how.recipe.eos_weight == "score"
        missing = missing_score(scores, response.kept, needs_eos, how.recipe.final)
        if missing:
            return BadRow(pair.where, f"{side}: {missing}; {_REMEDY[how.recipe.final]}")
        weights.append(how.weights(scores, response.kept, response.has_eos, pair.index, side, context))
        beyond = how.fault(weights[-1])
        if beyond:
            return BadRow(pair.where, f"{side}: {beyond}")
    return WeightedPair(pair, (weights[0], weights[1]))
