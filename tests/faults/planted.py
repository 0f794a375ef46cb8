"""Small inputs that are planted for the table of faults: each function plants one and returns the command line."""

from __future__ import annotations

import fcntl
import json
import pickle
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from conftest import pair_rows, read_jsonl, write_jsonl
from safetensors.torch import load_file, save_file

Line = list[str | Path]
GOOD = {"prompt": "p", "chosen": " c", "rejected": " r"}
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Box:
    """A place to plant in: the world of all tests, and a directory of one test.

    Attributes:
        out: the output directory of the command.
    """

    world: Path
    tmp: Path
    out: Path = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "out", self.tmp / "out")

    def train_dpo(self, *more: str | Path, data: Path | None = None, model: Path | None = None) -> Line:
        """train-dpo of one step."""
        short = ("--max-steps", "1", "--batch-size", "4", "--eval-pairs", "0", "--warmup-steps", "0")
        model, data = model or self.world / "sft", data or self.world / "data"
        return ["train-dpo", "-m", model, "-d", data, "-o", self.out, *short, *more]

    def estimate(self, forward: Path, reverse: Path) -> Line:
        """estimate with two models."""
        return ["estimate", "--forward", forward, "--reverse", reverse, "-d", self.world / "data", "-o", self.out]


Plant = Callable[[Box], Line]


# Datasets -----------------------------------------------------------------------------------------------------------


def text(content: str | bytes, *more: str, name: str = "pairs.jsonl") -> Plant:
    """A dataset file with this content; a check of it by `--dry-run`."""

    def plant(box: Box) -> Line:
        path = box.tmp / name
        path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        return box.train_dpo("--dry-run", *more, data=path)

    return plant


def second_line(line: str | bytes) -> Plant:
    """A good row, and a second line."""
    return text(json.dumps(GOOD).encode() + b"\n" + (line.encode() if isinstance(line, str) else line) + b"\n")


def second_row(**changed: object) -> Plant:
    """A good row, and one with other values; `...` leaves a column out."""
    return rows(GOOD, {key: value for key, value in {**GOOD, **changed}.items() if value is not ...})


def rows(*given: Mapping[str, object], more: tuple[str, ...] = ()) -> Plant:
    """A JSON Lines file with these rows."""
    return text("".join(json.dumps(row) + "\n" for row in given), *more)


def options(*more: str) -> Plant:
    """The world's model and data with further options."""
    return lambda box: box.train_dpo(*more)


# Scored datasets ----------------------------------------------------------------------------------------------------


def scored(change: Callable[[list[dict[str, Any]]], object], *more: str) -> Plant:
    """A scored dataset of four rows, changed; a check of it by `train --dry-run`."""

    def plant(box: Box) -> Line:
        from tisdpo_cli.model.tokenizer import load_tokenizer

        tokenizer = load_tokenizer(box.world / "sft")
        planted: list[dict[str, Any]] = [dict(row) for row in pair_rows(4)]
        for row in planted:
            for side in ("chosen", "rejected"):
                row[f"{side}_weight"] = [0.1] * len(tokenizer.texts.encode([row[side]])[0])
        change(planted)
        path = write_jsonl(box.tmp / "scored" / "train.jsonl", planted).parent
        return ["train", *box.train_dpo("--dry-run", *more, data=path)[1:]]

    return plant


def other_tokenizer(box: Box) -> Line:
    """Scores that were made with another tokenizer."""
    line = scored(lambda _: None)(box)
    (box.tmp / "scored" / "estimate.json").write_text(json.dumps({"tokenizer": "0" * 64}))
    return line


# Models -------------------------------------------------------------------------------------------------------------


def model(change: Callable[[Path], object], *more: str) -> Plant:
    """A changed copy of the world's model; a check of it by `--dry-run`, or another option."""

    def plant(box: Box) -> Line:
        copy = Path(shutil.copytree(box.world / "sft", box.tmp / "model"))
        change(copy)
        return box.train_dpo(*(more or ("--dry-run",)), model=copy)

    return plant


def tensors(change: Callable[[dict[str, torch.Tensor]], object], *more: str) -> Plant:
    """A copy of the world's model with other tensors."""

    def edit(path: Path) -> None:
        loaded = load_file(path / WEIGHTS)
        change(loaded)
        save_file(loaded, path / WEIGHTS, metadata={"format": "pt"})

    return model(edit, *more)


def change_json(path: Path, **values: object) -> None:
    """Change members of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def pickled(path: Path) -> None:
    """Weights as a pickle that leaves a trace when it runs."""

    class Trace:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (path / "ran",)

    (path / WEIGHTS).unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Trace()))


def outside(path: Path) -> None:
    """An index that names a file outside the model."""
    (path / WEIGHTS).rename(path.parent / WEIGHTS)
    index = {"weight_map": {"model.norm.weight": f"../{WEIGHTS}"}}
    (path / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


def swapped_ids(box: Box) -> Line:
    """Two models whose tokenizers have the same size and two ids swapped."""
    other = Path(shutil.copytree(box.world / "sft", box.tmp / "model"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["x"], vocabulary["z"] = vocabulary["z"], vocabulary["x"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return box.estimate(box.world / "sft", other)


# Settings and surroundings ------------------------------------------------------------------------------------------


def config(content: str, *more: str) -> Plant:
    """A config file, and what is in force with it."""

    def plant(box: Box) -> Line:
        path = box.tmp / "c.yaml"
        path.write_text(content, encoding="utf-8")
        return ["train-dpo", "-c", path, "-m", "m", "-d", "d", "-o", "o", *more]

    return plant


@contextmanager
def locked(box: Box) -> Iterator[None]:
    """Another run holds the output directory."""
    box.out.mkdir()
    with (box.out / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def plain_and_marked(box: Box) -> tuple[Path, Path]:
    """The same rows twice: plain, and with BOM, CRLF, blank lines and no final newline."""
    lines = [json.dumps(row) for row in read_jsonl(box.world / "data" / "train.jsonl")]
    plain, marked = box.tmp / "plain" / "train.jsonl", box.tmp / "marked" / "train.jsonl"
    for path, content in ((plain, "\n".join(lines) + "\n"), (marked, "\ufeff" + "\r\n\r\n".join(lines))):
        path.parent.mkdir()
        path.write_bytes(content.encode("utf-8"))
    return plain, marked
