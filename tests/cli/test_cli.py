"""The program as people and scripts meet it: streams, exit codes, help, errors, output directories, hostile text."""

from __future__ import annotations

import fcntl
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import yaml
from conftest import Done, Tisdpo, pair_rows, run_tisdpo, write_jsonl
from typer.testing import CliRunner

from tisdpo_cli import __version__
from tisdpo_cli.cli.app import app, main
from tisdpo_cli.cli.arguments import read_arguments
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.fields import PANELS

SHORT = ("--max-steps", "1", "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0")


def here(*arguments: str | Path) -> Done:
    """Run the program in this process: the same exit code and the same text, without the start-up."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["tisdpo", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as left, signals_kept():
            main()
    finally:
        sys.argv = argv
    return Done(int(left.value.code or 0), out.getvalue(), err.getvalue())


@contextmanager
def signals_kept() -> Iterator[None]:
    """Put the handler of SIGTERM back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def assert_failed(done: Done, code: int) -> None:
    """A failure says one line, last on stderr, and nothing on stdout."""
    assert done.code == code, done.err
    assert done.out == ""
    assert done.error.startswith("error: "), done.err
    assert len(done.error) <= 300
    assert "Traceback" not in done.err
    assert done.err.endswith("\n")


def train_dpo(world: Path, out: Path, *more: str | Path) -> list[str | Path]:
    """A training of one update."""
    return ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", out, *SHORT, *more]


# ---------------------------------------------------------------- help and version


@pytest.mark.parametrize("flag", ["-h", "--help"])
@pytest.mark.parametrize("command", [*COMMANDS, ""])
def test_help_is_there_in_panels(command: str, flag: str) -> None:
    shown = CliRunner().invoke(app, [*([command] if command else []), flag], env={"COLUMNS": "100"})
    assert shown.exit_code == 0
    assert shown.stdout.lstrip().startswith("Usage:")
    if command in COMMANDS:
        panels = re.findall(r"^([A-Z][\w ]+):$", shown.stdout, re.M)
        order = [panel for panel in (*PANELS, "Configuration") if panel in panels]
        assert panels == order
        assert panels[-1] == "Configuration"
        assert ("Data" in panels) == (command not in ("env", "merge"))
        assert re.search(rf"Example: +tisdpo {command} ", shown.stdout)


def test_the_two_panels_of_commands_are_shown() -> None:
    shown = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "100"}).stdout
    method, around = shown.index("The method:"), shown.index("Tools:")
    positions = {command: shown.index(f"\n  {command} ") for command in COMMANDS}
    others = ("train-sft", "evaluate", "export", "report", "merge", "translate", "env")
    assert all(method < positions[c] < around for c in COMMANDS if c not in others)
    assert all(positions[c] > around for c in others)


