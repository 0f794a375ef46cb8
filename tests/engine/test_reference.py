"""Log-probs of the reference: computed once, kept, shared by the trainings, and never stale."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import pytest
import torch
from conftest import Done, pair_rows, read_jsonl, run_here, write_jsonl

from tisdpo_cli.engine.training import policy, reference, reference_model
from tisdpo_cli.engine.training import preference as pairs
from tisdpo_cli.model import loading
from tisdpo_cli.runs.cache import TensorCache, key_of

FEW = ("--max-steps", "3", "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


def files(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.rglob("*.safetensors")}


def train(command: str, root: Path, out: Path, cache: Path, *more: str | Path, data: str = "data") -> Done:
    source = root / data if (root / data).exists() else Path(data)
    done = run_here(
        command, "-m", root / "sft", "-d", source, "-o", out, *FEW, "--cache-dir", cache, *more
    )  # fmt: skip
    assert done.code == 0, done.err
    return done


def metrics(out: Path) -> list[dict]:
    dropped = ("tokens_per_second", "pairs_per_second")
    return [{k: v for k, v in line.items() if k not in dropped} for line in read_jsonl(out / "metrics.jsonl")]


def test_kept_values_are_those_computed_anew(world: Path, tmp_path: Path, cache: Path) -> None:
    train("train-dpo", world, tmp_path / "one", cache)
    first = files(cache)
    assert len(first) == 2, "a part of the train split, and one of the test split"
    again = train("train-dpo", world, tmp_path / "two", cache)
    assert "log-probs of 24 pairs read from the cache" in again.err
    train("train-dpo", world, tmp_path / "three", cache, "--no-ref-cache")
    train("train-dpo", world, tmp_path / "four", tmp_path / "other")
    assert files(cache) == first == files(tmp_path / "other")
    outcomes = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two", "three", "four")]
    assert len(set(outcomes)) == 1
    assert len({json.dumps(metrics(tmp_path / name)) for name in ("one", "two", "three", "four")}) == 1


def test_the_reference_is_not_in_memory_while_training(
    contrast: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[weakref.ref] = []
    load, run = loading.load_model, pairs.run_training

    def remembered(*args: object, **kwargs: object) -> torch.nn.Module:
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    def checked(*args: object) -> object:
        gc.collect()
        assert [reference() is None for reference in loaded] == [False, True]
        return run(*args)

    for module in (policy, reference_model):
        monkeypatch.setattr(module, "load_model", remembered)
    monkeypatch.setattr(pairs, "run_training", checked)
    train("train-dpo", contrast, tmp_path / "out", cache, "--ref-model", contrast / "dpo")
    assert len(loaded) == 2


def test_values_of_other_scoring_code_are_not_used(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train("train-dpo", world, tmp_path / "one", cache)
    monkeypatch.setattr(reference, "REVISION", reference.REVISION + 1)
    again = train("train-dpo", world, tmp_path / "two", cache)
    assert "read from the cache" not in again.err
    assert len(files(cache)) == 4


def test_all_trainings_of_the_method_share_it(contrast: Path, tmp_path: Path, cache: Path) -> None:
    train("train-dpo", contrast, tmp_path / "dpo", cache)
    first = files(cache)
    for command, data in (("train-reverse", "data"), ("train", "scored")):
        done = train(command, contrast, tmp_path / command, cache, data=data)
        assert "reference log-probs of 24 pairs read from the cache" in done.err
        assert "0.6931 = ln 2" in done.err
    # Another learning rate, loss and batch size read it too.
    train("train-dpo", contrast, tmp_path / "ipo", cache, "--loss", "ipo", "--batch-size", "4", "--lr", "1e-5")
    assert files(cache) == first


def changed_model(world: Path, tmp_path: Path) -> Path:
    from safetensors.torch import load_file, save_file

    shutil.copytree(world, tmp_path / "changed", ignore=shutil.ignore_patterns("scored", "dpo", "reverse"))
    path = tmp_path / "changed" / "sft" / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).view(-1)[0] += 1e-3
    save_file(tensors, path, metadata={"format": "pt"})
    return tmp_path / "changed"


@pytest.mark.parametrize("what", ["a weight", "a character", "max_length", "layout", "dtype"])
def test_whatever_it_depends_on_makes_it_anew(world: Path, tmp_path: Path, cache: Path, what: str) -> None:
    train("train-dpo", world, tmp_path / "one", cache, "--eval-pairs", "0")
    assert len(files(cache)) == 1
    root, data, more = world, "data", ()
    if what == "a weight":
        root = changed_model(world, tmp_path)
    elif what == "a character":
        rows = pair_rows(24)
        rows[7]["chosen"] += "!"
        data = str(write_jsonl(tmp_path / "d" / "train.jsonl", rows).parent)
    else:
        more = {"max_length": ("--max-length", "40", "--max-prompt-length", "16"), "layout": ("--layout", "separate"),
                "dtype": ("--dtype", "bf16")}[what]  # fmt: skip
    done = train("train-dpo", root, tmp_path / "two", cache, "--eval-pairs", "0", *more, data=data)
    assert "read from the cache" not in done.err
    assert len(files(cache)) == 2


def test_a_damaged_file_is_made_again(world: Path, tmp_path: Path, cache: Path) -> None:
    train("train-dpo", world, tmp_path / "one", cache)
    whole = files(cache)
    paths = sorted(cache.rglob("*.safetensors"))
    body = bytearray(paths[0].read_bytes())
    body[-1] ^= 1
    paths[0].write_bytes(bytes(body))
    paths[1].write_bytes(b"")
    done = train("train-dpo", world, tmp_path / "two", cache)
    assert done.err.count("is damaged; recomputing") == 2
    assert files(cache) == whole
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")


def test_where_it_cannot_be_kept_training_goes_on(world: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = train("train-dpo", world, tmp_path / "one", tmp_path / "file")
    assert "warning: " in done.err
    assert "log-probs are not cached" in done.err


def test_nothing_is_kept_where_it_is_not_wanted_or_not_enough(world: Path, tmp_path: Path, cache: Path) -> None:
    train("train-dpo", world, tmp_path / "one", cache, "--no-ref-cache")
    train("train-dpo", world, tmp_path / "two", cache, "--loss", "tdpo2")
    train("train-dpo", world, tmp_path / "three", cache, "--alpha", "0.5")
    assert files(cache) == {}


def test_another_reference_has_values_of_its_own(contrast: Path, tmp_path: Path, cache: Path) -> None:
    train("train-dpo", contrast, tmp_path / "one", cache)
    done = train("train-dpo", contrast, tmp_path / "two", cache, "--ref-model", contrast / "dpo")
    assert "read from the cache" not in done.err
    assert len(files(cache)) == 4
    assert metrics(tmp_path / "two")[0]["rewards/margins"] != 0


def test_env_says_where_and_how_large(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert f"{tmp_path}/xdg/tisdpo/reference, 0 files, 0.0 MiB" in run_here("env").out
    done = run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "o", *FEW)
    assert done.code == 0, done.err
    assert f"{tmp_path}/xdg/tisdpo/reference, 2 files" in run_here("env").out


def test_a_key_is_of_everything() -> None:
    one = key_of({"a": [1, 2], "b": "x"})
    assert one == key_of({"b": "x", "a": [1, 2]})
    assert len({one, key_of({"a": [1, 3], "b": "x"}), key_of({"a": [1, 2], "b": "y"}), key_of({"a": [[1], 2]})}) == 4


def test_a_kept_tensor_comes_back_to_the_bit(tmp_path: Path) -> None:
    told: list[str] = []
    cache = TensorCache(tmp_path, told.append)
    tensor = torch.tensor([0.1, -0.0, 3e-39, -1e30])
    assert cache.read("ab12", 4) is None
    cache.write("ab12", tensor)
    kept = cache.read("ab12", 4)
    assert kept is not None
    assert kept.numpy().tobytes() == tensor.numpy().tobytes()
    assert [path.name for path in (cache.directory / "ab").iterdir()] == ["ab12.safetensors"]
    assert told == []


def test_a_short_run_waits_for_the_pairs_that_it_trains(
    world: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where all would take long; a few are computed all, so that other trainings share them."""
    asked: list[int] = []
    run = reference.ReferencePass.run
    monkeypatch.setattr(
        reference.ReferencePass, "run", lambda self, pairs: asked.append(len(pairs)) or run(self, pairs)
    )
    train("train-dpo", world, tmp_path / "few", cache, "--max-steps", "2", "--batch-size", "3")
    monkeypatch.setattr(pairs, "PAIRS_PER_PART", 20)
    train("train-dpo", world, tmp_path / "short", cache, "--max-steps", "2", "--batch-size", "3")
    assert asked == [24, 8, 6, 8]
    asked.clear()
    train("train-dpo", world, tmp_path / "long", cache, "--max-steps", "9", "--batch-size", "3")
    assert asked == [24, 8]
