"""Keys of axolotl's YAML that are no settings here, beside those that it has from transformers."""

from __future__ import annotations

from typing import Any

from tisdpo_cli.settings.foreign.rules import (
    Outcome,
    Rule,
    idle,
    is_off,
    mapped,
    refused,
    taken,
    where_given,
)

_TRACKERS = "use --report-to, and the environment variables of the tracker"
_AUTO = "models and tokenizers are loaded by transformers' auto classes"
_LAYOUT = "attention is chosen by --layout"
_PACKED = "rows are packed where that changes nothing; see --layout"
_SCHEDULES = "see --lr-scheduler"
_PARALLEL = "there is no tensor or context parallelism; see --shard"
# Where the columns of a preference dataset are named, beside the dataset or in its type.
_COLUMNS = {
    "field_prompt": "prompt_column",
    "field_messages": "prompt_column",
    "field_chosen": "chosen_column",
    "field_rejected": "rejected_column",
}
# What says how rows become text, which the columns and the chat template do here, and TRL's list of columns to keep.
_SAID_BY_ROWS = {"type", "ds_type", "trust_remote_code", "columns"}


def datasets(value: Any) -> Outcome:
    """`datasets:` with one or more of path, split and columns."""
    entries = [value] if isinstance(value, dict) else value
    if is_off(value):
        return Outcome()
    if not isinstance(entries, list) or not all(isinstance(entry, dict) and entry.get("path") for entry in entries):
        return Outcome(fault="must be a list of datasets, each with a path")
    unknown = {str(name) for entry in entries for name, inner in entry.items() if not _is_known(str(name), inner)}
    if unknown:
        return Outcome(fault=f"{', '.join(sorted(unknown))}: no such setting of a dataset here")
    parts = [_part(entry) for entry in entries]
    notice = "taken as --dataset; rows must be prompt, chosen, rejected, or see --data-format"
    if len(parts) > 1:
        return Outcome({"dataset": parts}, notice=notice)
    own = dict(parts[0])
    return Outcome({"dataset": own.pop("path"), **own}, notice=notice)


def _is_known(name: str, value: Any) -> bool:
    if name in ("roles", "message_property_mappings") and isinstance(value, dict):
        # Names that stay as they are.
        return all(inner in (key, [key]) for key, inner in value.items())
    return name in {"path", "name", "split", *_COLUMNS, *_SAID_BY_ROWS} or is_off(value)


def _part(entry: dict[str, Any]) -> dict[str, Any]:
    path = f"{entry['path']}:{entry['name']}" if entry.get("name") else entry["path"]
    kind = entry["type"] if isinstance(entry.get("type"), dict) else {}
    columns = {own: name for field, own in _COLUMNS.items() if (name := entry.get(field) or kind.get(field))}
    # Those are the defaults here.
    columns = {own: name for own, name in columns.items() if f"{name}_column" != own}
    split = {"split": entry["split"]} if entry.get("split", "train") != "train" else {}
    return {"path": path, **split, **columns}


def _adapter(value: Any) -> Outcome:
    if is_off(value):
        return Outcome()
    if value not in ("lora", "qlora"):
        return Outcome(fault="use --lora-r, the rank of a LoRA adapter")
    own = {"load_in_4bit": True} if value == "qlora" else {}
    return Outcome(soft={"lora_r": 8, **own}, notice="an adapter: --lora-r 8 unless given")


def _linear(value: Any) -> Outcome:
    return Outcome() if is_off(value) else Outcome({"lora_target": "all-linear"})


def _checkpointing(value: Any) -> Outcome:
    return Outcome() if is_off(value) else Outcome(fault="use --gradient-checkpointing")


def _trl(value: Any) -> Outcome:
    if is_off(value):
        return Outcome()
    if isinstance(value, dict) and set(value) <= {"beta", "sync_ref_model"} and not value.get("sync_ref_model"):
        return Outcome({"beta": value["beta"]} if value.get("beta") is not None else {})
    return Outcome(fault="only beta has a setting here; see --beta")


