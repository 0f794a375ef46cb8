"""The policy of a preference training and what its reference is: the policy as it starts, or another model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tisdpo_cli.engine.training.policy import load_policy
from tisdpo_cli.engine.training.session import SessionConfig, session_scorer
from tisdpo_cli.engine.training.sharded_model import dtype_to_load, is_light, place
from tisdpo_cli.model.adapters import adapters_of, attach_saved
from tisdpo_cli.model.directory import base_of, is_adapter, is_quantized_adapter
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.model.logprobs import TokenScorer
from tisdpo_cli.model.quantization import is_quantized
from tisdpo_cli.runs.runtime import Runtime


@dataclass(frozen=True)
class Models:
    """The policy and its reference.

    Attributes:
        policy: what the user calls the policy.
        policy_path: its directory.
        reference: what the user calls the reference.
        reference_path: its directory, or None where it is the policy as it starts.
    """

    policy: str
    policy_path: Path
    reference: str
    reference_path: Path | None
    trust_remote_code: bool


def load_scorer(runtime: Runtime, models: Models, session: SessionConfig, longest: int) -> TokenScorer:
    """Load the policy, in the layout of the training."""
    policy = load_policy(runtime, session, models.policy_path, models.trust_remote_code)
    return session_scorer(runtime, session, policy, longest, models.policy)


def with_reference(
    runtime: Runtime, models: Models, session: SessionConfig, policy: TokenScorer, divergence: str | None, longest: int
) -> tuple[TokenScorer, TokenScorer]:
    """The policy and its reference: the same scorer where the reference is the policy's start and only its log-probs
    are needed.
    """
    if models.reference_path is None and divergence is None:
        return policy, policy
    path = models.reference_path or models.policy_path
    if _shares_weights(path, models.policy_path, policy):
        return policy, _on_the_same_weights(runtime, models, session, policy, path, longest)
    # In the precision of the policy's own frozen weights, if it has any.
    dtype = dtype_to_load(runtime, path, runtime.on_main(lambda: next(policy.parameters()).dtype))
    frozen = load_model(path, models.trust_remote_code, dtype=dtype, trained=False)
    frozen = place(runtime, frozen).requires_grad_(False)
    reference = session_scorer(runtime, session, frozen, longest, models.reference)
    if reference.packed == policy.packed or divergence is None:
        return policy, reference
    runtime.reporter.note("encoding each response separately in both models, since one of them cannot share prompts")
    policy = session_scorer(runtime, session, policy.model, longest, models.policy, "separate")
    return policy, session_scorer(runtime, session, frozen, longest, models.reference, "separate")


def _shares_weights(path: Path, policy_path: Path, policy: TokenScorer) -> bool:
    """Whether a reference is the base model of the policy's adapter, or an adapter on it in the same precision."""
    if adapters_of(policy.model) is None or base_of(path).resolve() != base_of(policy_path).resolve():
        return False
    return not is_adapter(path) or is_quantized_adapter(path) == is_quantized(policy.model)


def _on_the_same_weights(
    runtime: Runtime, models: Models, session: SessionConfig, policy: TokenScorer, path: Path, longest: int
) -> TokenScorer:
    """Score the reference with the weights of the policy, without an adapter or with another one.

    Raises:
        ModelError: the two need different layouts.
    """
    adapters = adapters_of(policy.model)
    assert adapters is not None
    with adapters.using(policy.adapter):
        adapters.switch(None)
        if is_adapter(path):
            attach_saved(policy.model, path, trained=False)
            if not is_light(runtime):
                policy.model.to(runtime.device)
        layout = "shared-prefix" if policy.packed else "separate"
        return session_scorer(runtime, session, policy.model, longest, models.reference, layout)
