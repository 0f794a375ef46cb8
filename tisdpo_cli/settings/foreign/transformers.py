"""Options of transformers' `TrainingArguments`, older names included, that are no settings here."""

from __future__ import annotations

from typing import Any

from tisdpo_cli.settings.foreign.rules import (
    Outcome,
    Rule,
    always,
    idle,
    is_off,
    mapped,
    number_of,
    refused,
    renamed,
    taken,
    where_given,
)

_EVERY_STEP = "every step is in metrics.jsonl in the output directory"
_TRACKERS = "set by the environment variables of the tracker; see --report-to"
_HUB = "a finished model is uploaded once; see --push-to-hub"
_HUB_TOKEN = "log in with hf auth login; a token is no option"
_FSDP = "use --shard full, which is FSDP2"
_DTYPE = "use --dtype bf16"


def _bf16(value: Any) -> Outcome:
    # In `run` it speaks of the trainings: scores in bf16 would be lost.
    if value is True or value == "full":
        return Outcome({"memory.dtype": "bf16"})
    # Where the type of the weights is given too, it decides.
    return Outcome() if value is None else Outcome(soft={"memory.dtype": "auto" if value == "auto" else "float32"})


def warmup_ratio(value: Any) -> Outcome:
    """A share of the steps; `warmup_steps` takes it, below 1."""
    number = number_of(value)
    if value is None:
        return Outcome()
    if number is None or not 0 <= number < 1:
        return Outcome(fault="must be a share below 1; use --warmup-steps for a number of steps")
    return Outcome({"warmup_steps": number})


def _resume(value: Any) -> Outcome:
    if value is None:
        return Outcome()
    if value is True:
        return Outcome(notice="an interrupted run is resumed anyway; see --resume")
    if is_off(value):
        return Outcome({"resume": "never"}, notice="taken as --resume never")
    return Outcome({"resume": str(value)}, notice="taken as --resume")


def fsdp(value: Any) -> Outcome:
    """`full_shard auto_wrap offload`, as words or a list."""
    words = set(str(value).replace(",", " ").replace("[", " ").replace("]", " ").replace("'", " ").split())
    if is_off(value) or words == {"no_shard"}:
        return Outcome()
    if value is not True and "full_shard" not in words:
        return Outcome(fault=_FSDP)
    offload = {"cpu_offload": True} if "offload" in words else {}
    return Outcome({"shard": "full", **offload}, notice="taken as --shard full, which is FSDP2")


def fsdp_config(value: Any) -> Outcome:
    """The options of FSDP that have a setting here; layers are wrapped one by one anyway."""
    if is_off(value):
        return Outcome()
    if not isinstance(value, dict):
        return Outcome(fault=f"{_FSDP}, with --cpu-offload")
    names = {str(key).removeprefix("fsdp_"): inner for key, inner in value.items()}
    asked = {"cpu_offload": "offload_params", "gradient_checkpointing": "activation_checkpointing"}
    soft = {setting: True for setting, name in asked.items() if names.get(name) is True}
    return Outcome(soft={"shard": "full", **soft}, notice="taken as --shard full, which wraps every decoder layer")


_NO_EVALUATION = Outcome({"eval_pairs": 0}, notice="taken as --eval-pairs 0")
_EVALUATION = mapped(
    {
        "no": _NO_EVALUATION,
        False: _NO_EVALUATION,
        None: Outcome(),
        "steps": Outcome(notice="evaluated every --eval-every steps, and before and after training"),
    },
    "use --eval-every, a number of steps",
)
_NO_CHECKPOINT = Outcome({"save_every": None}, notice="taken as --set save_every=null: only when interrupted")
_SAVE = mapped(
    {
        "no": _NO_CHECKPOINT,
        False: _NO_CHECKPOINT,
        None: Outcome(),
        "steps": Outcome(notice="a checkpoint every --save-every steps"),
    },
    "use --save-every, a number of steps",
)

