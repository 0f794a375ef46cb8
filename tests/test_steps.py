"""Steps before the transform, against plain loops and by hand; spans of text, on many scripts and real tokenizers.

Float32 scores after the steps agree with float64 loops within 1e-6.
"""

import doctest
import random
import re
from itertools import pairwise

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tisdpo_cli import params, steps, templates
from tisdpo_cli.data import tokens
from tisdpo_cli.models import describe_tokenizer, make_tokenizer
from tisdpo_cli.params import Param, described, with_defaults
from tisdpo_cli.steps import STEPS, Centers, Context, apply_steps, centers_of, spans_of
from tisdpo_cli.weights import Stream, recipe, response_weights

CENTERS = Centers(0.5, (1.0, -1.0), 0.25)


def after(scores, wanted, spans=None):
    """Scores after some steps, as a list."""
    return apply_steps(torch.tensor(scores), wanted, Context(CENTERS, spans)).tolist()


def random_scores(seed, count):
    draw = random.Random(seed)
    return [draw.gauss(0, 1) for _ in range(count)]


# ---------------------------------------------------------------- each step


def test_worked_examples():
    scores = [2.0, -1.0, 0.25, 0.75]
    assert after(scores, {"center": "dataset"}) == [1.5, -1.5, -0.25, 0.25]
    assert after(scores, {"center": "position"}) == [1.0, 0.0, 0.0, 0.5]
    assert after(scores, {"spans": "word"}, [0, 0, 1, 1]) == [0.5, 0.5, 0.5, 0.5]
    assert after(scores, {"spans": "word"}, [0, 1, 1, 1]) == [2.0, 0.0, 0.0, 0.0]
    assert after(scores, {"dead_zone": 0.75}) == [2.0, -1.0, 0.0, 0.0]
    assert after(scores, {"decay": 0.5}) == [2.0, -0.5, 0.0625, 0.09375]


def test_nothing_is_done_unless_asked_for():
    scores = torch.randn(30)
    assert apply_steps(scores, {}, Context()) is scores
    assert not recipe("exp").steps


