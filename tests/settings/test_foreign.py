"""Options of other trainers: the same outcome from every source, and none of TRL's unknown."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import yaml

from tisdpo_cli.cli.arguments import read_arguments
from tisdpo_cli.errors import UsageError
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.foreign.rules import is_off, plain
from tisdpo_cli.settings.foreign.table import EVERY, foreign_options, without_settings
from tisdpo_cli.settings.names import names
from tisdpo_cli.settings.sources import Loaded, load

NEEDED = {"model": "m", "dataset": "d", "output_dir": "o"}
VALUES = (None, True, False, 0, 1, 0.5, "x", [], ["x", "y"], {}, {"x": 1})
SOURCES = ("flag", "--set", "file", "environment")


@pytest.fixture
def loads(tmp_path: Path):
    """Load settings of `train-dpo` with options of others from one source."""

    def run(
        source: str, options: dict[str, Any], command: str = "train-dpo", needed: dict[str, Any] = NEEDED
    ) -> Loaded:
        given: dict[str, Any] = {}
        if source == "flag":
            words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
            typed = read_arguments([command, *words], COMMANDS)
            given = {"further": typed.further, "faults": typed.faults}
            names_typed = [word[2:].replace("-", "_") for word in typed.words[1::2]]
            needed = needed | dict(zip(names_typed, typed.words[2::2], strict=True))
        elif source == "--set":
            given = {"sets": [f"{name}={value}" for name, value in options.items()]}
        elif source == "environment":
            given = {"environ": {f"TISDPO_{name.upper()}": str(value) for name, value in options.items()}}
        else:
            given = {"config": tmp_path / "c.yaml"}
            given["config"].write_text(yaml.safe_dump(options), encoding="utf-8")
        return load(COMMANDS[command].settings, needed, **given)

    return run


def at(loaded: Loaded, path: str) -> Any:
    """The value of a setting by its dotted name."""
    return reduce(getattr, path.split("."), loaded.settings)


# ---------------------------------------------------------------- three outcomes, four sources


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        ({"bf16": "True"}, "memory.dtype", "bf16"),
        ({"bf16": "false"}, "memory.dtype", "float32"),
        ({"bf16": "true", "dtype": "bfloat16"}, "memory.dtype", "bf16"),
        ({"bf16": "false", "torch_dtype": "bfloat16"}, "memory.dtype", "bf16"),
        ({"dtype": "torch.float32"}, "memory.dtype", "float32"),
        ({"warmup_ratio": "0.1"}, "optim.warmup_steps", 0.1),
        ({"warmup_ratio": "0"}, "optim.warmup_steps", 0),
        ({"max_steps": "-1"}, "optim.max_steps", None),
        ({"loss_type": "sigmoid"}, "method.loss", "dpo"),
        ({"loss_type": "ipo"}, "method.length_normalize", True),
        ({"use_peft": "true"}, "adapter.lora_alpha", 32.0),
        ({"use_peft": "true", "lora_r": "4"}, "adapter.lora_r", 4),
        ({"eval_strategy": "no"}, "evaluation.eval_pairs", 0),
        ({"save_strategy": "no"}, "checkpoints.save_every", None),
        ({"resume_from_checkpoint": "out/checkpoint-5"}, "checkpoints.resume", "out/checkpoint-5"),
        ({"fsdp": "full_shard auto_wrap offload"}, "memory.cpu_offload", True),
        ({"activation_checkpointing": "True"}, "memory.gradient_checkpointing", True),
        ({"overwrite_output_dir": "True"}, "overwrite", True),
        # LLaMA-Factory
        ({"cutoff_len": "1024"}, "data.max_length", 1024),
        ({"pref_beta": "0.3"}, "method.beta", 0.3),
        ({"pref_loss": "sigmoid"}, "method.loss", "dpo"),
        ({"finetuning_type": "lora", "lora_target": "all"}, "adapter.lora_target", "all-linear"),
        ({"lora_rank": "16"}, "adapter.lora_r", 16),
        ({"max_samples": "100"}, "data.limit", 100),
        ({"val_size": "0.1"}, "data.eval_size", 0.1),
        ({"lora_rank": "4", "quantization_bit": "4"}, "adapter.load_in_4bit", True),
        # axolotl
        ({"sequence_len": "2048"}, "data.max_length", 2048),
        ({"num_epochs": "4"}, "optim.epochs", 4.0),
        ({"rl": "ipo"}, "method.loss", "ipo"),
        ({"rl_beta": "0.2"}, "method.beta", 0.2),
        ({"adapter": "qlora", "lora_r": "32"}, "adapter.load_in_4bit", True),
        ({"val_set_size": "0"}, "data.eval_size", None),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_an_option_means_the_same_in_every_source(loads, source: str, options: dict, path: str, value: Any) -> None:
    assert at(loads(source, options), path) == value


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("fp16", "True", "use --dtype bf16"),
        ("dtype", "float16", "use bf16"),
        ("warmup_ratio", "5", "--warmup-steps"),
        ("disable_dropout", "false", "dropout is always off"),
        ("deepspeed", "zero3.json", "--shard full"),
        ("eval_strategy", "epoch", "--eval-every"),
        ("f_divergence_type", "js_divergence", "reverse KL"),
        ("loss_type", "hinge", "--loss"),
        ("load_in_8bit", "yes", "--load-in-4bit"),
        ("model_revision", "v2", "hf download"),
        ("stage", "kto", "train-dpo"),
        ("saves_per_epoch", "4", "--save-every"),
        ("rl", "grpo", "dpo"),
    ],
)
def test_what_is_not_done_is_refused_with_what_to_use(loads, source: str, name: str, value: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        loads(source, {name: value})
    message = str(caught.value)
    spelled = {"flag": name.replace("_", "-"), "environment": name.upper()}.get(source, name)
    assert spelled in message
    assert said in message
    assert "did you mean" not in message


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("logging_steps", "10"), ("padding_free", "true"), ("disable_dropout", "true"),
        ("precompute_ref_log_probs", "true"), ("attn_implementation", "flash_attention_2"),
        ("dataloader_num_workers", "4"), ("torch_compile", "none"), ("fp16", "false"),
        ("f_divergence_type", "reverse_kl"), ("template", "qwen3"), ("sample_packing", "false"),
        ("gradient_checkpointing_kwargs", "{use_reentrant: true}"),
    ],
)  # fmt: skip
def test_what_changes_nothing_is_taken_in_one_line(loads, source: str, name: str, value: str) -> None:
    # On a command line these are one word in quotes.
    done = loads("--set" if source == "flag" and " " in value else source, {name: value})
    (notice,) = done.notices
    assert name.replace("_", "-") in notice.lower().replace("_", "-")
    assert "\n" not in notice
    assert done.settings == loads("file", {}).settings


def test_an_option_of_a_stage_stays_in_its_stage(loads) -> None:
    done = load(COMMANDS["run"].settings, NEEDED | {"train_dpo": {"warmup_ratio": 0.2, "bf16": True}, "bf16": False})
    assert at(done, "train_dpo.optim.warmup_steps") == 0.2
    assert (at(done, "train_dpo.memory.dtype"), at(done, "train.memory.dtype")) == ("bf16", "float32")


def test_bf16_of_a_pipeline_is_that_of_its_trainings() -> None:
    done = load(COMMANDS["run"].settings, NEEDED, further=[("bf16", "True"), ("learning_rate", "1e-4")])
    assert (at(done, "train_dpo.memory.dtype"), at(done, "train.memory.dtype")) == ("bf16", "bf16")
    assert at(done, "estimate.dtype") == "auto"
    assert at(done, "train_dpo.optim.learning_rate") == 1e-4
    needed = {"forward": "f", "reverse": "r", "dataset": "d", "output_dir": "o"}
    assert at(load(COMMANDS["estimate"].settings, needed, sets=["bf16=true"]), "dtype") == "bf16"
    # A variable is for all commands.
    assert at(load(COMMANDS["estimate"].settings, needed, environ={"TISDPO_BF16": "1"}), "dtype") == "auto"


def test_an_option_that_another_command_lacks_is_refused_but_left_alone_in_the_environment() -> None:
    needed = {"scored": "s"}
    with pytest.raises(UsageError, match="inspect-weights has no --warmup-steps"):
        load(COMMANDS["inspect-weights"].settings, needed, sets=["warmup_ratio=0.1"])
    load(COMMANDS["inspect-weights"].settings, needed, environ={"TISDPO_WARMUP_RATIO": "0.1"})


def test_a_setting_and_its_translation_must_not_differ(loads) -> None:
    with pytest.raises(UsageError, match="given twice, once as 'bf16'"):
        loads("file", {"dtype": "float32", "bf16": True})


def test_what_is_on_by_default_elsewhere_is_switched_off_as_there(loads) -> None:
    read = read_arguments(["train-dpo", "--no_gradient_checkpointing", "--no_remove_unused_columns"], COMMANDS)
    done = load(COMMANDS["train-dpo"].settings, NEEDED, further=read.further, config=None)
    assert done.origins["memory.gradient_checkpointing"] == "flag"
    assert at(done, "memory.gradient_checkpointing") is False
    read = read_arguments(["train-dpo", "--no_disable_dropout", "--no_bata", "--no-ref-cache"], COMMANDS)
    with pytest.raises(UsageError, match=r"--disable-dropout: dropout is always off; .*No such option: --no-bata"):
        load(COMMANDS["train-dpo"].settings, NEEDED, further=read.further)
    assert read.words == ["train-dpo", "--no-ref-cache"]


@pytest.mark.parametrize("source", SOURCES)
def test_steps_are_no_share(loads, source: str) -> None:
    with pytest.raises(UsageError, match=r"(?i)eval.(steps|every): must be a number of steps, not a share"):
        loads(source, {"eval_steps": "0.1"})
    assert at(loads("file", {"save_total_limit": None}), "checkpoints.keep_checkpoints") == 2


def test_lists_and_mappings_of_yaml_are_taken(loads) -> None:
    datasets = [{"path": "a", "split": "train", "type": "chatml.ultra"}, {"path": "b", "split": "test", "name": "c"}]
    done = loads("file", {"datasets": datasets}, needed={"model": "m", "output_dir": "o"})
    assert [part.plain() for part in at(done, "dataset")] == ["a", {"path": "b:c", "split": "test"}]
    one = {"path": "a", "type": {"field_chosen": "good"}}
    done = loads("file", {"datasets": [one]}, needed={"model": "m", "output_dir": "o"})
    assert (at(done, "dataset"), at(done, "data.chosen_column")) == ("a", "good")
    turns = {"field_messages": "talk", "roles": {"user": ["user"]}, "message_property_mappings": {"role": "role"}}
    done = loads("file", {"datasets": [{"path": "a", **turns}]}, needed={"model": "m", "output_dir": "o"})
    assert at(done, "data.prompt_column") == "talk"
    with pytest.raises(UsageError, match="data_files, roles: no such setting"):
        loads("file", {"datasets": [{"path": "a", "data_files": "x", "roles": {"user": ["human"]}}]}, needed={})
    done = loads("file", {"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"], "trl": {"beta": 0.4}})
    assert (at(done, "adapter.lora_target"), at(done, "method.beta")) == ("q_proj,v_proj", 0.4)
    done = loads("file", {"fsdp_version": 2, "fsdp_config": {"offload_params": True, "reshard_after_forward": True}})
    assert (at(done, "memory.shard"), at(done, "memory.cpu_offload")) == ("full", True)


def test_all_faults_of_all_sources_are_one_message(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("fp16: true\nlerning_rate: 1\n", encoding="utf-8")
    typed = ["train-dpo", "--deepspeed", "z.json", "--bata", "3", "stray", "--sync_ref_model", "--max_steps"]
    read = read_arguments(typed, COMMANDS)
    with pytest.raises(UsageError) as caught:
        load(
            COMMANDS["train-dpo"].settings,
            {"beta": "0"},
            config=config,
            sets=["neftune_noise_alpha=5", "foo=1"],
            environ={"TISDPO_LOAD_IN_8BIT": "1", "TISDPO_BETTA": "1"},
            further=read.further,
            faults=read.faults,
        )
    said = "\n".join(caught.value.details)
    for name in (
        "--deepspeed", "--bata", "--sync-ref-model", "--max-steps needs a value", "neftune_noise_alpha", "foo",
        "TISDPO_LOAD_IN_8BIT", "TISDPO_BETTA", "c.yaml: fp16", "lerning_rate", "--beta (method.beta)",
        "--model is required",
    ):  # fmt: skip
        assert name in said
    assert len(caught.value.details) == 14


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("typed", "words", "further"),
    [
        ("--gradient_checkpointing True --lr 1", "--gradient-checkpointing|True", None),
        ("--gradient-checkpointing", "", []),
        ("--lora_target_modules q_proj v_proj --lr 1", "--lora-target|q_proj,v_proj|--learning-rate|1", []),
        ("--fsdp_config {} --local_rank -1", "", [("fsdp_config", "{}"), ("local_rank", "-1")]),
        ("--loss_weights 1 2 --bf16", "", [("loss_weights", ["1", "2"]), ("bf16", True)]),
        ("--overwrite=false", "", [("overwrite", "false")]),
    ],
)
def test_values_of_flags_and_lists_are_read_as_others_write_them(typed: str, words: str, further: Any) -> None:
    read = read_arguments(["train-dpo", *typed.split()], COMMANDS)
    assert read.faults == []
    if further is None:
        further, words = [("gradient_checkpointing", "True")], "--learning-rate|1"
    assert read.further == further
    assert "|".join(read.words[1:]) == (words or "|".join(read.words[1:]))


# ---------------------------------------------------------------- the table


def test_no_entry_shadows_a_setting() -> None:
    assert not set(foreign_options()) & names(COMMANDS["run"].settings)
    assert "run_name" not in without_settings(EVERY, ["run_name"])
    assert len(foreign_options()) > 300


def test_every_entry_answers_every_kind_of_value() -> None:
    known = names(COMMANDS["run"].settings)
    for name, rule in EVERY.items():
        for value in VALUES:
            outcome = rule(value)
            assert "\n" not in outcome.notice + outcome.fault, name
            assert not (outcome.fault and outcome.values), name
            assert set(outcome.values) | set(outcome.soft) <= known, name


def test_options_and_commands_that_are_recommended_exist() -> None:
    options = {f"--{name.replace('_', '-')}" for spec in COMMANDS.values() for name in names(spec.settings)}
    for name, rule in EVERY.items():
        for value in VALUES:
            outcome = rule(value)
            said = outcome.notice + outcome.fault
            spoken = set(re.findall(r"(?<![\w-])--[A-Za-z][\w-]*", said))
            assert spoken <= options | {"--set", "--debug", "--revision"}, name
            assert set(re.findall(r"`tisdpo ([\w-]+)", said)) <= set(COMMANDS), name


@pytest.mark.parametrize(
    ("text", "value"),
    [("True", True), ("no", False), ("None", None), ("1e-5", 1e-5), ("-1", -1), ("[a, b]", ["a", "b"]), ("a b", "a b"),
     ('{"a": 1}', {"a": 1}), (["x"], "x"), ("", None)],
)  # fmt: skip
def test_values_have_one_form(text: Any, value: Any) -> None:
    assert plain(text) == value
    assert type(plain(text)) is type(value)


def test_true_asks_for_something() -> None:
    assert [value for value in (None, False, 0, [], {}, True, 1, "x") if not is_off(value)] == [True, 1, "x"]


# ---------------------------------------------------------------- TRL


def fields() -> Iterator[tuple[str, Any]]:
    """Name and default of every option of `trl dpo`."""
    trl = pytest.importorskip("trl")
    for kind in (trl.ScriptArguments, trl.ModelConfig, trl.DPOConfig):
        for field in dataclasses.fields(kind):
            if field.default is not dataclasses.MISSING:
                yield field.name, field.default
            elif field.default_factory is not dataclasses.MISSING:
                yield field.name, field.default_factory()


def test_every_option_of_trl_is_known(loads) -> None:
    known = set(foreign_options()) | names(COMMANDS["train-dpo"].settings)
    assert {name for name, _ in fields()} - known == set()


def test_trl_commands_with_every_option_have_no_unknown_one(loads) -> None:
    """Each with TRL's own default; what is refused by value is refused by name."""
    given = {name: value for name, value in fields() if value is not None and name not in ("output_dir", "debug")}
    assert len(given) > 81
    options = {name: value[0] if isinstance(value, list) and value else value for name, value in given.items()}
    options = {name: value for name, value in options.items() if value not in ("", [], {})}
    faults: tuple[str, ...] = ()
    try:
        loads("flag", options)
    except UsageError as fault:
        faults = fault.details or (str(fault),)
    assert [fault for fault in faults if "No such option" in fault] == []
    # Options of adapters without an adapter, which TRL ignores.
    assert all("lora" in fault for fault in faults), faults


def test_the_options_that_the_guide_names_are_known() -> None:
    guide = Path(__file__).parents[2] / "examples" / "guides" / "coming-from-trl.md"
    if not guide.is_file():
        pytest.skip("not in a checkout")
    own = {name for spec in COMMANDS.values() for name in names(spec.settings)} | {"config", "set", "help"}
    launchers = {"num_processes", "revision", "config_file", "loss_weights", "no_hub_private"}
    spoken = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([A-Za-z][\w-]*)", guide.read_text("utf-8"))}
    assert spoken - own - set(foreign_options()) - launchers == set()
