"""The model card: metadata that the hub takes, what a reader needs to make the model again, and no surprises."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import read_jsonl, run_here
from huggingface_hub import ModelCard, metadata_save

from tisdpo_cli.engine.model_card import card_metadata, code, hub_base, text
from tisdpo_cli.model.content_hashes import hash_model

SHORT = ("--max-steps", "2", "--batch-size", "8", "--lr", "1e-3", "--warmup-steps", "0", "--eval-pairs", "2")


def made(*arguments: str | Path) -> Path:
    done = run_here(*arguments)
    assert done.code == 0, done.err
    return Path(done.out.strip())


def card_of(out: Path) -> ModelCard:
    return ModelCard.load(out / "README.md")


def section(card: ModelCard, title: str) -> str:
    return card.text.partition(f"\n## {title}\n")[2].partition("\n## ")[0].strip()


def rows_of(table: str) -> dict[str, str]:
    """The two columns of a table."""
    found = (re.split(r"(?<!\\)\|", line.strip("| ")) for line in table.splitlines() if line.startswith("| "))
    return {row[0].strip(): row[1].strip() for row in found if len(row) == 2}


@pytest.fixture(scope="module")
def trained(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy trained with token weights."""
    root = tmp_path_factory.mktemp("card")
    return made("train", "-m", contrast / "sft", "-d", contrast / "scored", "-o", root / "out", *SHORT,
                "--transform", "rank_based", "--beta", "0.2")  # fmt: skip


@pytest.fixture(scope="module")
def adapter(contrast: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on a base model that comes from the hub, says its card."""
    root = tmp_path_factory.mktemp("adapter")
    shutil.copytree(contrast / "sft", root / "base")
    metadata_save(root / "base" / "README.md", {"base_model": "owner/base"})
    return made("train-dpo", "-m", root / "base", "-d", contrast / "data", "-o", root / "out", *SHORT, "--lora-r", "2")


def test_the_metadata_are_what_the_hub_knows(trained: Path, adapter: Path, contrast: Path) -> None:
    data = card_of(trained).data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "text-generation")
    assert data.tags == ["tisdpo", "tis-dpo", "dpo"]
    assert data.license is None  # for the user to state
    assert data.base_model is None  # a directory of this machine is no model of the hub
    assert card_of(contrast / "sft").data.tags == ["tisdpo", "sft"]
    data = card_of(adapter).data
    assert (data.library_name, data.base_model) == ("peft", "owner/base")
    assert data.to_dict()["base_model_relation"] == "adapter"
    assert data.tags == ["tisdpo", "dpo", "lora"]


def test_the_merged_model_is_one_of_the_same_base_and_method(adapter: Path, tmp_path: Path) -> None:
    data = card_of(made("merge", adapter, "-o", tmp_path / "merged")).data
    assert (data.library_name, data.base_model, data.tags) == ("transformers", "owner/base", ["tisdpo", "dpo"])
    assert data.to_dict()["base_model_relation"] == "finetune"


def test_what_was_done_is_in_the_card(trained: Path, contrast: Path) -> None:
    card, record = card_of(trained), json.loads((trained / "run.json").read_text())
    rows = rows_of(section(card, "Training"))
    assert (rows["base model"], rows["data"], rows["seed"], rows["steps"]) == ("`sft`", "`scored`", "0", "2")
    assert rows["loss"].startswith("dpo (β 0.2)")
    assert rows["token weights"].startswith("rank_based (min_scale 0.7, max_scale 1.3), EOS auto")
    assert rows["forward model of the scores"] == "`dpo`"
    assert rows["SHA-256 of model"] == f"`{hash_model(contrast / 'sft')}`"
    final = read_jsonl(trained / "metrics.jsonl")[-1]
    shown = {name: float(value) for name, value in rows_of(section(card, "Final metrics")).items() if name != "metric"}
    expected = {name: value for name, value in final.items() if name not in ("step", "epoch")}
    expected = {name: value for name, value in expected.items() if not name.endswith("_per_second")}
    assert shown == pytest.approx(expected, rel=1e-5)
    assert rows_of(section(card, "Versions"))["torch"] == record["versions"]["torch"]
    settings = rows_of(section(card, "Settings"))
    assert (settings["weights.transform"], settings["optim.learning_rate"]) == ('`"rank_based"`', "`0.001`")


def test_the_command_of_the_card_makes_the_same_bytes(trained: Path, contrast: Path, tmp_path: Path) -> None:
    line = re.search(r"```bash\n(.*)\n```", section(card_of(trained), "Command"))
    assert line is not None
    # Paths are shown without what says something about the machine.
    where = {"sft": contrast / "sft", "scored": contrast / "scored", "OUTPUT_DIR": tmp_path / "again"}
    again = made(*(where.get(word, word) for word in shlex.split(line[1])[1:]))
    for name in ("model.safetensors", "README.md"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_no_directory_of_this_machine_is_in_the_card(trained: Path, adapter: Path, contrast: Path) -> None:
    for out in (trained, adapter):
        shown = (out / "README.md").read_text()
        assert str(contrast) not in shown
        assert str(out.parent) not in shown


def test_a_card_is_no_part_of_the_model(trained: Path, contrast: Path, tmp_path: Path) -> None:
    """An edited card changes no hash: what was made from the model stays finished."""
    model = tmp_path / "model"
    shutil.copytree(trained, model)
    (model / "README.md").write_text("mine\n")
    assert hash_model(model) == hash_model(trained)
    command = ("train-dpo", "-m", model, "-d", contrast / "data", "-o", tmp_path / "out", *SHORT)
    made(*command)
    (model / "README.md").unlink()
    done = run_here(*command)
    assert (done.code, "already finished" in done.err) == (0, True)


@pytest.mark.parametrize("content", ["no metadata", "---\nbase_model: [", "---\nbase_model: 3\n---\n", "\udcff"])
def test_a_base_model_with_a_card_that_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "README.md").write_bytes(content.encode(errors="surrogateescape"))
    assert hub_base(str(tmp_path)) is None


def test_names_of_base_models() -> None:
    assert [hub_base(name) for name in ("gpt2", "owner/name", "owner/name/more", "a b", None)] == [
        "gpt2", "owner/name", None, None, None,
    ]  # fmt: skip
    assert card_metadata(Path("nowhere")) == {}


def test_text_of_data_stays_text_in_a_table() -> None:
    assert text("a|b <img> [x](y) `c` _d_ e_f") == r"a\|b \<img\> \[x\](y) \`c\` \_d\_ e_f"
    assert code("a|b\x1b[31m") == r"`a\|b\x1b[31m`"
    assert code("a`b``c") == "``` a`b``c ```"
