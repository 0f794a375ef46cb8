"""TIS-DPO in TRL: a `DPOTrainer` that weighs every token of the loss, on a dataset scored by `tisdpo estimate`.

    python examples/trl_trainer.py --model out/sft --dataset out/scored --output-dir out/trl --transform rank_based

Written against TRL 1.16; needs `pip install trl`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset, load_dataset
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from tisdpo_cli import preference_loss, token_weights

SIDES = ("chosen", "rejected")


def row_weights(row: dict[str, Any], side: str, index: int, **recipe: Any) -> list[float]:
    """Weights of a response with its EOS. `tisdpo estimate` writes negative scores, −r, the EOS in its own column."""
    values = [*row[f"{side}_weight"], row[f"{side}_eos_weight"]]
    if None in values:
        raise ValueError(f"row {index}: {side} was cut when it was scored; raise --max-length of tisdpo estimate")
    return token_weights([-value for value in values], side, eos_weight="score", row=index, **recipe)


class WeightCollator(DataCollatorForPreference):
    """TRL's collator, with the token weights padded and cut like the token ids."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = super().torch_call(examples)
        rows = [[0.0] * len(e["prompt_ids"]) + e[f"{side}_token_weights"] for side in SIDES for e in examples]
        if self.max_length is not None:
            keep_start = self.truncation_mode == "keep_start"
            rows = [row[: self.max_length] if keep_start else row[-self.max_length :] for row in rows]
        weights = torch.zeros(batch["input_ids"].shape)
        for row, target in zip(rows, weights, strict=True):
            target[: len(row)] = torch.tensor(row)
        return {**batch, "token_weights": weights}


class TISDPOTrainer(DPOTrainer):
    """TRL's trainer with the loss of TIS-DPO. Pass a reference model, and `recipe`: arguments of `token_weights`."""

    def __init__(self, *args: Any, recipe: dict[str, Any] | None = None, **kwargs: Any) -> None:
        self.recipe = recipe or {}
        super().__init__(*args, **kwargs)
        if self.ref_model is None or self.loss_types != ["sigmoid"]:
            raise ValueError("TISDPOTrainer needs a ref_model (no adapters, nothing precomputed) and the sigmoid loss")
        self.data_collator = WeightCollator(**vars(self.data_collator))

    def _prepare_dataset(self, dataset: Dataset, *args: Any) -> Dataset:
        recipe = self.recipe

        def add_weights(row: dict[str, Any], index: int) -> dict[str, list[float]]:
            columns = {f"{side}_token_weights": row_weights(row, side, index, **recipe) for side in SIDES}
            for side in SIDES:
                tokens, weights = len(row[f"{side}_ids"]), len(columns[f"{side}_token_weights"])
                if tokens != weights:  # TRL tokenizes prompt and response together, which can merge tokens
                    raise ValueError(f"row {index}: {side} has {tokens} tokens in TRL, but {weights} scores")
            return columns

        return super()._prepare_dataset(dataset, *args).map(add_weights, with_indices=True)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names = [*self._signature_columns, *(f"{side}_token_weights" for side in SIDES)]
        self._signature_columns = [*dict.fromkeys(names)]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any) -> Any:
        logps = token_logps(model, inputs)
        with torch.no_grad():
            ref_logps = token_logps(self.ref_model, inputs)
        mask, weights = inputs["completion_mask"][:, 1:], inputs["token_weights"][:, 1:]
        result = preference_loss(logps, ref_logps, mask, weights=weights, beta=self.beta)

        chosen, rejected = result.rewards.chosen, result.rewards.rejected
        margins, metrics = chosen - rejected, self._metrics["train" if self.model.training else "eval"]
        values = {"chosen": chosen, "rejected": rejected, "margins": margins, "accuracies": (margins > 0).float()}
        for name, value in values.items():
            metrics[f"rewards/{name}"].append(self.accelerator.gather(value).mean().item())
        loss = result.losses.mean()
        return (loss, {}) if return_outputs else loss


def token_logps(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Log-probs [2B, T − 1] of every token but the first, float32."""
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False).logits
    return -F.cross_entropy(logits[:, :-1].float().transpose(1, 2), inputs["input_ids"][:, 1:], reduction="none")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="starting model and reference")
    parser.add_argument("--dataset", required=True, help="directory written by tisdpo estimate")
    parser.add_argument("--output-dir", required=True)
    parser.add_argument("--transform", default="exp")
    parser.add_argument("--max-steps", type=int, default=-1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=5e-7)
    arguments = parser.parse_args()

    train = load_dataset("json", data_files=str(Path(arguments.dataset) / "train.jsonl"), split="train")
    config = DPOConfig(
        output_dir=arguments.output_dir,
        max_steps=arguments.max_steps,
        per_device_train_batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        beta=0.1,
        max_length=512,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    trainer = TISDPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        ref_model=AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32),
        args=config,
        train_dataset=train,
        processing_class=AutoTokenizer.from_pretrained(arguments.model),
        recipe={"transform": arguments.transform},
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
