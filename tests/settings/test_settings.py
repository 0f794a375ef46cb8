"""Settings: where values come from, which are refused, and how they are written down. No torch, no process."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tisdpo_cli.cli.app import app
from tisdpo_cli.errors import UsageError
from tisdpo_cli.method.objectives import OBJECTIVES
from tisdpo_cli.method.prompt_templates import TEMPLATES
from tisdpo_cli.runs.markers import differences
from tisdpo_cli.settings.base import leaf_paths
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import Loaded, load, to_yaml

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))

# What each command cannot do without.
NEEDED = {
    "model": "m",
    "dataset": "d",
    "output_dir": "o",
    "forward": "f",
    "reverse": "r",
    "scored": "s",
    "ref_model": "f",
    "runs": "a",
    "output": "o.html",
    "samples": "s.jsonl",
    "alpaca_eval": "o.json",
}


def needed(command: str, *without: str) -> dict[str, str]:
    """Flags without which the command has nothing to work on."""
    paths = leaf_paths(COMMANDS[command].settings)
    optional = {"estimate": {"model"}, "evaluate": {"samples"}}.get(command, {"ref_model"})
    return {name: value for name, value in NEEDED.items() if name in paths and name not in optional.union(without)}


@pytest.fixture
def loads(tmp_path: Path):
    """Load a command's settings from any mixture of sources; `file` is the text of a config."""

    def run(command: str, file: str | None = None, flags: dict | None = None, **sources) -> Loaded:
        config = None
        if file is not None:
            config = tmp_path / "c.yaml"
            config.write_text(file, encoding="utf-8")
        given = needed(command) if flags is None else flags
        return load(COMMANDS[command].settings, given, config=config, **sources)

    return run


@pytest.fixture
def refused(loads):
    """Load settings that must be refused with exit 2; returns the whole message."""

    def run(*args, **sources) -> str:
        with pytest.raises(UsageError) as caught:
            loads(*args, **sources)
        assert caught.value.exit_code == 2
        return "\n".join((str(caught.value), *caught.value.details))

    return run


def at(loaded: Loaded, path: str):
    """The value of a setting by its dotted name."""
    return reduce(getattr, path.split("."), loaded.settings)


# ---------------------------------------------------------------- precedence

GC = "memory.gradient_checkpointing"
SOURCES = ("default", "file", "environment", "--set", "flag")


@pytest.mark.parametrize("highest", range(len(SOURCES)), ids=SOURCES)
def test_the_highest_source_that_has_a_value_wins(loads, highest: int) -> None:
    loaded = loads(
        "train-dpo",
        "beta: 0.2" if highest >= 1 else None,
        environ={"TISDPO_BETA": "0.3"} if highest >= 2 else {},
        sets=["beta=0.4"] if highest >= 3 else [],
        flags={**needed("train-dpo"), **({"method.beta": "0.5"} if highest >= 4 else {})},
    )
    assert at(loaded, "method.beta") == (0.1, 0.2, 0.3, 0.4, 0.5)[highest]
    origin = loaded.origins.get("method.beta", "default")
    assert origin.endswith("c.yaml") if SOURCES[highest] == "file" else origin == SOURCES[highest]


def test_sources_fill_different_members_of_one_group(loads) -> None:
    loaded = loads(
        "train-dpo",
        "optim: {learning_rate: 1e-4, warmup_steps: 3}",
        environ={"TISDPO_OPTIM__BATCH_SIZE": "4"},
        sets=["optim.optimizer=sgd"],
        flags={**needed("train-dpo"), "optim.warmup_steps": "5"},
    )
    optim = loaded.settings.optim
    assert (optim.learning_rate, optim.batch_size, optim.optimizer, optim.warmup_steps) == (1e-4, 4, "sgd", 5)


def test_an_untouched_flag_does_not_override_the_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "model: m\ndataset: d\noutput_dir: o\nbeta: 0.3\noverwrite: true\ndry_run: true\n"
        "gradient_checkpointing: true\noptimizer: adamw\n"
    )
    shown = CliRunner().invoke(app, ["train-dpo", "-c", str(config), "--print-config"]).stdout
    for line in ("beta: 0.3", "overwrite: true", "dry_run: true", "gradient_checkpointing: true", "optimizer: adamw"):
        assert re.search(rf"{line} +# .*c\.yaml$", shown, re.M), shown


def test_what_a_file_switches_on_can_be_switched_off(loads) -> None:
    assert not at(loads("train", "gradient_checkpointing: true", sets=["gradient_checkpointing=false"]), GC)
    assert not at(loads("train", "gradient_checkpointing: true", environ={"TISDPO_GRADIENT_CHECKPOINTING": "0"}), GC)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_flag(command: str) -> None:
    help_text = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "300"}).stdout
    names = {path.rpartition(".")[2].replace("_", "-") for path in leaf_paths(COMMANDS[command].settings)}
    positional = {"scored"} if command == "inspect-weights" else set()
    missing = [name for name in names - positional if not re.search(rf"--{name}\b", help_text, re.I)]
    assert not missing


# ---------------------------------------------------------------- names

