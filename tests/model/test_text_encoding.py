"""Data is always text, a response continues its prompt, and the files of a tokenizer stay what they are."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from conftest import run_here, write_jsonl
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import LlamaTokenizerFast, PreTrainedTokenizerFast

from tisdpo_cli.data.tokens import Limits, encode_pairs
from tisdpo_cli.engine.chat import vocabulary_of
from tisdpo_cli.model.text_encoding import TextEncoding
from tisdpo_cli.model.tokenizer import Tokenizer, describe_tokenizer, load_tokenizer, make_tokenizer

USER, CALL = "<|User|>", "<tool_call>"
TEMPLATE = "{% for m in messages %}<|User|>{{ m.content }}<tool_call>{% endfor %}"


def with_controls(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level, with added tokens: special ones, and others that are not marked special."""
    backend = Backend(
        models.BPE(vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken(text, special=False) for text in (USER, CALL, "<think>", "<table>", "[x]")])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


def with_prefix_space(scheme: str | None = "always", legacy: bool = False) -> PreTrainedTokenizerFast:
    """As of Llama 2: a space is put before a text, by the pre-tokenizer or by the normalizer."""
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{b:02X}>": 3 + b for b in range(256)}}
    for text in ("▁", *map(chr, range(33, 127)), "▁Y", "▁Ye", "▁Yes", "Ye", "Yes"):
        letters.setdefault(text, len(letters))
    merges = [("▁", "Y"), ("▁Y", "e"), ("▁Ye", "s"), ("Y", "e"), ("Ye", "s")]
    backend = Backend(models.BPE(vocab=letters, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


KINDS = {
    "prepended by the pre-tokenizer": with_prefix_space(),
    "before the first part only": with_prefix_space("first"),
    "prepended by the normalizer": with_prefix_space(legacy=True),
}


# ---------------------------------------------------------------- a space that is not in the text


@pytest.mark.parametrize("kind", KINDS)
def test_a_response_gets_no_space_that_is_not_in_it(kind: str) -> None:
    tokenizer = describe_tokenizer(KINDS[kind], "here")
    assert tokenizer.texts.adds_space
    words = [
        tokenizer.backend.convert_ids_to_tokens(ids) for ids in tokenizer.encode_responses(["Yes", " Yes", "\nYes"])
    ]
    assert words == [["Yes"], ["▁Yes"], ["<0x0A>", "Yes"]]
    assert tokenizer.backend.convert_ids_to_tokens(tokenizer.encode_prompts(["Yes"])[0]) == ["▁Yes"]


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_response_apart_are_both_joined(kind: str) -> None:
    """After a newline, where no merge crosses the boundary, the ids are those of the whole text."""
    tokenizer, draw = describe_tokenizer(KINDS[kind], "here"), random.Random(0)
    prompts = ["".join(draw.choice("Yes \né?") for _ in range(9)) + "\n" for _ in range(300)]
    responses = ["".join(draw.choice("Yes \né?") for _ in range(9)) for _ in range(300)]
    whole = tokenizer.texts.encode([p + r for p, r in zip(prompts, responses, strict=True)])
    apart = zip(tokenizer.encode_prompts(prompts), tokenizer.encode_responses(responses), strict=True)
    assert whole == [p + r for p, r in apart]


@pytest.mark.parametrize("kind", KINDS)
def test_offsets_are_those_of_the_response(kind: str) -> None:
    tokenizer = describe_tokenizer(KINDS[kind], "here")
    for text in ("Yes", " Yes", "\n\nYes", "é Yes?", ""):
        (ids,), (places,) = tokenizer.encode_responses([text]), tokenizer.offsets([text])
        assert len(ids) == len(places)
        assert all(0 <= a <= b <= len(text) for a, b in places)
        assert {i for a, b in places for i in range(a, b)} == set(range(len(text)))


def test_other_tokenizers_encode_a_response_as_any_text() -> None:
    tokenizer = make_tokenizer(["Yes no\n"] * 9, 300)
    texts = ["Yes", " Yes", "\nYes", ""]
    assert not tokenizer.texts.adds_space
    assert tokenizer.encode_responses(texts) == tokenizer.encode_prompts(texts) == tokenizer.texts.encode(texts)


# ---------------------------------------------------------------- control tokens


def test_data_never_becomes_a_control_token() -> None:
    tokenizer, draw = describe_tokenizer(with_controls(), "here"), random.Random(1)
    controls = set(tokenizer.backend.convert_tokens_to_ids([USER, CALL, "<s>", "</s>"]))
    parts = (USER, CALL, "<s>", "</s>", "<|User", "|>", "<tool_", "call>", "a", " ", "<", ">")
    texts = ["".join(draw.choice(parts) for _ in range(draw.randrange(8))) for _ in range(500)]
    for encode in (tokenizer.encode_prompts, tokenizer.encode_responses):
        encoded = encode(texts)
        assert not any(controls & set(ids) for ids in encoded)
        assert [tokenizer.text(ids) for ids in encoded] == texts
    for text, ids, places in zip(texts, tokenizer.encode_responses(texts), tokenizer.offsets(texts), strict=True):
        assert [text[a:b] for a, b in places] == tokenizer.pieces(ids)


def test_a_template_spells_out_its_own_tokens() -> None:
    tokenizer = describe_tokenizer(with_controls(), "here")
    before, after = tokenizer.encode_template(f"<s>{USER}", CALL)
    assert tokenizer.backend.convert_ids_to_tokens([*before, *after]) == ["<s>", USER, CALL]


@pytest.mark.parametrize(
    ("template", "controls"), [(TEMPLATE, [CALL, USER]), (None, [USER])], ids=["with a template", "without"]
)
def test_which_tokens_frame_turns(template: str | None, controls: list[str]) -> None:
    """Tags of HTML and of reasoning are vocabulary, which models read and write as tokens."""
    encoding = TextEncoding(with_controls(template))
    assert encoding.controls == controls
    assert len(encoding.encode(["<think>"])[0]) == len(encoding.encode(["<table>"])[0]) == 1


# ---------------------------------------------------------------- rendered rows


def pairs_of(tokenizer: Tokenizer, *rows: tuple[str, str, str]):
    """Encoded pairs, and what is said of them."""
    columns = [list(column) for column in zip(*rows, strict=True)]
    return encode_pairs(*columns, [f"f:{i}" for i in range(len(rows))], vocabulary_of(tokenizer), Limits())


def test_rendered_rows_are_counted_by_their_marker() -> None:
    tokenizer = describe_tokenizer(with_controls(), "here")
    _, stats = pairs_of(tokenizer, ("plain", "a", "b"), (f"{USER}hi", "a", "b"), ("hi", "a</s>", "b"))
    warning = stats.marked.warning(3)
    assert warning is not None
    assert warning.startswith(f"2 of 3 rows spell out special tokens such as {USER!r}, which are read as plain text")
    assert "--special-tokens-in-data parse" in warning
    assert pairs_of(tokenizer, ("plain", "a", "b"))[1].marked.warning(1) is None


def test_parsed_rows_have_each_token_once() -> None:
    """The BOS and the EOS that a template rendered are not doubled."""
    fast = with_controls()
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", fast.convert_tokens_to_ids("<s>"))]
    )
    tokenizer = describe_tokenizer(fast, "here", parse_data=True)
    (pair,), stats = pairs_of(tokenizer, (f"<s>{USER}hi{CALL}", "yes</s>\n", "no"))
    names = tokenizer.backend.convert_ids_to_tokens
    assert names(pair.prompt) == ["<s>", USER, "h", "i", CALL]
    assert names(pair.chosen.ids) == ["y", "e", "s", "</s>"]
    assert names(pair.rejected.ids) == ["n", "o", "</s>"]
    assert stats.marked.rows == 0
    assert tokenizer.digest != describe_tokenizer(fast, "here").digest


# ---------------------------------------------------------------- files


def test_a_tokenizer_that_transformers_rewrites_is_copied_byte_for_byte(tmp_path: Path) -> None:
    """transformers 5 writes other rules for the space before a text than it loads from such files."""
    source = tmp_path / "source"
    source.mkdir()
    with_prefix_space(legacy=True).save_pretrained(source)
    config = json.loads((source / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True, "add_bos_token": True}
    (source / "tokenizer_config.json").write_text(json.dumps(config, indent=3))
    (source / "chat_templates").mkdir()
    (source / "chat_templates" / "tools.jinja").write_text("{{ messages }}")
    first = load_tokenizer(source)
    for number in range(2):
        target = tmp_path / f"saved-{number}"
        target.mkdir()
        first.save(target)
        again = load_tokenizer(target)
        assert again.digest == first.digest
        texts = ["Yes", " Yes", "a\nYes"]
        assert again.encode_prompts(texts) == first.encode_prompts(texts)
        for file in source.rglob("*"):
            assert file.is_dir() or (target / file.relative_to(source)).read_bytes() == file.read_bytes()
        first = again
    assert isinstance(first.backend, (LlamaTokenizerFast, PreTrainedTokenizerFast))


def test_outputs_keep_the_files_of_the_tokenizer(world: Path, tmp_path: Path) -> None:
    import shutil

    model = tmp_path / "model"
    shutil.copytree(world / "sft", model)
    file = model / "tokenizer_config.json"
    file.write_text(file.read_text() + "\n\n")
    options = ("-d", world / "data", "--max-steps", "1", "--warmup-steps", "0")
    assert run_here("train-dpo", "-m", model, "-o", tmp_path / "out", *options).code == 0
    done = run_here(
        "estimate", "--forward", tmp_path / "out", "--reverse", model, "-d", world / "data", "-o", tmp_path / "scored"
    )
    assert done.code == 0, done.err
    for place in ("out", "scored"):
        assert (tmp_path / place / "tokenizer_config.json").read_bytes() == file.read_bytes()


def test_a_bos_that_is_asked_for_and_not_added_is_named(tmp_path: Path) -> None:
    fast = with_controls()
    fast.save_pretrained(tmp_path)
    assert not any("add_bos_token" in notice for notice in load_tokenizer(tmp_path).notices)
    file = tmp_path / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "add_bos_token": True}))
    (notice,) = [n for n in load_tokenizer(tmp_path).notices if "add_bos_token" in n]
    assert "'<s>'" in notice


