"""Steps before the transform, against plain loops and by hand; spans of text, on many scripts and real tokenizers.

Float32 scores after the steps agree with float64 loops within 1e-6.
"""

import doctest
import math
import random
import re
from itertools import combinations, pairwise, permutations

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tisdpo_cli.data import tokens
from tisdpo_cli.method import params, prompt_templates, steps
from tisdpo_cli.method.recipe import resolve_recipe, response_weights
from tisdpo_cli.method.steps import STEPS, Centers, Context, apply_steps, centers_of, spans_of
from tisdpo_cli.method.transforms import TRANSFORMS, RandomStream
from tisdpo_cli.model.tokenizer import describe_tokenizer, make_tokenizer

CENTERS = Centers(0.5, (1.0, -1.0), 0.25)


def after(scores, wanted, spans=None):
    """Scores after some steps, as a list."""
    return apply_steps(torch.tensor(scores), wanted, Context(CENTERS, spans)).tolist()


def random_scores(seed, count):
    draw = random.Random(seed)
    return [draw.gauss(0, 1) for _ in range(count)]


def random_spans(seed, count):
    """Spans of so many tokens: groups of one to five."""
    draw, spans = random.Random(f"spans {seed}"), []
    while len(spans) < count:
        spans += [spans[-1] + 1 if spans else 0] * draw.randint(1, 5)
    return spans[:count]


# ---------------------------------------------------------------- the steps again, in loops


def plain_center(scores, kind, spans):
    means = [*CENTERS.positions, *[CENTERS.tail] * len(scores)]
    return [r - (means[t] if kind == "position" else CENTERS.dataset) for t, r in enumerate(scores)]


def plain_spans(scores, unit, spans):
    result = []
    for span in spans[: len(scores)]:
        members = [r for r, other in zip(scores, spans, strict=False) if other == span]
        result.append(sum(members) / len(members))
    return result


def plain_dead_zone(scores, size, spans):
    return [r if r > size or r < -size else 0.0 for r in scores]


def plain_decay(scores, factor, spans):
    result, power = [], 1.0
    for r in scores:
        result.append(r * power)
        power *= factor
    return result


PLAIN = {"center": plain_center, "spans": plain_spans, "dead_zone": plain_dead_zone, "decay": plain_decay}
ORDER = ("center", "spans", "dead_zone", "decay")
CHOICES = {"center": ("dataset", "position"), "spans": ("word",), "dead_zone": (0.3, 1.1), "decay": (0.5, 0.97)}


def plainly(scores, wanted, spans, order=ORDER):
    """The steps that are wanted, in this order."""
    for name in order:
        if name in wanted:
            scores = PLAIN[name](scores, wanted[name], spans)
    return scores


# ---------------------------------------------------------------- each step


def test_worked_examples():
    scores = [2.0, -1.0, 0.25, 0.75]
    assert after(scores, {"center": "dataset"}) == [1.5, -1.5, -0.25, 0.25]
    assert after(scores, {"center": "position"}) == [1.0, 0.0, 0.0, 0.5]
    assert after(scores, {"spans": "word"}, [0, 0, 1, 1]) == [0.5, 0.5, 0.5, 0.5]
    assert after(scores, {"spans": "word"}, [0, 1, 1, 1]) == [2.0, 0.0, 0.0, 0.0]
    assert after(scores, {"dead_zone": 0.75}) == [2.0, -1.0, 0.0, 0.0]
    assert after(scores, {"decay": 0.5}) == [2.0, -0.5, 0.0625, 0.09375]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "wanted", [{name: choice} for name in ORDER for choice in CHOICES[name]], ids=lambda wanted: str(*wanted.items())
)
def test_each_step_alone_agrees_with_plain_loops(wanted, seed):
    count = (1, 2, 3, 8, 33, 120)[seed]
    scores, spans = random_scores(seed, count), random_spans(seed, count)
    expected = plainly(scores, wanted, spans)
    assert after(scores, wanted, spans) == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("names", [names for size in range(5) for names in combinations(ORDER, size)], ids="-".join)