SETTINGS = [("method.beta", 0.7), ("optim.batch_size", 3), ("weights.L", -0.25), ("data.max_prompt_length", 17)]


@pytest.mark.parametrize(("path", "value"), SETTINGS)
@pytest.mark.parametrize("grouped", [False, True], ids=["flat", "grouped"])
def test_flat_and_grouped_names_are_the_same_setting_everywhere(loads, path: str, value: float, grouped: bool) -> None:
    group, _, bare = path.partition(".")
    name = path if grouped else bare
    file = f"{group}: {{{bare}: {value}}}" if grouped else f"{bare}: {value}"
    variable = f"TISDPO_{name.upper().replace('.', '__')}"
    assert at(loads("train", file), path) == value
    assert at(loads("train", f"{name}: {value}"), path) == value
    assert at(loads("train", sets=[f"{name}={value}"]), path) == value
    assert at(loads("train", environ={variable: str(value)}), path) == value


def test_dashes_are_underscores_in_a_file_and_in_set(loads) -> None:
    assert at(loads("train", "learning-rate: 1e-4\n"), "optim.learning_rate") == 1e-4
    assert at(loads("train", sets=["optim.learning-rate=1e-4"]), "optim.learning_rate") == 1e-4


def test_a_setting_given_twice_in_one_source_is_refused(refused) -> None:
    assert "method.beta is given twice" in refused("train", "beta: 0.2\nmethod: {beta: 0.3}\n")
    assert "method.beta is given twice" in refused("train", sets=["beta=0.2", "method.beta=0.3"])


def test_null_takes_an_optional_value_away(loads) -> None:
    assert at(loads("train", "max_steps: 5", sets=["max_steps=null"]), "optim.max_steps") is None


@pytest.mark.parametrize("source", ["file", "--set", "environment"])
def test_none_is_a_word_where_it_is_a_choice(loads, source: str) -> None:
    """`normalize: none|mean` (DESIGN 1): its default must be sayable in every source."""
    loaded = loads(
        "train",
        "normalize: none" if source == "file" else "normalize: mean\n",
        sets=["normalize=none"] if source == "--set" else [],
        environ={"TISDPO_NORMALIZE": "none"} if source == "environment" else {},
    )
    assert at(loaded, "weights.normalize") == "none"


def test_other_variables_of_the_environment_are_left_alone(loads) -> None:
    environ = {"HOME": "/x", "HF_TOKEN": "hf_x", "BETA": "9", "TISDPO_SCORED": "s", "TISDPO_TRAIN_DPO__BETA": "0.9"}
    assert at(loads("train-dpo", environ=environ), "method.beta") == 0.1


