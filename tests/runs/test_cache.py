"""The cache of tensors by itself: verified before use, bounded in size, tidy, with the permissions of the umask."""

from __future__ import annotations

import json
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_here
from safetensors.torch import load_file, save_file
from torch import Tensor

from tisdpo_cli.cached_files import reference_files
from tisdpo_cli.runs import cache as module
from tisdpo_cli.runs.cache import TensorCache, cpu_model, key_of
from tisdpo_cli.runs.env import environment

KEY, OTHER = key_of({"row": 1}), key_of({"row": 2})
VALUES = torch.tensor([-1.5, -0.25, -3.0])


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def cache(tmp_path: Path, warnings: list[str]) -> TensorCache:
    cache = TensorCache(tmp_path, warnings.append)
    cache.write(KEY, VALUES)
    return cache


def file_of(cache: TensorCache, key: str = KEY) -> Path:
    return cache.directory / key[:2] / f"{key}.safetensors"


def consistent(tensor: Tensor) -> Callable[[TensorCache], None]:
    """A file that is whole in itself, but holds something else."""

    def write(cache: TensorCache) -> None:
        digest = module._digest(tensor.float() if tensor.dtype == torch.bfloat16 else tensor, KEY)
        save_file({"values": tensor}, file_of(cache), metadata={"sha256": digest})

    return write


def of_another_key(cache: TensorCache) -> None:
    cache.write(OTHER, VALUES + 1)
    file_of(cache, OTHER).replace(file_of(cache))


def claims_terabytes(cache: TensorCache) -> None:
    header = json.dumps({"values": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}).encode()
    file_of(cache).write_bytes(struct.pack("<Q", len(header)) + header)


def flipped(cache: TensorCache) -> None:
    content = bytearray(file_of(cache).read_bytes())
    content[-1] ^= 1
    file_of(cache).write_bytes(content)


DAMAGE: dict[str, Callable[[TensorCache], object]] = {
    "longer": consistent(torch.cat([VALUES, VALUES])),
    "shorter": consistent(VALUES[:2].clone()),
    "empty tensor": consistent(torch.zeros(0)),
    "another shape": consistent(VALUES.reshape(1, 3)),
    "bf16": consistent(VALUES.bfloat16()),
    "float64": consistent(VALUES.double()),
    "int32": consistent(VALUES.int()),
    "not finite": consistent(torch.tensor([0.0, float("nan"), 0.0])),
    "of another key": of_another_key,
    "flipped": flipped,
    "another name": lambda cache: save_file({"weights": VALUES}, file_of(cache)),
    "without a hash": lambda cache: save_file({"values": VALUES}, file_of(cache)),
    "empty": lambda cache: file_of(cache).write_bytes(b""),
    "cut": lambda cache: file_of(cache).write_bytes(file_of(cache).read_bytes()[:-3]),
    "text": lambda cache: file_of(cache).write_text("[" * 10_000),
    "terabytes": claims_terabytes,
}