def test_every_choice_of_steps_agrees_with_plain_loops_however_it_is_asked_for(names):
    for seed, count in enumerate((1, 5, 41)):
        scores, spans = random_scores(seed + 10, count), random_spans(seed + 10, count)
        wanted = {name: CHOICES[name][seed % len(CHOICES[name])] for name in names}
        expected = plainly(scores, wanted, spans)
        for order in permutations(names):
            got = after(scores, {name: wanted[name] for name in order}, spans)
            assert got == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_the_order_is_center_spans_dead_zone_decay():
    """[3.5, -0.5, 0.75, 0.25] less [1, -1, 0.25, 0.25] is [2.5, 0.5, 0.5, 0]; by spans [1.5, 1.5, 0.25, 0.25].

    The dead zone of 0.8 leaves [1.5, 1.5, 0, 0], the decay of a half [1.5, 0.75, 0, 0]. No two neighbours could
    change places: each of those orders would have given other numbers.
    """
    scores, spans = [3.5, -0.5, 0.75, 0.25], [0, 0, 1, 1]
    wanted = {"center": "position", "spans": "word", "dead_zone": 0.8, "decay": 0.5}
    for order in permutations(wanted):
        assert after(scores, {name: wanted[name] for name in order}, spans) == [1.5, 0.75, 0.0, 0.0]
    for i in range(3):
        swapped = [*ORDER[:i], ORDER[i + 1], ORDER[i], *ORDER[i + 2 :]]
        assert plainly(scores, wanted, spans, swapped) != [1.5, 0.75, 0.0, 0.0]
    assert tuple(STEPS) == ORDER


@pytest.mark.parametrize("name", TRANSFORMS)
def test_without_steps_the_scores_are_the_same_bits(name):
    scores = torch.tensor([*random_scores(7, 30), -0.0, 0.0, 1e-42, -3e38])
    assert apply_steps(scores, {}, Context()) is scores
    assert apply_steps(scores, {}, Context(CENTERS, [0] * 34)) is scores
    how, stream, eos = resolve_recipe(name), RandomStream(1, 2, "rejected"), torch.tensor([0.5])
    assert not how.steps
    bare = response_weights(scores, eos, 34, True, how, stream)
    beside = response_weights(scores, eos, 34, True, how, stream, Context(CENTERS, [0] * 34))
    assert bare.view(torch.int32).tolist() == beside.view(torch.int32).tolist()
    if name == "origin":
        assert bare[:-1].view(torch.int32).tolist() == (-scores).view(torch.int32).tolist()


def test_an_empty_response_stays_empty():
    for wanted in ({name: choice} for name in ORDER for choice in CHOICES[name]):
        assert after([], wanted, []) == []


def test_a_single_token_is_its_own_span_at_position_zero():
    """3 less the mean 0.5 or the first position's 1; its span's mean is itself; γ⁰ is 1."""
    assert after([3.0], {"center": "dataset"}) == [2.5]
    assert after([3.0], {"center": "position"}) == [2.0]
    assert after([3.0], {"spans": "sentence"}, [0]) == [3.0]
    assert after([3.0], {"dead_zone": 2.5}) == [3.0]
    assert after([3.0], {"decay": 0.01}) == [3.0]


@pytest.mark.parametrize("seed", range(5))
def test_averaging_over_spans_keeps_the_sum_and_is_done_once(seed):
    scores, spans = random_scores(seed, 40), random_spans(seed, 40)
    once = after(scores, {"spans": "word"}, spans)
    assert sum(once) == pytest.approx(sum(scores), abs=1e-5)
    assert after(once, {"spans": "word"}, spans) == pytest.approx(once, abs=1e-6)
    assert {len({r for r, span in zip(once, spans, strict=True) if span == one}) for one in spans} == {1}
    assert len(set(once)) == len(set(spans))


def test_scores_that_are_not_there_take_no_part_in_spans():
    """A response that was scored up to a cut has fewer scores than spans."""
    assert after([1.0, 3.0], {"spans": "word"}, [0, 0, 0, 1]) == [2.0, 2.0]


@pytest.mark.parametrize("size", [0.1, 0.3, 0.7, 1e-3, 5.0])
def test_the_dead_zone_is_hard_and_holds_its_boundary(size):
    """At the size itself, in float32, a score is 0; the next float32 beyond is left to the last bit."""
    edge = torch.tensor([size])
    beyond, within = (torch.nextafter(edge, edge * factor) for factor in (2, 0))
    scores = torch.cat([edge, -edge, beyond, -beyond, within, -within])
    outside = [0, 0, *torch.cat([beyond, -beyond]).tolist(), 0, 0]
    assert apply_steps(scores, {"dead_zone": size}, Context()).tolist() == outside


