"""What a dry run predicts from: the models of a training without their weights, and the sizes of its examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from tisdpo_cli.engine.training.batching import pair_costs
from tisdpo_cli.engine.training.dry_run import Examples, ExampleSize, ReferencePlan, Trained
from tisdpo_cli.engine.training.planning import OtherModel
from tisdpo_cli.engine.training.reference_model import Models
from tisdpo_cli.engine.training.session import SessionConfig
from tisdpo_cli.engine.training.sft_task import SftTask
from tisdpo_cli.engine.training.weighted_pairs import WeightedPair, tokens_of
from tisdpo_cli.method.objectives import Loss
from tisdpo_cli.model.directory import base_of, is_adapter
from tisdpo_cli.model.loading import take_notes
from tisdpo_cli.model.quantization import bitsandbytes
from tisdpo_cli.model.shapes import file_bytes, outline
from tisdpo_cli.runs.runtime import Runtime


@dataclass(frozen=True)
class ModelOutline:
    """A model to train, without the values of its weights.

    Attributes:
        model: on the meta device.
        file: size of its weight files in bytes; 0 for a new model.
        adaptable: whether an adapter could be trained instead.
    """

    model: nn.Module
    file: int
    adaptable: bool


def outline_policy(session: SessionConfig, path: Path, trust_remote_code: bool) -> ModelOutline:
    """The model that `load_policy` will load, whose files get all checks that need no values.

    Raises:
        ModelError: they are damaged.
        UsageError: a package that the training needs is not installed.
    """
    if session.quantized:
        bitsandbytes()
    model = outline(path, trust_remote_code, session.adapter)
    return ModelOutline(model, file_bytes(base_of(path)), session.adapter is None and not is_adapter(path))


def planned_pairs(
    runtime: Runtime,
    session: SessionConfig,
    models: Models,
    loss: Loss,
    cached: bool,
    pairs: tuple[Sequence[WeightedPair], Sequence[WeightedPair]],
) -> Trained:
    """What a preference training needs is predicted from this.

    Args:
        runtime: this process.
        session: how the training runs.
        models: the policy and its reference.
        loss: the objective.
        cached: whether log-probs of the reference are kept.
        pairs: to train, and to evaluate.
    """
    policy = outline_policy(session, models.policy_path, models.trust_remote_code)
    for text in take_notes(policy.model):
        runtime.reporter.note(f"{models.policy}: {text}")
    divergence = loss.needs.divergence
    other = _other_model(models, session, divergence)
    reference = ReferencePlan(other, divergence is not None, divergence is None and cached)
    train, test = (_pairs(session, split) for split in pairs)
    return Trained(policy.model, policy.file, train, test if test.costs else None, reference, policy.adaptable)


def _pairs(session: SessionConfig, pairs: Sequence[WeightedPair]) -> Examples:
    tokens = tokens_of(pairs)

    def size(number: int) -> ExampleSize:
        pair = tokens[number]
        return ExampleSize(len(pair.prompt), (len(pair.chosen.ids), len(pair.rejected.ids)))

    return Examples(pair_costs(tokens, packed=session.layout != "separate"), size)


def planned_examples(session: SessionConfig, policy: ModelOutline, task: SftTask, eval_task: SftTask | None) -> Trained:
    """What a fine-tuning needs is predicted from this.

    Args:
        session: how the training runs.
        policy: the model.
        task: what is trained.
        eval_task: what is evaluated, or None.
    """
    train, test = (None if of is None else Examples(of.pass_costs(session.layout), of.size) for of in (task, eval_task))
    assert train is not None
    return Trained(policy.model, policy.file, train, test, None, policy.adaptable)


def _other_model(models: Models, session: SessionConfig, divergence: str | None) -> OtherModel | None:
    """The reference that `with_reference` will load beside the policy, or None, from shapes alone.

    Raises:
        ModelError: its files are damaged.
    """
    path = models.reference_path or (models.policy_path if divergence is not None else None)
    adapted = session.adapter is not None or is_adapter(models.policy_path)
    if path is None or (adapted and base_of(path).resolve() == base_of(models.policy_path).resolve()):
        return None
    size = sum(p.numel() for p in outline(path, models.trust_remote_code).parameters())
    each = 2 if adapted and session.precision == "bf16" else 4
    return OtherModel(each * size, file_bytes(base_of(path)), divergence is not None)
