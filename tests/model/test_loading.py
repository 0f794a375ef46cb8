"""Model directories that are damaged, foreign or dangerous: refused with one clear sentence before any harm."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tisdpo_cli.cli.first_row_view import first_row_lines
from tisdpo_cli.cli.preflight import check
from tisdpo_cli.engine.scoring.estimate import estimate
from tisdpo_cli.engine.training.preference import train_pairs
from tisdpo_cli.errors import ModelError, TisdpoError, UsageError
from tisdpo_cli.model.content_hashes import hash_model
from tisdpo_cli.model.directory import locate_model
from tisdpo_cli.model.loading import load_model, move_to_device
from tisdpo_cli.model.tokenizer import describe_tokenizer, load_tokenizer
from tisdpo_cli.reporter import Silent
from tisdpo_cli.settings.commands import COMMANDS
from tisdpo_cli.settings.sources import load

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"

Damage = Callable[[Path], object]


class Listener(Silent):
    """Remembers what was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """A fact."""
        self.said.append(text)

    warn = note


@pytest.fixture
def model(world: Path, tmp_path: Path) -> Path:
    """A copy of the world's starting model, to be damaged."""
    return Path(shutil.copytree(world / "sft", tmp_path / "model"))


@pytest.fixture
def attempt(world: Path, tmp_path: Path):
    """A dry run of train-dpo with a model; returns what was said."""

    def run(model: Path | str, *sets: str) -> str:
        flags = {"model": str(model), "dataset": str(world / "data"), "output_dir": str(tmp_path / "out")}
        settings = load(COMMANDS["train-dpo"].settings, flags, sets=["dry_run=true", *sets]).settings
        listener = Listener()
        check(settings)
        result = train_pairs(settings, listener)
        return "\n".join([*listener.said, *first_row_lines(result.dry_run.first_row)])

    return run


@pytest.fixture
def refused(attempt):
    """The sentence with which a model is refused, and its exit code."""

    def run(model: Path | str, *sets: str) -> tuple[int, str]:
        with pytest.raises(TisdpoError) as caught:
            attempt(model, *sets)
        return caught.value.exit_code, str(caught.value)

    return run