# ---------------------------------------------------------------- through the program


def test_scored_rows_are_read_as_they_were_scored(world: Path, tmp_path: Path) -> None:
    """Columns and parsing come from estimate.json, for train and inspect-weights; an option given wins."""
    rows = [json.loads(line) for line in (world / "data" / "train.jsonl").read_text().splitlines()][:6]
    eos = load_tokenizer(world / "sft").backend.eos_token
    data = write_jsonl(
        tmp_path / "rows.jsonl",
        [{"q": row["prompt"], "good": f"{row['chosen']}{eos}", "bad": row["rejected"]} for row in rows],
    )
    names = ("--prompt-column", "q", "--chosen-column", "good", "--rejected-column", "bad")
    scored = tmp_path / "scored"
    model = ("--forward", world / "sft", "--reverse", world / "sft")
    done = run_here("estimate", *model, "-d", data, "-o", scored, *names, "--special-tokens-in-data", "parse")
    assert done.code == 0, done.err
    assert json.loads((scored / "estimate.json").read_text())["reading"]["special_tokens_in_data"] == "parse"
    train = ("train", "-m", world / "sft", "-d", scored, "--max-steps", "1", "--warmup-steps", "0")
    done = run_here(*train, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert "spell out" not in done.err
    assert run_here("inspect-weights", scored).code == 0
    assert "expected columns" in run_here(*train, "-o", tmp_path / "other", "--prompt-column", "prompt").err
    plain = run_here("train-dpo", "-m", world / "sft", "-d", data, "-o", tmp_path / "dpo", *names, "--dry-run")
    assert f"6 of 6 rows spell out special tokens such as {eos!r}" in plain.err
