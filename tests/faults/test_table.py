"""The table of faults: every kind of bad input and fault, and that the program ends as promised.

A row is held by cases, which run the program on a small planted input, or by the tests that it names, where the fault
takes more than an input: kills, signals, several processes, a browser.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import planted as plant
import pytest
from conftest import Done, pair_rows, run_here, run_tisdpo
from planted import GOOD, WEIGHTS, Box, Plant

TESTS = Path(__file__).parents[1]
DEEP = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
FIRST = "model.layers.0.self_attn.q_proj.weight"


@dataclass(frozen=True)
class Case:
    """One planted input.

    Attributes:
        row: number in the table.
        name: the input in words.
        input: plants it and returns the command line.
        code: exit code.
        said: what the error says, with its place; for exit code 0, what stderr says.
        hidden: what must not be said.
        around: surroundings of the run.
        env: variables; with any, the program runs in a process of its own.
    """

    row: int
    name: str
    input: Plant
    code: int
    said: tuple[str, ...]
    hidden: str = ""
    around: Callable[[Box], AbstractContextManager[None]] = lambda _box: nullcontext()
    env: tuple[tuple[str, str], ...] = ()


def line(text: str) -> Plant:
    return plant.second_line(text)


def row(**values: object) -> Plant:
    return plant.second_row(**values)


def weights(values: object) -> Plant:
    return plant.scored(lambda rows: rows[1].update(chosen_weight=values))


PLACE = "pairs.jsonl:2"
JSON_ROW = '{{"prompt": "p", "chosen": "c", "rejected": "r", "n": {}}}'
BETA_NOT_ONE_TO_USE = ["0", "-0.1", "nan", "inf", "true"]
BATCH_NOT_ONE_TO_USE = ["0", "-1", "1.5", "true"]

CASES = [
    Case(1, "torn line", line('{"prompt": "p", "chosen": "c'), 1, (f"{PLACE}:",)),
    Case(1, "malformed line", line("{'prompt': 1}"), 1, (f"{PLACE}:",)),
    Case(2, "NUL byte", line('{"prompt": "p\0", "chosen": "c", "rejected": "r"}'), 1, (PLACE, "NUL")),
    Case(2, "NUL, escaped", line('{"prompt": "p\\u0000", "chosen": "c", "rejected": "r"}'), 1, (PLACE, "NUL")),
    Case(2, "invalid UTF-8", plant.second_line(b'{"prompt": "\xff", "chosen": "c", "rejected": "r"}'), 1, (PLACE,)),
    Case(2, "UTF-16", plant.text(json.dumps(GOOD).encode("utf-16")), 1, ("pairs.jsonl", "UTF-16")),
    Case(2, "lone surrogate", line('{"prompt": "\\ud800", "chosen": "c", "rejected": "r"}'), 1, (PLACE,)),
    Case(4, "duplicate key", line(JSON_ROW.format('1, "prompt": "q"')), 1, (PLACE, "prompt")),
    *(Case(4, name, line(JSON_ROW.format(name)), 1, (PLACE,)) for name in ("NaN", "Infinity", "-Infinity", "1e999")),
    Case(4, "integer of 5,000 digits", line(JSON_ROW.format("1" * 5000)), 1, (PLACE,)),
    Case(5, "nesting, 100,000 levels deep", line(DEEP), 1, (PLACE,)),
    Case(7, "row is a list", line('["p", "c", "r"]'), 1, (PLACE,)),
    Case(7, "first row is a list", plant.text('["p"]\n' + json.dumps(GOOD)), 1, ("pairs.jsonl:1",)),
    Case(7, "JSON array", plant.text(json.dumps(pair_rows(4))), 0, ("nothing was trained",)),
    Case(8, "column missing in one row", row(chosen=...), 1, (PLACE, "'chosen'")),
    Case(9, "column missing everywhere", plant.rows({"instruction": "p", "chosen": "c", "rejected": "r"}), 1,
         ("pairs.jsonl", "--prompt-column instruction")),
    *(Case(10, f"{name} is {value!r}", row(**{name: value}), 1, (PLACE, f"'{name}'"))
      for name in ("prompt", "chosen", "rejected") for value in (None, 3)),
    *(Case(11, f"{name} is {value!r}", row(**{name: value}), 1, (PLACE, f"'{name}' is "))
      for name in ("chosen", "rejected") for value in ("", " \n", "\u200b")),
    Case(11, "empty prompt", row(prompt=""), 1, (PLACE, "'prompt'")),
    Case(12, "equal responses in some rows", plant.rows(*pair_rows(4), {**GOOD, "rejected": " c"}), 0,
         ("1 pairs dropped: equal responses",)),
    Case(12, "nothing but equal responses", plant.rows({**GOOD, "rejected": " c"}), 1,
         ("pairs.jsonl", "none of 1 pairs can be trained")),
    Case(13, "same prompt, some rows without weights", plant.scored(
        lambda rows: (rows[0].update(prompt=rows[1]["prompt"]), rows[0].pop("chosen_weight")),
        "--on-bad-row", "skip"), 0, ("skipped 1 of 4 rows", "train.jsonl:1", "step of 3 pairs")),
    Case(14, "contradicting pairs", plant.rows(GOOD, {**GOOD, "chosen": " r", "rejected": " c"}), 0,
         ("2 rows contradict",)),
    Case(15, "empty file", plant.text(""), 1, ("pairs.jsonl", "no rows")),
    Case(15, "no epochs", plant.options("--epochs", "0", "--dry-run"), 2, ("--epochs",)),
    Case(16, "prompt longer than max_length", plant.rows({**GOOD, "prompt": "p " * 900}), 0,
         ("truncated", "1 prompts")),
    Case(16, "max_length beyond the positions", plant.options("--max-length", "4096", "--dry-run"), 2,
         ("--max-length 4096", "2048 positions")),
    Case(17, "text of a special token", plant.rows({**GOOD, "chosen": " a<|endoftext|>b"}), 0,
         ("' a' '<' '|'",)),
    Case(18, "tokenizer without EOS", plant.model(
        lambda path: plant.change_json(path / "tokenizer_config.json", eos_token=None)), 1,
         ("model", "end-of-sequence")),
    Case(19, "fewer weights than tokens", weights([0.1, 0.2]), 1, ("train.jsonl:2", "2 values", "tokens")),
    Case(20, "weight is NaN", weights([float("nan")]), 1, ("train.jsonl:2",)),
    Case(20, "weight is a string", plant.scored(lambda rows: rows[1]["chosen_weight"].__setitem__(0, "0.1")), 1,
         ("train.jsonl:2",)),
    Case(20, "weight is 1e39", plant.scored(lambda rows: rows[1]["chosen_weight"].__setitem__(0, 1e39)), 1,
         ("train.jsonl:2",)),
    Case(20, "no list of weights", weights("all"), 1, ("train.jsonl:2",)),
    Case(20, "null where a weight is needed", plant.scored(
        lambda rows: rows[1]["chosen_weight"].__setitem__(0, None)), 1, ("train.jsonl:2",)),
    Case(21, "scored with another tokenizer", plant.other_tokenizer, 1, ("tokenizer",)),
    Case(22, "tokenizers with two ids swapped", plant.swapped_ids, 1, ("model", "different tokenizers")),
    Case(23, "tokenizer larger than the embedding", plant.model(
        lambda path: plant.change_json(path / "config.json", vocab_size=300)), 1,
         ("model", "ids up to 319", "300 rows")),
    Case(24, "mistyped path", lambda box: box.train_dpo(model=box.world / "stf"), 2,
         ("--model", "did you mean", "sft")),
    Case(24, "mistyped dataset", lambda box: box.train_dpo(data=box.world / "dta"), 2, ("--dataset", "did you mean")),
    Case(25, "no config.json", plant.model(lambda path: (path / "config.json").unlink()), 1, ("config.json",)),
    Case(25, "no weights", plant.model(lambda path: (path / WEIGHTS).unlink()), 1, (WEIGHTS,)),
    Case(25, "empty weights", plant.model(lambda path: (path / WEIGHTS).write_bytes(b"")), 1, (WEIGHTS,)),
    Case(25, "truncated weights", plant.model(
        lambda path: (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-9])), 1, (WEIGHTS,)),
    Case(25, "config.json nested deeply", plant.model(lambda path: (path / "config.json").write_text(DEEP)), 1,
         ("config.json",)),
    Case(25, "wrong shape", plant.tensors(lambda t: t.update({FIRST: t[FIRST][:-1].clone()})), 1, (FIRST,)),
    Case(26, "a tensor missing", plant.tensors(lambda t: t.pop(FIRST)), 1, (FIRST,)),
    # A dry run reads no values.
    Case(27, "NaN in the weights", plant.tensors(
        lambda t: t[FIRST].__setitem__((0, 0), float("nan")), "--max-steps", "1"), 1, (FIRST,)),
    Case(28, "pickled weights", plant.model(plant.pickled), 1, ("pickled", "save_pretrained")),
    Case(29, "remote code", plant.model(
        lambda path: plant.change_json(path / "config.json", auto_map={"AutoConfig": "code.C"})), 2,
        ("--trust-remote-code",)),
    Case(29, "attention kernels of the hub", plant.model(
        lambda path: plant.change_json(path / "config.json", _attn_implementation="a/b")), 2, ("--trust-remote-code",)),
    Case(34, "loss that is not finite", plant.options(
        "--optimizer", "sgd", "--learning-rate", "1e30", "--max-steps", "3"), 1, ("step 2", "train.jsonl:")),
    Case(36, "directory in use", plant.options(), 2, ("another run",), around=plant.locked),
    Case(39, "FSDP 1 asked for", plant.options(), 1, ("FSDP version 1",), env=(("ACCELERATE_USE_FSDP", "true"),)),
    Case(44, "a file outside the model", plant.model(plant.outside), 1, ("outside the model",)),
    Case(46, "unknown key in a file", plant.config("betta: 1\n"), 2, ("c.yaml", "did you mean beta?")),
    Case(46, "unknown key in --set", plant.options("--set", "betta=1"), 2, ("did you mean beta?",)),
    Case(46, "unknown variable", plant.options(), 2, ("TISDPO_BETTA", "TISDPO_BETA?"), env=(("TISDPO_BETTA", "1"),)),
    *(Case(47, f"beta {value}", plant.config(f"beta: {value}\n"), 2, ("--beta",)) for value in BETA_NOT_ONE_TO_USE),
    *(Case(47, f"batch size {value}", plant.config(f"batch_size: {value}\n"), 2, ("--batch-size",))
      for value in BATCH_NOT_ONE_TO_USE),
    Case(47, "negative learning rate", plant.options("--learning-rate", "-1"), 2, ("--learning-rate",)),
    Case(48, "duplicate key in YAML", plant.config("beta: 0.1\nbeta: 0.2\n"), 2, ("c.yaml:2", "duplicate key")),
    Case(48, "nested aliases in YAML", plant.config(
        "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 30))), 2,
        ("c.yaml:5", "aliases")),
    Case(49, "a secret as a value", plant.options("--set", "beta=hf_secretsecret"), 2, ("--beta",), "secretsecret"),
]  # fmt: skip

# Rows to tests elsewhere, as `file::name` under `tests/`.
ELSEWHERE = {
    3: ["data/test_reader.py::test_harmless_differences_change_nothing"],
    6: [
        "data/test_reader.py::test_a_line_beyond_the_limit_is_told_and_one_below_is_read",
        "data/test_dataset_files.py::test_one_value_has_a_limit_in_every_format",
        "data/test_dataset_files.py::test_a_parquet_cell_has_a_limit",
        "data/test_dataset_files.py::test_a_parquet_file_of_repetition_is_refused_before_it_is_read",
    ],
    13: ["data/test_reader.py::test_rows_with_the_same_prompt_are_independent"],
    17: [
        "data/test_tokens.py::test_text_that_spells_a_special_token_stays_text",
        "data/test_reader.py::test_text_that_spells_a_special_token_stays_text",
    ],
    18: [
        "model/test_loading.py::test_padding_that_is_the_end_of_sequence_keeps_the_real_one",
        "model/test_loading.py::test_a_tokenizer_without_padding_gets_one_that_is_named",
    ],
    21: ["data/test_scored.py::test_a_dataset_changed_since_it_was_scored_is_used_with_a_notice"],
    28: ["model/test_loading.py::test_pickled_weights_are_refused_and_never_run"],
    29: ["model/test_loading.py::test_code_of_a_model_needs_leave"],
    30: [
        "engine/test_resume.py::test_killed_again_and_again",
        "engine/test_resume.py::test_killed_between_any_two_file_operations",
        "engine/test_estimate.py::test_killed_and_gone_on",
    ],
    31: [
        "runs/test_checkpoints.py::test_a_damaged_checkpoint_is_passed_over_with_a_warning",
        "runs/test_checkpoints.py::test_one_flipped_bit_anywhere_is_found",
        "engine/test_resume.py::test_a_damaged_newest_checkpoint_falls_back_to_the_one_before",
        "faults/test_damaged_runs.py::test_a_damaged_manifest_falls_back_to_the_checkpoint_before",
        "faults/test_damaged_runs.py::test_a_bad_line_of_metrics_does_not_stop_a_resume",
    ],
    32: [
        "engine/test_resume.py::test_other_settings_are_refused_by_name",
        "engine/test_resume.py::test_other_data_or_another_model_are_refused_by_name",
    ],
    33: [
        "faults/test_signals.py::test_a_signal_outside_the_loop",
        "faults/test_signals.py::test_a_signal_in_the_loop_keeps_a_checkpoint",
        "faults/test_signals.py::test_a_signal_during_the_imports",
        "runs/test_processes.py::test_interrupted_on_two_processes_and_gone_on",
    ],
    34: [
        "engine/test_pair_training.py::test_a_loss_that_is_not_finite_stops_before_any_weight_changes",
        "engine/test_pair_training.py::test_a_gradient_that_is_not_finite_stops_before_any_weight_changes",
    ],
    35: [
        "engine/test_resume.py::test_no_room_for_a_checkpoint_leaves_the_last_one",
        "engine/test_resume.py::test_no_room_for_the_model_is_not_a_fault_of_the_program",
        "engine/test_resume.py::test_where_nothing_may_be_written_it_is_told",
        "engine/test_estimate.py::test_no_room_is_told_and_gone_on_from",
        "faults/test_output_directories.py::test_a_failed_run_leaves_no_temporary_file",
    ],
    37: [
        "cli/test_cli.py::test_a_stdout_that_fails_loses_no_work",
        "faults/test_streams.py::test_a_training_survives_its_stderr",
        "faults/test_streams.py::test_what_stdout_cannot_encode_is_escaped",
    ],
    38: [
        "faults/test_out_of_memory.py::test_the_advice_is_about_settings_in_force",
        "faults/test_out_of_memory.py::test_while_a_model_is_loaded",
        "faults/test_out_of_memory.py::test_in_a_training",
    ],
    39: ["runs/test_processes.py::test_without_a_gpu_torchrun_needs_to_be_told_nothing"],
    40: [
        "runs/test_processes.py::test_pairs_that_do_not_divide_are_each_used_once",
        "engine/test_pair_training.py::test_a_ragged_last_window_counts_every_pair_once",
    ],
    41: ["cli/test_cli.py::test_a_view_shows_hostile_text_as_text"],
    42: [
        "cli/test_cli.py::test_hostile_names_in_errors_are_shown_as_text",
        "cli/test_cli.py::test_a_view_as_json_holds_no_raw_control",
        "faults/test_streams.py::test_a_path_with_control_characters_is_escaped_on_a_terminal",
    ],
    43: [
        "engine/test_report.py::test_hostile_data_is_shown_as_text",
        "engine/test_report.py::test_the_file_holds_nothing_that_loads_or_runs",
    ],
    44: ["faults/test_output_directories.py::test_a_link_named_like_a_temporary_file_is_not_followed"],
    45: [
        "cli/test_cli.py::test_secrets_of_the_environment_are_nowhere",
        "faults/test_environment.py::test_known_settings_do_not_show_what_looks_like_a_secret",
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.row}: {case.name}")
def test_an_input_ends_as_promised(world: Path, tmp_path: Path, case: Case) -> None:
    box = Box(world, tmp_path)
    arguments = case.input(box)
    with case.around(box):
        done = run_tisdpo(*arguments, env=dict(case.env)) if case.env else run_here(*arguments)
    assert done.code == case.code, done.err
    assert "Traceback" not in done.err
    assert not (case.hidden and case.hidden in done.err)
    said = done.err if case.code == 0 else done.error
    assert all(words in said for words in case.said), said
    if case.code:
        assert_one_line(done)
    assert not (tmp_path / "model" / "ran").exists(), "code of the model ran"
    left = {path.name for path in box.out.rglob("*")}
    assert not left & {"run.json", WEIGHTS}
    assert not [name for name in left if name.startswith(".partial-")]


def assert_one_line(done: Done) -> None:
    assert done.out == ""
    assert done.error.startswith("error: "), done.err
    assert len(done.error) <= 300
    assert done.err.endswith("\n")


def test_marks_and_line_ends_change_no_byte(world: Path, tmp_path: Path) -> None:
    """Row 3."""
    box = Box(world, tmp_path)
    models = []
    for path in plant.plain_and_marked(box):
        done = run_here(*box.train_dpo("--no-ref-cache", "--overwrite", data=path))
        assert done.code == 0, done.err
        models.append((box.out / WEIGHTS).read_bytes())
    assert models[0] == models[1]


@pytest.mark.parametrize("number", ["1e-5", "1E-5", "1.0e-05"])
def test_a_number_in_yaml_is_one(tmp_path: Path, number: str) -> None:
    """Row 48."""
    box = Box(tmp_path, tmp_path)
    done = run_here(*plant.config(f"learning_rate: {number}\n", "--print-config")(box))
    assert done.code == 0, done.err
    assert "learning_rate: 1.0e-05" in done.out


# The table is complete ----------------------------------------------------------------------------------------------


@cache
def defined_in(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("number", range(1, 50))
def test_every_row_is_held(number: int) -> None:
    named = ELSEWHERE.get(number, [])
    missing = [name for name in named if name.partition("::")[2] not in defined_in(name.partition("::")[0])]
    assert missing == []
    assert named or [case for case in CASES if case.row == number]
