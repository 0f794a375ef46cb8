"""The environment in a bug report: names of variables, and no value that may be a secret."""

from __future__ import annotations

import json

import pytest
from conftest import run_here

SECRET = "correct-horse-battery-staple"
UNKNOWN = ("TISDPO_HF_TOKEN", "TISDPO_BETTA", "TISDPO_API_KEY", "TISDPO_", "TISDPO_X")
SECRET_VALUES = (
    "hf_abcdefghijklmnop",
    "https://user:hunter2@example.org/model",
    "sk-proj-abcdefgh12345678",
    "0123456789abcdef0123456789abcdef",
    "token=hunter2",
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0",
)


def test_unknown_variables_are_named_without_their_values(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in UNKNOWN:
        monkeypatch.setenv(name, SECRET)
    for more in ((), ("--json",)):
        done = run_here("env", *more)
        assert done.code == 0, done.err
        assert all(name in done.out for name in UNKNOWN)
        assert SECRET not in done.out + done.err


@pytest.mark.parametrize("value", SECRET_VALUES)
def test_known_settings_do_not_show_what_looks_like_a_secret(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TISDPO_MODEL", value)
    done = run_here("env")
    assert done.code == 0, done.err
    assert "TISDPO_MODEL: " in done.out
    assert value not in done.out + done.err


def test_values_of_known_settings_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "TISDPO_BETA": "0.2",
        "TISDPO_TOKENS_PER_MICROBATCH": "4096",
        "TISDPO_TOKENIZER": "/models/SmolLM2-135M-Instruct",
        "TISDPO_OUTPUT_DIR": "/scratch/user/2026-07-run-12345/checkpoints_of_the_long_experiment_3",
        "TISDPO_METHOD__ALPHA": "0.5",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    shown = json.loads(run_here("env", "--json").out)
    assert {name: shown[name] for name in values} == values
