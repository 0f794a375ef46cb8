"""`translate`: commands and configs of other trainers as a command line or config that parses to the same settings."""

from __future__ import annotations

import dataclasses
import shlex
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from tisdpo_cli.cli.arguments import read_arguments
from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import build, load
from tisdpo_cli.settings.translate import Translate
from tisdpo_cli.settings.translation import Translation, translate
from tisdpo_cli.settings.wiring import Layer

NEEDED = "--model_name_or_path m --dataset_name d --output_dir o"


def of_words(line: str, **more: Any) -> Translation:
    """The translation of a command line."""
    return translate(Translate(words=shlex.split(line), **more))


def of_file(path: Path, options: dict[str, Any], **more: Any) -> Translation:
    """The translation of a config file."""
    path.write_text(yaml.safe_dump(options), encoding="utf-8")
    return translate(Translate(from_trl=str(path), **more))


def at(done: Translation, name: str) -> Any:
    """A translated setting by its bare name; None if it is not set."""
    return {path.rpartition(".")[2]: value for path, value in done.settings.items()}.get(name)


def settings_of(done: Translation) -> Any:
    """The settings of a translation."""
    return build(COMMANDS[done.command].settings, [Layer("t", done.settings)]).settings


COMMANDS_OF_OTHERS = [
    f"trl dpo {NEEDED}",
    f"trl dpo {NEEDED} --bf16 True --dtype bfloat16 --warmup_ratio 0.1 --learning_rate 5e-7 --beta 0.05 --max_steps -1",
    f"trl dpo {NEEDED} --use_peft --lora_r 8 --lora_target_modules q_proj v_proj --load_in_4bit true --max_length 128",
    f"trl dpo {NEEDED} --loss_type ipo --eval_strategy no --save_strategy no --gradient_checkpointing False",
    f"trl sft {NEEDED} --num_train_epochs 1",
    f"python trl/scripts/dpo.py {NEEDED} --per_device_train_batch_size 2 --gradient_accumulation_steps 4",
    f"accelerate launch --num_processes 4 --multi_gpu --mixed_precision bf16 -m trl.scripts.dpo {NEEDED}",
    f"HF_HOME=/x torchrun --standalone --nproc-per-node=2 examples/scripts/dpo.py {NEEDED}",
]


@pytest.mark.parametrize("line", COMMANDS_OF_OTHERS)
def test_the_printed_command_and_config_parse_to_the_settings(line: str, tmp_path: Path) -> None:
    done = of_words(line)
    words = shlex.split(done.command_line().removeprefix("HF_HOME=/x "))
    assert words[0] == "tisdpo"
    read = read_arguments(words[1:], COMMANDS)
    assert read.faults == []
    given = dict(zip(*[iter(_pairs(read.words[1:]))] * 2, strict=True))
    sets = [given.pop("set")] if "set" in given else []
    loaded = load(COMMANDS[words[1]].settings, given, sets=sets, further=read.further)
    assert loaded.settings == settings_of(done)
    config = tmp_path / "c.yaml"
    config.write_text(done.yaml(), encoding="utf-8")
    assert load(COMMANDS[words[1]].settings, {}, config=config).settings == settings_of(done)


def _pairs(words: list[str]) -> list[Any]:
    """Words with True behind every flag."""
    pairs: list[Any] = []
    for word in words:
        if word.startswith("--"):
            if len(pairs) % 2:
                pairs.append(True)
            pairs.append(word[2:].replace("-", "_"))
        else:
            pairs.append(word)
    return [*pairs, True] if len(pairs) % 2 else pairs