def test_the_dead_zone_changes_nothing_outside_of_it():
    scores = torch.tensor(random_scores(4, 200))
    made = apply_steps(scores, {"dead_zone": 0.6}, Context())
    outside = scores.abs() > 0.6
    assert torch.equal(made[outside], scores[outside])
    assert not made[~outside].any()
    assert 50 < outside.sum() < 150


def test_decay_fades_by_position_and_stays_finite():
    ones = torch.ones(3000)
    made = apply_steps(ones, {"decay": 0.5}, Context())
    assert made[:4].tolist() == [1.0, 0.5, 0.25, 0.125]
    assert made.isfinite().all()
    assert made[-1] == 0
    nearly = apply_steps(ones, {"decay": 0.999}, Context())
    assert nearly[2999].item() == pytest.approx(math.exp(2999 * math.log(0.999)), rel=1e-6)


@pytest.mark.parametrize("wanted", [{name: choice} for name in ORDER for choice in CHOICES[name]])
def test_steps_change_no_scores_and_want_no_gradient(wanted):
    scores = torch.tensor(random_scores(2, 9))
    before = scores.clone()
    made = apply_steps(scores, wanted, Context(CENTERS, random_spans(2, 9)))
    assert made.dtype == torch.float32
    assert not made.requires_grad
    made.zero_()
    assert torch.equal(scores, before)