def _excess(value: Any) -> Outcome:
    if value in (None, "truncate"):
        return Outcome(notice="rows beyond --max-length are truncated")
    return Outcome(fault="rows beyond --max-length are truncated, never dropped")


def _special_tokens(value: Any) -> Outcome:
    if isinstance(value, dict) and set(value) <= {"pad_token"}:
        return Outcome(notice="padding is masked by length")
    return Outcome() if is_off(value) else Outcome(fault="special tokens are those of the tokenizer; set them there")


def _per_epoch(setting: str) -> Rule:
    option = "--" + setting.replace("_", "-")

    def rule(value: Any) -> Outcome:
        return Outcome() if is_off(value) else Outcome(fault=f"use {option}, a number of steps")

    return rule


AXOLOTL: dict[str, Rule] = {
    # What is trained
    "rl": mapped(
        {
            "dpo": Outcome(notice="`tisdpo train-dpo` trains with DPO, `tisdpo run` the whole method"),
            "ipo": Outcome({"loss": "ipo"}, {"length_normalize": True}, "taken as --loss ipo --length-normalize"),
        },
        "only dpo and ipo",
    ),
    "rl_beta": where_given("beta"),
    "dpo_beta": where_given("beta"),
    "trl": _trl,
    "dpo_loss_type": mapped(
        {"sigmoid": Outcome({"loss": "dpo"}), "ipo": Outcome({"loss": "ipo"}, {"length_normalize": True})},
        "see --loss for the objectives",
    ),
    "dpo_loss_weights": refused("there is one loss at a time", 1),
    "dpo_use_weighting": refused("weights of WPO are not supported; token weights come from `tisdpo estimate`"),
    "dpo_use_liger_kernel": idle("the head is computed in chunks anyway"),
    "dpo_use_logits_to_keep": idle("only scored positions reach the head"),
    "dpo_padding_free": idle(_PACKED),
    "dpo_norm_loss": refused("see --length-normalize of --loss ipo"),
    "dpo_generate_during_eval": refused("use `tisdpo evaluate --samples FILE`"),
    **dict.fromkeys(("orpo_alpha", "cpo_alpha", "kto_desirable_weight", "kto_undesirable_weight"),
                    refused("see --loss for the objectives")),
    "base_model": taken("model"),
    **dict.fromkeys(("base_model_config", "tokenizer_config", "revision_of_model"),
                    refused("config and tokenizer are those of --model")),
    **dict.fromkeys(("model_type", "tokenizer_type", "tokenizer_use_fast", "tokenizer_legacy", "processor_type",
                     "is_llama_derived_model", "is_mistral_derived_model", "is_qwen_derived_model",
                     "is_falcon_derived_model"), idle(_AUTO)),
    **dict.fromkeys(("overrides_of_model_config", "overrides_of_model_kwargs", "plugins", "trainer_cls",
                     "unfrozen_parameters"), refused("models run as transformers defines them")),
    "special_tokens": _special_tokens,
    "tokens": refused("the vocabulary stays as it is"),
    "eot_tokens": idle("the stop of a conversation follows from its template"),
    "adapter": _adapter,
    "lora_model_dir": refused("use --model with the adapter's directory"),
    "lora_target_linear": _linear,
    "lora_fan_in_fan_out": idle("found out from the layer"),
    "peft_use_dora": where_given("dora"),
    "peft_use_rslora": where_given("rslora"),
    **dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel"), idle("there are no kernels of adapters")),
    "relora": refused("adapters are not merged while training"),
    "gptq": refused("use --load-in-4bit"),
    # Data
    "datasets": datasets,
    "test_datasets": refused("give a --dataset with two splits; see --eval-split"),
    "sequence_len": taken("max_length"),
    "max_prompt_len": where_given("max_prompt_length"),
    "val_set_size": where_given("eval_size"),
    "excess_length_strategy": _excess,
    "dataset_prepared_path": idle("tokens are cached; see --cache-dir"),
    "dataset_processes": idle("the number of processes that tokenize follows from rows and cores"),
    "dataset_keep_in_memory": idle("rows are mapped into memory"),
    "dataset_exact_deduplication": refused("remove duplicates from the dataset first"),
    "shuffle_merged_datasets": idle("pairs come in random order; see --seed"),
    "skip_prepare_dataset": refused("rows are always read and tokenized"),
    "train_on_inputs": refused("only responses are trained on; see train-sft --train-on-prompt"),
    **dict.fromkeys(
        ("sample_packing", "eval_sample_packing", "pad_to_sequence_len", "batch_flattening"), idle(_PACKED)
    ),
    "default_system_message": refused("put system messages into the rows, or into a --chat-template"),
    "chat_template_jinja": refused("use --chat-template FILE"),
    # Attention
    **dict.fromkeys(
        ("flash_attention", "xformers_attention", "sdp_attention", "flex_attention", "eager_attention",
         "sage_attention", "s2_attention", "flash_attn_cross_entropy", "flash_attn_rms_norm", "flash_attn_fuse_mlp"),
        idle(_LAYOUT),
    ),
    "chunked_cross_entropy": idle("the head is computed in chunks anyway"),
    # Optimization
    "num_epochs": taken("epochs"),
    "bfloat16": refused("weights stay in float32; use --dtype bf16"),
    "float16": refused("fp16 is not supported; use --dtype bf16"),
    "float32": lambda value: Outcome() if is_off(value) else Outcome({"dtype": "float32"}),
    "fp8": refused("fp8 is not supported; use --dtype bf16"),
    "cosine_min_lr_ratio": refused(_SCHEDULES),
    "cosine_constant_lr_ratio": refused(_SCHEDULES),
    "lr_quadratic_warmup": refused("the warm-up is linear"),
    "lr_groups": refused("every parameter has the same learning rate"),
    "embedding_lr": refused("every parameter has the same learning rate"),
    "embedding_lr_scale": refused("every parameter has the same learning rate"),
    "loss_watchdog_threshold": idle("a loss that is not finite ends the run"),
    "loss_watchdog_patience": idle("a loss that is not finite ends the run"),
    "layer_offloading": refused("use --shard full --cpu-offload"),
    "selective_checkpointing": _checkpointing,
    # Evaluation and checkpoints
    "evals_per_epoch": _per_epoch("eval_every"),
    "saves_per_epoch": _per_epoch("save_every"),
    "auto_resume_from_checkpoints": idle("an interrupted run is resumed anyway; see --resume"),
    "save_first_step": idle("see --save-every"),
    "eval_table_size": refused("use `tisdpo evaluate --samples FILE`"),
    "eval_max_new_tokens": idle("see `tisdpo evaluate --max-new-tokens`"),
    "do_bench_eval": refused("use `tisdpo evaluate`"),
    "do_causal_lm_eval": refused("use `tisdpo evaluate`"),
    # Logs
    **dict.fromkeys(("use_wandb", "use_mlflow", "use_comet", "use_tensorboard", "use_trackio"), refused(_TRACKERS)),
    **dict.fromkeys(
        ("wandb_project", "wandb_entity", "wandb_watch", "wandb_name", "wandb_run_id", "wandb_mode",
         "wandb_log_model", "mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "comet_project_name",
         "comet_workspace", "trackio_project_name", "trackio_run_name"),
        refused(_TRACKERS),
    ),
    "gc_steps": idle("a token budget bounds memory; see --tokens-per-microbatch"),
    "strict": idle("unknown names are always refused"),
    # Processes
    "fsdp_version": refused("--shard full is FSDP2", 2),
    "fsdp_final_state_dict_type": idle("the model is saved whole"),
    "dp_shard_size": refused("use --shard full", 1),
    "dp_replicate_size": refused("--shard full shards over all processes", 1),
    **dict.fromkeys(("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree"),
                    refused(_PARALLEL, 1)),
    "device_map": refused("see --shard full", "auto"),
    "ddp": idle("see --num-processes"),
    "world_size": idle("set by the launcher"),
    "experimental_skip_move_to_device": idle("the device is chosen by the launcher"),
    "use_ray": refused("use --num-processes"),
}  # fmt: skip