@pytest.mark.parametrize("source", ["file", "file, as text", "--set", "environment", "flag"])
def test_a_json_object_may_come_from_every_source(loads, source: str) -> None:
    text = '{"min_lr_rate": 0.1}'
    loaded = loads(
        "train",
        {
            "file": "lr_scheduler_kwargs: {min_lr_rate: 0.1}",
            "file, as text": f"optim: {{lr_scheduler_kwargs: '{text}'}}",
        }.get(source, ""),
        flags={**needed("train"), **({"lr_scheduler_kwargs": text} if source == "flag" else {})},
        sets=["lr_scheduler=cosine_with_min_lr", *([f"lr_scheduler_kwargs={text}"] if source == "--set" else [])],
        environ={"TISDPO_LR_SCHEDULER_KWARGS": text} if source == "environment" else {},
    )
    assert loaded.settings.fingerprint()["optim.lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert loaded.settings.optim.schedule_params(1.0) == {"min_lr_rate": 0.1, "num_cycles": 0.5}


def test_defaults_of_a_schedule_count_the_same_given_or_left_out(loads) -> None:
    given, left_out = (
        loads("train", sets=["lr_scheduler=cosine", *more])
        for more in (['lr_scheduler_kwargs={"num_cycles": 0.5}'], [])
    )
    assert given.settings.fingerprint() == left_out.settings.fingerprint()


def test_the_parameters_of_a_schedule_are_checked(loads, refused) -> None:
    assert "needs min_lr or min_lr_rate" in refused("train", "lr_scheduler: cosine_with_min_lr\n")
    assert "must be a JSON object" in refused("train", "lr_scheduler_kwargs: '[1]'\n")
    # Where the rate depends on whether the model is new.
    end = ["lr_scheduler=polynomial", 'lr_scheduler_kwargs={"lr_end": 1e-4}']
    assert "below the learning rate, 2e-05" in refused("train-sft", sets=end)
    new = {"dataset": "d", "output_dir": "o", "init": True}
    assert loads("train-sft", flags=new, sets=end).settings.learning_rate() == 3e-3


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("sources", "unknown", "meant"),
    [
        ({"file": "betta: 1"}, "betta", "beta"),
        ({"file": "method: {betta: 1}"}, "method.betta", "method.beta"),
        ({"file": "method: {learning_rate: 1e-4}"}, "method.learning_rate", "learning_rate"),
        ({"sets": ["batch_sise=4"]}, "batch_sise", "batch_size"),
        ({"sets": ["optim.lerning_rate=4"]}, "optim.lerning_rate", "optim.learning_rate"),
        ({"environ": {"TISDPO_BETTA": "1"}}, "TISDPO_BETTA", "TISDPO_BETA"),
        ({"environ": {"TISDPO_OPTIM__BATCH_SISE": "1"}}, "TISDPO_OPTIM__BATCH_SISE", "TISDPO_OPTIM__BATCH_SIZE"),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(refused, sources: dict, unknown: str, meant: str) -> None:
    message = refused("train-dpo", **sources)
    assert unknown in message
    assert re.search(rf"did you mean [\w.]*{meant}\?", message)


def test_a_file_is_named_with_its_unknown_key(refused) -> None:
    assert re.search(r"c\.yaml: unknown setting 'betta'", refused("train-dpo", "betta: 1"))


def test_all_unknown_names_are_told_at_once(refused) -> None:
    message = refused(
        "train-dpo", "betta: 1\nmethod: {gamma: 2}\n", sets=["batch_sise=4"], environ={"TISDPO_SEDE": "1"}
    )
    assert all(name in message for name in ("betta", "method.gamma", "batch_sise", "TISDPO_SEDE"))


def test_all_values_that_cannot_be_used_are_told_at_once(refused) -> None:
    message = refused("train-dpo", "beta: 0\nbatch_size: -1\nlearning_rate: fast\noptimizer: adam2\n", flags={})
    for name in ("beta", "batch-size", "learning-rate", "optimizer", "--model is required", "--dataset is required"):
        assert name in message


def test_unknown_names_and_unusable_values_are_told_together(refused) -> None:
    message = refused("train-dpo", "betta: 1\nbatch_size: -1\n")
    assert "betta" in message
    assert "batch-size" in message


NOT_POSITIVE = ["0", "-1", ".nan", ".inf", "-.inf", "1e999", "true", "fast", "[1]", "{a: 1}", "null"]
NUMBERS = {
    "beta": NOT_POSITIVE,
    "learning_rate": NOT_POSITIVE,
    "epochs": NOT_POSITIVE,
    "max_grad_norm": NOT_POSITIVE,
    "weight_decay": ["-1", ".nan", ".inf", "true"],
    "batch_size": ["0", "-1", "1.5", ".nan", ".inf", "true", "many"],
    "max_steps": ["0", "-2", "1.5", ".inf", "false"],
    "warmup_steps": ["-1", "2.5", "true"],
    "micro_batch_size": ["0", "1.5", "true"],
    "gradient_accumulation": ["0", "-2"],
    "eval_every": ["0", "0.5"],
    "eval_pairs": ["-1", "true"],
    "save_every": ["0", "true"],
    "max_length": ["0", "12.5", "true"],
    "seed": ["-1", "0.5", "true", "null", "1" + "0" * 30],
    "mu": [".nan", ".inf", "true"],
}


@pytest.mark.parametrize(("name", "text"), [(name, text) for name, texts in NUMBERS.items() for text in texts])
def test_numbers_that_make_no_sense_are_refused(refused, name: str, text: str) -> None:
    message = refused("train", f"{name}: {text}")
    assert name.replace("_", "-") in message or name in message


@pytest.mark.parametrize("text", ["0", "-0.1", "nan", "inf", "-Infinity", "1e999", "true", "", " ", "0,1", "0x1"])
@pytest.mark.parametrize("source", ["flag", "--set", "environment"])
def test_numbers_that_make_no_sense_are_refused_as_text(refused, text: str, source: str) -> None:
    message = refused(
        "train-dpo",
        flags={**needed("train-dpo"), **({"method.beta": text} if source == "flag" else {})},
        sets=[f"beta={text}"] if source == "--set" else [],
        environ={"TISDPO_BETA": text} if source == "environment" else {},
    )
    assert "beta" in message


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-05", "0.00001", "'1e-5'", ".00001"])
def test_yaml_numbers_are_numbers(loads, text: str) -> None:
    assert at(loads("train-dpo", f"learning_rate: {text}"), "optim.learning_rate") == 1e-5


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("beta: 0.1\nseed: 1\nbeta: 0.2\n", "c.yaml:3:1"),
        ("optim:\n  batch_size: 1\n  batch_size: 2\n", "c.yaml:3:3"),
        ("optim: {batch_size: 1}\ndata: {}\noptim: {epochs: 1}\n", "c.yaml:3:1"),
    ],
)
def test_a_key_that_stands_twice_is_refused_with_its_place(refused, text: str, place: str) -> None:
    message = refused("train", text)
    assert place in message
    assert "duplicate key" in message


def test_a_merged_key_may_be_overridden(loads) -> None:
    """`<<` is made for this: what stands beside it wins, and no key stands twice."""
    file = "train_dpo: &shared {beta: 0.2, max_steps: 3}\ntrain_reverse: {<<: *shared, beta: 0.3}\n"
    assert at(loads("run", file), "train_reverse.method.beta") == 0.3
    assert at(loads("run", file), "train_reverse.optim.max_steps") == 3