def change_json(path: Path, **values: object) -> None:
    """Change members of a JSON file; `...` removes one."""
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def change_weights(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a model directory."""
    tensors = load_file(path / WEIGHTS)
    change(tensors)
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def truncate(path: Path, size: int) -> None:
    """Keep the first bytes of a file; a negative size takes bytes from its end."""
    path.write_bytes(path.read_bytes()[:size])


def test_a_whole_model_is_taken(attempt, model: Path) -> None:
    assert "dry run" in attempt(model)


# ---------------------------------------------------------------- files (rows 18, 24, 25)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda d: (d / "config.json").unlink(), "config.json"),
        (lambda d: (d / "config.json").write_text("{"), "config.json"),
        (lambda d: (d / "config.json").write_text("[]"), "config.json"),
        (lambda d: (d / "config.json").write_bytes(b"\xff"), "config.json"),
        (lambda d: (d / "config.json").write_text("{}"), "config.json"),
        (lambda d: change_json(d / "config.json", model_type="unheard-of"), "config.json"),
        (lambda d: (d / WEIGHTS).unlink(), WEIGHTS),
        (lambda d: (d / WEIGHTS).write_bytes(b""), WEIGHTS),
        (lambda d: (d / WEIGHTS).write_bytes(b"x" * 5000), WEIGHTS),
        (lambda d: (d / WEIGHTS).write_bytes(b"\xff" * 8 + b"{}"), WEIGHTS),
        (lambda d: truncate(d / WEIGHTS, 7), WEIGHTS),
        (lambda d: truncate(d / WEIGHTS, 100), WEIGHTS),
        (lambda d: truncate(d / WEIGHTS, -1), WEIGHTS),
        (lambda d: (d / WEIGHTS).write_bytes((d / WEIGHTS).read_bytes() + b"x"), WEIGHTS),
        (lambda d: [(d / name).unlink() for name in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
        (lambda d: truncate(d / "tokenizer.json", 500), "tokenizer"),
    ],
    ids=[
        "no-config", "torn-config", "list-config", "latin-config", "empty-config", "unknown-type", "no-weights",
        "0-bytes", "junk", "huge-header", "7-bytes", "torn-header", "1-byte-short", "1-byte-long", "no-tokenizer",
        "torn-tokenizer",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(refused, model: Path, damage: Damage, named: str) -> None:
    damage(model)
    code, message = refused(model)
    assert code == 1
    assert str(model) in message
    assert named in message


@pytest.mark.parametrize(
    "index",
    [
        "{",
        {"weight_map": {NORM: "model-00001.safetensors", "lost": "model-00002.safetensors"}},
        {"weight_map": []},
        {"weight_map": {NORM: 3}},
        {},
    ],
    ids=["torn", "lost-shard", "list", "number", "empty"],
)
def test_a_damaged_index_of_shards_is_told(refused, model: Path, index) -> None:
    (model / WEIGHTS).rename(model / "model-00001.safetensors")
    path = model / f"{WEIGHTS}.index.json"
    path.write_text(index if isinstance(index, str) else json.dumps(index))
    code, message = refused(model)
    assert code == 1
    assert str(model) in message
    assert "safetensors" in message


def test_a_file_that_is_written_to_later_changes_no_model(model: Path) -> None:
    placed = move_to_device(load_model(model), torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in placed.state_dict().items()}
    file = model / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(b"\x42" * (file.stat().st_size // 2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in placed.state_dict().items())
    assert placed.get_input_embeddings().weight is placed.get_output_embeddings().weight


def test_shards_are_read(attempt, model: Path) -> None:
    tensors = load_file(model / WEIGHTS)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, part in shards.items():
        save_file({name: tensors[name] for name in part}, model / shard, metadata={"format": "pt"})
    where = {name: shard for shard, part in shards.items() for name in part}
    (model / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (model / WEIGHTS).unlink()
    assert "dry run" in attempt(model)
    truncate(model / "model-00002-of-00002.safetensors", -1)
    with pytest.raises(TisdpoError, match="model-00002-of-00002"):
        attempt(model)


@pytest.mark.parametrize("option", ["model", "ref_model", "forward", "reverse"])
def test_a_mistyped_path_names_its_neighbour(world: Path, tmp_path: Path, option: str) -> None:
    command = "train-dpo" if "model" in option else "estimate"
    good = dict.fromkeys(["model"] if "model" in option else ["forward", "reverse"], str(world / "sft"))
    flags = {**good, option: str(world / "stf"), "dataset": str(world / "data"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(UsageError, match="did you mean") as caught:
        check(load(COMMANDS[command].settings, flags).settings)
    assert str(world / "sft") in str(caught.value)
    assert f"--{option.replace('_', '-')}" in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["no/such/directory/at/all", "./nothing", "/nothing/here", "a b", "~nobody", "x\x00y"])
def test_what_is_no_model_anywhere_is_refused(refused, name: str) -> None:
    code, message = refused(name)
    assert code == 2
    assert "--model" in message


def test_a_file_is_no_model(refused, model: Path) -> None:
    code, message = refused(model / WEIGHTS)
    assert code == 2
    assert "is a file" in message


def test_an_unknown_hub_id_is_refused_without_a_network(refused) -> None:
    code, message = refused("nobody-owns/this-model")
    assert code == 2
    assert "nobody-owns/this-model" in message


def test_an_unfinished_output_is_refused(refused, model: Path) -> None:
    (model / "run.json").unlink()
    code, message = refused(model)
    assert code == 1
    assert "incomplete output" in message
    assert str(model) in message


def test_an_adapter_is_named(refused, model: Path) -> None:
    (model / "config.json").rename(model / "adapter_config.json")
    assert "adapter" in refused(model)[1]


# ---------------------------------------------------------------- weights (rows 25 to 27)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(NORM),
        lambda t: t.update({NORM: torch.ones(7)}),
        lambda t: t.update({NORM: t[NORM].reshape(2, -1)}),
    ],
    ids=["missing", "short", "folded"],
)
def test_a_bad_tensor_is_named(refused, model: Path, change: Callable) -> None:
    change_weights(model, change)
    code, message = refused(model)
    assert code == 1
    assert str(model) in message
    assert NORM in message


@pytest.mark.parametrize(("place", "value"), [(3, "nan"), (0, "-inf")])
def test_a_tensor_that_is_not_finite_is_named(attempt, model: Path, place: int, value: str) -> None:
    change_weights(model, lambda t: t[NORM].__setitem__(place, float(value)))
    with pytest.raises(ModelError, match=NORM) as caught:
        load_model(model)
    assert str(model) in str(caught.value)
    assert "dry run" in attempt(model), "which reads no values"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_outline_has_the_tensors_of_the_model_without_values(model: Path, dtype: torch.dtype) -> None:
    whole, outline = load_model(model, dtype=dtype), load_model(model, dtype=dtype, outline=True)
    shapes = [{n: (p.shape, p.dtype) for n, p in of.named_parameters()} for of in (whole, outline)]
    assert shapes[0] == shapes[1]
    assert all(p.is_meta for p in outline.parameters())


def test_a_missing_block_is_counted(refused, model: Path) -> None:
    change_weights(model, lambda t: [t.pop(name) for name in list(t) if ".layers.1." in name])
    assert "12 tensors are missing" in refused(model)[1]


def test_tied_weights_are_not_missing(model: Path) -> None:
    assert "lm_head.weight" not in load_file(model / WEIGHTS)
    loaded = load_model(model)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


def test_half_precision_weights_become_float32(model: Path) -> None:
    change_weights(model, lambda t: t.update({name: tensor.bfloat16() for name, tensor in t.items()}))
    assert {p.dtype for p in load_model(model).parameters()} == {torch.float32}


def test_a_model_of_another_kind_is_refused(refused, model: Path) -> None:
    (model / "config.json").write_text(json.dumps({"model_type": "t5"}))
    code, message = refused(model)
    assert code == 1
    assert "causal" in message


# ---------------------------------------------------------------- code (rows 28, 29)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_pickled_weights_are_refused_and_never_run(refused, model: Path, tmp_path: Path, name: str) -> None:
    (model / WEIGHTS).unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    code, message = refused(model)
    assert code == 1
    assert "save_pretrained" in message, "says how to convert"
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_beside_safetensors_are_ignored(attempt, model: Path, tmp_path: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        (model / name).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    assert "dry run" in attempt(model)
    assert not (tmp_path / "ran").exists()


def add_code(model: Path, ran: Path) -> None:
    """Give a model code that leaves a trace when it runs."""
    (model / "code.py").write_text(
        f"from pathlib import Path\nfrom transformers import Qwen2Config, Qwen2ForCausalLM\n"
        f"Path({str(ran)!r}).touch()\nclass C(Qwen2Config):\n    model_type = 'own'\n"
        "class M(Qwen2ForCausalLM):\n    config_class = C\n"
    )
    auto = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}
    change_json(model / "config.json", auto_map=auto, model_type="own", architectures=["M"])


def test_code_of_a_model_needs_leave(refused, model: Path, tmp_path: Path) -> None:
    add_code(model, tmp_path / "ran")
    code, message = refused(model)
    assert code == 2
    assert "--trust-remote-code" in message
    assert not (tmp_path / "ran").exists()


def test_code_of_a_model_runs_with_leave(attempt, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    add_code(model, tmp_path / "ran")
    assert "dry run" in attempt(model, "trust_remote_code=true")
    assert (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_never_runs_unasked(attempt, model: Path, tmp_path: Path) -> None:
    add_code(model, tmp_path / "ran")
    change_json(model / "config.json", auto_map=..., model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    change_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.C", None]}, tokenizer_class="C")
    with suppress(TisdpoError):
        attempt(model)
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- tokenizers and positions (rows 16, 18, 22, 23)


def test_a_tokenizer_larger_than_the_embedding_is_refused(refused, model: Path) -> None:
    tokenizer = load_tokenizer(model).backend
    tokenizer.add_tokens(["one-more", "and-another"])
    tokenizer.save_pretrained(model)
    code, message = refused(model)
    assert code == 1
    assert "up to 321" in message
    assert "320 rows" in message


def test_an_embedding_larger_than_the_tokenizer_is_fine(attempt, model: Path) -> None:
    def widen(tensors: dict[str, torch.Tensor]) -> None:
        name = "model.embed_tokens.weight"
        tensors[name] = torch.cat([tensors[name], torch.zeros(8, tensors[name].shape[1])])

    change_weights(model, widen)
    change_json(model / "config.json", vocab_size=328)
    assert "dry run" in attempt(model)


def test_a_tokenizer_without_an_end_is_refused(refused, model: Path) -> None:
    change_json(model / "tokenizer_config.json", eos_token=None)
    code, message = refused(model)
    assert code == 1
    assert "end-of-sequence" in message


def test_a_tokenizer_without_padding_gets_one_that_is_named(attempt, model: Path) -> None:
    change_json(model / "tokenizer_config.json", pad_token=None)
    said = attempt(model)
    assert "no padding token" in said
    assert "<|endoftext|>" in said


def test_padding_that_is_the_end_of_sequence_keeps_the_real_one(attempt, model: Path) -> None:
    change_json(model / "tokenizer_config.json", pad_token="<|endoftext|>")
    tokenizer = load_tokenizer(model)
    assert tokenizer.pad == tokenizer.eos
    first_chosen = next(line for line in attempt(model).splitlines() if line.startswith("first chosen"))
    assert first_chosen.endswith("'<|endoftext|>'")


class Backend:
    """As much of a tokenizer as is asked."""

    eos_token_id, eos_token, pad_token_id = 2, "</s>", 0

    def __init__(self, bos: int | None, adds: bool) -> None:
        self.bos_token_id, self.adds = bos, adds

        self.added_tokens_decoder: dict[int, object] = {}

    def __call__(self, text: str | list[str], add_special_tokens: bool, **_other: bool) -> Mapping[str, list]:
        """Ids of a text, or of several."""
        ids = ([self.bos_token_id] if self.adds and add_special_tokens else []) + [7]
        return {"input_ids": ids if isinstance(text, str) else [ids for _ in text]}

    def get_vocab(self) -> dict[str, int]:
        """The vocabulary."""
        return {"a": 7}


@pytest.mark.parametrize(("bos", "adds", "expected"), [(1, True, 1), (1, False, None), (None, False, None)])
def test_a_beginning_is_put_where_the_tokenizer_puts_one(bos: int | None, adds: bool, expected: int | None) -> None:
    assert describe_tokenizer(Backend(bos, adds), "here").bos == expected


def test_lengths_beyond_the_positions_of_the_model_are_refused(refused, attempt, model: Path) -> None:
    change_json(model / "config.json", max_position_embeddings=100)
    code, message = refused(model)
    assert code == 2
    assert "max_length 512" in message
    assert "100 positions" in message
    assert "dry run" in attempt(model, "max_length=100", "max_prompt_length=50")


@pytest.fixture
def scoring(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run estimate with two models that must not get as far as a forward pass."""

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("tisdpo_cli.model.shared_models.load_model", no_model)

    def run(forward: Path, reverse: Path) -> tuple[int, str]:
        flags = {"forward": str(forward), "reverse": str(reverse), "dataset": str(world / "data")}
        place = tmp_path / f"scored-by-{reverse.name}"
        settings = load(COMMANDS["estimate"].settings, {**flags, "output_dir": str(place)}).settings
        check(settings)
        with pytest.raises(TisdpoError) as caught:
            estimate(settings, Silent())
        return caught.value.exit_code, str(caught.value)

    return run


def swap_ids(model: Path) -> None:
    """The same vocabulary with two ids swapped."""
    content = json.loads((model / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (model / "tokenizer.json").write_text(json.dumps(content))


def other_end(model: Path) -> None:
    """The same vocabulary with another end-of-sequence token."""
    change_json(model / "tokenizer_config.json", eos_token="<|pad|>")


def fewer_merges(model: Path) -> None:
    """The same ids, and words cut in another way."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))


def smaller(model: Path) -> None:
    """One token less."""
    content = json.loads((model / "tokenizer.json").read_text())
    content["model"]["vocab"].pop(max(content["model"]["vocab"], key=content["model"]["vocab"].get))
    content["model"]["merges"].pop()
    (model / "tokenizer.json").write_text(json.dumps(content))


@pytest.mark.parametrize("damage", [swap_ids, other_end, fewer_merges, smaller])
def test_models_with_different_tokenizers_are_not_compared(scoring, world: Path, model: Path, damage: Damage) -> None:
    damage(model)
    for forward, reverse in ((world / "sft", model), (model, world / "sft")):
        code, message = scoring(forward, reverse)
        assert code == 1
        assert "different tokenizers" in message
        assert str(reverse) in message


# ---------------------------------------------------------------- hashes


@pytest.mark.parametrize(
    ("change", "same"),
    [
        (lambda d: (d / "README.md").write_text("x"), True),
        (lambda d: (d / "metrics.jsonl").unlink(), True),
        (lambda d: change_weights(d, lambda t: t[NORM].add_(1e-3)), False),
        (lambda d: change_json(d / "config.json", rope_theta=5.0), False),
        (lambda d: change_json(d / "tokenizer_config.json", eos_token="<|pad|>"), False),
        (lambda d: (d / "tokenizer_config.json").unlink(), False),
    ],
    ids=["readme", "metrics", "weights", "config", "tokenizer", "no-tokenizer-config"],
)
def test_the_hash_of_a_model_is_that_of_what_it_computes(model: Path, change: Damage, same: bool) -> None:
    before = hash_model(model)
    change(model)
    assert (hash_model(model) == before) is same


def test_a_model_is_found_where_it_is(world: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(model.parent)
    assert locate_model("model", "--model") == Path("model")
    assert locate_model(str(world / "sft") + "/", "--model") == world / "sft"
    assert hash_model(model) == hash_model(world / "sft")