@pytest.mark.parametrize("arguments", [["--help"], ["train-dpo", "--help"], ["--version"], ["run", "--print-config"]])
def test_nothing_heavy_is_imported_for_what_needs_no_model(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom tisdpo_cli.cli.app import main\nsys.argv = ['tisdpo', *sys.argv[1:]]\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print('HEAVY', *({'torch', 'transformers', 'datasets', 'accelerate', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].strip() == "HEAVY"


def test_the_version_is_the_packages(tisdpo: Tisdpo) -> None:
    done = tisdpo("--version")
    assert (done.code, done.out, done.err) == (0, f"tisdpo {__version__}\n", "")


def test_the_installed_program_is_the_same_as_the_module() -> None:
    from importlib.metadata import entry_points

    scripts = [e for e in entry_points(group="console_scripts") if e.name == "tisdpo"]
    assert all(e.load() is main for e in scripts)


# ---------------------------------------------------------------- usage


def test_no_command_shows_the_help_and_no_empty_error() -> None:
    done = here()
    assert done.code == 2
    assert "Usage: tisdpo" in done.out + done.err
    assert not re.search(r"error: *;", done.err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train-dpo", "--bata", "3"], "--beta"),
        (["train-dpo", "--learning-rat", "3"], "--learning-rate"),
        (["train-dpa"], "train-dpo"),
        (["--versoin"], "--version"),
        (["train-dpo", "stray"], "stray"),
        (["train-dpo", "--beta"], "--beta"),
        (["train-dpo", "--set"], "--set"),
        (["train-dpo", "--set", "bata=1"], "did you mean beta?"),
        (["train-dpo", "-m", "m", "-d", "d", "-o", "o", "--beta", "0"], "--beta"),
        (["train-dpo"], "--model is required"),
        (["train-dpo", "-c", "/nowhere/c.yaml"], "/nowhere/c.yaml"),
        (["inspect-weights", "a", "--dataset", "b"], "twice"),
        (["inspect-weights"], "--scored is required"),
        (["run", "--betta", "1"], "--beta"),
        # What other trainers have, and what to use in its place.
        (["train-dpo", "--fp16"], "--fp16: fp16 is not supported; use --dtype bf16"),
        (["train", "--warmup_ratio=2"], "--warmup-steps"),
        (["train-dpo", "--sync_ref_model"], "the reference does not move"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_typed_wrong_is_told_in_one_line(arguments: list[str], said: str) -> None:
    done = here(*arguments)
    assert_failed(done, 2)
    assert said in done.error


def test_a_usage_error_looks_the_same_in_a_process_of_its_own(tisdpo: Tisdpo) -> None:
    done = tisdpo("train-dpo", "-m", "m", "-d", "d", "-o", "o", "--bata", "3")
    assert_failed(done, 2)
    assert done.err.count("\n") == 1
    assert "--beta" in done.error


def test_a_misspelt_variable_stops_every_command(tisdpo: Tisdpo, world: Path, tmp_path: Path) -> None:
    done = tisdpo(*train_dpo(world, tmp_path / "out"), env={"TISDPO_BETTA": "0.2"})
    assert_failed(done, 2)
    assert "TISDPO_BETTA" in done.error
    assert "TISDPO_BETA?" in done.error
    assert not (tmp_path / "out").exists()


def test_all_faults_are_listed_before_the_error() -> None:
    done = here("train-dpo", "--beta", "0", "--batch-size", "1.5")
    assert_failed(done, 2)
    assert [line for line in done.err.splitlines() if "batch-size" in line and not line.startswith("error")]
    assert "5 invalid settings" in done.error


@pytest.mark.parametrize("spelling", ["--learning-rate", "--learning_rate", "--lr", "--learning_rate="])
def test_options_may_be_spelt_as_elsewhere(spelling: str) -> None:
    given = [f"{spelling}1e-4"] if spelling.endswith("=") else [spelling, "1e-4"]
    done = here("train-dpo", "-m", "a_b", "-d", "d_e", "-o", "o", *given, "--print-config")
    assert done.code == 0
    assert "learning_rate: 0.0001  # flag" in done.out
    assert "model: a_b" in done.out


@pytest.mark.parametrize("value", ["-- Q_A", "--max_length", "--lr", "--", "-- a_b=c_d", "-x_y"])
@pytest.mark.parametrize("option", ["--output-dir", "--output_dir", "-o"])
def test_a_value_may_look_like_an_option(option: str, value: str) -> None:
    done = here("train-dpo", option, value, "-m", "m", "--dataset_name", "d", "--max_length", "900", "--print-config")
    assert done.code == 0, done.err
    settings = yaml.safe_load(done.out)
    assert (settings["output_dir"], settings["data"]["max_length"]) == (value, 900)


@pytest.mark.parametrize(
    ("typed", "normalized"),
    [
        (["estimate", "--positive-template", "--x_y {}", "--batch_size=2"], "--x_y {}|--batch-size=2"),
        (["estimate", "--positive-template=--x_y {}"], "--positive-template=--x_y {}"),
        (["train-dpo", "--set", "--a_b", "--dry_run", "--max_steps", "3"], "--a_b|--dry-run|--max-steps|3"),
        (["inspect-weights", "--", "--my_scores"], "--|--my_scores"),
        (["--print_config", "--set_x"], "--print-config|--set-x"),
        (["translate", "--yaml", "trl", "dpo", "--max_length", "3"], "--yaml|--|trl|dpo|--max_length|3"),
    ],
)
def test_only_names_of_options_are_normalized(typed: list[str], normalized: str) -> None:
    assert "|".join(read_arguments(typed, COMMANDS).words).endswith(normalized)


def test_options_of_trl_can_be_pasted() -> None:
    trl = "--per_device_train_batch_size 2 --gradient_accumulation_steps 4 --num_train_epochs 2 --eval_steps 5 "
    trl += "--save_steps 7 --save_total_limit 1 --lr_scheduler_type cosine --optim adamw_torch"
    trl += " --per_device_eval_batch_size 3 --model_name_or_path m --dataset_name d --output_dir o"
    done = here("train-dpo", *trl.split(), "--print-config")
    assert done.code == 0, done.err
    for line in (
        "micro_batch_size: 2", "gradient_accumulation: 4", "epochs: 2.0", "eval_every: 5", "save_every: 7",
        "keep_checkpoints: 1", "lr_scheduler: cosine", "optimizer: adamw", "eval_batch_size: 3",
        "model: m", "dataset: d",
    ):  # fmt: skip
        assert f"{line}  # flag" in done.out


def test_a_command_of_trl_is_translated_to_one_line() -> None:
    trl = (
        "accelerate launch --num_processes 2 trl dpo --model_name_or_path m --dataset_name d --output_dir o --bf16 true"
    )
    done = here("translate", "--", *trl.split())
    assert done.code == 0, done.err
    assert done.out.startswith("tisdpo train-dpo --model m --dataset d --output-dir o --num-processes 2 --dtype bf16 ")
    assert done.out.count("\n") == 1
    assert "defaults of TRL" in done.err
    settings = yaml.safe_load(here("translate", "--yaml", "--", *trl.split()).out)
    assert settings["num_processes"] == 2
    assert json.loads(here("translate", "--json", "--", *trl.split()).out)["command_line"] == done.out.strip()
    refused = here("translate", "--", *trl.split(), "--fp16", "--sync_ref_model")
    assert_failed(refused, 2)
    assert "2 invalid settings" in refused.error


def test_a_very_long_message_is_cut_and_ends_the_error() -> None:
    done = here("train-dpo", "-m", "m", "-d", "d", "-o", "o", *[w for i in range(40) for w in ("--set", f"bad{i}=1")])
    assert_failed(done, 2)
    assert len(done.err.splitlines()) == 41


@pytest.mark.parametrize(
    ("option", "near"), [("--model", "sft"), ("--ref-model", "sft"), ("--dataset", "data")], ids=lambda v: v.strip("-")
)
def test_a_mistyped_path_names_the_near_match(world: Path, tmp_path: Path, option: str, near: str) -> None:
    done = here(*train_dpo(world, tmp_path / "out"), option, world / f"{near}a")
    assert_failed(done, 2)
    assert option in done.error
    assert f"did you mean {world / near}" in done.error
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- faults


BAD_ROWS = [{"prompt": "p", "chosen": "", "rejected": "r"}] * 30 + pair_rows(3)


def test_a_fault_in_the_data_is_one_line_after_the_bad_rows(tisdpo: Tisdpo, world: Path, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", BAD_ROWS)
    done = tisdpo("train-dpo", "-m", world / "sft", "-d", path, "-o", tmp_path / "out")
    assert_failed(done, 1)
    lines = done.err.splitlines()
    assert lines[-22:-2] == [f"{path}:{n}: 'chosen' is empty" for n in range(1, 21)]
    assert "10 more" in lines[-2]
    assert done.error.startswith(f"error: {path}:1: ")


def test_the_way_out_survives_a_long_message(world: Path, tmp_path: Path) -> None:
    """`error: FILE:LINE: what; how to fix`, in 300 characters (FAULTS)."""
    row = {"instruction": "p", "chosen": "c", "rejected": "r", **{f"annotation_{i:02}": i for i in range(40)}}
    path = write_jsonl(tmp_path / "wide.jsonl", [row])
    done = here("train-dpo", "-m", world / "sft", "-d", path, "-o", tmp_path / "out")
    assert_failed(done, 1)
    assert "--prompt-column instruction" in done.error


@pytest.mark.parametrize("debug", [False, True])
def test_a_traceback_is_shown_with_debug_only(world: Path, tmp_path: Path, debug: bool) -> None:
    path = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "p", "chosen": "", "rejected": "r"}])
    for code, data in ((1, path), (2, tmp_path / "absent")):
        arguments = ["train-dpo", "-m", world / "sft", "-d", data, "-o", tmp_path / "out"]
        done = here(*arguments, *(["--debug"] if debug else []))
        assert done.code == code
        assert ("Traceback" in done.err) is debug
        assert done.error.startswith("error: ")


def test_a_fault_of_the_program_is_one_line_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("tisdpo_cli.cli.preflight.check", broken)
    done = here(*train_dpo(world, tmp_path / "out"))
    assert_failed(done, 1)
    assert "RuntimeError: first line" in done.error
    assert "--debug" in done.error


# ---------------------------------------------------------------- results and output directories

SECRETS = {"HF_TOKEN": "hf_secretsecret", "WANDB_API_KEY": "wandb-secretsecret", "OPENAI_API_KEY": "sk-secretsecret"}


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """An output, and the run that made it, with secrets in its environment."""
    out = tmp_path_factory.mktemp("cli") / "out"
    return out, run_tisdpo(*train_dpo(world, out), "--save-every", "1", env=SECRETS)


def test_stdout_is_the_path_and_nothing_else(trained: tuple[Path, Done]) -> None:
    out, done = trained
    assert done.code == 0, done.err
    assert done.out == f"{out}\n"
    assert "training 1/1 steps" in done.err
    assert "next: tisdpo train-reverse" in done.err
    assert "\x1b" not in done.err, "no terminal, no colours and no moving bar"
    assert "\r" not in done.err


def test_secrets_of_the_environment_are_nowhere(trained: tuple[Path, Done], tisdpo: Tisdpo) -> None:
    out, done = trained
    files = [path for path in out.rglob("*") if path.is_file()]
    assert {"run.json", "config.yaml", "metrics.jsonl", "model.safetensors"} <= {path.name for path in files}
    assert not [path for path in files if b"secretsecret" in path.read_bytes()]
    shown = tisdpo("env", env=SECRETS)
    assert shown.code == 0, shown.err
    assert "torch: " in shown.out
    assert "secretsecret" not in done.out + done.err + shown.out + shown.err


def test_no_pickle_is_written(trained: tuple[Path, Done]) -> None:
    assert not [path for path in trained[0].rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]


def test_the_same_command_again_prints_the_path_and_does_nothing(trained: tuple[Path, Done], world: Path) -> None:
    out, _ = trained
    before = {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"}
    done = here(*train_dpo(world, out), "--save-every", "3")
    assert (done.code, done.out) == (0, f"{out}\n")
    assert "nothing to do" in done.err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir() if path.name != ".lock"} == before


def test_json_is_one_object_with_the_path(trained: tuple[Path, Done], world: Path) -> None:
    out, _ = trained
    done = here(*train_dpo(world, out), "--json")
    assert done.code == 0
    assert done.out.count("\n") == 1
    record = json.loads(done.out)
    assert record["path"] == str(out)
    assert record["command"] == "train-dpo"
    assert record["final_metrics"]["step"] == 1
    assert record == {"path": str(out), **json.loads((out / "run.json").read_text())}


@pytest.fixture
def elsewhere(world: Path, tmp_path: Path) -> dict[str, Path]:
    """A model and a dataset that differ a little from the world's."""
    model = Path(shutil.copytree(world / "sft", tmp_path / "model"))
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "rope_theta": 5.0}))
    return {"model": model, "data": write_jsonl(tmp_path / "pairs.jsonl", pair_rows(24))}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (["--beta", "0.2", "--seed", "3"], ["beta 0.1 → 0.2", "seed 0 → 3"]),
        (["-m", "{model}"], ["content of model"]),
        (["-d", "{data}"], ["content of dataset"]),
    ],
    ids=["settings", "model", "dataset"],
)
def test_other_settings_in_a_used_directory_are_refused_by_name(
    trained: tuple[Path, Done], world: Path, elsewhere: dict[str, Path], change: list[str], named: list[str]
) -> None:
    out, _ = trained
    before = (out / "run.json").read_bytes()
    done = here(*train_dpo(world, out), *(word.format(**elsewhere) for word in change))
    assert_failed(done, 2)
    assert all(name in done.error for name in named), done.error
    assert (out / "run.json").read_bytes() == before