@pytest.mark.parametrize(
    "text",
    [
        "- beta\n",
        "just text\n",
        "beta: [1\n",
        "a: b: c\n",
        "beta: 0.1\n\tseed: 1\n",
        "model: !!python/object:os.system {}\n",
        "data: &a\n  x: *a\n",
        "beta: 0.1\0\n",
        "? [a]\n: b\n",
        "output_dir: 2024-13-45\n",
        "a: " + "[" * 5000,
    ],
    ids=["list", "text", "torn", "colons", "tab", "object", "loop", "nul", "list-key", "no-date", "deep"],
)
def test_a_file_that_is_no_config_is_refused(refused, text: str) -> None:
    assert "c.yaml" in refused("train", text)


def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"model: caf\xe9\n")
    for name in ("absent.yaml", "latin.yaml", "."):
        with pytest.raises(UsageError, match=re.escape(str(tmp_path / name))):
            load(COMMANDS["train"].settings, {}, config=tmp_path / name)


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "optim:\ndata: {}\n"])
def test_an_empty_config_or_section_changes_nothing(loads, text: str) -> None:
    assert loads("train", text).settings == loads("train").settings


@pytest.mark.parametrize("item", ["beta", "=1", " =1", ""])
def test_a_set_without_name_or_value_is_refused(refused, item: str) -> None:
    assert "name=value" in refused("train", sets=[item])


@pytest.mark.parametrize(
    ("command", "name"),
    [("train-dpo", "model"), ("train-dpo", "dataset"), ("train-dpo", "output_dir"), ("estimate", "forward")],
)
def test_an_empty_path_is_refused(refused, command: str, name: str) -> None:
    """`--model "$EMPTY"` must not mean the current directory."""
    assert name.replace("_", "-") in refused(command, flags={**needed(command), name: ""})


@pytest.mark.parametrize(("prompt", "whole"), [(512, 512), (600, 512), (256, 100)])
def test_a_prompt_as_long_as_everything_is_refused(refused, prompt: int, whole: int) -> None:
    for command in ("train", "train-sft", "estimate", "run"):
        message = refused(command, f"max_prompt_length: {prompt}\nmax_length: {whole}\n")
        assert f"max_prompt_length ({prompt})" in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("transform: rank_based\nmu: 2\n", "mu"),
        ("transform: origin\nk: 2\n", "it has: none"),
        ("top_percent: 50\n", "exp has no parameter top_percent"),
        ("preset: aggressive\nL: -1\n", "threshold_and_scale has no parameter L"),
        ("transform: rankbased\n", "transform"),
        ("preset: mild\n", "preset"),
        ("transform: exp\nL: 2\nU: 1\n", "must be below U"),
        ("transform: exp\nk: 0\n", "above 0"),
        ("transform: binary\ntop_percent: 101\n", "at most 100"),
        ("transform: binary\ntop_percent: 0\n", "above 0"),
        ("transform: threshold\nnormalize: mean\n", "normalize mean"),
        ("eos_weight: maybe\n", "eos-weight"),
    ],
)
def test_transforms_take_their_own_parameters_only(refused, text: str, said: str) -> None:
    for command in ("train", "inspect-weights", "run"):
        assert said in refused(command, text)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "--model PATH or --init"),
        ({"model": "m", "init": True}, "--model PATH or --init"),
        ({"init": True, "vocab_size": "100"}, "258"),
        ({"init": True, "hidden_size": "100", "heads": "6"}, "multiple"),
        ({"init": True, "data.instruction_template": "no place"}, "exactly once"),
        ({"init": True, "target": "best"}, "target"),
    ],
)
def test_train_sft_starts_from_one_thing(refused, flags: dict, said: str) -> None:
    assert said in refused("train-sft", flags={"dataset": "d", "output_dir": "o", **flags})


def test_values_are_not_repeated_in_a_refusal(refused) -> None:
    """A secret in the wrong variable stays a secret."""
    secret = "hf_verysecret"
    environ = {"TISDPO_BETA": secret, "TISDPO_DTYPE": secret, "TISDPO_RESUME": secret, "TISDPO_NORMALIZE": secret}
    assert secret not in refused("train", environ=environ)
    assert secret not in refused("train", environ={"TISDPO_HUB_TOKEN": secret})
    assert secret not in refused("train", f"seed: {secret}\nhub_token: {secret}\n")


# ---------------------------------------------------------------- defaults


@pytest.mark.parametrize("command", ["train-dpo", "train-reverse", "train"])
def test_the_defaults_of_the_pair_trainings_are_the_references(loads, command: str) -> None:
    expected = {
        "method.beta": 0.1,
        "optim.optimizer": "rmsprop",
        "optim.learning_rate": 5e-7,
        "optim.lr_scheduler": "constant",
        "optim.warmup_steps": 150,
        "optim.max_grad_norm": 10,
        "optim.batch_size": None,  # 32 where nothing else decides it; see test_pair_training
        "optim.epochs": 1,
        "optim.max_steps": None,
        "data.max_length": 512,
        "data.max_prompt_length": 256,
        "data.keep_prompt": "end",
        "evaluation.eval_pairs": 256,
        "checkpoints.resume": "auto",
    }
    loaded = loads(command)
    assert {path: at(loaded, path) for path in expected} == expected
    assert not set(loaded.origins) - {"model", "dataset", "output_dir"}