def test_what_is_written_comes_back(cache: TensorCache, warnings: list[str]) -> None:
    back = cache.read(KEY, 3)
    assert back is not None
    assert torch.equal(back, VALUES)
    assert cache.read(OTHER, 3) is None
    assert warnings == []


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_not_expected_is_computed_anew_with_one_warning(
    cache: TensorCache, warnings: list[str], damage: Callable[[TensorCache], object]
) -> None:
    damage(cache)
    assert cache.read(KEY, 3) is None
    assert warnings == [f"{file_of(cache)} is damaged; recomputing"]
    cache.write(KEY, VALUES)
    assert torch.equal(cache.read(KEY, 3), VALUES)  # type: ignore[arg-type]
    assert len(warnings) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_training_recomputes_what_is_consistent_but_wrong(world: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    def train(out: str) -> bytes:
        done = run_here(
            "train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / out, "--max-steps", "1",
            "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0", "--cache-dir", tmp_path,
        )  # fmt: skip
        assert done.code == 0, done.err
        assert done.err.count("is damaged; recomputing") == (out != "one")
        return (tmp_path / out / "model.safetensors").read_bytes()

    whole = train("one")
    (path,) = (tmp_path / "reference").rglob("*.safetensors")
    values = load_file(path)["values"]
    cut = values[:-1].clone() if dtype == torch.bfloat16 else values
    save_file({"values": cut.to(dtype)}, path, metadata={"sha256": module._digest(cut, path.stem)})
    assert train("two") == whole


def test_the_files_used_least_recently_make_room(tmp_path: Path, warnings: list[str]) -> None:
    keys = [key_of({"row": i}) for i in range(6)]
    values = torch.zeros(1000)
    unbounded = TensorCache(tmp_path, warnings.append)
    for age, key in enumerate(keys[:5]):
        unbounded.write(key, values)
        path = file_of(unbounded, key)
        os.utime(path, (1000.0 + age, 1000.0 + age))
    one = path.stat().st_size
    assert unbounded.read(keys[0], 1000) is not None, "used just now"
    bounded = TensorCache(tmp_path, warnings.append, bound=int(4.5 * one))
    bounded.write(keys[5], values)
    left = [key for key in keys if file_of(bounded, key).exists()]
    assert left == [keys[0], keys[3], keys[4], keys[5]]
    assert reference_files(tmp_path).size() == (4, 4 * one)
    bounded.write(keys[1], values)
    assert not file_of(bounded, keys[3]).exists()
    assert warnings == []


def test_old_temporary_files_are_removed_and_new_ones_stay(tmp_path: Path, warnings: list[str]) -> None:
    folder = tmp_path / "reference" / KEY[:2]
    folder.mkdir(parents=True)
    old = time.time() - 25 * 3600
    for name in (".partial-1-a.safetensors", ".tmpAbC123"):
        (folder / name).write_text("half")
        os.utime(folder / name, (old, old))
    (folder / ".partial-2-b.safetensors").write_text("another process writes it")
    TensorCache(tmp_path, warnings.append).write(KEY, VALUES)
    names = sorted(path.name for path in folder.iterdir())
    assert names == [".partial-2-b.safetensors", f"{KEY}.safetensors"]


def test_nothing_is_written_through_a_link(tmp_path: Path, warnings: list[str]) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    folder = tmp_path / "reference" / KEY[:2]
    folder.mkdir(parents=True)
    for name in (f"{KEY}.safetensors", f".partial-{os.getpid()}-{KEY}.safetensors"):
        (folder / name).symlink_to(mine)
    TensorCache(tmp_path, warnings.append).write(KEY, VALUES)
    assert mine.read_text() == "mine"
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.safetensors"]


def test_clearing_removes_what_is_ours_alone(cache: TensorCache, tmp_path: Path) -> None:
    size = file_of(cache).stat().st_size
    (cache.directory / KEY[:2] / ".partial-1-x").write_text("half")
    (cache.directory / "notes.txt").write_text("mine")
    assert reference_files(tmp_path).clear() == (1, size)
    assert [path.name for path in cache.directory.rglob("*")] == ["notes.txt"]
    (cache.directory / "notes.txt").unlink()
    assert reference_files(tmp_path).clear() == (0, 0)
    assert not cache.directory.exists()
    assert reference_files(tmp_path).clear() == (0, 0)


def test_env_shows_and_clears_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = TensorCache(None, lambda _text: None)
    cache.write(KEY, torch.zeros(2**18))
    place = f"reference log-probs: {tmp_path}/tisdpo/reference, "
    assert f"{place}1 files, 1.0 MiB, at most 20 GiB" in run_here("env").out
    assert "freed" not in run_here("env").out
    cleared = run_here("env", "--clear-cache")
    assert cleared.code == 0
    assert "freed: 1 files, 1.0 MiB" in cleared.out
    assert f"{place}0 files, 0.0 MiB" in cleared.out
    assert json.loads(run_here("env", "--clear-cache", "--json").out)["freed"] == "0 files, 0.0 MiB"


def test_the_cpu_is_part_of_the_key_and_of_env(monkeypatch: pytest.MonkeyPatch) -> None:
    from tisdpo_cli.engine.training import reference

    assert cpu_model()
    assert cpu_model() in environment(SimpleNamespace(clear_cache=False))["machine"]

    def depends_on() -> object:
        runtime = SimpleNamespace(device=torch.device("cpu"))
        model = torch.nn.Linear(1, 1)
        scorer = SimpleNamespace(packed=True, cut_short={}, model=model, parameters=model.parameters)
        microbatching = SimpleNamespace()
        return reference.ReferencePass(runtime, scorer, 0, microbatching, {}, None).depends_on  # type: ignore[arg-type]

    here = depends_on()
    assert depends_on() == here
    monkeypatch.setattr(reference, "cpu_model", lambda: "another")
    assert depends_on() != here
