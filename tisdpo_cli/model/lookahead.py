"""Refuses models in which a later token changes the log-prob of an earlier one: bidirectional encoders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tisdpo_cli.errors import ModelError, is_out_of_memory

# Tokens of the probe; the second half is changed.
_TOKENS = 16
# In nats, beyond the rounding of experts, whose products change shape with the tokens.
_TOLERANCE = 1e-4
# Gradients of later tokens, relative to those of earlier ones; exactly 0 in causal attention.
_GRADIENT_TOLERANCE = 1e-5


def refuse_lookahead(model: nn.Module, name: str) -> None:
    """Check by numbers that log-probs do not depend on later tokens.

    Args:
        model: model on its device.
        name: name of the model in messages.

    Raises:
        ModelError: they do.
    """
    vocabulary = int(model.config.get_text_config().vocab_size)  # type: ignore[operator, union-attr]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (_TOKENS,), generator=generator).tolist()
    if _change_by_later(model, ids, vocabulary) > _TOLERANCE or _gradient_of_later(model, ids) > _GRADIENT_TOLERANCE:
        raise ModelError(
            "not a causal language model: later tokens change the log-probs of earlier ones",
            where=name,
            fix="use a decoder; an encoder such as BERT attends in both directions",
        )


@torch.inference_mode()
def _change_by_later(model: nn.Module, ids: list[int], vocabulary: int) -> float:
    """Largest change in nats of the log-probs of the first half by other tokens in the second."""
    half = _TOKENS // 2
    changed = ids[:half] + [(token + 1) % vocabulary for token in ids[half:]]
    device = next(model.parameters()).device
    before, after = (
        model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0, :half].float().log_softmax(-1)
        for row in (ids, changed)
    )
    return float((before - after).abs().max())


def _gradient_of_later(model: nn.Module, ids: list[int]) -> float:
    """Largest gradient of the logits of the first half by the embeddings of the second, relative to their own.

    More sensitive than the change of log-probs, which can be small in models with small random weights. 0 where the
    embeddings cannot be observed.
    """
    embedded: list[Tensor] = []

    def observe(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    half = _TOKENS // 2
    row = torch.tensor([ids], device=next(model.parameters()).device)
    handle = model.get_input_embeddings().register_forward_hook(observe)  # type: ignore[operator]
    try:
        with torch.enable_grad():
            logits = model(input_ids=row, use_cache=False).logits
            (gradient,) = torch.autograd.grad(logits[0, :half].float().square().sum(), embedded[:1])
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return 0.0
    finally:
        handle.remove()
    size = gradient[0].abs().amax(-1)
    return float(size[half:].max() / size[:half].max().clamp(min=1e-30))