def test_the_learning_rate_of_train_sft_depends_on_its_start(loads) -> None:
    start = {"dataset": "d", "output_dir": "o"}
    assert loads("train-sft", flags={**start, "model": "m"}).settings.learning_rate() == 2e-5
    assert loads("train-sft", flags={**start, "init": True}).settings.learning_rate() == 3e-3
    given = loads("train-sft", "learning_rate: 1e-4", flags={**start, "init": True})
    assert given.settings.learning_rate() == 1e-4
    assert at(given, "optim.optimizer") == "adamw"


# ---------------------------------------------------------------- written down

WITH_SETTINGS = [name for name in COMMANDS if name != "env"]

CHANGED = {
    "train-sft": "target: both\nlearning_rate: 1e-4\n",
    "estimate": "batch_size: 3\ndtype: bf16\n",
    "merge": "dtype: bf16\n",
    "report": "runs: [a, b]\n",
    "export": "name: mine\n",
    "translate": "words: [trl, dpo, a b]\nyaml: true\n",
    "inspect-weights": "transform: rank_based\nmax_scale: 1.5\nindex: 2\n",
    "train": "preset: aggressive\ntransform: binary\nL: null\neos_weight: zero\n",
    "run": "max_length: 100\nmax_prompt_length: 20\ntrain_sft: {target: both}\ntrain_dpo: {beta: 0.2}\nL: -0.25\n",
}


# What is set beside the file.
SET = {
    "estimate": ["max_length=300"],
    "merge": ["overwrite=true"],
    "report": ["output=p.html"],
    "export": ["policy=baseline"],
    "translate": ["dialect=trl"],
}
# Those that truncate what they read.
WITH_DATA = [
    name for name in WITH_SETTINGS if name not in ("inspect-weights", "merge", "report", "export", "translate")
]


@pytest.mark.parametrize("command", WITH_SETTINGS)
def test_printed_settings_read_back_to_the_same_settings(loads, command: str) -> None:
    first = loads(command, CHANGED.get(command, "beta: 0.3\n"), sets=SET.get(command, ["seed=7"]))
    text = to_yaml(first.settings, first.origins)
    again = loads(command, text, flags={})
    assert again.settings == first.settings
    assert to_yaml(again.settings) == to_yaml(first.settings)


@pytest.mark.parametrize("command", WITH_DATA)
def test_printed_settings_show_where_each_value_comes_from(loads, command: str) -> None:
    loaded = loads(command, sets=["max_length=300"], environ={"TISDPO_MAX_PROMPT_LENGTH": "30"})
    lines = to_yaml(loaded.settings, loaded.origins).splitlines()
    values = [line for line in lines if not line.rstrip().endswith(":")]
    assert all(re.search(r"  # (flag|--set|environment|default|run)$", line) for line in values)
    assert any(re.fullmatch(r" *max_length: 300  # --set", line) for line in lines)
    assert any(re.fullmatch(r" *max_prompt_length: 30  # environment", line) for line in lines)
    assert any(re.fullmatch(r" *(dataset: d|scored: s)  # flag", line) for line in lines)
    assert any(line.endswith("  # default") for line in lines)


AWKWARD = ("yes", "null", "~", "1e-5", "12", "", " a ", "a: b", "# x", "'", '"', "é", "a\tb", "a\nb", "\u2028", "---")


@pytest.mark.parametrize("text", AWKWARD, ids=ascii)
def test_awkward_texts_read_back_the_same(loads, text: str) -> None:
    first = loads("train", flags={**needed("train"), "data.prompt_column": text})
    assert at(first, "data.prompt_column") == text
    again = loads("train", to_yaml(first.settings, first.origins), flags={})
    assert again.settings == first.settings


def test_printed_settings_hold_no_character_that_fights_back(loads) -> None:
    loaded = loads("train", flags={**needed("train"), "model": "a\x1b[31m\x9b\u202e\u2066b"})
    printed = to_yaml(loaded.settings, loaded.origins)
    assert not set(printed) & set("\x1b\x9b\u202e\u2066")
    assert loads("train", printed, flags={}).settings == loaded.settings


# ---------------------------------------------------------------- the pipeline


def test_what_stands_at_the_top_applies_to_every_stage_that_has_it(loads) -> None:
    text = "max_length: 90\ndata: {max_prompt_length: 30}\nbeta: 0.2\nbatch_size: 4\ntransform: origin\nseed: 5\n"
    run = loads("run", text, flags=needed("run", "model")).settings
    assert [stage.data.max_length for stage in run.stages().values()] == [90] * 5
    assert [stage.data.max_prompt_length for stage in run.stages().values()] == [30] * 5
    assert [getattr(run, s).method.beta for s in ("train_dpo", "train_reverse", "train")] == [0.2] * 3
    assert [getattr(run, s).optim.batch_size for s in ("train_sft", "train_dpo", "train")] == [4] * 3
    assert run.train.weights.transform == run.inspect_weights.weights.transform == "origin"
    assert [stage.seed for name, stage in run.stages().items() if name != "estimate"] == [5] * 4
    assert run.inspect_weights.seed == 5


