"""Trainings of adapters from the command line: the same promises as for whole models, on one base."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import Done, Listener, read_jsonl, run_here, write_jsonl
from safetensors.torch import load_file

from tisdpo_cli.engine.training import preference as engine
from tisdpo_cli.errors import Interrupted
from tisdpo_cli.model import loading
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.settings.train_pairs import TrainDpo

LORA = ("--lora-r", "4", "--lr", "1e-2", "--optimizer", "adamw", "--warmup-steps", "0", "--batch-size", "8")
FILES = ("adapter_model.safetensors", "adapter_config.json")


class StopInTraining(Listener):
    """Asks to stop after two updates, whatever was counted before."""

    def progress(self, title: str, total: int, done: int, unit: str) -> Listener:
        self.left = 2 if title == "training" else None
        return self


def done(*arguments: str | Path) -> Done:
    result = run_here(*arguments)
    assert result.code == 0, result.err[-3000:]
    return result


def content(path: Path) -> list[bytes]:
    return [(path / name).read_bytes() for name in FILES]


def metrics(path: Path) -> list[dict]:
    return read_jsonl(path / "metrics.jsonl")


@pytest.fixture(scope="module")
def adapters(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters `dpo/` and `reverse/` on the starting model."""
    root = tmp_path_factory.mktemp("adapters")
    for command, name in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
        done(command, "-m", world / "sft", "-d", world / "data", "-o", root / name, "--max-steps", "4", *LORA)
    return root


def test_the_reference_is_the_base_model(world: Path, adapters: Path, tmp_path: Path) -> None:
    """Before the first step nothing differs; reference log-probs are those of every other training on this base."""
    first = metrics(adapters / "dpo")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == 0.0
    whole = ("train-dpo", "-m", world / "sft", "-d", world / "data", "--max-steps", "1", "--cache-dir", tmp_path / "c")
    done(*whole, "-o", tmp_path / "whole")
    said = done(*whole, "-o", tmp_path / "adapter", *LORA).err
    assert "reference log-probs of 24 pairs read from the cache" in said
    assert f"policy = {world / 'sft'} + a new adapter" in said
    assert "LoRA, r 4, alpha 8; the weights of its base model are frozen, in float32" in said


