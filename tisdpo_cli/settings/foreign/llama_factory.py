"""Options of LLaMA-Factory that are no settings here, beside those that it has from transformers."""

from __future__ import annotations

from typing import Any

from tisdpo_cli.settings.foreign.rules import Outcome, Rule, idle, is_off, mapped, refused, taken, where_given
from tisdpo_cli.settings.foreign.trl import LOSSES

_TRACKERS = "use --report-to with another tracker"
_OPTIMIZERS = "see --optimizer"
_IMAGES = "images, video and audio are not supported"


def _finetuning(value: Any) -> Outcome:
    if value == "lora":
        return Outcome(soft={"lora_r": 8}, notice="LLaMA-Factory's default: --lora-r 8 unless given")
    if value in (None, "full"):
        return Outcome()
    return Outcome(fault="train all parameters (full), or an adapter with --lora-r")


def _bits(value: Any) -> Outcome:
    if is_off(value):
        return Outcome()
    if value != 4:
        return Outcome(fault="use --load-in-4bit")
    return Outcome({"load_in_4bit": True}, notice="taken as --load-in-4bit")


def _no_checkpointing(value: Any) -> Outcome:
    if value is None:
        return Outcome()
    on = not value
    return Outcome({"gradient_checkpointing": on}, notice=f"taken as --gradient-checkpointing {str(on).lower()}")


LLAMA_FACTORY: dict[str, Rule] = {
    # What is trained
    "stage": mapped(
        {
            "dpo": Outcome(notice="`tisdpo train-dpo` trains with DPO, `tisdpo run` the whole method"),
            "sft": Outcome(notice="`tisdpo train-sft` fine-tunes"),
        },
        "only dpo (train-dpo) and sft (train-sft)",
    ),
    "finetuning_type": _finetuning,
    "lora_rank": where_given("lora_r"),
    "additional_target": where_given("lora_modules_to_save"),
    "adapter_name_or_path": refused("use --model with the adapter's directory"),
    "create_new_adapter": refused("merge the old adapter first: `tisdpo merge`"),
    "ref_model_adapters": refused("use --ref-model with the adapter's directory"),
    "ref_model_quantization_bit": refused("see --load-in-4bit"),
    "reward_model_adapters": refused("use --reward-model with a whole model"),
    "quantization_bit": _bits,
    "quantization_method": refused("bitsandbytes is the only method; see --load-in-4bit", "bnb", "bitsandbytes"),
    "quantization_type": refused("nf4 is the only type; see --load-in-4bit", "nf4"),
    "double_quantization": idle("double quantization is always on; see --load-in-4bit"),
    "pure_bf16": refused("weights stay in float32; use --dtype bf16"),
    "disable_gradient_checkpointing": _no_checkpointing,
    "use_reentrant_gc": idle("checkpoints are not reentrant"),
    "enable_liger_kernel": taken("liger_kernel"),
    "flash_attn": idle("attention is chosen by --layout"),
    "upcast_layernorm": idle("norms are computed in float32 anyway"),
    "upcast_lmhead_output": idle("log-probs are computed in float32 anyway"),
    "low_cpu_mem_usage": idle("weights are read without a copy where that is possible"),
    "use_fast_tokenizer": idle("fast tokenizers are used"),
    "infer_backend": idle("see `tisdpo evaluate`"),
    "infer_dtype": idle("see `tisdpo evaluate --dtype`"),
    "hf_hub_token": refused("use hf auth login"),
    "train_from_scratch": refused("use `tisdpo train-sft --init`"),
    **dict.fromkeys(
        ("use_unsloth", "use_unsloth_gc", "shift_attn", "mixture_of_depths", "rope_scaling", "use_llama_pro"),
        refused("models run as transformers defines them"),
    ),
    **dict.fromkeys(
        ("resize_vocab", "add_tokens", "add_special_tokens", "new_special_tokens_config"),
        refused("the vocabulary stays as it is"),
    ),
    "moe_aux_loss_coef": refused("there is no loss of routers"),
    # Preferences
    "pref_beta": taken("beta"),
    "pref_loss": mapped(LOSSES, "see --loss for the objectives"),
    "pref_ftx": refused("an SFT loss beside the preference loss is not supported"),
    "pref_bco_weight": refused("see --loss for the objectives"),
    "dpo_label_smoothing": where_given("label_smoothing"),
    "simpo_gamma": idle("see --loss for the objectives"),
    "kto_chosen_weight": idle("see --loss for the objectives"),
    "kto_rejected_weight": idle("see --loss for the objectives"),
    # Optimizers
    "loraplus_lr_ratio": refused(_OPTIMIZERS),
    **dict.fromkeys(("use_galore", "use_apollo", "use_badam", "use_adam_mini", "use_muon"), refused(_OPTIMIZERS)),
    "pissa_init": refused("adapters start at zero"),
    # Data
    "template": idle("the tokenizer's chat template is used; see --chat-template"),
    "dataset_dir": idle("--dataset takes the path or hub id itself"),
    "media_dir": refused(_IMAGES),
    "image_max_pixels": idle(_IMAGES),
    "image_min_pixels": idle(_IMAGES),
    "video_max_pixels": idle(_IMAGES),
    "video_min_pixels": idle(_IMAGES),
    "eval_dataset": refused("give a --dataset with two splits; see --eval-split"),
    "cutoff_len": taken("max_length"),
    "max_samples": where_given("limit"),
    "val_size": where_given("eval_size"),
    "streaming": refused("datasets are read whole, in bounded memory"),
    "mix_strategy": refused("give shares: --dataset PATH=SHARE", "concat"),
    "interleave_probs": refused("give shares: --dataset PATH=SHARE"),
    "overwrite_cache": idle("the cache goes by content; see `tisdpo env --clear-cache`"),
    "preprocessing_num_workers": idle("the number of processes that tokenize follows from rows and cores"),
    "preprocessing_batch_size": idle("the number of processes that tokenize follows from rows and cores"),
    "data_shared_file_system": idle("set TISDPO_CACHE_DIR"),
    "tokenized_path": idle("tokens are cached; see --cache-dir"),
    "split_special_tokens": idle("special tokens in rows are text; see --special-tokens-in-data"),
    "packing": idle("rows are packed where that changes nothing; see --layout"),
    "neat_packing": idle("rows are packed where that changes nothing; see --layout"),
    "ignore_pad_token_for_loss": idle("padding is masked by length"),
    "mask_history": idle("only the last answers differ in a preference pair"),
    "default_system": refused("put system messages into the rows, or into a --chat-template"),
    "enable_thinking": refused("use --chat-template-kwargs '{\"enable_thinking\": false}'", True),
    "tool_format": refused("tools are not supported"),
    # Logs
    "plot_loss": idle("every step is in metrics.jsonl in the output directory"),
    "compute_accuracy": idle("rewards/accuracies is in metrics.jsonl"),
    "include_effective_tokens_per_second": idle("tokens_per_second is in metrics.jsonl"),
    "print_param_status": idle("see `tisdpo train-dpo --dry-run`"),
    "early_stopping_steps": where_given("early_stopping_patience"),
    "disable_shuffling": refused("pairs come in random order; see --seed"),
    "use_swanlab": refused(_TRACKERS),
    "swanlab_project": idle(_TRACKERS),
    "swanlab_run_name": idle(_TRACKERS),
    "ray_num_workers": refused("use --num-processes", 1),
}