def test_what_trl_does_by_default_is_written_down() -> None:
    trl = pytest.importorskip("trl")
    fields = {field.name: field.default for field in dataclasses.fields(trl.DPOConfig)}
    done = of_words(f"trl dpo {NEEDED}")
    settings = settings_of(done)
    for name, path in (
        ("learning_rate", "optim.learning_rate"), ("warmup_steps", "optim.warmup_steps"), ("seed", "seed"),
        ("num_train_epochs", "optim.epochs"), ("max_grad_norm", "optim.max_grad_norm"), ("beta", "method.beta"),
        ("per_device_train_batch_size", "memory.micro_batch_size"), ("max_length", "data.max_length"),
        ("gradient_accumulation_steps", "memory.gradient_accumulation"), ("weight_decay", "optim.weight_decay"),
        ("gradient_checkpointing", "memory.gradient_checkpointing"), ("lr_scheduler_type", "optim.lr_scheduler"),
    ):  # fmt: skip
        assert str(reduce(getattr, path.split("."), settings)) == str(getattr(fields[name], "value", fields[name])), (
            name
        )
    assert settings.optim.optimizer == "adamw"
    assert any("defaults of TRL" in notice for notice in done.notices)


def test_options_are_read_together() -> None:
    done = of_words(f"trl dpo {NEEDED} --dataset_config c --lora_r 8 --dtype float32 --bf16 true")
    assert (at(done, "dataset"), at(done, "lora_r"), at(done, "dtype")) == ("d:c", None, "bf16")
    assert any("--lora-r" in notice and "without an adapter" in notice for notice in done.notices)
    done = of_words(f"trl dpo {NEEDED} --bf16 false --dtype float32 --use_peft")
    assert (at(done, "dtype"), at(done, "lora_r"), at(done, "lora_alpha")) == ("float32", 16, 32.0)
    assert any("--lora-target" in notice for notice in done.notices)


def test_launchers_become_options(tmp_path: Path) -> None:
    done = of_words(f"A=1 accelerate launch --num_processes 4 --use_fsdp --gpu_ids 0,1 trl dpo {NEEDED}")
    assert (at(done, "num_processes"), at(done, "shard")) == (4, "full")
    assert done.command_line().startswith("A=1 CUDA_VISIBLE_DEVICES=0,1 tisdpo train-dpo ")
    config = tmp_path / "a.yaml"
    config.write_text(
        "distributed_type: FSDP\nnum_processes: 8\nmixed_precision: bf16\nfsdp_config: {fsdp_offload_params: true}\n"
    )
    done = of_words(f"accelerate launch --config_file {config} -m trl.scripts.dpo {NEEDED}")
    assert [at(done, name) for name in ("num_processes", "shard", "cpu_offload", "dtype")] == [8, "full", True, "bf16"]


def test_variables_and_empty_options_of_a_file(tmp_path: Path) -> None:
    options = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o", "weight_decay": None, "seed": None}
    done = of_file(tmp_path / "c.yaml", {**options, "env": {"HF_HUB_OFFLINE": 1}})
    assert done.command_line().startswith("HF_HUB_OFFLINE=1 tisdpo train-dpo ")
    assert (at(done, "weight_decay"), at(done, "seed")) == (None, 42)


def test_a_command_line_may_be_one_word() -> None:
    whole = of_words(f"trl dpo {NEEDED} --beta 0.2")
    assert translate(Translate(words=[f"trl dpo \\\n {NEEDED} --beta 0.2"])) == whole
    with pytest.raises(UsageError, match="cannot be read"):
        translate(Translate(words=["trl 'dpo"]))


def test_the_options_of_a_command_win_over_its_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("model_name_or_path: m\ndataset_name: d\noutput_dir: o\nbeta: 0.3\nlearning_rate: 1e-5\n")
    done = of_words(f"trl dpo --config {config} --beta 0.2")
    assert (at(done, "beta"), at(done, "learning_rate")) == (0.2, 1e-5)


LLAMA_FACTORY = {
    "model_name_or_path": "m", "stage": "dpo", "do_train": True, "finetuning_type": "lora", "lora_rank": 16,
    "lora_target": "all", "pref_beta": 0.2, "pref_loss": "sigmoid", "dataset": "d", "template": "qwen3",
    "cutoff_len": 1024, "max_samples": 10, "output_dir": "o", "logging_steps": 10, "plot_loss": True,
    "report_to": "none", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8, "learning_rate": 5e-6,
    "num_train_epochs": 3.0, "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "bf16": True, "ddp_timeout": 18000,
}  # fmt: skip
AXOLOTL = {
    "base_model": "m", "rl": "dpo", "datasets": [{"path": "d", "split": "train", "type": "chatml.ultra"}],
    "chat_template": "llama3", "val_set_size": 0.05, "output_dir": "o", "sequence_len": 4096, "adapter": "qlora",
    "lora_r": 32, "lora_alpha": 16, "lora_target_linear": True, "wandb_project": None, "micro_batch_size": 2,
    "gradient_accumulation_steps": 4, "num_epochs": 4, "optimizer": "adamw_bnb_8bit", "lr_scheduler": "cosine",
    "learning_rate": 2e-4, "bf16": "auto", "tf32": False, "gradient_checkpointing": True, "warmup_ratio": 0.1,
    "flash_attention": True, "weight_decay": 0.0, "sample_packing": False, "evals_per_epoch": 0,
}  # fmt: skip