def test_nothing_but_the_adapter_is_written(adapters: Path, world: Path) -> None:
    made = sorted(path.name for path in (adapters / "dpo").iterdir())
    assert made == sorted([*FILES, "README.md", "base_model.json", "config.yaml", "metrics.jsonl", "run.json",
                           "tokenizer.json", "tokenizer_config.json"])  # fmt: skip
    config = json.loads((adapters / "dpo" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str((world / "sft").resolve())
    assert config["inference_mode"] is True


@pytest.mark.parametrize("options", [(), ("--lora-dropout", "0.3"), ("--dora",), ("--no-ref-cache",)],
                         ids=["plain", "dropout", "dora", "no cache"])  # fmt: skip
def test_the_same_bytes_twice_and_after_an_interruption(
    world: Path, adapters: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    command = ("train-dpo", "-m", world / "sft", "-d", world / "data", "--max-steps", "4", *LORA, *options)
    done(*command, "-o", tmp_path / "once")
    settings = {
        "model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(tmp_path / "twice"),
        "optim": {"max_steps": 4, "learning_rate": 1e-2, "optimizer": "adamw", "warmup_steps": 0, "batch_size": 8},
        "adapter": {"lora_r": 4, "lora_dropout": 0.3 if "0.3" in options else 0.0, "dora": "--dora" in options},
        "no_ref_cache": "--no-ref-cache" in options,
    }  # fmt: skip
    with pytest.raises(Interrupted):
        engine.train_pairs(TrainDpo(value_layers=[settings]), StopInTraining())
    (checkpoint,) = (tmp_path / "twice" / "checkpoints").iterdir()
    model = checkpoint / "model.safetensors"
    # The adapter and nothing of its base model.
    assert model.stat().st_size < (world / "sft" / "model.safetensors").stat().st_size / 2
    said = done(*command, "-o", tmp_path / "twice")
    assert "resuming from" in said.err
    assert ("--lora-dropout is above 0" in said.err) == ("0.3" in options)
    assert content(tmp_path / "once") == content(tmp_path / "twice")
    if options in ((), ("--no-ref-cache",)):
        assert content(tmp_path / "once") == content(adapters / "dpo")


def test_two_adapters_score_as_two_merged_models(world: Path, adapters: Path, tmp_path: Path, monkeypatch) -> None:
    loaded = []
    load = loading._load_whole
    monkeypatch.setattr(loading, "_load_whole", lambda path, *rest: loaded.append(path) or load(path, *rest))
    sides = ("--forward", adapters / "dpo", "--reverse", adapters / "reverse")
    done("estimate", *sides, "-d", world / "data", "-o", tmp_path / "one")
    assert loaded == [world / "sft"]
    done("estimate", *sides, "-d", world / "data", "-o", tmp_path / "sequential", "--sequential")
    assert loaded == [world / "sft"] * 2
    for name in ("dpo", "reverse"):
        said = done("merge", adapters / name, "-o", tmp_path / name)
        assert "log-probs differ by at most" in said.err
    done("estimate", "--forward", tmp_path / "dpo", "--reverse", tmp_path / "reverse", "-d", world / "data",
         "-o", tmp_path / "two")  # fmt: skip
    rows = {name: read_jsonl(tmp_path / name / "train.jsonl") for name in ("one", "sequential", "two")}
    assert rows["one"] == rows["sequential"]
    for one, two in zip(rows["one"], rows["two"], strict=True):
        for column in ("chosen_weight", "rejected_weight"):
            assert one[column] == pytest.approx(two[column], abs=1e-5)
        assert any(abs(r) > 1e-3 for r in one["chosen_weight"])


def test_an_adapter_is_scored_against_its_base(world: Path, adapters: Path, tmp_path: Path) -> None:
    done("merge", adapters / "dpo", "-o", tmp_path / "merged")
    for name, forward in (("adapter", adapters / "dpo"), ("merged", tmp_path / "merged")):
        sides = ("--forward", forward, "--reverse", world / "sft")
        done("estimate", *sides, "-d", world / "data", "-o", tmp_path / f"by-{name}")
    first, second = (read_jsonl(tmp_path / f"by-{name}" / "train.jsonl") for name in ("adapter", "merged"))
    for one, two in zip(first, second, strict=True):
        assert one["chosen_weight"] == pytest.approx(two["chosen_weight"], abs=1e-5)


def test_unit_weights_are_dpo(world: Path, adapters: Path, tmp_path: Path) -> None:
    done("estimate", "--forward", adapters / "dpo", "--reverse", adapters / "reverse", "-d", world / "data",
         "-o", tmp_path / "scored")  # fmt: skip
    for split in ("train", "test"):
        rows = read_jsonl(tmp_path / "scored" / f"{split}.jsonl")
        for row in rows:
            for side in ("chosen", "rejected"):
                row |= {f"{side}_weight": [1.0] * len(row[f"{side}_weight"]), f"{side}_eos_weight": 1.0}
        write_jsonl(tmp_path / "ones" / f"{split}.jsonl", rows)
    done("train", "-m", world / "sft", "-d", tmp_path / "ones", "-o", tmp_path / "tisdpo", "--max-steps", "4", *LORA,
         "--weights-are", "final")  # fmt: skip
    assert content(tmp_path / "tisdpo") == content(adapters / "dpo")


@pytest.mark.parametrize("loss", ["dpo", "tdpo1"])
def test_an_adapter_is_trained_further_against_itself(world: Path, adapters: Path, tmp_path: Path, loss: str) -> None:
    options = ("-d", world / "data", "--loss", loss, "--max-steps", "3", *LORA)
    said = done("train-dpo", "-m", adapters / "dpo", "-o", tmp_path / "further", *options).err
    assert f"policy = {adapters / 'dpo'} + its adapter" in said
    done("merge", adapters / "dpo", "-o", tmp_path / "merged")
    done("train-dpo", "-m", adapters / "dpo", "--ref-model", tmp_path / "merged", "-o", tmp_path / "other", *options)
    for one, other in zip(metrics(tmp_path / "further"), metrics(tmp_path / "other"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert metrics(tmp_path / "further")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    base = json.loads((tmp_path / "further" / "base_model.json").read_text())
    assert base == json.loads((adapters / "dpo" / "base_model.json").read_text())
    assert content(tmp_path / "further")[0] != content(adapters / "dpo")[0]


def test_a_distribution_is_compared_with_the_base_on_the_same_weights(world: Path, tmp_path: Path) -> None:
    """Where the loss needs the whole distribution of the reference, no second model is loaded."""
    options = ("-d", world / "data", "--loss", "tdpo2", "--max-steps", "3", *LORA)
    done("train-dpo", "-m", world / "sft", "-o", tmp_path / "one", *options)
    shutil.copytree(world / "sft", tmp_path / "copy")
    done("train-dpo", "-m", world / "sft", "--ref-model", tmp_path / "copy", "-o", tmp_path / "two", *options)
    assert content(tmp_path / "one")[0] == content(tmp_path / "two")[0]
    assert any(line["kl/chosen"] > 1e-4 for line in metrics(tmp_path / "one"))


def test_fine_tuning_and_evaluation_take_adapters(world: Path, adapters: Path, tmp_path: Path) -> None:
    done("train-sft", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "sft", "--max-steps", "3", *LORA)
    done("train-dpo", "-m", tmp_path / "sft", "-d", world / "data", "-o", tmp_path / "dpo", "--max-steps", "2", *LORA)
    assert content(tmp_path / "dpo")[0] != content(tmp_path / "sft")[0]
    done("merge", tmp_path / "sft", "-o", tmp_path / "merged")
    shown = []
    for model in (tmp_path / "sft", tmp_path / "merged"):
        evaluated = done("evaluate", "-m", model, "--baseline", adapters / "dpo", "--ref-model", world / "sft",
                         "-d", world / "data", "--sample-prompts", "3", "--max-new-tokens", "8", "--json")  # fmt: skip
        shown.append(json.loads(evaluated.out)["policies"])
    for one, other in zip(*shown, strict=True):
        for name in ("pairs", "samples"):
            values = [
                {key: value for key, value in side[name].items() if isinstance(value, float)} for side in (one, other)
            ]
            assert values[0] == pytest.approx(values[1], abs=1e-4, rel=1e-4)


def test_bf16_holds_the_base_in_bf16(world: Path, tmp_path: Path) -> None:
    command = ("train-dpo", "-m", world / "sft", "-d", world / "data", "--max-steps", "2", "--dtype", "bf16", *LORA)
    said = done(*command, "-o", tmp_path / "out").err
    assert "frozen, in bfloat16" in said
    assert metrics(tmp_path / "out")[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    done(*command, "-o", tmp_path / "again")
    assert content(tmp_path / "out") == content(tmp_path / "again")


@pytest.fixture
def adapter(adapters: Path, world: Path, tmp_path: Path) -> Path:
    """A copy of an adapter on a copy of its base model."""
    shutil.copytree(world / "sft", tmp_path / "base")
    shutil.copytree(adapters / "dpo", tmp_path / "adapter")
    rewrite(tmp_path / "adapter", base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path / "adapter"


def rewrite(adapter: Path, **changed: object) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))


def test_faulty_adapters_are_named(adapter: Path, world: Path, tmp_path: Path) -> None:
    def refused(sentence: str, code: int = 1) -> None:
        result = run_here("train-dpo", "-m", adapter, "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "1")
        assert (result.code, sentence in result.error) == (code, True), result.err
        assert not (tmp_path / "out").exists()

    config = tmp_path / "base" / "generation_config.json"
    before = config.read_text()
    config.write_text(before.replace("}", ',"top_k": 3}'))
    refused("has changed since this adapter was trained")
    config.write_text(before)
    rewrite(adapter, peft_type="PREFIX_TUNING")
    refused("an adapter with peft_type 'PREFIX_TUNING'")
    for name, value in (
        ("init_lora_weights", "pissa"),
        ("bias", "all"),
        ("task_type", "SEQ_CLS"),
        ("alora_invocation_tokens", [5]),
    ):
        before = json.loads((adapter / "adapter_config.json").read_text())[name]
        rewrite(adapter, peft_type="LORA", **{name: value})
        refused(f"an adapter with {name}")
        rewrite(adapter, **{name: before})
    rewrite(adapter, peft_type="LORA", base_model_name_or_path=str(tmp_path / "gone"))
    refused("the base model of this adapter is not there")
    rewrite(adapter, base_model_name_or_path=str(tmp_path / "base"))
    (adapter / "adapter_model.safetensors").rename(adapter / "moved")
    refused("no adapter_model.safetensors")
    (adapter / "moved").rename(adapter / "adapter_model.safetensors")
    (adapter / "config.json").write_text((tmp_path / "base" / "config.json").read_text())
    refused("an adapter beside a whole model")


def test_options_that_contradict_are_named(adapters: Path, world: Path, tmp_path: Path) -> None:
    def refused(sentence: str, *options: str | Path) -> None:
        result = run_here("train-dpo", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "1", *options)
        assert (result.code, sentence in result.error) == (2, True), result.err
        assert not (tmp_path / "out").exists()

    refused("lora_alpha shape an adapter and need lora_r", "-m", world / "sft", "--lora-alpha", "16")
    refused("an adapter with another r", "-m", adapters / "dpo", "--lora-r", "8")
    refused("its linear layers are", "-m", world / "sft", "--lora-r", "4", "--lora-target", "query")
    init = run_here("train-sft", "--init", "-d", world / "data", "-o", tmp_path / "out", "--lora-r", "4")
    assert (init.code, "lora_r needs a trained model" in init.error) == (2, True)
    whole = run_here("merge", world / "sft", "-o", tmp_path / "out")
    assert (whole.code, "is a whole model, not an adapter" in whole.error) == (2, True), whole.err


def test_a_whole_pipeline_of_adapters(world: Path, tmp_path: Path) -> None:
    options = ("--set", "lora_r=4", "--set", "warmup_steps=0", "--max-steps", "2")
    done("run", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", *options)
    for stage in ("dpo", "reverse", "tisdpo"):
        assert (tmp_path / "out" / stage / "adapter_model.safetensors").is_file()
        assert not (tmp_path / "out" / stage / "model.safetensors").exists()
    assert (tmp_path / "out" / "report.html").is_file()


bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="needs bitsandbytes")


@bitsandbytes
@pytest.mark.parametrize("optimizer", ["adamw8bit", "paged_adamw_8bit"])
@pytest.mark.filterwarnings("ignore:Paged optimizers")
def test_optimizers_in_8_bits_resume_to_the_same_bytes(world: Path, tmp_path: Path, optimizer: str) -> None:
    """The rank makes adapters of more than 4,096 weights: states of smaller ones stay in float32."""
    options = ("--lora-r", "64", "--lr", "1e-2", "--optimizer", optimizer, "--warmup-steps", "0", "--batch-size", "8")
    command = ("train-dpo", "-m", world / "sft", "-d", world / "data", "--max-steps", "4", *options)
    done(*command, "-o", tmp_path / "once")
    settings = {
        "model": str(world / "sft"), "dataset": str(world / "data"), "output_dir": str(tmp_path / "twice"),
        "optim": {"max_steps": 4, "learning_rate": 1e-2, "optimizer": optimizer, "warmup_steps": 0, "batch_size": 8},
        "adapter": {"lora_r": 64},
    }  # fmt: skip
    with pytest.raises(Interrupted):
        engine.train_pairs(TrainDpo(value_layers=[settings]), StopInTraining())
    (checkpoint,) = (tmp_path / "twice" / "checkpoints").iterdir()
    kinds = {tensor.dtype for tensor in load_file(checkpoint / "optimizer.safetensors").values()}
    assert torch.uint8 in kinds
    assert "resuming from" in done(*command, "-o", tmp_path / "twice").err
    assert content(tmp_path / "once") == content(tmp_path / "twice")


QLORA = (*LORA, "--load-in-4bit")


@bitsandbytes
def test_a_base_in_4_bits_goes_through_every_command(world: Path, tmp_path: Path, monkeypatch) -> None:
    """The same base in 4 bits is the reference and scores; merged, its weights are what they were in 4 bits."""
    for command, name in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
        said = done(
            command, "-m", world / "sft", "-d", world / "data", "-o", tmp_path / name, "--max-steps", "4", *QLORA
        )
        assert re.search(r"frozen, in 4 bits \(nf4; [67]\d% of them\)", said.err), said.err
        assert metrics(tmp_path / name)[0]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert "read from the cache" in said.err
    done("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "again", "--max-steps", "4", *QLORA)
    assert content(tmp_path / "again") == content(tmp_path / "dpo")
    tensors = load_file(tmp_path / "dpo" / "adapter_model.safetensors")
    assert all(bool(tensor.any()) for name, tensor in tensors.items() if "lora_B" in name), "every adapter has moved"
    refused = run_here("merge", tmp_path / "dpo", "-o", tmp_path / "whole")
    assert (refused.code, "add --dequantize" in refused.error) == (2, True)
    sides = {}
    for name in ("dpo", "reverse"):
        done("merge", tmp_path / name, "-o", tmp_path / f"{name}-whole", "--dequantize")
        sides[name] = tmp_path / f"{name}-whole"
    done("estimate", "--forward", tmp_path / "dpo", "--reverse", tmp_path / "reverse", "-d", world / "data",
         "-o", tmp_path / "scored")  # fmt: skip
    done("estimate", "--forward", sides["dpo"], "--reverse", sides["reverse"], "-d", world / "data",
         "-o", tmp_path / "scored-whole")  # fmt: skip
    first, second = (read_jsonl(tmp_path / name / "train.jsonl") for name in ("scored", "scored-whole"))
    for one, two in zip(first, second, strict=True):
        assert one["chosen_weight"] == pytest.approx(two["chosen_weight"], abs=1e-5)
    done(
        "train-dpo",
        "-m",
        tmp_path / "dpo",
        "-d",
        world / "data",
        "-o",
        tmp_path / "further",
        "--max-steps",
        "1",
        *QLORA,
    )
    base = json.loads((tmp_path / "further" / "base_model.json").read_text())
    assert base["quantization"] == "nf4"
    refused = run_here("train-dpo", "-m", tmp_path / "dpo", "-d", world / "data", "-o", tmp_path / "x", *LORA)
    assert (refused.code, "trained on a base model in 4 bits" in refused.error) == (2, True)


@bitsandbytes
def test_layers_that_give_no_gradients_are_found(world: Path, tmp_path: Path, monkeypatch) -> None:
    """As quantized layers in evaluation mode do on some CPUs, without a word."""
    from tisdpo_cli.engine.training import trainer

    backward = trainer.Trainer._backward

    def without_one(self, batch):
        sums = backward(self, batch)
        next(p for p in self.model.parameters() if p.requires_grad).grad = None
        return sums

    monkeypatch.setattr(trainer.Trainer, "_backward", without_one)
    refused = run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", *QLORA,
                       "--max-steps", "1")  # fmt: skip
    assert (refused.code, "gets no gradients through the quantized layers" in refused.error) == (1, True), refused.err


def test_without_bitsandbytes_the_package_is_named(world: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    for options in (QLORA, (*LORA, "--optimizer", "adamw8bit")):
        refused = run_here("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", *options)
        assert (refused.code, "pip install 'tisdpo[bitsandbytes]'" in refused.error) == (2, True), refused.err


def test_adapters_with_dropout_are_scored_and_trained_further(world: Path, tmp_path: Path) -> None:
    """What they drop in training they drop nowhere else; the loss before the first step has it, and is not checked."""
    options = ("-d", world / "data", "--max-steps", "4", *LORA, "--lora-dropout", "0.5")
    for command, name in (("train-dpo", "dpo"), ("train-reverse", "reverse")):
        done(command, "-m", world / "sft", "-o", tmp_path / name, *options)
        done("merge", tmp_path / name, "-o", tmp_path / f"{name}-merged")
    scores = []
    for end in ("", "-merged"):
        sides = ("--forward", tmp_path / f"dpo{end}", "--reverse", tmp_path / f"reverse{end}")
        done("estimate", *sides, "-d", world / "data", "-o", tmp_path / f"scored{end}")
        scores.append(
            [r for row in read_jsonl(tmp_path / f"scored{end}" / "train.jsonl") for r in row["chosen_weight"]]
        )
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    for loss in ("dpo", "tdpo1"):
        said = done("train-dpo", "-m", tmp_path / "dpo", "-o", tmp_path / f"by-{loss}", "--loss", loss, *options)
        assert "policy and reference differ" in said.err


@pytest.mark.parametrize("target", ["q_proj v_porj", "all-linear lm_head"])
def test_every_name_of_a_layer_is_checked(world: Path, tmp_path: Path, target: str) -> None:
    command = ("train-dpo", "-m", world / "sft", "-d", world / "data", "-o", tmp_path / "out", *LORA)
    refused = run_here(*command, "--lora-target", target)
    assert (refused.code, "target" in refused.error) == (2, True), refused.err


def test_another_choice_of_layers_for_an_adapter_is_refused(world: Path, adapters: Path, tmp_path: Path) -> None:
    command = ("train-dpo", "-m", adapters / "dpo", "-d", world / "data", "-o", tmp_path / "out", *LORA)
    for option, value in (("--lora-target", "q_proj"), ("--lora-modules-to-save", "norm")):
        refused = run_here(*command, option, value)
        assert (refused.code, option in refused.error) == (2, True), refused.err


def test_in_a_pipeline_the_new_model_is_trained_whole(world: Path, tmp_path: Path) -> None:
    options = ("--set", "lora_r=4", "--set", "warmup_steps=0", "--max-steps", "2", "--set", "train_sft.hidden_size=32")
    done("run", "-d", world / "data", "-o", tmp_path / "out", *options, "--set", "train_sft.heads=2")
    assert (tmp_path / "out" / "sft" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "dpo" / "adapter_model.safetensors").is_file()


def test_in_bf16_a_dora_has_reference_log_probs_of_its_own(world: Path, tmp_path: Path) -> None:
    """A new one changes no weight, but the roundings of its base model."""
    command = ("train-dpo", "-m", world / "sft", "-d", world / "data", "--max-steps", "2", "--dtype", "bf16", *LORA)
    done(*command, "-o", tmp_path / "lora", "--cache-dir", tmp_path / "shared")
    done(*command, "-o", tmp_path / "one", "--dora", "--cache-dir", tmp_path / "shared")
    done(*command, "-o", tmp_path / "two", "--dora", "--cache-dir", tmp_path / "own")
    assert content(tmp_path / "one") == content(tmp_path / "two")


@bitsandbytes
def test_a_base_in_4_bits_is_compared_with_itself(world: Path, tmp_path: Path) -> None:
    """Not with its weights before quantization: an adapter that has learned nothing scores 0 everywhere."""
    still = ("--lora-r", "4", "--load-in-4bit", "--optimizer", "sgd", "--lr", "1e-12", "--warmup-steps", "0")
    command = ("train-dpo", "-d", world / "data", "--max-steps", "1", "--batch-size", "8", *still)
    done(*command, "-m", world / "sft", "-o", tmp_path / "still")
    done("estimate", "--forward", tmp_path / "still", "--reverse", world / "sft", "-d", world / "data",
         "-o", tmp_path / "scored")  # fmt: skip
    rows = read_jsonl(tmp_path / "scored" / "train.jsonl")
    assert max(abs(r) for row in rows for r in row["chosen_weight"]) < 1e-6
    done(*command, "-m", world / "sft", "--ref-model", world / "sft", "-o", tmp_path / "named")
    assert metrics(tmp_path / "named")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    quantized = hash_model(tmp_path / "still")
    (tmp_path / "still" / "base_model.json").unlink()
    assert hash_model(tmp_path / "still") != quantized


@pytest.mark.parametrize("loss", ["dpo", "tdpo1"])
@pytest.mark.parametrize("reference", ["base", "other adapter"])
def test_a_reference_on_the_policys_base_shares_its_weights(
    world: Path, adapters: Path, tmp_path: Path, monkeypatch, loss: str, reference: str
) -> None:
    """The same losses as against a model of its own, which is loaded."""
    loaded = []
    load = loading._load_whole
    monkeypatch.setattr(loading, "_load_whole", lambda path, *rest: loaded.append(path) or load(path, *rest))
    if reference == "base":
        named, own = world / "sft", Path(shutil.copytree(world / "sft", tmp_path / "copy"))
    else:
        named, own = adapters / "reverse", tmp_path / "merged"
        done("merge", adapters / "reverse", "-o", own)
    command = ("train-dpo", "-m", adapters / "dpo", "-d", world / "data", "--loss", loss, "--max-steps", "3", *LORA)
    loaded.clear()
    done(*command, "--ref-model", named, "-o", tmp_path / "shared")
    assert loaded == [world / "sft"]
    done(*command, "--ref-model", own, "-o", tmp_path / "apart")
    assert len(loaded) == 3
    for one, other in zip(metrics(tmp_path / "shared"), metrics(tmp_path / "apart"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=1e-4)
    assert metrics(tmp_path / "shared")[0]["loss"] != pytest.approx(math.log(2), abs=1e-4)


def test_an_adapter_of_the_hub_is_found_in_the_cache(world: Path, adapters: Path, tmp_path: Path, monkeypatch) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_args, **_kwargs: str(adapters / "dpo"))
    said = done(
        "train-dpo", "-m", "acme/adapter", "-d", world / "data", "-o", tmp_path / "out", "--max-steps", "1", *LORA
    )
    assert "policy = acme/adapter + its adapter" in said.err
