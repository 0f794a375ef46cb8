"""Options of TRL's `DPOConfig`, `ScriptArguments` and `ModelConfig`, older ones too, that are no settings here."""

from __future__ import annotations

from typing import Any

from tisdpo_cli.settings.foreign.rules import Outcome, Rule, always, idle, is_off, mapped, refused, taken

_MERGE = "use --model with a whole model; `tisdpo merge` makes one"
_LOSSES = "see --loss for the objectives"
_LAYOUT = "attention is chosen by --layout"
_MOVING = "the reference does not move"

# The losses of TRL that are objectives here.
LOSSES = {
    "sigmoid": Outcome({"loss": "dpo"}, notice="taken as --loss dpo"),
    "ipo": Outcome(
        {"loss": "ipo"}, {"length_normalize": True}, notice="taken as --loss ipo --length-normalize, as TRL averages"
    ),
    None: Outcome(),
}


def _use_peft(value: Any) -> Outcome:
    if is_off(value):
        return Outcome()
    soft = {"lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
    return Outcome(soft=soft, notice="TRL's defaults: --lora-r 16 --lora-alpha 32 --lora-dropout 0.05 unless given")


def _truncation(value: Any) -> Outcome:
    if value not in (None, "keep_start", "keep_end"):
        return Outcome(fault="see --keep-prompt")
    how = "rows beyond --max-length lose prompt tokens first, then the end of responses"
    return Outcome(notice=f"{how}; see --keep-prompt")


TRL: dict[str, Rule] = {
    # ScriptArguments
    "dataset_config": refused("use --dataset OWNER/NAME:CONFIG"),
    "dataset_streaming": refused("datasets are read whole, in bounded memory"),
    "ignore_bias_buffers": idle("buffers are not synchronized"),
    "accelerate_config": mapped(
        {
            "single_gpu": Outcome(),
            "multi_gpu": Outcome(notice="use --num-processes"),
            "fsdp1": Outcome({"shard": "full"}, notice="taken as --shard full"),
            "fsdp2": Outcome({"shard": "full"}, notice="taken as --shard full"),
        },
        "use --num-processes and --shard full, or accelerate launch -m tisdpo_cli",
    ),
    # ModelConfig
    "model_revision": refused("fetch it with hf download REPO --revision NAME and give --model its directory", "main"),
    "model_init_kwargs": refused("see --dtype, --layout and --load-in-4bit"),
    "ref_model_init_kwargs": refused("see --dtype, --layout and --load-in-4bit"),
    "attn_implementation": idle(_LAYOUT),
    "use_peft": _use_peft,
    "lora_target_parameters": refused("adapters are put on linear layers; see --lora-target"),
    "lora_task_type": refused("an adapter is always one of a causal language model", "CAUSAL_LM"),
    "load_in_8bit": refused("use --load-in-4bit"),
    "bnb_4bit_quant_type": refused("nf4 is the only type; see --load-in-4bit", "nf4"),
    "use_bnb_nested_quant": idle("double quantization is always on; see --load-in-4bit"),
    "bnb_4bit_quant_storage": idle("weights in 4 bits are stored as bytes"),
    # DPOConfig
    "disable_dropout": always("dropout is always off"),
    "dataset_num_proc": idle("the number of processes that tokenize follows from rows and cores"),
    "truncation_mode": _truncation,
    "padding_free": idle("rows are packed by default; see --layout"),
    "pad_to_multiple_of": idle("rows are packed by default; see --layout"),
    "precompute_ref_log_probs": idle("reference log-probs are always precomputed; see --no-ref-cache"),
    "precompute_ref_batch_size": idle("reference log-probs are computed within the token budget"),
    "loss_type": mapped(LOSSES, _LOSSES),
    "loss_weights": refused("there is one loss at a time", 1),
    "ld_alpha": refused("lengths are not reweighted", 1),
    "f_divergence_type": refused("the divergence is the reverse KL", "reverse_kl", "FDivergenceType.REVERSE_KL"),
    "f_divergence_alpha_coef": idle("the divergence is the reverse KL"),
    "f_alpha_divergence_coef": idle("the divergence is the reverse KL"),
    "use_weighting": refused("weights of WPO are not supported; token weights come from `tisdpo estimate`"),
    "discopop_tau": idle(_LOSSES),
    "rpo_alpha": refused(_LOSSES),
    "activation_offloading": refused("use --gradient-checkpointing"),
    "sync_ref_model": refused(_MOVING),
    "ref_model_mixup_alpha": idle(_MOVING),
    "ref_model_sync_steps": idle(_MOVING),
    "router_aux_loss_coef": refused("there is no loss of routers"),
    "pad_token": idle("padding is masked by length"),
    "padding_value": idle("padding is masked by length"),
    "label_pad_token_id": idle("padding is masked by length"),
    "use_logits_to_keep": idle("only scored positions reach the head"),
    "generate_during_eval": refused("use `tisdpo evaluate --samples FILE`"),
    "max_completion_length": refused("see --max-length and --max-prompt-length"),
    "force_use_ref_model": idle("the reference is the adapter's base; see --ref-model"),
    "model_adapter_name": idle("an adapter has no name"),
    "ref_adapter_name": refused(_MERGE),
    "tools": refused("tools are not supported"),
    "ref_model_name_or_path": taken("ref_model"),
}