TRANSFORMERS: dict[str, Rule] = {
    # Precision and speed
    "bf16": _bf16,
    "fp16": refused(f"fp16 is not supported; {_DTYPE}"),
    "half_precision_backend": idle("PyTorch's autocast is used"),
    "bf16_full_eval": refused(f"an evaluation computes as the training does; {_DTYPE}"),
    "fp16_full_eval": refused(f"fp16 is not supported; {_DTYPE}"),
    "tf32": refused("TF32 is not used; use --dtype bf16"),
    "torch_dtype": taken("dtype"),
    "torch_compile": refused("torch.compile is not supported"),
    "torch_compile_backend": refused("torch.compile is not supported"),
    "torch_compile_mode": refused("torch.compile is not supported"),
    "activation_checkpointing": taken("gradient_checkpointing"),
    "activation_checkpointing_kwargs": idle("checkpoints are not reentrant"),
    "gradient_checkpointing_kwargs": idle("checkpoints are not reentrant"),
    "liger_kernel_config": refused("which kernels are used is fixed; see --liger-kernel"),
    "use_cache": idle("training uses no key-value cache"),
    "torch_empty_cache_steps": idle("a token budget bounds memory; see --tokens-per-microbatch"),
    "auto_find_batch_size": idle("a token budget bounds memory; see --tokens-per-microbatch"),
    "use_cpu": refused("set the variable ACCELERATE_USE_CPU=1"),
    "no_cuda": refused("set the variable ACCELERATE_USE_CPU=1"),
    # Optimization
    "warmup_ratio": warmup_ratio,
    "optim_args": refused("optimizers have no further parameters; see --optimizer"),
    "optim_target_modules": refused("every trained parameter has the same optimizer"),
    "average_tokens_across_devices": idle("a batch is averaged over all processes anyway"),
    "label_smoothing_factor": refused("use --label-smoothing, that of the preference loss"),
    "neftune_noise_alpha": refused("noise on embeddings is not supported"),
    "per_gpu_train_batch_size": renamed("micro_batch_size"),
    "per_gpu_eval_batch_size": renamed("eval_batch_size"),
    # Logs and trackers
    "logging_steps": idle(_EVERY_STEP),
    "logging_strategy": idle(_EVERY_STEP),
    "logging_first_step": idle(_EVERY_STEP),
    "logging_dir": idle(_EVERY_STEP),
    "logging_nan_inf_filter": idle("a loss that is not finite ends the run"),
    "log_on_each_node": idle("the first process alone reports"),
    "log_level": idle("see --debug"),
    "log_level_replica": idle("the first process alone reports"),
    "disable_tqdm": idle("without a terminal there is no bar"),
    "include_num_input_tokens_seen": idle("tokens_per_second is in metrics.jsonl"),
    "include_tokens_per_second": idle("tokens_per_second is in metrics.jsonl"),
    "skip_memory_metrics": idle("--dry-run predicts memory"),
    "trackio_space_id": refused(_TRACKERS, "trackio"),
    "trackio_bucket_id": refused(_TRACKERS),
    "trackio_static_space_id": refused(_TRACKERS),
    "push_to_hub_model_id": where_given("push_to_hub"),
    "push_to_hub_token": refused(_HUB_TOKEN),
    "hub_model_id": where_given("push_to_hub"),
    "hub_token": refused(_HUB_TOKEN),
    "hub_private_repo": renamed("hub_private"),
    "hub_strategy": idle(_HUB),
    "hub_always_push": refused(_HUB),
    "hub_revision": refused(_HUB),
    # Evaluation
    "eval_strategy": _EVALUATION,
    "evaluation_strategy": _EVALUATION,
    "eval_on_start": idle("training begins with an evaluation anyway"),
    "eval_delay": refused("the first evaluation is before training"),
    "eval_accumulation_steps": idle("metrics are summed as they are computed"),
    "eval_do_concat_batches": idle("metrics are summed as they are computed"),
    "eval_use_gather_object": idle("metrics are summed as they are computed"),
    "batch_eval_metrics": idle("metrics are summed as they are computed"),
    "prediction_loss_only": idle("every metric is in metrics.jsonl"),
    "include_for_metrics": refused("see `tisdpo evaluate`"),
    "do_train": idle("a training trains"),
    "do_eval": idle("a split to evaluate is evaluated if there is one; see --eval-pairs"),
    "do_predict": refused("use `tisdpo evaluate`"),
    # Checkpoints
    "save_strategy": _SAVE,
    "save_only_model": idle("checkpoints hold what an exact resume needs"),
    "save_on_each_node": idle("the first process alone saves"),
    "save_safetensors": always("models are always saved as safetensors"),
    "enable_jit_checkpoint": idle("an interruption saves a checkpoint anyway"),
    "overwrite_output_dir": renamed("overwrite"),
    "resume_from_checkpoint": _resume,
    "ignore_data_skip": refused("a run is resumed exactly where it stopped"),
    "restore_callback_states_from_checkpoint": idle("a run is resumed exactly where it stopped"),
    "full_determinism": idle("the same command gives the same bytes anyway"),
    "data_seed": refused("use --seed, which also shuffles the data"),
    # Data
    "dataloader_drop_last": refused("every pair counts once; the last batch may be smaller"),
    **dict.fromkeys(
        (
            "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
            "dataloader_prefetch_factor", "dataloader_multiprocessing_context", "dataloader_in_order",
        ),
        idle("batches come from memory-mapped tokens"),
    ),
    "remove_unused_columns": idle("further columns are left alone"),
    "label_names": idle("a preference loss has no labels"),
    "group_by_length": idle("rows are packed without padding, in random order"),
    "train_sampling_strategy": mapped(
        {"random": Outcome(), "group_by_length": Outcome(notice="rows are packed without padding, in random order")},
        "pairs come in random order",
    ),
    "length_column_name": idle("lengths are counted"),
    # Processes
    "fsdp": fsdp,
    "fsdp_config": fsdp_config,
    "fsdp_min_num_params": idle("--shard full wraps every decoder layer"),
    "fsdp_transformer_layer_cls_to_wrap": idle("--shard full wraps every decoder layer"),
    "deepspeed": refused(_FSDP),
    "accelerator_config": refused("use accelerate launch; see --num-processes"),
    "parallelism_config": refused("there is no tensor or context parallelism; see --shard"),
    "local_rank": idle("set by the launcher"),
    **dict.fromkeys(
        (
            "ddp_backend", "ddp_timeout", "ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers",
            "ddp_static_graph",
        ),
        idle("the defaults of PyTorch's DDP are used"),
    ),
    "debug": refused("see --debug and --profile"),
}  # fmt: skip