def test_a_step_without_what_it_needs_says_so():
    for wanted, word in (({"center": "dataset"}, "mean scores"), ({"spans": "word"}, "span")):
        with pytest.raises(ValueError, match=word):
            apply_steps(torch.zeros(2), wanted, Context())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"decay": 1.0}, "decay of the steps must be below 1, not 1"),
        ({"decay": 1.5}, "decay of the steps must be below 1, not 1.5"),
        ({"decay": 0.0}, "decay of the steps must be above 0, not 0"),
        ({"decay": -0.5}, "decay of the steps must be above 0, not -0.5"),
        ({"decay": float("nan")}, "decay of the steps must be a finite number"),
        ({"dead_zone": 0.0}, "dead_zone of the steps must be above 0, not 0"),
        ({"dead_zone": -1.0}, "dead_zone of the steps must be above 0, not -1"),
        ({"dead_zone": float("nan")}, "dead_zone of the steps must be a finite number"),
        ({"dead_zone": float("inf")}, "dead_zone of the steps must be a finite number"),
        ({"center": "token"}, "center of the steps must be one of dataset, position, not token"),
        ({"center": ""}, "center of the steps must be one of dataset, position"),
        ({"spans": "letter"}, "spans of the steps must be one of word, clause, sentence, not letter"),
        ({"blur": 1.0}, "no parameter blur (it has: center, spans, dead_zone, decay)"),
    ],
)
def test_values_that_make_no_sense_are_refused_by_name(given, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        resolve_recipe("exp", steps=given)


def test_one_bad_step_among_good_ones_is_refused():
    with pytest.raises(ValueError, match="decay"):
        resolve_recipe("exp", steps={"center": "dataset", "spans": "word", "dead_zone": 0.5, "decay": 1.0})


# ---------------------------------------------------------------- the cut and the EOS


def weights_of(scores, wanted, spans, *, eos=None, eos_weight="score", kept=None, side="chosen", name="origin"):
    """Weights after steps; `origin` shows the scores themselves on the chosen side."""
    how = resolve_recipe(name, steps=wanted, eos_weight=eos_weight)
    eos_score = None if eos is None else torch.tensor([eos])
    kept = len(scores) if kept is None else kept
    arguments = (torch.tensor(scores), eos_score, kept, eos is not None, how, RandomStream(0, 0, side))
    return response_weights(*arguments, Context(CENTERS, spans)).tolist()


def test_the_eos_is_one_token_more_at_the_end_by_hand():
    """A span of its own, at position n = 2, and centred as any token there."""
    assert weights_of([1.0, 3.0], {"spans": "word"}, [0, 0], eos=9.0) == [2.0, 2.0, 9.0]
    assert weights_of([1.0, 3.0], {"decay": 0.5}, [0, 1], eos=8.0) == [1.0, 1.5, 2.0]
    assert weights_of([1.0, 3.0], {"center": "position"}, [0, 1], eos=1.0) == [0.0, 4.0, 0.75]
    assert weights_of([1.0, 3.0], {"center": "dataset"}, [0, 1], eos=1.0) == [0.5, 2.5, 0.5]
    assert weights_of([1.0, 3.0], {"dead_zone": 1.0}, [0, 1], eos=-1.0) == [0.0, 3.0, 0.0]
    assert weights_of([1.0, 3.0], {"decay": 0.5}, [0, 1], eos=8.0, side="rejected") == [-1.0, -1.5, -2.0]


def test_the_eos_of_an_empty_response_is_its_only_token():
    assert weights_of([], {"spans": "word"}, [], eos=2.0) == [2.0]
    assert weights_of([], {"decay": 0.5}, [], eos=2.0) == [2.0]
    assert weights_of([], {"center": "position"}, [], eos=2.0) == [1.0]
    assert weights_of([], {"dead_zone": 2.0}, [], eos=2.0) == [0.0]


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@pytest.mark.parametrize("name", ["exp", "rank_based", "threshold_and_scale", "threshold", "binary", "origin"])
@pytest.mark.parametrize("names", [names for size in range(1, 5) for names in combinations(ORDER, size)], ids="-".join)
def test_the_eos_is_weighed_as_one_more_token_and_leaves_the_others_alone(names, name, side):
    wanted = {one: CHOICES[one][0] for one in names}
    for seed, count in enumerate((0, 1, 2, 17)):
        *scores, eos = random_scores(seed, count + 1)
        spans = random_spans(seed, count)
        alone = weights_of(scores, wanted, spans, side=side, name=name)
        joined = weights_of(scores, wanted, spans, eos=eos, side=side, name=name)
        assert joined[:-1] == alone
        own = [*spans, spans[-1] + 1 if spans else 0]
        longer = weights_of([*scores, eos], wanted, own, side=side, name=name)
        assert joined[-1] == longer[-1]


@pytest.mark.parametrize(("eos_weight", "expected"), [("zero", 0.0), ("one", 1.0)])
def test_a_fixed_eos_weight_knows_no_steps(eos_weight, expected):
    wanted = {"center": "dataset", "spans": "word", "dead_zone": 0.1, "decay": 0.5}
    assert weights_of([1.0, 3.0], wanted, [0, 1], eos=9.0, eos_weight=eos_weight)[-1] == expected


def test_steps_see_the_uncut_response():
    """The span of a token reaches beyond the cut."""
    assert weights_of([1.0, 3.0, 5.0], {"spans": "sentence"}, [0, 0, 0], kept=1) == [3.0]
    assert weights_of([1.0, 3.0, 5.0], {"spans": "sentence"}, [0, 0, 0], kept=0) == []


def test_equal_scores_of_a_span_get_equal_weights():
    spans = random_spans(5, 30)
    for name in (name for name in TRANSFORMS if name != "random"):
        weights = weights_of(random_scores(5, 30), {"spans": "word"}, spans, name=name)
        assert len(set(zip(spans, weights, strict=True))) == len(set(spans))


# ---------------------------------------------------------------- means of a dataset


def ragged(seed, count, longest):
    """Responses of 0 to `longest` tokens, their scores drifting by position."""
    draw = random.Random(seed)
    return [[draw.gauss(0.3 - 0.05 * t, 1) for t in range(draw.randint(0, longest))] for _ in range(count)]


@pytest.mark.parametrize("seed", range(4))
def test_centres_agree_with_plain_loops(seed):
    responses = ragged(seed, 60, 40)
    centers = centers_of(iter(responses))
    columns = [[scores[t] for scores in responses if len(scores) > t] for t in range(40)]
    reached = [column for column in columns if len(column) >= 20]
    rest = [r for column in columns if len(column) < 20 for r in column]
    assert 10 < len(reached) < 40
    assert rest
    assert centers.dataset == pytest.approx(sum(map(sum, responses)) / sum(map(len, responses)), abs=1e-12)
    assert centers.positions == pytest.approx([sum(column) / len(column) for column in reached], abs=1e-12)
    assert centers.tail == pytest.approx(sum(rest) / len(rest), abs=1e-12)


def test_twenty_responses_are_enough_and_nineteen_are_not():
    assert centers_of([[1.0, 2.0]] * 20) == Centers(1.5, (1.0, 2.0), 0.0)
    assert centers_of([[1.0, 2.0]] * 19 + [[1.0]]) == Centers(58 / 39, (1.0,), 2.0)
    assert centers_of([[1.0, 3.0]] * 19) == Centers(2.0, (), 2.0)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", ["dataset", "position"])
def test_centring_makes_the_means_zero_where_responses_differ_in_length(kind, seed):
    responses = ragged(seed, 60, 40)
    centers = centers_of(responses)
    centred = [apply_steps(torch.tensor(r), {"center": kind}, Context(centers)).tolist() for r in responses]
    every = [r for scores in centred for r in scores]
    assert abs(sum(every) / len(every)) < 1e-6
    if kind == "position":
        well = len(centers.positions)
        for t in range(well):
            column = [scores[t] for scores in centred if len(scores) > t]
            assert abs(sum(column) / len(column)) < 1e-6
        thin = [r for scores in centred for r in scores[well:]]
        assert abs(sum(thin) / len(thin)) < 1e-6


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
        ("word", "She’s well-known", ["She’s", " well-known"]),
        ("word", " two  spaces", [" two", "  spaces"]),
        ("word", "end \n", ["end \n"]),
        ("word", "so (sad)!", ["so", " (", "sad", ")!"]),
        ("word", "wait… \"what?!\"", ["wait", "…", " \"", "what", "?!\""]),
        ("word", "3.14 km", ["3", ".", "14", " km"]),
        ("word", "snake_case x=1", ["snake_case", " x", "=", "1"]),
        ("word", "नमस्ते दुनिया", ["नमस्ते", " दुनिया"]),
        ("word", "cafe\u0301 noir", ["cafe\u0301", " noir"]),
        ("word", "你好，世界。", ["你好", "，", "世界", "。"]),
        ("word", "مرحبا، كيف", ["مرحبا", "،", " كيف"]),
        ("word", "ok 👍🏽 yes", ["ok", " 👍🏽", " yes"]),
        ("word", "👩‍👩‍👧 x", ["👩‍👩‍👧", " x"]),
        ("clause", "Well, no; yes: maybe.", ["Well,", " no;", " yes:", " maybe."]),
        ("clause", "He came — late – again", ["He came —", " late –", " again"]),
        ("clause", "It is 3.14 or 1,000 at 10:30 now", ["It is 3.14 or 1,000 at 10:30 now"]),
        ("clause", "She said “go,” then left.", ["She said “go,”", " then left."]),
        ("clause", "One. Two, three\nFour", ["One.", " Two,", " three\n", "Four"]),
        ("clause", "你好，世界。再见", ["你好，", "世界。", "再见"]),
        ("clause", "一、二；三：四", ["一、", "二；", "三：", "四"]),
        ("clause", "مرحبا، كيف حالك؟ بخير", ["مرحبا،", " كيف حالك؟", " بخير"]),
        ("clause", "واحد؛ اثنان", ["واحد؛", " اثنان"]),
        ("sentence", "Hi! Who? Me, me. \"Go.\" End", ["Hi!", " Who?", " Me, me.", " \"Go.\"", " End"]),
        ("sentence", "What?! No… (Yes.) End", ["What?!", " No…", " (Yes.)", " End"]),
        ("sentence", "one\ntwo\n\nthree", ["one\n", "two\n\n", "three"]),
        ("sentence", "one\r\ntwo", ["one\r\n", "two"]),
        ("sentence", "All done.\n\nNext", ["All done.\n\n", "Next"]),
        ("sentence", "All done.  \n \nNext", ["All done.  \n \n", "Next"]),
        ("sentence", "\nNext", ["\n", "Next"]),
        ("sentence", "No end", ["No end"]),
        ("sentence", "Pi is 3.14, v1.2.3 of a.b", ["Pi is 3.14, v1.2.3 of a.b"]),
        ("sentence", "मैं हूँ। तुम हो।", ["मैं हूँ।", " तुम हो।"]),
        ("sentence", "你好，世界。「走。」再见！好", ["你好，世界。", "「走。」", "再见！", "好"]),
        ("sentence", "كيف حالك؟ بخير، شكرا", ["كيف حالك؟", " بخير، شكرا"]),
    ],
)  # fmt: skip
def test_spans_by_hand(unit, text, expected):
    assert grouped(text, unit) == expected


