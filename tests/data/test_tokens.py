"""Text to ids, and the cut, against the oracle; BOS and EOS; the tokenizer that `--init` makes."""

import random
import unicodedata
from dataclasses import replace

import oracle
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tisdpo_cli.data.tokens import Limits, Vocabulary, _spread, cut, encode_pairs
from tisdpo_cli.engine.chat import vocabulary_of
from tisdpo_cli.errors import ModelError
from tisdpo_cli.model.loading import make_model, save_model
from tisdpo_cli.model.tokenizer import describe_tokenizer, load_tokenizer, make_tokenizer

BOS, EOS = 100, 101

# Whatever a dataset may hold: control characters, all of Latin-1, combining marks, Hangul, emoji, private use.
RANGES = ((0x0, 0x17F), (0x300, 0x36F), (0x400, 0x4FF), (0x5D0, 0x6FF), (0x4E00, 0x4E80), (0xAC00, 0xAC80),
          (0x1F300, 0x1F6FF), (0xE000, 0xE010), (0xFFF0, 0xFFFD))  # fmt: skip


def random_text(draw):
    return "".join(chr(draw.randint(*draw.choice(RANGES))) for _ in range(draw.randrange(40)))


def characters(texts):
    """A tokenizer of single characters, without special tokens of its own."""
    return [[ord(character) % 90 for character in text] for text in texts]


def encode(prompts, chosen, rejected, limits, bos=BOS):
    """`encode_pairs` with the tokenizer of characters."""
    wheres = [f"data.jsonl:{i + 1}" for i in range(len(prompts))]
    return encode_pairs(prompts, chosen, rejected, wheres, Vocabulary(characters, characters, bos, EOS), limits)


