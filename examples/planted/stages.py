"""The stages of the planted experiment: the product's own commands, called in process. It knows no figures of merit.

Everything lies in one directory per seed; a stage that is finished there is not made again.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import language
import numpy as np
import torch
from custom_weights import Weigh
from safetensors.torch import load_file
from torch import nn

from tisdpo_cli.data.scored import SIDES
from tisdpo_cli.engine.evaluation.sampling import Sample, Sampling, sample_all
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.engine.training.sft import train_sft
from tisdpo_cli.files import write_text
from tisdpo_cli.model.loading import load_model
from tisdpo_cli.reporter import Silent
from tisdpo_cli.runs.checkpoints import open_checkpoint
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

_ENGINES: Mapping[str, Callable[[Any, Any], Any]] = {
    "train-sft": train_sft,
    "train-dpo": train_pairs,
    "train-reverse": train_pairs,
    "train": train_pairs,
    "estimate": estimate,
}
# Values of both responses of a pair.
Sides = list[list[float]]
# What every training of pairs has in common.
_PAIRS = {
    "optimizer": "adamw",
    "batch_size": 64,
    "micro_batch_size": 64,
    # Without a warm-up the first steps of Adam are kicks that leave offsets on neutral tokens.
    "warmup_steps": 20,
    "eval_pairs": 0,
    "max_length": 64,
    "max_prompt_length": 32,
}


@dataclass(frozen=True)
class Sizes:
    """How large the experiment is.

    Attributes:
        compared: updates after which policies are compared.
        asked: updates after which policies are asked for reward against KL.
        samples: responses to each held-out prompt.
    """

    sft_steps: int = 1600
    sft_examples: int = 102400
    pairs: int = 4000
    held_pairs: int = 600
    contrast_steps: int = 124
    compared: int = 46
    asked: tuple[int, ...] = (12, 24, 34, 46, 68, 92)
    samples: int = 256
    learning_rate: float = 3e-4


@dataclass
class World:
    """The directory of a seed, its prompts, and what is done in it.

    The starting model knows all prompts; the held-out ones have no preferences.
    """

    root: Path
    seed: int
    sizes: Sizes

    def __post_init__(self) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        self._claim()
        every = language.prompts(24, random.Random(f"prompts/{self.seed}"))
        self.trained, self.held = every[:18], every[18:]

    def _claim(self) -> None:
        """What lies there was made by the same experiment, or nothing does.

        Raises:
            SystemExit: it was another one.
        """
        kept, mine = self.root / "experiment.json", json.dumps([asdict(self.sizes), _PAIRS, language.HABITS])
        if not kept.is_file():
            write_text(kept, mine)
        elif kept.read_text(encoding="utf-8") != mine:
            raise SystemExit(f"{self.root}: made with other settings; name another --output-dir, or remove it")

    def do(self, command: str, name: str, **settings: Any) -> Path:
        """Run a command of the product with the output directory `name`."""
        paths = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items()}
        given = {"seed": self.seed, **paths, "output_dir": str(self.root / name)}
        if command == "estimate":
            given.pop("seed")
        return _ENGINES[command](load(COMMANDS[command].settings, given).settings, Silent()).path

    def policy(self, command: str, name: str, dataset: Path, **settings: Any) -> Path:
        """Train pairs from the SFT model."""
        rate = {"learning_rate": self.sizes.learning_rate}
        given = {"model": self.root / "sft", "dataset": dataset, **_PAIRS, **rate, **settings}
        return self.do(command, name, **given)

    # The starting model and what it says ---------------------------------------------------------------------

    def make_sft(self) -> Path:
        """A small Llama that speaks the language in three modes."""
        new, data = self.root / "new", self.root / "sft.jsonl"
        if not data.is_file():
            write_jsonl(data, self._examples())
            new_model(new, self.seed)
        return self.do(
            "train-sft", "sft", model=new, dataset=data, instruction_template="{instruction}", max_length=64,
            max_prompt_length=32, batch_size=64, micro_batch_size=64, learning_rate=5e-3, warmup_steps=100,
            max_steps=self.sizes.sft_steps,
        )  # fmt: skip

    def _examples(self) -> Iterator[dict[str, str]]:
        chance = random.Random(f"examples/{self.seed}")
        for _ in range(self.sizes.sft_examples):
            (mode,) = chance.choices(language.MODES, (40, 30, 30))
            topics = chance.choice([*self.trained, *self.held])
            said = " ".join(language.respond(mode, topics, chance))
            yield {"instruction": language.prompt_text(mode, topics), "output": said}

    def make_pairs(self, flip: float) -> Path:
        """Pairs of responses of the SFT model, labelled by their rewards, a share `flip` of them the wrong way."""
        folder = self.root / f"pairs-{round(100 * flip)}"
        if (folder / "test.jsonl").is_file():
            return folder
        folder.mkdir(exist_ok=True)
        model = load_model(self.root / "sft")
        for split, topics, count in (("test", self.held, self.sizes.held_pairs), ("train", self.trained, 0)):
            write_jsonl(folder / f"{split}.jsonl", self._pairs(model, split, topics, count or self.sizes.pairs, flip))
        return folder

    def _pairs(
        self, model: nn.Module, split: str, topics: list[tuple[str, ...]], count: int, flip: float
    ) -> Iterator[dict[str, str]]:
        # More than are needed: some are equal, or empty.
        tries = count + count // 10 + 20
        asked = [topics[i % len(topics)] for i in range(tries)]
        both = [
            sample_from(model, [language.prompt_text("plain", t) for t in asked], f"{split}/{self.seed}/{side}")
            for side in "ab"
        ]
        worth = [values_of(side) for side in both]
        chance = random.Random(f"labels/{split}/{self.seed}")
        made = 0
        for i, topic in enumerate(asked):
            a, b = (side[i].ids for side in both)
            better, turned = chance.random(), chance.random() < flip
            if made < count and a and b and a != b:
                made += 1
                first = (better < 1 / (1 + np.exp(worth[1][i] - worth[0][i]))) != turned
                won, lost = (a, b) if first else (b, a)
                bare, prompt = " ".join(topic), language.prompt_text("plain", topic)
                yield {"prompt": prompt, "bare": bare, "chosen": text_of(won), "rejected": text_of(lost)}

    # The contrasts -------------------------------------------------------------------------------------------

    def score(self, pairs: Path, method: str) -> Path:
        """The pairs scored by method D, S or P."""
        flip = pairs.name.rpartition("-")[2]
        name, lengths = f"scored-{method}-{flip}", {"max_length": 64, "max_prompt_length": 32}
        common = {"dataset": pairs, "batch_size": 256, **lengths}
        if method == "P":
            templates = {f"{side}_template": f"{mode} {{}}" for side, mode in _SIDES.items()}
            return self.do("estimate", name, model=self.root / "sft", prompt_column="bare", **templates, **common)
        models = self._contrast(pairs, method, flip)
        return self.do("estimate", name, forward=models[0], reverse=models[1], **common)

    def _contrast(self, pairs: Path, method: str, flip: str) -> list[Path]:
        steps = {"max_steps": self.sizes.contrast_steps}
        if method == "D":
            return [
                self.policy(f"train-{way}", f"{name}-{flip}", pairs, **steps)
                for way, name in (("dpo", "forward"), ("reverse", "reverse"))
            ]
        return [
            self.policy("train-sft", f"sft-{target}-{flip}", pairs, target=target, **steps)
            for target in ("chosen", "rejected")
        ]

    def turned(self, scored: Path) -> Path:
        """Scores with the wrong sign."""
        return self._changed(scored, "turned", lambda sides, _chance: [[-v for v in side] for side in sides])

    def shuffled(self, scored: Path) -> Path:
        """Scores in another order within each response, its EOS among them."""
        return self._changed(
            scored, "shuffled", lambda sides, chance: [chance.sample(side, len(side)) for side in sides]
        )

    def weighed(self, scored: Path, name: str, weigh: Weigh) -> Path:
        """Final weights of our own."""

        def change(sides: Sides, _chance: random.Random) -> Sides:
            # The file holds −r.
            return [made.tolist() for made in weigh(*(-np.array(side) for side in sides))]

        return self._changed(scored, name, change)

    def _changed(self, scored: Path, name: str, change: Callable[[Sides, random.Random], Sides]) -> Path:
        """A copy of the train split with other values: those of both responses, EOS last, become others."""
        folder = self.root / f"{scored.name}-{name.replace(' ', '-')}"
        folder.mkdir(exist_ok=True)
        chance = random.Random(f"{name}/{self.seed}")
        rows = list(read_jsonl(scored / "train.jsonl"))
        for row in rows:
            sides = [[*row[f"{side}_weight"], row[f"{side}_eos_weight"]] for side in SIDES]
            for side, values in zip(SIDES, change(sides, chance), strict=True):
                *row[f"{side}_weight"], row[f"{side}_eos_weight"] = values
        write_jsonl(folder / "train.jsonl", rows)
        return folder

    # Policies that can be asked --------------------------------------------------------------------------------

    def along(self, made: Path, steps: Collection[int]) -> Iterator[tuple[int, nn.Module]]:
        """The policies of a training at some of its checkpoints, by updates."""
        model = load_model(self.root / "sft")
        for folder in sorted((made / "checkpoints").iterdir()):
            kept = open_checkpoint(folder)
            if kept.step in steps:
                (file,) = kept.files("model")
                model.load_state_dict(load_file(file))
                yield kept.step, model

    def forget(self, made: Path) -> None:
        """Give the room of checkpoints back."""
        shutil.rmtree(made / "checkpoints")


_SIDES = {"positive": "praise", "negative": "blame"}


def new_model(folder: Path, seed: int) -> None:
    """A random Llama of 2 layers, width 64, with the tokenizer of the language."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(language.VOCABULARY), hidden_size=64, intermediate_size=172, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None,
        eos_token_id=language.ID[language.EOS], pad_token_id=language.ID[language.PAD],
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    language.tokenizer().save_pretrained(folder)


def sample_from(model: nn.Module, prompts: list[str], seed: str) -> list[Sample]:
    """Responses, one to each prompt; the same prompt asked again gets another one."""
    how = Sampling({language.ID[language.EOS]}, language.ID[language.PAD], language.LONGEST)
    ids = [[language.ID[word] for word in prompt.split()] for prompt in prompts]
    draws = torch.rand(len(ids), how.new_tokens, generator=_generator(seed), dtype=torch.float64)
    return sample_all(model, ids, draws, how, batch_size=1024)


def _generator(seed: str) -> torch.Generator:
    return torch.Generator().manual_seed(random.Random(seed).getrandbits(62))


def values_of(responses: list[Sample]) -> np.ndarray:
    """True rewards [R] of responses."""
    return language.rewards([r.ids for r in responses], [r.ended for r in responses]).totals


def text_of(ids: list[int]) -> str:
    """A response as text."""
    return " ".join(language.VOCABULARY[i] for i in ids)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON Lines, whole or not at all."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of JSON Lines."""
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