@pytest.mark.parametrize(
    "word",
    [
        "می\u200cخواهم",  # Persian, a zero-width non-joiner between its parts
        "क्\u200dष",  # Hindi, a zero-width joiner
        "co\u2010op",  # the hyphen that is not also a minus
        "co\u2011op",  # the hyphen that never breaks
        "soft\u00adhyphen",
        "\u2764\ufe0f",  # a heart, and the sign that gives it its colour
    ],
    ids=ascii,
)
def test_signs_that_join_do_not_split_a_word(word):
    assert grouped(f"a {word} b", "word", r"(?s).") == ["a", f" {word}", " b"]


@pytest.mark.parametrize("unit", ["word", "clause", "sentence"])
def test_no_tokens_have_no_spans_and_one_has_one(unit):
    assert spans_of("", [], unit) == []
    assert spans_of("Hi. There", [], unit) == []
    assert spans_of("Hi, you. There", [(0, 14)], unit) == [0]
    assert spans_of("", [(0, 0)], unit) == [0]


@pytest.mark.parametrize("unit", ["word", "clause", "sentence"])
def test_tokens_of_no_width_belong_to_what_was_before_them(unit):
    """Some tokenizers give markers the offsets (0, 0), wherever they stand."""
    text, offsets = "Hi, so. By", [(0, 2), (2, 3), (3, 6), (6, 7), (7, 10)]
    plain = spans_of(text, offsets, unit)
    for i in range(len(offsets) + 1):
        spans = spans_of(text, [*offsets[:i], (0, 0), *offsets[i:]], unit)
        assert spans[:i] + spans[i + 1 :] == plain
        assert spans[i] == (plain[i - 1] if i else 0)