def byte_tokenizer(adds_bos=True, **special):
    """A tokenizer of bytes with special tokens `<s>` and `</s>`; puts `<s>` in front if asked to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>"])
    if adds_bos:
        ids = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", ids)
    special = {"bos_token": "<s>", "eos_token": "</s>", **special}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def vocabulary(tokenizer):
    return vocabulary_of(tokenizer)


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize("keep", ["end", "start"])
@pytest.mark.parametrize("bos", [None, BOS])
def test_cut_agrees_with_the_oracle(bos, keep):
    draw = random.Random(0)
    cuts = 0
    for _ in range(2000):
        prompt, chosen, rejected = ([draw.randrange(90) for _ in range(draw.randrange(13))] for _ in range(3))
        max_length = draw.randint(2, 24)
        max_prompt = draw.randint(1, max_length - 1)
        limits = Limits(max_length, max_prompt, keep)
        got, (good, bad) = cut(prompt, [chosen, rejected], bos, EOS, limits)
        expected = oracle.encode_and_cut(
            prompt, chosen, rejected, bos=bos, eos=EOS, max_length=max_length, max_prompt_length=max_prompt, keep=keep
        )
        assert got == expected["prompt"]
        for side, response, ids in (("chosen", good, chosen), ("rejected", bad, rejected)):
            assert response.ids == expected[side]
            assert response.has_eos == expected[f"{side}_has_eos"]
            assert response.kept == expected[f"{side}_kept"]
            assert response.uncut == len(ids)
            assert len(got) + len(response.ids) <= max_length
        cuts += len(expected["prompt"]) < len(prompt) + (bos is not None)
    assert 200 < cuts < 1800


@pytest.mark.parametrize("keep", ["end", "start"])
@pytest.mark.parametrize("bos", [None, BOS])
def test_pairs_are_encoded_and_cut_as_by_the_oracle(bos, keep):
    draw = random.Random(1)
    limits = Limits(20, 6, keep)
    texts = [[random_text(draw)[: draw.randrange(20)] for _ in range(200)] for _ in range(3)]
    pairs, cuts = encode(*texts, limits, bos)
    cut_prompts = cut_responses = 0
    for i, pair in enumerate(pairs):
        ids = characters([column[i] for column in texts])
        expected = oracle.encode_and_cut(*ids, bos=bos, eos=EOS, max_length=20, max_prompt_length=6, keep=keep)
        assert (pair.index, pair.where) == (i, f"data.jsonl:{i + 1}")
        assert (pair.prompt, pair.chosen.ids, pair.rejected.ids) == tuple(
            expected[name] for name in ("prompt", "chosen", "rejected")
        )
        cut_prompts += len(pair.prompt) < len(ids[0]) + (bos is not None)
        cut_responses += (not pair.chosen.has_eos) + (not pair.rejected.has_eos)
        assert pair.tokens == len(pair.prompt) + len(pair.chosen.ids) + len(pair.rejected.ids)
    assert (cuts.rows, cuts.cut_prompts, cuts.cut_responses) == (200, cut_prompts, cut_responses)
    assert cut_prompts
    assert cut_responses


def test_worked_example():
    """Limit 8, prompt limit 4, BOS: 1 + 5 + 3 + 1 = 10 > 8, so the prompt keeps 3 tokens beside its BOS.

    That leaves 4 for a response: 3 tokens and the EOS fit, 5 tokens are cut to 4 and lose it.
    """
    limits = Limits(8, 4)
    prompt, (chosen, rejected) = cut([1, 2, 3, 4, 5], [[6, 7, 8], [6, 7, 8, 9, 10]], BOS, EOS, limits)
    assert prompt == [BOS, 3, 4, 5]
    assert (chosen.ids, chosen.has_eos, chosen.kept) == ([6, 7, 8, EOS], True, 3)
    assert (rejected.ids, rejected.has_eos, rejected.kept) == ([6, 7, 8, 9], False, 4)
    start, _ = cut([1, 2, 3, 4, 5], [[6] * 5], BOS, EOS, replace(limits, keep_prompt="start"))
    assert start == [BOS, 1, 2, 3]


def test_a_pair_that_just_fits_is_not_cut():
    """1 + 4 + 2 + 1 = 8."""
    prompt, (response,) = cut([1, 2, 3, 4], [[5, 6]], BOS, EOS, Limits(8, 2))
    assert (prompt, response.ids) == ([BOS, 1, 2, 3, 4], [5, 6, EOS])
    prompt, (response,) = cut([1, 2, 3, 4], [[5, 6]], BOS, EOS, Limits(7, 2))
    assert (prompt, response.ids) == ([BOS, 4], [5, 6, EOS])


def test_a_response_whose_eos_alone_does_not_fit_is_cut():
    _, (response,) = cut([1, 2], [[3, 4]], None, EOS, Limits(4, 2))
    assert (response.ids, response.has_eos, response.uncut) == ([3, 4], False, 2)


def test_rows_with_nothing_left_are_kept():
    """Scoring needs every row; training drops them later."""
    pairs, _ = encode(["abc", "abc"], ["", "x"], ["", "x"], Limits(16, 8))
    assert [(pair.chosen.kept, pair.chosen.ids) for pair in pairs] == [(0, [EOS]), (1, characters("x")[0] + [EOS])]


def test_swapping_a_pair_twice_gives_it_back():
    (pair,), _ = encode(["abc"], ["good"], ["bad one"], Limits(64, 32))
    assert pair.swapped().chosen == pair.rejected
    assert pair.swapped().prompt == pair.prompt
    assert pair.swapped().swapped() == pair


def test_merged_boundaries_are_counted():
    """With `b` and `c` merged into one token when they meet, only the first row would tokenise differently."""

    def merging(texts):
        return [[ord(character) for character in text.replace("bc", "z")] for text in texts]

    columns = (["ab", "ab"], ["c", "d"], ["c", "d"], ["f:1", "f:2"])
    pairs, cuts = encode_pairs(*columns, Vocabulary(merging, merging, None, EOS), Limits(64, 32))
    assert cuts.merged_boundaries == 1
    assert pairs[0].prompt == [ord("a"), ord("b")]
    assert any("tokenize differently" in message for message in cuts.messages(Limits()))


# ---------------------------------------------------------------- special tokens


def test_bos_once_where_the_tokenizer_adds_one():
    tokenizer = describe_tokenizer(byte_tokenizer(), "here")
    texts = (["Ask me"], ["Yes"], ["No"], ["f:1"])
    (pair,), _ = encode_pairs(*texts, vocabulary(tokenizer), Limits())
    assert tokenizer.bos is not None
    for response in (pair.chosen, pair.rejected):
        row = pair.prompt + response.ids
        assert row.index(tokenizer.bos) == 0
        assert row.count(tokenizer.bos) == 1
        assert row.count(tokenizer.eos) == 1
        assert row[-1] == tokenizer.eos
    assert tokenizer.backend.decode(pair.prompt[1:] + pair.chosen.ids[:-1]) == "Ask meYes"


def test_no_bos_where_the_tokenizer_adds_none():
    tokenizer = describe_tokenizer(byte_tokenizer(adds_bos=False), "here")
    assert tokenizer.bos is None
    (pair,), _ = encode_pairs(["a"], ["b"], ["c"], ["f:1"], vocabulary(tokenizer), Limits())
    assert pair.prompt == tokenizer.texts.encode(["a"])[0]


def test_bos_survives_the_cut():
    tokenizer = describe_tokenizer(byte_tokenizer(), "here")
    for keep in ("end", "start"):
        limits = Limits(8, 3, keep)
        (pair,), _ = encode_pairs(["a long prompt"], ["responses"], ["b"], ["f:1"], vocabulary(tokenizer), limits)
        assert pair.prompt[0] == tokenizer.bos
        assert tokenizer.backend.decode(pair.prompt[1:]) == {"end": "pt", "start": "a "}[keep]


@pytest.mark.parametrize("made", ["by us", "with a BOS"])
def test_text_that_spells_a_special_token_stays_text(made):
    tokenizer = (
        make_tokenizer(["a text"], 300) if made == "by us" else describe_tokenizer(byte_tokenizer(), "with a BOS")
    )
    special = tokenizer.backend.all_special_ids
    for token in tokenizer.backend.all_special_tokens:
        text = f"{token} between {token}"
        (ids,) = tokenizer.texts.encode([text])
        assert not set(ids) & set(special)
        assert tokenizer.backend.decode(ids) == text
        # Neither does the program's own use leave anything behind in the tokenizer.
        assert tokenizer.backend.convert_tokens_to_ids(token) in special


def test_eos_ends_a_response_also_where_it_is_the_padding():
    tokenizer = describe_tokenizer(byte_tokenizer(), "here")
    assert tokenizer.pad == tokenizer.eos
    assert any("no padding token" in notice for notice in tokenizer.notices)
    padded = describe_tokenizer(byte_tokenizer(pad_token="</s>"), "here")
    for vocabulary_ in (vocabulary(tokenizer), vocabulary(padded)):
        (pair,), _ = encode_pairs(["a"], ["ends itself</s>"], ["b"], ["f:1"], vocabulary_, Limits())
        assert pair.chosen.ids.count(vocabulary_.eos) == 1
        assert pair.chosen.ids[-1] == vocabulary_.eos
        assert pair.chosen.has_eos


def test_a_tokenizer_needs_an_eos():
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        describe_tokenizer(byte_tokenizer(eos_token=None), "here")


def test_no_texts_give_no_ids():
    assert make_tokenizer(["a"], 260).texts.encode([]) == []


# ---------------------------------------------------------------- a new tokenizer

TEXTS = ["The quick brown fox, again and again and again.", "Zwölf Boxkämpfer jagen Viktor"] * 3


@pytest.mark.parametrize("vocab_size", [1, 258, 300])
def test_a_new_tokenizer_knows_all_bytes(vocab_size):
    tokenizer = make_tokenizer(TEXTS, vocab_size)
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(tokenizer.backend.get_vocab())
    assert len(tokenizer.backend) <= max(vocab_size, 258)
    assert tokenizer.bos is None
    assert tokenizer.eos != tokenizer.pad


def test_a_new_tokenizer_round_trips_any_text():
    draw = random.Random(2)
    tokenizer = make_tokenizer(TEXTS, 320)
    texts = [unicodedata.normalize("NFC", random_text(draw)) for _ in range(500)]
    for text, ids in zip(texts, tokenizer.texts.encode(texts), strict=True):
        assert tokenizer.backend.decode(ids, clean_up_tokenization_spaces=False) == text
        assert not set(ids) & {tokenizer.eos, tokenizer.pad}


def test_a_new_tokenizer_is_the_same_every_time():
    assert make_tokenizer(TEXTS, 320).digest == make_tokenizer(TEXTS, 320).digest
    assert make_tokenizer(TEXTS, 320).digest != make_tokenizer(TEXTS, 300).digest


def test_a_tokenizer_reloaded_beside_its_model_is_the_same(tmp_path):
    draw = random.Random(3)
    texts = [random_text(draw) for _ in range(100)] + TEXTS
    tokenizer = make_tokenizer(TEXTS, 320)
    # Use must not change what it is, nor what is saved.
    tokenizer.backend(texts, padding=True, truncation=True, max_length=4)
    ids = tokenizer.texts.encode(texts)
    model = make_model(tokenizer, hidden_size=16, layers=1, heads=2, positions=64, seed=0)
    for generation in ("one", "two"):
        save_model(model, tokenizer, tmp_path / generation)
        reloaded = load_tokenizer(tmp_path / generation)
        assert reloaded.digest == tokenizer.digest
        assert (reloaded.bos, reloaded.eos, reloaded.pad) == (tokenizer.bos, tokenizer.eos, tokenizer.pad)
        assert reloaded.texts.encode(texts) == ids
        tokenizer = reloaded


def test_pieces_show_each_token():
    tokenizer = make_tokenizer(TEXTS, 300)
    (ids,) = tokenizer.texts.encode(["again, Boxkämpfer"])
    assert "".join(tokenizer.pieces(ids)).replace("�", "") in ("again, Boxkämpfer", "again, Boxkmpfer")
    assert tokenizer.pieces([tokenizer.eos]) == ["<|endoftext|>"]


def word_piece_tokenizer():
    """A tokenizer like that of Llama 2: a sign for spaces, bytes as tokens of their own, a decoder that strips."""
    backend = Backend(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=400, special_tokens=special))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    return describe_tokenizer(tokenizer, "test")


def test_pieces_keep_the_space_that_a_decoder_strips():
    tokenizer = word_piece_tokenizer()
    (ids,) = tokenizer.texts.encode(["once again, 👍 thanks"])
    assert "".join(tokenizer.pieces(ids)).replace("\ufffd", "") == " once again,  thanks"
    assert b"".join(tokenizer.token_bytes(ids)).decode() == " once again, 👍 thanks"
    assert "⟨f0⟩⟨9f⟩⟨91⟩⟨8d⟩" in "".join(tokenizer.labels(ids))
    assert tokenizer.pieces([tokenizer.eos]) == ["</s>"]


@pytest.mark.parametrize(
    ("lengths", "shown"), [([], "none"), ([7], "7/7/7"), ([14, 2], "14/14/14"), (list(range(1, 101)), "51/95/100")]
)
def test_lengths_are_summed_up_in_order(lengths: list[int], shown: str) -> None:
    assert _spread(lengths) == shown
