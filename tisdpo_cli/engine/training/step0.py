"""The check of the first batch before any update: policy and reference must agree there."""

from __future__ import annotations

from collections.abc import Mapping

from tisdpo_cli.errors import TrainingError
from tisdpo_cli.method.objectives import Loss
from tisdpo_cli.reporter import Reporter

# Before the first update the policy is its reference. In float32 both agree up to the rounding of two packings. In bf16
# both are computed in the same packing, which gives the same bits where the kernels with and without a gradient are the
# same; elsewhere a pair of a model of 135 M parameters is off by up to 0.9 nats, and the mean over a batch by less.
_STEP0_LOSS = 1e-4
_STEP0_MARGIN = {"float32": 0.0, "bf16": 0.5}


def check_step0(metrics: Mapping[str, float], loss: Loss, precision: str, same_start: bool, reporter: Reporter) -> None:
    """Before the first update the margins are 0 and the loss is known, or something is wrong with the models.

    Raises:
        TrainingError: policy and reference disagree by more than rounding.
    """
    value = metrics["loss"]
    expected = loss.start_value()
    if expected is None or not same_start:
        reason = "the loss does not use the reference" if expected is None else "policy and reference differ"
        reporter.note(f"step-0 loss {value:.4f} ({reason})")
        return
    exact = abs(value - expected) <= _STEP0_LOSS * max(1.0, expected)
    margin = abs(metrics["rewards/margins"]) / loss.beta
    if not exact and not margin <= _STEP0_MARGIN[precision]:
        raise TrainingError(
            f"the loss before the first update is {value:.6f}, not {loss.objective.start} = {expected:.4f}: policy and "
            f"reference are the same model, but their log-ratio margin is {margin:.2g} nats",
            fix="something in the model's forward pass is random or changes between two passes; its code decides",
        )
    kind = "as expected" if exact else f"up to bf16 rounding, a margin of {margin:.2g} nats"
    reporter.note(f"step-0 loss {value:.4f} = {loss.objective.start} {kind}")