def test_a_token_over_a_boundary_belongs_where_its_text_begins():
    assert spans_of("so.By now", [(0, 2), (2, 5), (5, 9)], "word") == [0, 1, 2]
    assert spans_of("好。再见", [(0, 1), (1, 3), (3, 4)], "sentence") == [0, 0, 1]
    assert spans_of("Hi. By. So", [(0, 5), (5, 7), (7, 10)], "sentence") == [0, 1, 2]
    assert spans_of("Hi. By. So", [(0, 7), (7, 10)], "sentence") == [0, 1]


TEXTS = [
    "Well, I'd go (not 3.14 km).\n\nBye! See you…",
    "नमस्ते दुनिया। 你好，世界。Ça va? Ωραία!",
    "مرحبا، كيف حالك؟ بخير.",
    "👩‍👩‍👧 family 👍🏽, e\u0301 combining; \u200bzero width\r\nend",
    "  He said: \"Don't — e.g. Dr. No's — well-known.\" 'Yes,' (he) did…  ",
    "1. One,\n2. Two;\n\n- three: 10:30, 1,000.5!\n",
    "「行け。」彼は、言った！本当？はい",
    "**Bold.** `code, x` _it_; [a](b). \t\ttab",
    "\ufeff\u00a0odd\u2028spaces\u3000here.\x0bend\x00",
    "!!!???...,,,;;;",
    "   ",
    "a",
    "\n",
    "",
]
MARKS = " \n,.;:!?…—'’-\"”)(。，؟،।\u200d\u0301\ufe0fa1好é👍 "


def real_tokenizers():
    """Byte-level ones, whose tokens split characters, and those that mark spaces with ▁, before all text or not."""
    made = {"bytes": make_tokenizer(["x"], 260), "merged bytes": make_tokenizer([t for t in TEXTS if t] * 9, 400)}
    for scheme in ("always", "never"):
        letters = {"<unk>": 0, "▁": 1, **{chr(c): c for c in range(33, 127)}, "▁H": 127, "'t": 128, "▁.": 129}
        metaspace = Backend(models.BPE(vocab=letters, merges=[("▁", "H"), ("'", "t"), ("▁", ".")], unk_token="<unk>"))
        metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        metaspace.decoder = decoders.Metaspace(prepend_scheme=scheme)
        fast = PreTrainedTokenizerFast(tokenizer_object=metaspace, unk_token="<unk>", eos_token="~")
        made[f"metaspace, prefix {scheme}"] = describe_tokenizer(fast, "here")
    return made


TOKENIZERS = real_tokenizers()