@pytest.mark.parametrize("dialect", ["auto", "llama-factory"])
def test_a_config_of_llama_factory_is_translated(tmp_path: Path, dialect: str) -> None:
    done = of_file(tmp_path / "lf.yaml", LLAMA_FACTORY, dialect=dialect)
    assert done.command == "train-dpo"
    for name, value in {
        "lora_r": 16, "lora_target": "all-linear", "beta": 0.2, "max_length": 1024, "limit": 10, "dtype": "bf16",
        "micro_batch_size": 1, "gradient_accumulation": 8, "warmup_steps": 0.1, "optimizer": "adamw", "epochs": 3.0,
    }.items():  # fmt: skip
        assert at(done, name) == value
    full = of_file(tmp_path / "full.yaml", LLAMA_FACTORY | {"finetuning_type": "full"})
    assert at(full, "lora_r") is None
    sft = {name: value for name, value in LLAMA_FACTORY.items() if not name.startswith("pref_")} | {"stage": "sft"}
    assert of_file(tmp_path / "sft.yaml", sft).command == "train-sft"
    assert of_words(str(tmp_path / "lf.yaml")).settings == done.settings


def test_a_config_of_axolotl_is_translated(tmp_path: Path) -> None:
    done = of_file(tmp_path / "ax.yaml", AXOLOTL)
    for name, value in {
        "model": "m", "dataset": "d", "lora_r": 32, "load_in_4bit": True, "lora_target": "all-linear",
        "max_length": 4096, "eval_size": 0.05, "optimizer": "adamw8bit", "epochs": 4.0, "micro_batch_size": 2,
    }.items():  # fmt: skip
        assert at(done, name) == value
    again = of_words(f"axolotl train {tmp_path / 'ax.yaml'} --learning-rate 1e-5")
    assert at(again, "learning_rate") == 1e-5


def test_datasets_with_their_own_columns_need_a_config(tmp_path: Path) -> None:
    several = [{"path": "a", "split": "x"}, {"path": "b"}]
    done = of_file(tmp_path / "ax.yaml", AXOLOTL | {"datasets": several})
    assert yaml.safe_load(done.yaml())["dataset"] == [{"path": "a", "split": "x"}, "b"]
    with pytest.raises(UsageError, match="use --yaml"):
        done.command_line()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (f"trl dpo {NEEDED} --sync_ref_model true --fp16 true --bata 1", ["--sync-ref-model", "--fp16", "--bata"]),
        ("trl dpo", ["--model is required", "--dataset is required", "--output-dir is required"]),
        (f"trl grpo {NEEDED}", ["only dpo and sft"]),
        (f"accelerate launch --config_file /nowhere.yaml trl dpo {NEEDED} --fp16 yes", ["/nowhere.yaml", "--fp16"]),
        (f"accelerate launch --num_machines 2 --use_deepspeed trl dpo {NEEDED}", ["several machines", "DeepSpeed"]),
        (f"deepspeed dpo.py {NEEDED}", ["deepspeed"]),
        ("ls -l", ["no command of a known trainer"]),
        ("accelerate launch", ["no command of a known trainer"]),
    ],
)
def test_everything_without_an_equivalent_is_listed(line: str, said: list[str]) -> None:
    with pytest.raises(UsageError) as caught:
        of_words(line)
    assert caught.value.exit_code == 2
    assert all(word in "\n".join((str(caught.value), *caught.value.details)) for word in said)
