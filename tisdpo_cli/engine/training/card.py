"""What the model card of a training says of its settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tisdpo_cli.data.scored import read_manifest
from tisdpo_cli.engine.model_card import OUTPUT, CardFacts, code, text
from tisdpo_cli.settings.command_lines import command_line, shown_path
from tisdpo_cli.settings.datasets import parts_of, text_of
from tisdpo_cli.settings.train_pairs import Train, TrainPairs, TrainReverse
from tisdpo_cli.settings.train_sft import TrainSft


def card_facts(settings: TrainPairs | TrainSft, resolved: Mapping[str, Any]) -> CardFacts:
    """What the card of the trained model says of its settings.

    Args:
        settings: of a training.
        resolved: settings whose value depends on the machine or on other settings, as they are in force.
    """
    optim, base = settings.optim, settings.model
    title, summary, tags, rows = _sft_facts(settings) if isinstance(settings, TrainSft) else _pair_facts(settings)
    share = 0 < optim.warmup_steps < 1
    steps = f"{optim.warmup_steps:.3g} of the steps for" if share else f"{optim.warmup_steps} steps for"
    warmup = f", {steps} warm-up, then {optim.lr_scheduler}"
    rank, alpha = settings.adapter.lora_r, settings.adapter.alpha()
    kind = "DoRA" if settings.adapter.dora else "LoRA"
    adapter = {} if rank is None else {"adapter": f"{kind}, r {rank}, alpha {alpha:g}"}
    return CardFacts(
        title=title,
        summary=summary,
        command_line=command_line(settings, OUTPUT),
        base=base,
        base_name=shown_path(base) if base is not None else "",
        datasets=tuple(part.path for part in parts_of(settings.dataset)),
        tags=tags,
        rows={
            "base model": code(shown_path(base)) if base is not None else "none: a new one, made from the data",
            "data": " + ".join(code(shown_path(part.path)) for part in parts_of(settings.dataset)),
            **rows,
            **adapter,
            "optimizer": text(f"{optim.optimizer}, learning rate {resolved['optim.learning_rate']:g}{warmup}"),
            "precision": resolved["memory.dtype"],
        },
    )


# Title, summary, tags and rows of a card.
_Facts = tuple[str, str, tuple[str, ...], dict[str, str]]


def _sft_facts(settings: TrainSft) -> _Facts:
    responses = {"both": "chosen and rejected responses"}.get(settings.target, f"{settings.target} responses")
    summary = f"Supervised fine-tuning on the {responses} of preference pairs, or on the answers of instruction rows."
    return "SFT", summary, ("sft",), {"loss": "mean negative log-likelihood per token"}


def _pair_facts(settings: TrainPairs) -> _Facts:
    loss = settings.method.objective()
    reference = settings.ref_model
    rows = {
        "reference": "the base model" if reference is None else code(shown_path(reference)),
        "loss": text(f"{loss.describe()}: {loss.objective.help}"),
    }
    title = loss.name.upper()
    if isinstance(settings, Train):
        return f"TIS-{title}", _OF_TRAIN, (f"tis-{loss.name}", loss.name), {**rows, **_weight_rows(settings)}
    if isinstance(settings, TrainReverse):
        return f"Reverse {title}", _OF_REVERSE, (loss.name,), rows
    return title, _OF_DPO, (loss.name,), rows


_OF_DPO = (
    "Preference optimization on pairs of chosen and rejected responses. In TIS-DPO such a model is the forward "
    "contrastive model π⁺."
)
_OF_REVERSE = (
    "Preference optimization on pairs with chosen and rejected swapped: the reverse contrastive model π⁻ of TIS-DPO. "
    "**It was trained to prefer the worse responses**: use it to score tokens, not to answer anyone."
)
_OF_TRAIN = (
    "Preference optimization with token weights (TIS-DPO): every token of a response counts as much as two contrastive "
    "models say that it matters."
)


def _weight_rows(settings: Train) -> dict[str, str]:
    weights = settings.weights
    recipe = replace(weights.recipe(eos_scores=True), eos_weight=weights.eos_weight)  # type: ignore[arg-type]
    found = read_manifest(Path(text_of(settings.dataset)).expanduser()) or {}
    models = found.get("models")
    named = models if isinstance(models, dict) else {}
    scores = {
        f"{name} model of the scores": code(shown_path(str(named[name]["path"])))
        for name in ("forward", "reverse")
        if isinstance(named.get(name), dict) and "path" in named[name]
    }
    return {"token weights": text(recipe.describe()), **scores}