def sound(text, offsets):
    """Spans of each unit, after checks: one for each token, from 0, in steps of 0 or 1, sentences of whole clauses."""
    found = {unit: spans_of(text, offsets, unit) for unit in ("word", "clause", "sentence")}
    for spans in found.values():
        assert len(spans) == len(offsets)
        assert spans[:1] in ([], [0])
        assert all(b - a in (0, 1) for a, b in pairwise(spans))
    assert len(set(zip(found["clause"], found["sentence"], strict=True))) == len(set(found["clause"]))
    return found


@pytest.mark.parametrize("name", TOKENIZERS)
def test_spans_are_sound_on_real_tokens(name):
    encoded, offsets = TOKENIZERS[name].encode_responses(TEXTS), TOKENIZERS[name].offsets(TEXTS)
    for text, ids, at in zip(TEXTS, encoded, offsets, strict=True):
        assert len(at) == len(ids)
        for unit, spans in sound(text, at).items():
            # Tokens at the same place, parts of one character, are in one span.
            by_place = set(zip(at, spans, strict=True))
            assert len(by_place) == len(set(at)), unit


@pytest.mark.parametrize("seed", range(300))
def test_spans_are_sound_on_random_text_and_tokens(seed):
    draw = random.Random(seed)
    text = "".join(draw.choices(MARKS, k=draw.randint(0, 40)))
    cuts = sorted(draw.choices(range(len(text) + 1), k=draw.randint(0, 30)))
    offsets = [(a, b) for a, b in pairwise([0, *cuts, len(text)]) for _ in range(draw.choice((1, 1, 1, 3)))]
    sound(text, offsets)


def test_tokens_of_one_character_share_its_span():
    text = "a 你 b"
    spans = spans_of(text, TOKENIZERS["bytes"].offsets([text])[0], "word")
    assert max(spans) == 2
    assert spans.count(1) >= 3
    emoji = "👍🏽 ok"
    at = TOKENIZERS["bytes"].offsets([emoji])[0]
    assert len(at) == 11
    assert spans_of(emoji, at, "word") == [0] * 8 + [1] * 3


@pytest.mark.parametrize("unit", ["word", "clause", "sentence"])
def test_spans_do_not_depend_on_the_tokenizer(unit):
    """Every letter is in the same span, whatever tokens it is in."""
    text = "Hello there, friend. I can't say: go-to, or stay!\nOk."
    found = []
    for tokenizer in TOKENIZERS.values():
        at = tokenizer.offsets([text])[0]
        spans = spans_of(text, at, unit)
        found.append({i: s for (b, e), s in zip(at, spans, strict=True) for i in range(b, e) if text[i] > " "})
    assert all(spans == found[0] for spans in found)
    assert max(found[0].values()) + 1 == {"word": 16, "clause": 6, "sentence": 3}[unit]


@pytest.mark.parametrize("seed", range(100))
def test_words_agree_with_a_pattern(seed):
    """Without marks, a word is a run of letters, digits, _ ' ’ - or of other signs, and the white space before it."""
    draw = random.Random(seed)
    text = "".join(draw.choices("ab1é好_'’-  \n,.!(。", k=40)) + "z"
    place = [match.end() for match in re.finditer(r"\s*(?:[\w'’-]+|[^\w\s'’-]+)", text)]
    cuts = sorted(draw.sample(range(1, len(text)), 20))
    offsets = list(pairwise([0, *cuts, len(text)]))
    begins = [next(i for i in range(begin, len(text)) if not text[i].isspace()) for begin, _ in offsets]
    words = [sum(end <= begin for end in place) for begin in begins]
    numbers = {word: number for number, word in enumerate(dict.fromkeys(words))}
    assert spans_of(text, offsets, "word") == [numbers[word] for word in words]


# ---------------------------------------------------------------- docstrings


@pytest.mark.parametrize("module", [steps, params, prompt_templates, tokens])
def test_the_examples_in_the_docstrings_hold(module):
    assert doctest.testmod(module).failed == 0


# ---------------------------------------------------------------- templates


def test_a_template_has_one_place_for_the_prompt():
    assert prompt_templates.split_template("normal") == ("", "")
    assert prompt_templates.split_template("say {} now") == ("say ", " now")
    before, after_it = prompt_templates.split_template("harmless")
    assert before
    assert not after_it
    assert prompt_templates.split_template("harmful")[0] != before
    for wrong in ("no place", "{} twice {}", "", "harmles"):
        with pytest.raises(ValueError, match="exactly once"):
            prompt_templates.split_template(wrong)