def test_a_stages_section_wins_within_the_same_source(loads) -> None:
    run = loads("run", "beta: 0.2\ntrain_dpo: {beta: 0.3}\ntrain_reverse: {method: {beta: 0.4}}\n").settings
    assert (run.train_dpo.method.beta, run.train_reverse.method.beta, run.train.method.beta) == (0.3, 0.4, 0.2)
    run = loads("run", sets=["train_dpo.beta=0.3", "beta=0.2"]).settings
    assert (run.train_dpo.method.beta, run.train.method.beta) == (0.3, 0.2)


@pytest.mark.parametrize("source", ["flag", "--set", "environment"])
def test_a_higher_source_wins_over_a_stages_section_of_the_file(loads, source: str) -> None:
    loaded = loads(
        "run",
        "train_dpo: {max_steps: 7, beta: 0.3}\ntrain: {max_steps: 9}\n",
        flags={**needed("run"), **({"max_steps": "2"} if source == "flag" else {})},
        sets=["max_steps=2"] if source == "--set" else [],
        environ={"TISDPO_MAX_STEPS": "2"} if source == "environment" else {},
    )
    run = loaded.settings
    assert [s.optim.max_steps for s in (run.train_dpo, run.train_reverse, run.train)] == [2, 2, 2]
    assert run.train_dpo.method.beta == 0.3
    assert loaded.origins["train_dpo.optim.max_steps"] == source


def test_a_stages_setting_can_come_from_the_environment(loads) -> None:
    run = loads("run", "train_dpo: {beta: 0.3}", environ={"TISDPO_TRAIN_DPO__BETA": "0.4"}).settings
    assert (run.train_dpo.method.beta, run.train.method.beta) == (0.4, 0.1)


@pytest.mark.parametrize("variable", ["TISDPO_L", "TISDPO_WEIGHTS__L", "TISDPO_TRAIN__L"])
def test_upper_case_settings_of_stages_can_come_from_the_environment(loads, variable: str) -> None:
    assert at(loads("run", environ={variable: "-0.25"}), "train.weights.L") == -0.25


@pytest.mark.parametrize(
    "wired",
    [
        "train_sft: {dataset: x}",
        "train_dpo: {model: x}",
        "train_dpo: {dataset: x}",
        "train_reverse: {output_dir: x}",
        "estimate: {forward: x}",
        "estimate: {reverse: x}",
        "train: {dataset: x}",
        "train: {overwrite: true}",
        "inspect_weights: {scored: x}",
    ],
)
def test_what_the_pipeline_decides_cannot_be_set_in_a_section(refused, wired: str) -> None:
    stage, key = re.match(r"(\w+): {(\w+)", wired).groups()
    assert f"{stage}.{key} is set by run" in refused("run", wired)


def test_one_stages_output_is_the_next_ones_input(loads) -> None:
    run = loads("run", flags={"dataset": "d", "output_dir": "out"}).settings
    assert run.train_sft.init
    assert run.train_sft.model is None
    assert run.train_dpo.model == run.train_reverse.model == run.train.model == run.train_sft.output_dir
    assert (run.estimate.forward, run.estimate.reverse) == (run.train_dpo.output_dir, run.train_reverse.output_dir)
    assert run.train.dataset == run.inspect_weights.scored == run.estimate.output_dir
    assert {s.dataset for s in (run.train_sft, run.train_dpo, run.train_reverse, run.estimate)} == {"d"}
    assert len({stage.output_dir for stage in run.stages().values()}) == 5


@pytest.mark.parametrize(
    ("method", "stages", "contrast"),
    [
        ("dpo", ["train_dpo", "train_reverse"], ("out/dpo", "out/reverse", None)),
        ("sft", ["sft_chosen", "sft_rejected"], ("out/sft-chosen", "out/sft-rejected", None)),
        ("prompt", [], (None, None, "m")),
    ],
)
def test_the_method_decides_which_models_make_the_contrast(loads, method, stages, contrast) -> None:
    run = loads("run", flags={"model": "m", "dataset": "d", "output_dir": "out", "method": method}).settings
    assert list(run.stages()) == [*stages, "estimate", "train"]
    assert (run.estimate.forward, run.estimate.reverse, run.estimate.model) == contrast
    assert all(getattr(run, name).model == "m" for name in stages)
    assert run.train.model == "m"


def test_method_sft_learns_one_side_each(loads) -> None:
    text = "target: both\nhidden_size: 96\nmethod: sft\n"
    run = loads("run", text, flags={"dataset": "d", "output_dir": "out"}).settings
    assert (run.train_sft.target, run.sft_chosen.target, run.sft_rejected.target) == ("both", "chosen", "rejected")
    assert (run.train_sft.hidden_size, run.train_sft.init) == (96, True)
    assert not run.sft_chosen.init
    assert run.sft_chosen.model == run.sft_rejected.model == run.train_sft.output_dir


def test_a_section_of_another_method_is_told_and_not_used(loads) -> None:
    text = "train_dpo: {beta: 0.5}\nsft_chosen: {lr: 1e-4}\nmethod: prompt\nmodel: m\n"
    loaded = loads("run", text, flags={"dataset": "d", "output_dir": "out"})
    assert [name in loaded.notices[0] for name in ("train_dpo", "sft_chosen", "train_reverse")] == [True, True, False]
    assert loads("run", "train_dpo: {beta: 0.5}\n", flags={"dataset": "d", "output_dir": "out"}).notices == ()


