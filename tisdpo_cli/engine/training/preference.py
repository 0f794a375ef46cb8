"""train-dpo, train-reverse and train: one training that differs in two values. Is the pair swapped? Which weights?"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from tisdpo_cli.data.reader import find_splits
from tisdpo_cli.engine.arguments import output_request
from tisdpo_cli.engine.training.pair_data import prepare_pairs
from tisdpo_cli.engine.training.pair_task import PairTask, WeightedPair
from tisdpo_cli.engine.training.reference import ReferencePass
from tisdpo_cli.engine.training.session import (
    TrainingSetup,
    parameter_count,
    plan_training,
    resolved,
    run_training,
    scorer_of,
    with_token_budget,
)
from tisdpo_cli.errors import ModelError, TrainingError
from tisdpo_cli.method.objectives import Loss
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.loading import check_fit, load_model, move_to_device
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.tokenizer import Tokenizer, load_tokenizer
from tisdpo_cli.reporter import Reporter
from tisdpo_cli.runs.cache import TensorCache
from tisdpo_cli.runs.outputs import Output
from tisdpo_cli.runs.runtime import Runtime
from tisdpo_cli.runs.stage import StageResult, claim_output, finished_result
from tisdpo_cli.settings.train_pairs import TrainPairs, TrainReverse

# In float32 the policy and its reference are the same function before the first update.
_STEP0_TOLERANCE = 1e-4


def train_pairs(settings: TrainPairs, reporter: Reporter) -> StageResult:
    """Run train-dpo, train-reverse or train, by the type of the settings.

    Raises:
        TisdpoError: anything the user can do something about; see the subclasses in `errors`.
    """
    model_path = locate_model(settings.model, "--model", settings.trust_remote_code)
    ref_path = (
        locate_model(settings.ref_model, "--ref-model", settings.trust_remote_code) if settings.ref_model else None
    )
    files = find_splits(settings.dataset)
    runtime = Runtime(reporter)
    settings = with_token_budget(runtime, settings, model_path)
    models = {"model": model_path, "ref_model": ref_path}
    claimed = (
        nullcontext()
        if settings.dry_run
        else claim_output(runtime, output_request(settings, resolved(runtime, settings), models, files))
    )
    with claimed as output:
        if output is not None and output.state == "finished":
            return finished_result(runtime, output)
        tokenizer = load_tokenizer(model_path, settings.trust_remote_code)
        check_fit(model_path, tokenizer, settings.data.max_length, settings.trust_remote_code)
        if ref_path is not None:
            _check_reference(settings, ref_path, tokenizer)
        train, held = prepare_pairs(settings, runtime.reporter, files, tokenizer)
        plan = plan_training(runtime, settings, [pair.tokens.tokens for pair in train], PairTask.unit)
        longest = max(pair.tokens.longest for pair in (*train, *held))
        policy = move_to_device(load_model(model_path, settings.trust_remote_code), runtime.device)
        scorer = scorer_of(runtime, settings, policy, longest, settings.model)
        if output is None:
            _show_first(runtime.reporter, train[0], tokenizer)
            return StageResult(Path(settings.output_dir), {}, fresh=False)
        _banner(runtime.reporter, settings, policy)
        scorer, reference = _with_reference_model(runtime, settings, scorer, ref_path or model_path, longest)
        tasks = _tasks(runtime, settings, output, reference, tokenizer, train, held)
        # Unless a task has it, it is not in memory from here on.
        del reference
        return run_training(
            runtime,
            settings,
            output,
            TrainingSetup(*tasks, *plan),
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


def _with_reference_model(
    runtime: Runtime, settings: TrainPairs, policy: TokenScorer, path: Path, longest: int
) -> tuple[TokenScorer, TokenScorer]:
    """The policy and its reference: itself, before any update, where that is the model and only log-probs are read."""
    divergence = settings.method.objective().needs.divergence
    if settings.ref_model is None and divergence is None:
        return policy, policy
    frozen = move_to_device(load_model(path, settings.trust_remote_code), runtime.device).requires_grad_(False)
    name = settings.ref_model or settings.model
    reference = scorer_of(runtime, settings, frozen, longest, name)
    if reference.packed == policy.packed or divergence is None:
        return policy, reference
    runtime.reporter.note("policy and reference both read every response in a row of its own, for one cannot pack them")
    policy = scorer_of(runtime, settings, policy.model, longest, settings.model, "separate")
    return policy, scorer_of(runtime, settings, frozen, longest, name, "separate")


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


def _show_first(reporter: Reporter, pair: WeightedPair, tokenizer: Tokenizer) -> None:
    """The first row as it will be trained: one BOS where there is one, and where the EOS is."""
    tokens = pair.tokens
    for name, ids in (("prompt", tokens.prompt), ("chosen", tokens.chosen.ids), ("rejected", tokens.rejected.ids)):
        shown = " ".join(f"{piece!r}" for piece in tokenizer.pieces(ids[:12]))
        between = " …" if len(ids) > 13 else ""
        ending = f"{between} {tokenizer.pieces(ids[-1:])[0]!r}" if len(ids) > 12 else ""
        reporter.note(f"first {name} ({len(ids)} tokens): {shown}{ending}")
    reporter.note("dry run: nothing was trained")
