"""What the benchmarks share: data of known lengths, a model made on the spot, and runs in processes of their own,
interleaved A B A B.

Every run is a fresh process with the same environment, and measures only what is between its imports and its end:
wall seconds, CPU seconds, and the peak of its resident memory.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

VOCABULARY, MAX_LENGTH, MAX_PROMPT_LENGTH = 8192, 512, 256


@dataclass(frozen=True)
class Shape:
    """Of a Qwen2 with tied embeddings."""

    hidden: int = 256
    feed_forward: int = 640
    layers: int = 6
    heads: int = 4
    key_heads: int = 4
    vocabulary: int = VOCABULARY


SHAPES = {
    "small": Shape(),
    # Of Qwen2.5; the tokenizer stays the small one.
    "qwen2.5-0.5b": Shape(896, 4864, 24, 14, 2, 151_936),
    "qwen2.5-1.5b": Shape(1536, 8960, 28, 12, 2, 151_936),
}


def shape_of(model: str) -> Shape:
    """The shape of a model: a directory, or the name of a shape."""
    if model in SHAPES:
        return SHAPES[model]
    config = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return Shape(
        config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"], config["num_attention_heads"],
        config["num_key_value_heads"], config["vocab_size"],
    )  # fmt: skip


# Mean, median and longest, in tokens: prompts, chosen and rejected responses.
LENGTHS = {
    "hh": ((126, 98, 850), (41, 28, 280), (52, 36, 574)),
    "ultrafeedback": ((80, 45, 400), (260, 230, 900), (220, 185, 900)),
}
DTYPES = ("float32", "bf16")
EOS, PAD = "<|endoftext|>", "<|pad|>"


def on_gpu() -> bool:
    """Whether everything runs on a GPU."""
    return torch.cuda.is_available()


def parser(description: str, pairs: int) -> argparse.ArgumentParser:
    """Options that all benchmarks have; on a GPU there is more of everything.

    Args:
        description: of the benchmark.
        pairs: on CPUs.
    """
    gpu = on_gpu()
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--pairs", type=int, default=8 * pairs if gpu else pairs, help="pairs of preference data")
    default = "qwen2.5-0.5b" if gpu else "small"
    made.add_argument("--model", default=default, help=f"directory, or shape of a random one: {', '.join(SHAPES)}")
    made.add_argument("--dtype", choices=DTYPES, default="bf16" if gpu else "float32", help="what all compute in")
    made.add_argument("--lengths", choices=sorted(LENGTHS), default="hh", help="whose lengths the data have")
    made.add_argument("--data", type=Path, default=None, help="JSONL with prompt, chosen, rejected, in their place")
    made.add_argument("--rounds", type=int, default=3, help="how often each side runs")
    made.add_argument("--seed", type=int, default=0, help="of data and model")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    made.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    made.add_argument("--where", type=Path, default=None, help=argparse.SUPPRESS)
    return made


# Data and model ------------------------------------------------------------------------------------------------


def vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Ids and merges of a tokenizer in which ` a`, ` ab` and ` abc` are tokens, as far as the vocabulary reaches."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = "abcdefghijklmnopqrstuvwxyz"
    ids = {character: i for i, character in enumerate(bytes_to_unicode().values())}
    merges: list[tuple[str, str]] = []
    stems = ["Ġ"]
    while len(ids) < VOCABULARY - 2:
        longer = []
        for stem, letter in ((stem, letter) for stem in stems for letter in letters):
            if len(ids) == VOCABULARY - 2:
                break
            merges.append((stem, letter))
            longer.append(stem + letter)
            ids[stem + letter] = len(ids)
        stems = longer
    return ids, merges


def words() -> list[str]:
    """Texts that are one token each."""
    return [token.replace("Ġ", " ") for token in vocabulary()[0] if token.startswith("Ġ") and len(token) > 1]


def make_model(directory: Path, seed: int, shape: Shape) -> None:
    """A random model and its tokenizer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

    ids, merges = vocabulary()
    tokenizer = Qwen2Tokenizer(vocab=ids, merges=merges, eos_token=EOS, pad_token=PAD, unk_token=None)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=shape.vocabulary, hidden_size=shape.hidden, intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.key_heads,
        max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_other(directory: Path, other: Path, seed: int) -> None:
    """A model and its tokenizer with weights that are a little off."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() / 10)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(directory).save_pretrained(other)


def make_pairs(count: int, lengths: str, seed: int) -> list[dict[str, str]]:
    """Pairs of random words whose lengths in tokens are log-normal, as in the named dataset, and cut like them."""
    draw, every = random.Random(seed), words()

    def length(mean: float, median: float, longest: int) -> int:
        spread = math.sqrt(2 * math.log(mean / median))
        return max(2, min(longest, round(draw.lognormvariate(math.log(median), spread))))

    def text(size: int) -> str:
        return "".join(draw.choice(every) for _ in range(size))

    rows = []
    for _ in range(count):
        prompt, chosen, rejected = (length(*of) for of in LENGTHS[lengths])
        if prompt + max(chosen, rejected) > MAX_LENGTH:
            prompt = min(prompt, MAX_PROMPT_LENGTH)
        room = MAX_LENGTH - prompt
        # The end of the sequence is a token of each response.
        sizes = (min(size, room) - 1 for size in (chosen, rejected))
        rows.append({"prompt": text(prompt), **dict(zip(("chosen", "rejected"), map(text, sizes), strict=True))})
    return rows


def prepare(asked: argparse.Namespace, where: Path, shape: Shape | None = None) -> None:
    """Write `model/` and `data/train.jsonl`."""
    if shape is None and asked.model not in SHAPES:
        (where / "model").symlink_to(Path(asked.model).resolve(strict=True))
    else:
        make_model(where / "model", asked.seed, shape or SHAPES[asked.model])
    if asked.data is not None:
        rows = [json.loads(line) for line in asked.data.read_text(encoding="utf-8").splitlines()[: asked.pairs]]
        rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    else:
        rows = make_pairs(asked.pairs, asked.lengths, asked.seed)
    (where / "data").mkdir()
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (where / "data" / "train.jsonl").write_text(lines, encoding="utf-8")


# Work ----------------------------------------------------------------------------------------------------------


def forward_work(where: Path) -> float:
    """Multiplications and additions of one forward pass over all pairs, each prompt once, the head where a token is
    scored; a backward pass takes twice as many. Attention, which is little at these lengths, is left out.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (of.from_pretrained(where / "model") for of in (AutoModelForCausalLM, AutoTokenizer))
    body = sum(p.numel() for p in model.model.layers.parameters())
    head = model.lm_head.weight.numel()
    rows = [json.loads(line) for line in (where / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    sizes = [{name: len(tokenizer(text)["input_ids"]) for name, text in row.items()} for row in rows]
    scored = sum(size["chosen"] + size["rejected"] + 2 for size in sizes)
    tokens = scored + sum(size["prompt"] for size in sizes)
    return 2.0 * (body * tokens + head * scored)


def product_rate(shape: Shape, dtype: str) -> float:
    """Multiplications and additions per second of this device in matrix products: the better of those of a model's
    feed-forward layers and of large square ones.
    """
    gpu = on_gpu()
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    rows, edge = (16_384, 8192) if gpu else (2048, 1024)
    best = 0.0
    for n, k, m in ((rows, shape.hidden, shape.feed_forward), (edge, edge, edge)):
        a, b = (torch.randn(size, device="cuda" if gpu else "cpu").to(kind) for size in ((n, k), (k, m)))
        for _ in range(20):
            began = time.perf_counter()
            for _ in range(10):
                a @ b
            settle()
            best = max(best, 10 * 2.0 * n * k * m / (time.perf_counter() - began))
    return best


def settle() -> None:
    """Wait for what a GPU still has to do."""
    if on_gpu():
        torch.cuda.synchronize()


# Runs ----------------------------------------------------------------------------------------------------------


class Clock:
    """Wall and CPU seconds of all stretches that it has timed, to the end of what they asked of a GPU."""

    def __init__(self) -> None:
        self.wall, self.cpu = 0.0, 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Time what is done meanwhile."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        settle()
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


@contextmanager
def measured(record: dict[str, Any], loading: Clock | None = None, before: Clock | None = None) -> Iterator[None]:
    """Put wall and CPU seconds and the peak memory in MiB into a record; on a GPU that of its memory.

    Args:
        record: gets them.
        loading: of models, which does not count.
        before: of what was done before, and counts.
    """
    clock = Clock()
    with clock.running():
        yield
    less, more = loading or Clock(), before or Clock()
    record["seconds"] = clock.wall - less.wall + more.wall
    record["cpu_seconds"] = clock.cpu - less.cpu + more.cpu
    record["loading_seconds"] = less.wall
    record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if on_gpu():
        record["peak_mib"] = torch.cuda.max_memory_reserved() / 2**20


def utilisation(record: dict[str, Any], where: Path, passes: int, shape: Shape, dtype: str) -> None:
    """Put into a record of `measured` what share of the device's product rate the useful work had: the utilisation of
    model FLOPs, against what products reach here instead of what a data sheet says.

    Args:
        record: gets it.
        where: model and data.
        passes: the work, in forward passes over all pairs: 3 for an epoch of training, 1 for a reference or scores.
        shape: of the model.
        dtype: what was computed in.
    """
    record["product_rate"] = product_rate(shape, dtype)
    record["work"] = passes * forward_work(where)
    record["utilisation"] = record["work"] / record["seconds"] / record["product_rate"]


def facts(asked: argparse.Namespace) -> dict[str, Any]:
    """What was measured, for JSON."""
    return {name: getattr(asked, name) for name in ("dtype", "lengths", "pairs", "model")}


def arguments(asked: argparse.Namespace, where: Path | None = None) -> list[str]:
    """What a worker must know, as arguments."""
    named = {**facts(asked), "seed": asked.seed, **({} if where is None else {"where": where})}
    return [word for name, value in named.items() for word in (f"--{name}", str(value))]


def in_processes(script: str, names: Sequence[str], arguments: Sequence[str], rounds: int) -> dict[str, list[Any]]:
    """Run workers of a script, A B A B; their records by name."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            command = [sys.executable, script, "--worker", name, *arguments]
            with tempfile.TemporaryDirectory() as out:
                # As the program itself sets it, for both sides: idle threads do not keep the cores from others.
                spin = os.environ.get("GOMP_SPINCOUNT", "10000")
                env = {**os.environ, "HF_HUB_OFFLINE": "1", "TISDPO_BENCHMARK_OUT": out, "GOMP_SPINCOUNT": spin}
                done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
            if done.returncode:
                sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
            record = json.loads(done.stdout.splitlines()[-1])
            found[name].append(record)
            print(
                f"round {number + 1}, {name}: {record['seconds']:.2f} s, {record['peak_mib']:.0f} MiB", file=sys.stderr
            )
    return found


def middle(records: Sequence[Mapping[str, Any]], key: str = "seconds") -> float:
    """The median over runs."""
    return statistics.median(record[key] for record in records)


def table(found: Mapping[str, Sequence[Mapping[str, Any]]], units: int, unit: str) -> str:
    """Medians and spread of all sides; MFU is that of `utilisation`."""
    columns = f"{unit + '/s':>10s} {'seconds (lowest to highest)':>32s} {'CPU s':>8s} {'peak MiB':>9s} {'MFU':>5s}"
    lines = [f"{'':34s} {columns}"]
    for name, records in found.items():
        every = sorted(record["seconds"] for record in records)
        spread = f"{middle(records):.2f} ({every[0]:.2f} to {every[-1]:.2f})"
        cpu, peak = middle(records, "cpu_seconds"), middle(records, "peak_mib")
        numbers = f"{units / middle(records):10.2f} {spread:>32s} {cpu:8.2f} {peak:9.0f}"
        lines.append(f"{name:34s} {numbers} {middle(records, 'utilisation'):5.0%}")
    return "\n".join(lines)


def compared(found: Mapping[str, Sequence[Mapping[str, Any]]], ours: str, others: Sequence[str]) -> dict[str, Any]:
    """Our pairs per second and our peak memory over those of the fastest of the others."""
    against = min(others, key=lambda name: middle(found[name]))
    return {
        "speed_ratio": middle(found[against]) / middle(found[ours]),
        "memory_ratio": middle(found[ours], "peak_mib") / middle(found[against], "peak_mib"),
        "against": against,
    }


def answer(asked: argparse.Namespace, run: Callable[[argparse.Namespace, dict[str, Any]], None]) -> None:
    """Run a worker and print its record as the last line."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    record: dict[str, Any] = {}
    run(asked, record)
    print(json.dumps(record))


def made_for(command: str, **flags: Any) -> Any:
    """Settings of a command of ours, as its flags would make them."""
    from tisdpo_cli.settings.commands import COMMANDS
    from tisdpo_cli.settings.sources import load

    return load(COMMANDS[command].settings, flags, environ={}).settings