def test_the_top_of_a_pipeline_gives_templates_to_estimate(loads) -> None:
    text = "method: prompt\nmodel: m\nnegative_template: 'Be rude. {}'\n"
    run = loads("run", text, flags={"dataset": "d", "output_dir": "out"}).settings
    assert run.estimate.templates()["reverse"] == "Be rude. {}"
    assert run.estimate.templates()["forward"] != "{}"


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        ({}, "--forward and --reverse"),
        ({"forward": "f"}, "--reverse"),
        ({"reverse": "r"}, "--forward"),
        ({"forward": "f", "reverse": "r", "model": "m"}, "not all"),
        ({"model": "m", "positive_template": "no place"}, "exactly once"),
        ({"model": "m", "negative_template": "{} and {}"}, "exactly once"),
        ({"model": "m", "negative_template": "harmfull"}, "harmful"),
    ],
)
def test_estimate_needs_two_sides(loads, flags, word) -> None:
    with pytest.raises(UsageError, match=word):
        loads("estimate", flags={"dataset": "d", "output_dir": "o", **flags})


def test_two_models_read_plain_prompts_unless_told_otherwise(loads) -> None:
    assert set(loads("estimate").settings.templates().values()) == {"{}"}
    framed = loads("estimate", "positive_template: harmless\n").settings.templates()
    assert framed["forward"] != framed["reverse"] == "{}"


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("loss: tdpo\n", "loss"),
        ("loss: ipo\nalpha: 1\n", "alpha"),
        ("loss: tdpo1\nalpha: 1\n", "it has: none"),
        ("loss: tdpo2\nalpha: 0\n", "above 0"),
        ("loss: tdpo2\nlabel_smoothing: 0.1\n", "label_smoothing"),
        ("label_smoothing: 0.5\n", "below 0.5"),
        ("alpha: -1\n", "at least 0"),
        ("length_normalize: true\n", "length_normalize"),
        ("reference_free: true\nalpha: 0.5\n", "reference"),
    ],
)
def test_an_objective_refuses_what_it_does_not_have(loads, text, word) -> None:
    with pytest.raises(UsageError, match=word):
        loads("train-dpo", text)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_token_weights_go_with_objectives_that_take_them(loads, name) -> None:
    assert loads("train-dpo", f"loss: {name}\n").settings.method.objective().name == name
    if OBJECTIVES[name].takes_weights:
        assert loads("train", f"loss: {name}\n").settings.method.objective().name == name
    else:
        with pytest.raises(UsageError, match="train-dpo"):
            loads("train", f"loss: {name}\n")


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("decay: 1\n", "decay"),
        ("decay: 0\n", "decay"),
        ("dead_zone: 0\n", "dead_zone"),
        ("center: token\n", "center"),
        ("spans: letter\n", "spans"),
        ("weights_are: final\ntransform: exp\n", "transform"),
        ("weights_are: final\ncenter: dataset\nnormalize: mean\n", "center, normalize"),
        ("weights_are: final\nmu: 2\n", "mu"),
        ("weights_are: ready\n", "weights-are"),
        ("transform: random\nspans: word\n", "spans would change nothing: random .* does not read the scores"),
        ("transform: binary\ncenter: dataset\ndecay: 0.9\n", "center, decay would change nothing: binary"),
        ("transform: binary\npreset: default\nspans: word\n", "spans would change nothing"),
        ("mu: 0\nspans: word\n", "spans would change nothing: exp"),
    ],
)
def test_steps_and_final_weights_are_checked(loads, text, word) -> None:
    with pytest.raises(UsageError, match=word):
        loads("train", text)


@pytest.mark.parametrize("text", ["transform: binary\ntop_percent: 50\n", "preset: default\n", "preset: aggressive\n"])
def test_steps_go_with_what_reads_scores_and_with_presets(loads, text) -> None:
    assert at(loads("train", f"{text}spans: word\n"), "weights.spans") == "word"


def test_final_weights_have_no_scores_to_show(loads) -> None:
    with pytest.raises(UsageError, match="no scores"):
        loads("inspect-weights", "weights_are: final\nshow: scores\n")


@pytest.mark.parametrize(
    ("command", "one", "other"),
    [
        ("train-dpo", "", "alpha: 0\nlabel_smoothing: 0.0\nreference_free: false\n"),
        ("train-dpo", "loss: tdpo2\n", "loss: tdpo2\nalpha: 0.5\n"),
        ("train", "", "transform: exp\nk: 1\nmu: 1\nL: -0.5\nU: 1.5\n"),
        ("train", "preset: aggressive\n", "preset: aggressive\nmin_scale: 0.5\n"),
        ("train", "preset: aggressive\n",
         "transform: threshold_and_scale\nmin_val: -2\nmax_val: 2\nmin_scale: 0.5\nmax_scale: 1.5\n"),
        ("train", "preset: default\n", "transform: binary\n"),
        ("train", "preset: aggressive\ntransform: exp\n", ""),
    ],
)  # fmt: skip
def test_a_default_counts_the_same_given_or_left_out(loads, command, one, other) -> None:
    assert loads(command, one).settings.fingerprint() == loads(command, other).settings.fingerprint()