def test_another_command_in_a_used_directory_is_refused(trained: tuple[Path, Done], world: Path) -> None:
    done = here("train-reverse", *train_dpo(world, trained[0])[1:])
    assert_failed(done, 2)
    assert "command train-dpo → train-reverse" in done.error


def test_overwrite_makes_it_again(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert here(*train_dpo(world, out)).code == 0
    (out / "notes.txt").write_text("mine")
    done = here(*train_dpo(world, out), "--beta", "0.3", "--overwrite")
    assert (done.code, done.out) == (0, f"{out}\n")
    assert json.loads((out / "run.json").read_text())["made_from"]["method.beta"] == 0.3
    assert (out / "notes.txt").read_text() == "mine", "only what the program made is removed"


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
def test_a_directory_with_other_things_in_it_is_refused(world: Path, tmp_path: Path, overwrite: list[str]) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    done = here(*train_dpo(world, out), *overwrite)
    assert_failed(done, 2)
    assert "thesis.tex" in done.error
    assert [path.name for path in out.iterdir() if path.name != ".lock"] == ["thesis.tex"]


def test_a_file_is_no_output_directory(world: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    done = here(*train_dpo(world, path))
    assert_failed(done, 2)
    assert path.read_text() == "x"


def test_a_directory_in_use_is_refused(world: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        done = here(*train_dpo(world, out))
    assert_failed(done, 2)
    assert "another run" in done.error
    assert here(*train_dpo(world, out)).code == 0, "free again"


def test_a_dry_run_trains_nothing_and_makes_nothing(tisdpo: Tisdpo, world: Path, tmp_path: Path) -> None:
    done = tisdpo(*train_dpo(world, tmp_path / "out"), "--dry-run")
    assert (done.code, done.out) == (0, ""), done.err
    assert "nothing was trained" in done.err
    assert "'<|endoftext|>'" in done.err, "the first row is shown to its end"
    assert "1 step of 4 pairs" in done.err
    assert list(tmp_path.iterdir()) == []


def without_measurements(text: str) -> list[str]:
    """The lines of a dry run without those of its prediction, which depend on what else is in memory, and on time."""
    return [line for line in text.splitlines() if not line.startswith("  ")]


def test_printed_settings_go_in_again_where_accumulation_decides_the_batch(world: Path, tmp_path: Path) -> None:
    """`--print-config` prints what can be fed back (USERS)."""
    parts = ("--micro-batch-size", "2", "--gradient-accumulation", "2", "--dry-run")
    first = ["train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", *parts]
    usual = here(*first)
    assert usual.code == 0, usual.err
    config = tmp_path / "c.yaml"
    config.write_text(here(*first, "--print-config").out)
    again = here("train-dpo", "-c", config)
    assert (again.code, without_measurements(again.err)) == (0, without_measurements(usual.err))


def test_a_trial_of_the_pipeline_works_or_is_refused_as_such(world: Path, tmp_path: Path) -> None:
    """Not half of it, and then a complaint about a model that no stage has made."""
    done = here("run", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", "--set", "dry_run=true")
    assert done.code == 0 or "dry" in done.error, done.error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [["--batch-size", "5", "--micro-batch-size", "2", "--gradient-accumulation", "2"], ["--resume", "/no/checkpoint"]],
    ids=["batch", "resume"],
)
def test_what_is_typed_wrong_is_told_before_a_model_is_loaded(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tisdpo_cli.engine.training.policy.load_model", no_model)
    done = here(*train_dpo(world, tmp_path / "out"), *arguments)
    assert_failed(done, 2)
    assert arguments[0] in done.error or arguments[-1] in done.error


# ---------------------------------------------------------------- a stdout that fails


def run_with_stdout(stdout: int | None, *arguments: str | Path) -> Done:
    """Run the program with a stdout of its own; None closes it."""
    command = [sys.executable, "-m", "tisdpo_cli", *map(str, arguments)]
    if stdout is None:
        command = ["sh", "-c", 'exec "$@" >&-', "sh", *command]
    done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, timeout=300)
    return Done(done.returncode, "", done.stderr)


@pytest.mark.parametrize("kind", ["pipe", "full", "closed"])
def test_a_stdout_that_fails_loses_no_work(world: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / "out"
    if kind == "pipe":
        reader, stdout = os.pipe()
        os.close(reader)
    else:
        stdout = os.open("/dev/full", os.O_WRONLY) if kind == "full" else None
    try:
        done = run_with_stdout(stdout, *train_dpo(world, out))
    finally:
        if stdout is not None:
            os.close(stdout)
    assert_failed(done, 1)
    assert "stdout" in done.error
    assert "Exception ignored" not in done.err
    again = here(*train_dpo(world, out))
    assert (again.code, again.out) == (0, f"{out}\n")
    assert "nothing to do" in again.err, "the output is whole"


# ---------------------------------------------------------------- hostile text

# ESC, OSC 52, C1, bidirectional controls, separators, and markup of rich.
ATTACK = "[/bad][red]x[/red] \x1b[31mred \x1b]52;c;aGk=\x07 \x9b31m \u202eabc\u2066 \u2028 <b>&amp; \x7f"
RAW = "\x1b\x07\x9b\x7f\u202e\u2066\u2028\x08\x0c"


@pytest.fixture(scope="module")
def hostile(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scored dataset whose every text fights back, with the world's tokenizer beside it."""
    from tisdpo_cli.data.rows import Row
    from tisdpo_cli.data.scored import Scores, scored_columns
    from tisdpo_cli.model.tokenizer import load_tokenizer

    path = tmp_path_factory.mktemp("hostile") / "scored"
    tokenizer = load_tokenizer(world / "sft")
    rows = []
    for i in range(4):
        texts = {"prompt": f"{ATTACK} {i}", "chosen": f"good {ATTACK}", "rejected": f"bad {ATTACK}\n", ATTACK: ATTACK}
        ids = tokenizer.texts.encode([texts["chosen"], texts["rejected"]])
        both = (Scores([(-1) ** k * 0.1 * (k % 9 + i) for k in range(len(side))], 0.5) for side in ids)
        rows.append(scored_columns(Row("", texts), *both))
    write_jsonl(path / "train.jsonl", rows)
    tokenizer.backend.save_pretrained(path)
    return path


def without_colours(text: str) -> str:
    """Text without the sequences that set colours and styles."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_a_view_shows_hostile_text_as_text(tisdpo: Tisdpo, hostile: Path) -> None:
    done = tisdpo("inspect-weights", hostile, env={"COLUMNS": "100"})
    assert done.code == 0, done.err
    assert not set(RAW) & set(done.out + done.err)
    assert "[/bad][red]x[/red]" in done.out
    assert "\\x1b[31mred" in done.out
    assert "\\u202e" in done.out


@pytest.mark.parametrize("extra", [{}, {"NO_COLOR": "1"}], ids=["FORCE_COLOR", "and NO_COLOR"])
def test_colours_are_forced_and_forbidden_by_the_environment(tisdpo: Tisdpo, hostile: Path, extra: dict) -> None:
    env = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "120", **extra}
    done = tisdpo("inspect-weights", hostile, "--index", "1", env=env)
    assert done.code == 0, done.err
    coloured = re.findall(r"\x1b\[[0-9;]*\b(?:3[0-7]|4[0-7]|9[0-7]|10[0-7]|[34]8;[25])[0-9;]*m", done.out)
    assert bool(coloured) is not bool(extra)
    plain = without_colours(done.out)
    assert not set(RAW) & set(plain + without_colours(done.err))
    assert "[/bad][red]x[/red]" in plain


def test_a_view_as_json_holds_no_raw_control(tisdpo: Tisdpo, hostile: Path) -> None:
    done = tisdpo("inspect-weights", hostile, "--json", "--index", "2")
    assert done.code == 0, done.err
    assert done.out.isascii()
    assert not set(RAW) & set(done.out)
    view = json.loads(done.out)
    assert view["views"][0]["prompt"] == f"{ATTACK} 2"
    assert view["pairs"] == 4
    assert not set(RAW) & set(done.err)
    assert all(line.startswith("warning: the scores") for line in done.err.splitlines()), "what the checks found"


@pytest.mark.parametrize("debug", [[], ["--debug"]], ids=["", "--debug"])
def test_hostile_names_in_errors_are_shown_as_text(world: Path, tmp_path: Path, debug: list[str]) -> None:
    rows = [{ATTACK: "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": 1, "rejected": "r", ATTACK: 2}]
    for number, row in enumerate(rows):
        path = write_jsonl(tmp_path / f"{number}-\x1b[31m-\u202e.jsonl", [row])
        done = here("train-dpo", "-m", world / "sft", "-d", path, "-o", tmp_path / f"out{number}", *debug)
        assert done.code == 1
        assert not set(RAW) & set(done.err)
        assert "\\x1b[31m" in done.error


def test_hostile_words_on_the_command_line_are_shown_as_text() -> None:
    for arguments in (["train-dpo", f"--{ATTACK}"], [ATTACK], ["train-dpo", "--set", ATTACK], ["run", "-c", ATTACK]):
        done = here(*arguments)
        assert_failed(done, 2)
        assert not set(RAW) & set(done.err)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--index", "4"], 2, "the 4 pairs are 0 to 3"),
        (["--index", "-1"], 2, "index"),
        (["--split", "test"], 2, "no split 'test'"),
        (["--transform", "rank_based", "--mu", "1"], 2, "mu"),
        (["--chosen-column", "absent"], 1, "absent"),
    ],
    ids=["index", "negative", "split", "transform", "column"],
)
def test_a_view_that_cannot_be_shown_is_told(hostile: Path, arguments: list[str], code: int, said: str) -> None:
    done = here("inspect-weights", hostile, *arguments)
    assert_failed(done, code)
    assert said in done.error


MODEL = {"path": "x", "sha256": "0123456789abcdef"}


@pytest.mark.parametrize(
    "models",
    [{"forward": {**MODEL, "path": ATTACK}}, {"forward": {**MODEL, "sha256": "\x1b[2J\x9b31m\u202e"}}, {ATTACK: MODEL}],
    ids=["path", "hash", "name"],
)
def test_a_manifest_shows_hostile_text_as_text(hostile: Path, tmp_path: Path, models: dict) -> None:
    done = here("inspect-weights", with_manifest(hostile, tmp_path, {"models": models}))
    assert done.code == 0, done.err
    assert not set(RAW) & set(done.out)


@pytest.mark.parametrize(
    "manifest", [[], {"models": []}, {"models": {"forward": {}}}, {"models": {"forward": {"path": 1, "sha256": 2}}}]
)
def test_a_strange_manifest_is_no_fault_of_the_program(hostile: Path, tmp_path: Path, manifest: object) -> None:
    """It is shown as far as it goes, or refused as damaged."""
    done = here("inspect-weights", with_manifest(hostile, tmp_path, manifest))
    assert done.code == 0 or "estimate.json" in done.error, done.error


def with_manifest(scored: Path, folder: Path, manifest: object) -> Path:
    """A copy of a scored dataset with another manifest."""
    copy = Path(shutil.copytree(scored, folder / "scored"))
    (copy / "estimate.json").write_text(json.dumps(manifest))
    return copy