@pytest.mark.parametrize("seed", range(5))
def test_all_steps_in_their_order_agree_with_plain_loops(seed):
    draw, n = random.Random(seed), 1 + 7 * seed
    scores = random_scores(seed, n)
    spans = sorted(draw.randrange(1 + n // 2) for _ in range(n))
    spans = [sorted(set(spans)).index(span) for span in spans]
    expected = [r - (CENTERS.positions[t] if t < 2 else CENTERS.tail) for t, r in enumerate(scores)]
    means = {s: [r for r, other in zip(expected, spans, strict=True) if other == s] for s in spans}
    expected = [sum(means[s]) / len(means[s]) for s in spans]
    expected = [0.0 if abs(r) <= 0.3 else r for r in expected]
    expected = [r * 0.9**t for t, r in enumerate(expected)]
    wanted = {"decay": 0.9, "dead_zone": 0.3, "spans": "word", "center": "position"}
    for order in (list(wanted), list(reversed(wanted))):
        got = after(scores, {name: wanted[name] for name in order}, spans)
        assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert list(STEPS) == ["center", "spans", "dead_zone", "decay"]


def test_empty_and_single_responses():
    for wanted in (
        {"center": "dataset"},
        {"center": "position"},
        {"spans": "word"},
        {"dead_zone": 1.0},
        {"decay": 0.5},
    ):
        assert after([], wanted, []) == []
        assert len(after([3.0], wanted, [0])) == 1


def test_averaging_over_spans_keeps_the_sum_and_is_done_once():
    scores, spans = random_scores(1, 40), [t // 3 for t in range(40)]
    once = after(scores, {"spans": "word"}, spans)
    assert sum(once) == pytest.approx(sum(scores), abs=1e-5)
    assert after(once, {"spans": "word"}, spans) == pytest.approx(once, abs=1e-6)
    assert len({round(r, 5) for r in once}) == 14


def test_scores_that_are_not_there_take_no_part_in_spans():
    """A response that was scored up to a cut has fewer scores than spans."""
    assert after([1.0, 3.0], {"spans": "word"}, [0, 0, 0, 1]) == [2.0, 2.0]


@pytest.mark.parametrize("wanted", [{"center": "dataset"}, {"center": "position"}, {"spans": "word"}, {"decay": 0.8}])
def test_the_eos_is_one_more_token_and_leaves_the_others_alone(wanted):
    scores, eos, spans = [0.3, -0.2, 0.9], 0.4, [0, 1, 1]
    how = recipe("exp", steps=wanted)
    context, stream = Context(CENTERS, spans), Stream(0, 0, "chosen")
    arguments = (torch.tensor(scores), torch.tensor([eos]), 3)
    alone = response_weights(*arguments, False, how, stream, context)
    joined = response_weights(*arguments, True, how, stream, context)
    assert torch.equal(joined[:3], alone)
    expected = after([*scores, eos], wanted, [*spans, 2])
    assert joined[3].log().item() == pytest.approx(expected[3], abs=1e-6)


def test_steps_change_no_scores_and_want_no_gradient():
    scores = torch.tensor(random_scores(2, 9))
    before = scores.clone()
    made = apply_steps(scores, {"center": "dataset", "spans": "word", "dead_zone": 0.1}, Context(CENTERS, [0] * 9))
    assert torch.equal(scores, before)
    assert made.dtype == torch.float32
    assert not made.requires_grad


def test_a_step_without_what_it_needs_says_so():
    for wanted, word in (({"center": "dataset"}, "means"), ({"spans": "word"}, "span")):
        with pytest.raises(ValueError, match=word):
            apply_steps(torch.zeros(2), wanted, Context())


@pytest.mark.parametrize(
    "given",
    [{"decay": 1.0}, {"decay": 0.0}, {"decay": float("nan")}, {"dead_zone": 0.0}, {"dead_zone": -1.0},
     {"center": "token"}, {"spans": "letter"}, {"blur": 1.0}],
)  # fmt: skip
def test_values_that_make_no_sense_are_refused(given):
    with pytest.raises(ValueError, match=next(iter(given))):
        recipe("exp", steps=given)


# ---------------------------------------------------------------- means of a dataset


def test_centres_are_means_and_thin_positions_share_one():
    """Position 0 and 1 are reached by 25 responses, position 2 by 20, positions 3 and 4 by 5."""
    draw = random.Random(3)
    responses = [[draw.gauss(0, 1) for _ in range(n)] for n in [5] * 5 + [3] * 15 + [2] * 5]
    centers = centers_of(responses)
    every = [r for scores in responses for r in scores]
    assert centers.dataset == pytest.approx(sum(every) / len(every))
    assert len(centers.positions) == 3
    for t in range(3):
        column = [scores[t] for scores in responses if len(scores) > t]
        assert centers.at(t) == pytest.approx(sum(column) / len(column))
    tail = [r for scores in responses for r in scores[3:]]
    assert centers.at(3) == centers.at(4) == centers.at(99) == pytest.approx(sum(tail) / len(tail))


@pytest.mark.parametrize("kind", ["dataset", "position"])
def test_centring_makes_the_means_zero(kind):
    responses = [random_scores(seed, 12) for seed in range(30)]
    context = Context(centers_of(responses))
    centred = torch.stack([apply_steps(torch.tensor(r), {"center": kind}, context) for r in responses])
    assert abs(centred.mean().item()) < 1e-6
    if kind == "position":
        assert centred.mean(0).abs().max() < 1e-6


def test_a_dataset_without_scores_has_centres_all_the_same():
    assert centers_of([]) == centers_of([[], []]) == Centers(0.0, (), 0.0)


# ---------------------------------------------------------------- spans of text


def offsets_by(pattern, text):
    return [match.span() for match in re.finditer(pattern, text)]


def grouped(text, unit, pattern=r" ?\w+|[^\w\s]|\s"):
    """The text of each span."""
    offsets = offsets_by(pattern, text)
    spans = spans_of(text, offsets, unit)
    pieces = [text[begin:end] for begin, end in offsets]
    return ["".join(p for p, s in zip(pieces, spans, strict=True) if s == span) for span in sorted(set(spans))]


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("word", "I can't stop-gap it.", ["I", " can't", " stop-gap", " it", "."]),
        ("word", " two  spaces", [" two", "  spaces"]),
        ("word", "so (sad)!", ["so", " (", "sad", ")!"]),
        ("word", "नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        ("word", "你好，世界。", ["你好", "，", "世界", "。"]),
        ("word", "ok 👍🏽 yes", ["ok", " 👍🏽", " yes"]),
        ("clause", "Well, no; yes: maybe.", ["Well,", " no;", " yes:", " maybe."]),
        ("clause", "It is 3.14 or 1,000 now", ["It is 3.14 or 1,000 now"]),
        ("clause", "你好，世界。再见", ["你好，", "世界。", "再见"]),
        ("sentence", "Hi! Who? Me, me. \"Go.\" End", ["Hi!", " Who?", " Me, me.", " \"Go.\"", " End"]),
        ("sentence", "one\ntwo\n\nthree", ["one\n", "two\n\n", "three"]),
        ("sentence", "All done.\n\nNext", ["All done.\n\n", "Next"]),
        ("sentence", "No end", ["No end"]),
        ("sentence", "मैं हूँ। तुम हो।", ["मैं हूँ।", " तुम हो।"]),
        ("clause", "مرحبا، كيف حالك؟ بخير", ["مرحبا،", " كيف حالك؟", " بخير"]),
    ],
)  # fmt: skip
def test_spans_by_hand(unit, text, expected):
    assert grouped(text, unit) == expected


TEXTS = [
    "Well, I'd go (not 3.14 km).\n\nBye! See you…",
    "नमस्ते दुनिया। 你好，世界。Ça va? Ωραία!",
    "مرحبا، كيف حالك؟ بخير.",
    "👩‍👩‍👧 family 👍🏽, e\u0301 combining; \u200bzero width\r\nend",
    "   ",
    "a",
    "\n",
]


def real_tokenizers():
    """A byte-level one, whose tokens split characters, and one that marks spaces with ▁."""
    metaspace = Backend(
        models.BPE(vocab={"<unk>": 0, **{chr(c): c for c in range(33, 127)}}, merges=[], unk_token="<unk>")
    )
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace()
    metaspace.decoder = decoders.Metaspace()
    fast = PreTrainedTokenizerFast(tokenizer_object=metaspace, unk_token="<unk>", eos_token="~")
    return [make_tokenizer(["hello there, friend"], 270), describe_tokenizer(fast, "here")]


@pytest.mark.parametrize("tokenizer", real_tokenizers(), ids=["bytes", "metaspace"])
@pytest.mark.parametrize("unit", ["word", "clause", "sentence"])
def test_every_token_has_a_span_and_spans_never_go_back(tokenizer, unit):
    encoded = tokenizer.encode(TEXTS)
    for text, ids, offsets in zip(TEXTS, encoded, tokenizer.offsets(TEXTS), strict=True):
        spans = spans_of(text, offsets, unit)
        assert len(spans) == len(ids)
        assert spans[:1] in ([], [0])
        assert all(b - a in (0, 1) for a, b in pairwise(spans))


def test_sentences_are_made_of_clauses():
    for tokenizer in real_tokenizers():
        for text, offsets in zip(TEXTS, tokenizer.offsets(TEXTS), strict=True):
            clauses, sentences = (spans_of(text, offsets, unit) for unit in ("clause", "sentence"))
            assert len(set(zip(clauses, sentences, strict=True))) == len(set(clauses))


def test_tokens_of_one_character_share_its_span():
    tokenizer = make_tokenizer(["x"], 260)
    text = "a 你 b"
    spans = spans_of(text, tokenizer.offsets([text])[0], "word")
    assert max(spans) == 2
    assert spans.count(1) >= 3


def test_words_do_not_depend_on_the_tokenizer():
    text, found = "go there, now", []
    for tokenizer in real_tokenizers():
        offsets = tokenizer.offsets([text])[0]
        spans = spans_of(text, offsets, "word")
        found.append({i: s for (b, e), s in zip(offsets, spans, strict=True) for i in range(b, e) if text[i] != " "})
    assert found[0] == found[1]
    assert sorted(set(found[0].values())) == [0, 1, 2, 3]


# ---------------------------------------------------------------- parameters


def test_parameters_that_are_given_win_over_defaults():
    known = {"a": Param(1.0, "a", above=0.0), "b": Param(None, "b"), "c": Param(False, "c")}
    assert with_defaults("x", known, {}) == {"a": 1.0, "c": False}
    assert with_defaults("x", known, {"a": 2.0, "b": 3.0}) == {"a": 2.0, "b": 3.0, "c": False}


@pytest.mark.parametrize(
    ("param", "value", "told"),
    [
        (Param(1.0, "", above=0.0), 0.0, "above 0, not 0"),
        (Param(1.0, "", at_least=0.0), -1.0, "at least 0, not -1"),
        (Param(1.0, "", under=1.0), 1.0, "below 1, not 1"),
        (Param(1.0, "", at_most=1.0), 1.5, "at most 1, not 1.5"),
        (Param(1.0, ""), float("inf"), "a finite number, not inf"),
        (Param(None, "", choices=("u", "v")), "w", "one of u, v, not w"),
    ],
)
def test_a_value_out_of_bounds_is_told_with_its_bound(param, value, told):
    with pytest.raises(ValueError, match=re.escape(f"p of thing must be {told}")):
        with_defaults("thing", {"p": param}, {"p": value})


def test_descriptions_name_what_is_set():
    assert described({"a": 0.5, "b": "word", "c": True, "d": False}) == "a 0.5, b word, c"


@pytest.mark.parametrize("module", [steps, params, templates, tokens])
def test_the_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- templates


def test_a_template_has_one_place_for_the_prompt():
    assert templates.around("normal") == ("", "")
    assert templates.around("say {} now") == ("say ", " now")
    before, after_it = templates.around("harmless")
    assert before
    assert not after_it
    assert templates.around("harmful")[0] != before
    for wrong in ("no place", "{} twice {}", "", "harmles"):
        with pytest.raises(ValueError, match="exactly once"):
            templates.around(wrong)
