"""train-dpo, train-reverse and train: one training that differs in two values. Is the pair swapped? Which weights?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from tisdpo_cli.artefacts import locate_model
from tisdpo_cli.cache import TensorCache
from tisdpo_cli.data.reader import BadRow, find_splits, stop_or_skip
from tisdpo_cli.data.scored import check_meaning, hold_weights, read_manifest, require_scores, unscored_needed
from tisdpo_cli.data.tokens import EncodedPair, Response
from tisdpo_cli.engine.reference import Logps, ReferencePass
from tisdpo_cli.engine.reporter import Reporter
from tisdpo_cli.engine.runtime import Runtime
from tisdpo_cli.engine.splits import Split, read_split, trainable
from tisdpo_cli.engine.training import (
    Made,
    Ready,
    claim_output,
    describe,
    finished,
    parameter_count,
    plan_training,
    run_training,
    scorer_of,
    with_token_budget,
)
from tisdpo_cli.engine.weighing import Weighing, doubts, fit_centers, weighing
from tisdpo_cli.errors import DataError, ModelError, TrainingError
from tisdpo_cli.losses import Loss, pair_losses, response_sums
from tisdpo_cli.models import Tokenizer, check_fit, load_model, load_tokenizer
from tisdpo_cli.outputs import Output
from tisdpo_cli.scoring import Batch, Compared, TokenScorer, compare, lay_out, score
from tisdpo_cli.settings.commands import Train, TrainPairs, TrainReverse
from tisdpo_cli.steps import Centers, Context
from tisdpo_cli.weights import Recipe, Side

# In float32 the policy and its reference are the same function before the first update.
_STEP0_TOLERANCE = 1e-4

_REWARDS = ("chosen", "rejected", "margins", "accuracies")
_PLAIN = ("loss", *(f"rewards/{name}" for name in _REWARDS), "logps/chosen", "logps/rejected")
_WEIGHTED = tuple(f"weighted_rewards/{name}" for name in _REWARDS)
_KL = ("kl/chosen", "kl/rejected", "kl/margins")


@dataclass(frozen=True)
class WeightedPair:
    """A pair ready to be trained.

    Attributes:
        tokens: its prompt and responses.
        weights: of the tokens of both responses; None for all 1.
        reference: log-probs of both responses under the reference, where they were computed before.
    """

    tokens: EncodedPair
    weights: tuple[Tensor, Tensor] | None = None
    reference: Logps | None = None


class PairTask:
    """A preference objective over pairs: what one forward pass computes.

    Attributes:
        metrics: names of the sums that `forward` gives, in order.
    """

    unit = "pairs"

    def __init__(self, pairs: Sequence[WeightedPair], reference: TokenScorer | None, loss: Loss, pad: int) -> None:
        """Make a task; `reference` is None where the pairs bring its log-probs."""
        self.pairs, self.reference, self.loss, self.pad = pairs, reference, loss, pad
        self.weighted = any(pair.weights is not None for pair in pairs)
        computes_kl = loss.needs.divergence is not None
        self.metrics: tuple[str, ...] = _PLAIN + (_WEIGHTED if self.weighted else ()) + (_KL if computes_kl else ())
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
        groups = [(p.tokens.prompt, (p.tokens.chosen.ids, p.tokens.rejected.ids)) for p in pairs]
        batch = lay_out(scorer, groups, self.pad)
        compared = self._compared(scorer, batch, pairs)
        weights = self._weights(pairs, compared.logps)
        result = pair_losses(*compared, weights, batch.owner, len(pairs), self.loss)
        logps = response_sums(compared.logps.detach(), batch.owner, 2 * len(pairs))
        r = result.rewards
        columns = [result.losses.detach(), *_rewards(r.chosen, r.rejected), *_halves(logps)]
        if self.weighted:
            columns += _rewards(r.weighted_chosen, r.weighted_rejected)
        if result.kl is not None:
            chosen, rejected = _halves(result.kl)
            columns += [chosen, rejected, chosen - rejected]
        return result.losses.sum(), torch.stack([column.double().sum() for column in columns])

    def _compared(self, scorer: nn.Module, batch: Batch, pairs: Sequence[WeightedPair]) -> Compared:
        if self.reference is not None:
            return compare(scorer, self.reference, batch, self.loss.needs.divergence)
        logps = score(scorer, batch)
        return Compared(logps, _in_order([pair.reference for pair in pairs]).to(logps.device), None)

    def _weights(self, pairs: Sequence[WeightedPair], like: Tensor) -> Tensor:
        return _in_order([pair.weights for pair in pairs]).to(like.device) if self.weighted else torch.ones_like(like)


def _in_order(both: Sequence[tuple[Tensor, Tensor] | None]) -> Tensor:
    """Values of all chosen responses, then of all rejected ones, as the tokens of a batch come."""
    return torch.cat([pair[side] for side in (0, 1) for pair in both if pair is not None])


def _halves(of_both: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected of values [2B]."""
    return of_both[: len(of_both) // 2], of_both[len(of_both) // 2 :]


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
    settings = with_token_budget(runtime, settings, model_path)
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
        longest = max(pair.tokens.longest for pair in (*train, *held))
        policy = load_model(model_path, settings.trust_remote_code).to(runtime.device)
        scorer = scorer_of(runtime, settings, policy, longest, settings.model)
        if output is None:
            _show_first(runtime.reporter, train[0], tokenizer)
            return Made(Path(settings.output_dir), {}, fresh=False)
        _banner(runtime.reporter, settings, policy)
        reference = scorer
        if ref_path is not None or settings.method.objective().needs.divergence is not None:
            frozen = load_model(ref_path or model_path, settings.trust_remote_code).to(runtime.device)
            name = settings.ref_model or settings.model
            reference = scorer_of(runtime, settings, frozen.requires_grad_(False), longest, name)
        tasks = _tasks(runtime, settings, output, reference, tokenizer, train, held)
        del reference
        return run_training(
            runtime,
            settings,
            output,
            Ready(*tasks, *plan),
            scorer,
            tokenizer,
            settings.optim.learning_rate,
            lambda loss: _check_step0(loss, settings.method.objective(), _same_start(output), runtime.reporter),
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
    output: Output,
    reference: TokenScorer,
    tokenizer: Tokenizer,
    train: list[WeightedPair],
    held: list[WeightedPair],
) -> tuple[PairTask, PairTask | None]:
    """What is trained and what is evaluated, against one frozen reference.

    It is read once, before training, unless the objective needs its whole distributions.
    """
    loss, pad = settings.method.objective(), tokenizer.pad
    if loss.needs.divergence is not None:
        return PairTask(train, reference, loss, pad), PairTask(held, reference, loss, pad) if held else None
    of = {
        "model": output.made_from.get("content of ref_model") or output.made_from["content of model"],
        "dtype": runtime.precision(settings.memory.dtype),
    }
    directory = Path(settings.cache_dir).expanduser() if settings.cache_dir is not None else None
    cache = None if settings.no_ref_cache else TensorCache(directory, runtime.reporter.warn)
    config = reference.model.config.get_text_config()  # type: ignore[operator, union-attr]
    tokens = runtime.token_budget(config.num_hidden_layers, config.hidden_size)
    once = ReferencePass(runtime, reference, pad, tokens, of, cache)
    swapped = isinstance(settings, TrainReverse)
    made = [PairTask(_with_reference(pairs, once, swapped), None, loss, pad) for pairs in (train, held) if pairs]
    return made[0], made[1] if held else None


def _with_reference(pairs: Sequence[WeightedPair], once: ReferencePass, swapped: bool) -> list[WeightedPair]:
    """The pairs with its log-probs. It reads them as they stand in the data, so that all trainings share them."""
    found = once.run([pair.tokens.swapped() if swapped else pair.tokens for pair in pairs])
    both = [(rejected, chosen) if swapped else (chosen, rejected) for chosen, rejected in found]
    return [replace(pair, reference=logps) for pair, logps in zip(pairs, both, strict=True)]


def _banner(reporter: Reporter, settings: TrainPairs, policy: nn.Module) -> None:
    reporter.note(
        f"policy = {settings.model} ({parameter_count(policy)}, trainable), reference = "
        f"{settings.ref_model or settings.model} (frozen), dropout off"
    )
    loss = settings.method.objective()
    left_out = "; the reference is read for the metrics alone" if not loss.needs.reference else ""
    reporter.note(f"loss = {loss.describe()}: {loss.objective.help}{left_out}")
    if isinstance(settings, TrainReverse):
        reporter.note("reverse: in all metrics 'chosen' is the side preferred here, the dataset's rejected column")


def _same_start(output: Output) -> bool:
    """Whether the policy starts as the reference, by content: one model may be named twice."""
    start = output.made_from["content of model"]
    return output.made_from.get("content of ref_model", start) == start


def _check_step0(value: float, loss: Loss, same_start: bool, reporter: Reporter) -> None:
    """Before any update the margins are 0 and the loss has its value there, or something is wrong with the models."""
    expected = loss.at_the_start()
    if expected is None or not same_start:
        why = "it leaves the reference out" if expected is None else "policy and reference differ"
        reporter.note(f"step-0 loss {value:.4f} ({why})")
        return
    if not abs(value - expected) <= _STEP0_TOLERANCE * max(1.0, expected):
        raise TrainingError(
            f"the loss before the first update is {value:.6f}, not {loss.objective.start} = {expected:.4f}: policy and "
            "reference do not agree though they are the same model",
            fix="the model is not deterministic in evaluation mode; look for active dropout or noise in its code",
        )
    reporter.note(f"step-0 loss {value:.4f} = {loss.objective.start} as expected")


def _prepare(
    settings: TrainPairs, reporter: Reporter, files: dict[str, Path], tokenizer: Tokenizer
) -> tuple[list[WeightedPair], list[WeightedPair]]:
    """The pairs to train, and those to evaluate."""
    for notice in tokenizer.notices:
        reporter.note(notice)
    train = read_split(files["train"], settings.data, tokenizer)
    centers = None
    if isinstance(settings, Train):
        tokens = [(pair.chosen.uncut, pair.rejected.uncut) for pair in train.encoded]
        centers = fit_centers(settings.weights, train.pairs, tokens)
        idle_steps = settings.weights.recipe(eos_scores=True).idle_steps()
        if idle_steps:
            reporter.warn(idle_steps)
    elif hold_weights(pair.row for pair in train.pairs):
        reporter.note(
            "this dataset has token weights, which are not read here: `tisdpo train` is what trains with them"
        )
    wanted = settings.evaluation.eval_pairs
    splits = [train]
    if "test" in files and wanted:
        splits.append(read_split(files["test"], settings.data, tokenizer, wanted))
    made = [_weighted_pairs(settings, split, tokenizer, centers, reporter) for split in splits]
    return made[0], made[1] if len(made) > 1 else []


def _weighted_pairs(
    settings: TrainPairs, split: Split, tokenizer: Tokenizer, centers: Centers | None, reporter: Reporter
) -> list[WeightedPair]:
    kept, dropped = trainable(split)
    for notice in (*split.notices, *dropped):
        reporter.note(notice)
    if isinstance(settings, TrainReverse):
        return [WeightedPair(pair.swapped()) for pair in kept]
    if not isinstance(settings, Train):
        return [WeightedPair(pair) for pair in kept]
    _check_scored(settings, split, tokenizer, reporter)
    how = weighing(settings.weights, settings.seed, tokenizer, [split.pairs[pair.index] for pair in kept], centers)
    reporter.note(f"{split.path.name}: weights by {how.recipe.describe()}" + _why_eos(settings, how.recipe))
    weighted, bad = [], []
    contexts = how.contexts_of_pairs([split.pairs[pair.index] for pair in kept])
    for pair, both in zip(kept, contexts, strict=True):
        made = _weigh(split, pair, how, both)
        bad.append(made) if isinstance(made, BadRow) else weighted.append(made)
    for line in stop_or_skip(bad, len(kept), settings.data.on_bad_row):
        reporter.warn(line)
    known = [pair.weights for pair in weighted if pair.weights is not None]
    chosen, rejected = ([weights[side] for weights in known] for side in (0, 1))
    for line in doubts(chosen, rejected, how.recipe.final):
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
    changed = check_meaning(manifest, split.path, final)
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


def _weigh(split: Split, pair: EncodedPair, how: Weighing, contexts: tuple[Context, Context]) -> WeightedPair | BadRow:
    weights = []
    sides: tuple[tuple[Side, Response], ...] = (("chosen", pair.chosen), ("rejected", pair.rejected))
    for (side, response), context in zip(sides, contexts, strict=True):
        scores = how.read(split.pairs[pair.index], side, response.uncut, "this model's tokenizer")
        if isinstance(scores, BadRow):
            return scores
        needs_eos = response.has_eos and how.recipe.eos_weight == "score"
        missing = unscored_needed(scores, response.kept, needs_eos, how.recipe.final)
        if missing:
            return BadRow(pair.where, f"{side}: {missing}; {_REMEDY[how.recipe.final]}")
        weights.append(how.weights(scores, response.kept, response.has_eos, pair.index, side, context))
        beyond = how.fault(weights[-1])
        if beyond:
            return BadRow(pair.where, f"{side}: {beyond}")
    return WeightedPair(pair, (weights[0], weights[1]))


def _show_first(reporter: Reporter, pair: WeightedPair, tokenizer: Tokenizer) -> None:
    """The first row as it will be trained: one BOS where there is one, and where the EOS is."""
    tokens = pair.tokens
    for name, ids in (("prompt", tokens.prompt), ("chosen", tokens.chosen.ids), ("rejected", tokens.rejected.ids)):
        shown = " ".join(f"{piece!r}" for piece in tokenizer.pieces(ids[:12]))
        ending = f" … {tokenizer.pieces(ids[-1:])[0]!r}" if len(ids) > 12 else ""
        reporter.note(f"first {name} ({len(ids)} tokens): {shown}{ending}")
    reporter.note("dry run: nothing was trained")