def test_a_template_counts_by_its_text(loads) -> None:
    flags = {"model": "m", "dataset": "d", "output_dir": "o"}
    prints = [
        loads("estimate", flags={**flags, **more}).settings.fingerprint()
        for more in ({}, {"positive_template": "harmless"}, {"positive_template": TEMPLATES["harmless"]})
    ]
    assert prints[0] == prints[1] == prints[2]
    assert prints[0] != loads("estimate", flags={**flags, "positive_template": "{}!"}).settings.fingerprint()


@pytest.mark.parametrize(
    ("command", "one", "other", "told"),
    [
        ("train-dpo", "", "alpha: 0.5\n", ["method.alpha 0 → 0.5"]),
        ("train-dpo", "", "loss: ipo\n", ["method.loss dpo → ipo"]),
        ("train-dpo", "beta: 0.2\n", "loss: ipo\nseed: 1\n",
         ["seed 0 → 1", "method.loss dpo → ipo", "method.beta 0.2 → 0.1"]),
        ("train", "", "mu: 2\n", ["weights.mu 1 → 2"]),
        ("train", "", "transform: binary\n", ["weights.transform exp → binary"]),
        ("train", "", "transform: rank_based\nspans: word\n",
         ["weights.transform exp → rank_based", "weights.spans none → word"]),
        ("train", "", "decay: 0.9\n", ["weights.decay none → 0.9"]),
        ("train", "transform: rank_based\n", "preset: aggressive\ntransform: rank_based\n",
         ["weights.min_scale 0.7 → 0.5", "weights.max_scale 1.3 → 1.5"]),
    ],
)  # fmt: skip
def test_what_has_changed_is_named_and_what_follows_from_it_is_not(loads, command, one, other, told) -> None:
    was, now = ({"command": command, "made_from": loads(command, text).settings.fingerprint()} for text in (one, other))
    assert sorted(differences(was, now)) == sorted(told)


def test_train_sft_runs_only_where_it_is_wanted(loads) -> None:
    assert loads("run").settings.train_sft is None
    assert loads("run").settings.train_dpo.model == "m"
    for wanted in ("train_sft:\n", "train_sft: {}\n", "train_sft: {target: both}\n"):
        run = loads("run", wanted).settings
        assert run.train_sft.model == "m"
        assert not run.train_sft.init
        assert run.train_dpo.model == run.train_sft.output_dir
    assert loads("run", sets=["train_sft.target=both"]).settings.train_sft is not None


def test_init_may_be_said_where_there_is_no_model(loads, refused) -> None:
    assert loads("run", "train_sft: {init: true}", flags=needed("run", "model")).settings.train_sft.init
    assert "init" in refused("run", "train_sft: {init: true}"), "accepted and ignored beside --model"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train_dpo: {betta: 1}", "did you mean train_dpo.beta?"),
        ("train_dpo: {transform: exp}", "train_dpo.transform"),
        ("train-dbo: {beta: 1}", "train_dbo.beta"),
        ("gamma_ray: 1", "gamma_ray"),
        ("optim: {betta: 1}", "optim.betta"),
    ],
)
def test_an_unknown_name_in_a_pipeline_is_refused(refused, text: str, said: str) -> None:
    assert said in refused("run", text)


def test_the_faults_of_all_stages_are_told_at_once(refused) -> None:
    message = refused("run", "train_dpo: {beta: 0}\ntrain: {transform: origin, k: 2}\nestimate: {batch_size: 0}\n")
    assert all(part in message for part in ("train_dpo: --beta", "train: ", "estimate: --batch-size"))


def test_a_setting_given_twice_at_the_top_of_a_pipeline_is_refused(refused) -> None:
    assert "twice" in refused("run", "batch_size: 4\noptim: {batch_size: 8}\n")


@pytest.mark.parametrize("text", ["optim:\n", "train_dpo: {optim: }\n", "train_dpo:\n  data: {}\n", "train_dpo:\n"])
def test_an_empty_section_of_a_pipeline_changes_nothing(loads, text: str) -> None:
    assert loads("run", text).settings == loads("run").settings


def test_a_pipeline_needs_its_data_and_its_place(refused) -> None:
    message = refused("run", flags={})
    assert "--dataset is required" in message
    assert "--output-dir is required" in message


# ---------------------------------------------------------------- examples


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_every_example_config_is_accepted(path: Path) -> None:
    """By the command that its comments name (`tisdpo run --config …`)."""
    text = path.read_text(encoding="utf-8")
    named = re.search(r"tisdpo(?:_cli)? ([a-z-]+)\b.*(?:-c|--config)\b", text)
    assert named, "an example says how it is run"
    command = named.group(1)
    absent = {name: value for name, value in needed(command).items() if not re.search(rf"^{name}:", text, re.M)}
    if command == "run":
        absent.pop("model", None)
    load(COMMANDS[command].settings, absent, config=path)


def test_there_are_examples() -> None:
    assert EXAMPLES
