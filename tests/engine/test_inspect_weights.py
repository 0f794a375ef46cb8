"""inspect-weights: its results against plain re-derivations, on synthetic scores."""

from __future__ import annotations

import csv
import doctest
import json
import math
import re
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import pair_rows, read_jsonl, run_here, write_jsonl

from tisdpo_cli.data import tokens as tokens_module
from tisdpo_cli.data.tokens import shared_characters
from tisdpo_cli.engine.inspection import results
from tisdpo_cli.engine.inspection.results import Scale
from tisdpo_cli.engine.inspection.summaries import mean_ranks
from tisdpo_cli.model.tokenizer import load_tokenizer
from tisdpo_cli.text import glyphs

SIDES = ("chosen", "rejected")
# r of the token at a position of a response of so many tokens: (row, side, token id, position, tokens) to nats.
Score = Callable[[int, str, int, int, int], "float | None"]


@pytest.fixture
def scored(world: Path, tmp_path: Path) -> Callable[..., Path]:
    """Create a scored dataset of the texts of `world`, with scores from a function."""
    tokenizer = load_tokenizer(world / "sft")

    def make(score: Score, name: str = "scored", eos: float | None = 0.0, rows: int = 24) -> Path:
        scored_rows = []
        for i, row in enumerate(pair_rows(rows)):
            for side in SIDES:
                ids = tokenizer.texts.encode([row[side]])[0]
                values = [score(i, side, at, t, len(ids)) for t, at in enumerate(ids)]
                row[f"{side}_weight"] = [None if v is None else -v for v in values]
                if eos is not None:
                    row[f"{side}_eos_weight"] = -eos
            scored_rows.append(row)
        write_jsonl(tmp_path / name / "train.jsonl", scored_rows)
        tokenizer.backend.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def wavy(i: int, side: str, at: int, t: int, _n: int) -> float:
    """Different everywhere, positive on the whole in chosen and negative in rejected responses."""
    return math.sin(7.3 * i + 3.1 * t + at) + (0.5 if side == "chosen" else -0.5)


def inspect(*arguments: str | Path, code: int = 0) -> dict:
    done = run_here("inspect-weights", *arguments, "--json")
    assert done.code == code, done.err
    return json.loads(done.out)


def view_tokens(shown: dict) -> list[dict]:
    return [token for view in shown["views"] for side in SIDES for token in view[side]]


# ---------------------------------------------------------------- tokens


def test_every_pair_has_every_token(contrast: Path) -> None:
    shown = inspect(contrast / "scored", "--limit", "100", "--sort", "index")
    rows = read_jsonl(contrast / "scored" / "train.jsonl")
    tokenizer = load_tokenizer(contrast / "scored")
    assert [view["index"] for view in shown["views"]] == list(range(24))
    for view, row in zip(shown["views"], rows, strict=True):
        assert view["prompt"] == row["prompt"]
        for side in SIDES:
            *body, eos = view[side]
            assert "".join(token["text"] for token in body) == row[side]
            assert [token["id"] for token in body] == tokenizer.texts.encode([row[side]])[0]
            assert bytes.fromhex("".join(token["bytes"] for token in body)).decode() == row[side]
            assert [token["score"] for token in body] == pytest.approx([-x for x in row[f"{side}_weight"]])
            assert (eos["kind"], eos["id"]) == ("eos", tokenizer.eos)
            assert eos["score"] == pytest.approx(-row[f"{side}_eos_weight"])
            total = -sum(row[f"{side}_weight"]) - row[f"{side}_eos_weight"]
            assert view["sides"][side]["total_score"] == pytest.approx(total, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "unclipped"),
    [
        ((), lambda s: math.exp(s)),
        (("--k", "2", "--mu", "0.5", "--L", "-0.1", "--U", "0.2"), lambda s: 2 * math.exp(0.5 * s)),
        (("--transform", "threshold"), lambda s: s),
        (("--transform", "threshold_and_scale", "--max-val", "0.5"), lambda s: 0.7 + 0.6 * (s + 1.5) / 2.0),
        (("--transform", "origin"), None),
        (("--transform", "rank_based"), None),
    ],
    ids=["exp", "exp with parameters", "threshold", "scaled", "origin", "ranks"],
)
def test_weights_before_and_after_the_clamp(scored, options: tuple[str, ...], unclipped) -> None:
    shown = inspect(scored(wavy), "--limit", "24", *options)
    hit = [token for token in view_tokens(shown) if token["clipped"]]
    assert bool(hit) == (unclipped is not None)
    for view in shown["views"]:
        for side, sign in (("chosen", 1), ("rejected", -1)):
            for token in view[side]:
                if token["clipped"]:
                    assert token["unclipped"] == pytest.approx(unclipped(sign * token["score"]), rel=1e-5)
                    assert abs(token["unclipped"] - token["weight"]) > 1e-6
                else:
                    assert token["unclipped"] == token["weight"]
                assert token["masked"] == (token["weight"] == 0)


def test_unclipped_weights_are_normalized_too(scored) -> None:
    plain, normal = (inspect(scored(wavy), "--limit", "24", *options) for options in ((), ("--normalize", "mean")))
    for one, other in zip(view_tokens(plain), view_tokens(normal), strict=True):
        assert one["unclipped"] / one["weight"] == pytest.approx(other["unclipped"] / other["weight"], rel=1e-5)


def test_truncated_tokens_have_no_value(scored) -> None:
    shown = inspect(scored(lambda i, s, at, t, n: None if t >= n - 3 else 0.5 * (-1) ** t, eos=None), "--limit", "24")
    for view in shown["views"]:
        for side in SIDES:
            assert [token["truncated"] for token in view[side]][-4:] == [False, True, True, True]
            assert {token["weight"] for token in view[side][-3:]} == {None}
            assert not any(token["masked"] for token in view[side])


def test_log_probs_are_shown_if_they_are_stored(contrast: Path, tmp_path: Path) -> None:
    done = run_here(
        "estimate", "--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", contrast / "data",
        "-o", tmp_path / "kept", "--keep-logps", "--max-length", "40", "--max-prompt-length", "16",
    )  # fmt: skip
    assert done.code == 0, done.err
    shown = inspect(tmp_path / "kept", "--limit", "24")
    seen = 0
    for token in view_tokens(shown):
        if token["truncated"]:
            assert (token["logp_forward"], token["logp_reverse"]) == (None, None)
        else:
            seen += 1
            assert token["logp_forward"] < 0
            assert token["logp_forward"] - token["logp_reverse"] == pytest.approx(token["score"], abs=1e-5)
    assert seen > 200
    assert {token["logp_forward"] for token in view_tokens(inspect(contrast / "scored"))} == {None}
    # The same scores as without them; scored again without, the columns are gone.
    again = run_here(
        "estimate", "--forward", contrast / "dpo", "--reverse", contrast / "reverse", "-d", tmp_path / "kept",
        "-o", tmp_path / "plain", "--max-length", "40", "--max-prompt-length", "16",
    )  # fmt: skip
    assert again.code == 0, again.err
    kept, plain = (read_jsonl(tmp_path / name / "train.jsonl") for name in ("kept", "plain"))
    assert [{k: v for k, v in row.items() if "logps" not in k} for row in kept] == plain


def test_damaged_log_probs_are_errors(contrast: Path, tmp_path: Path, scored) -> None:
    data = scored(wavy)
    rows = read_jsonl(data / "train.jsonl")
    for name, value in (("forward", [0.0]), ("reverse", "x")):
        scored_rows = [{**row, "chosen_logps_forward": [-1.0], "chosen_logps_reverse": [-1.0]} for row in rows]
        scored_rows[3][f"chosen_logps_{name}"] = value
        write_jsonl(data / "train.jsonl", scored_rows)
        done = run_here("inspect-weights", data)
        assert done.code == 1
        assert "logps_" in done.error


# ---------------------------------------------------------------- split characters


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([], []),
        ([b"a", b" b"], []),
        ([b" \xf0\x9f", b"\x91", b"\x8d!"], [(0, 3, " 👍!")]),
        ([b"\xf0\x9f\x91", b"\x8d\xf0\x9f", b"\x8f\xbd"], [(0, 3, "👍🏽")]),
        ([b"\xc3", b"\xa9", b"\xc3", b"\xa8"], [(0, 2, "é"), (2, 4, "è")]),
        ([b"\xff", b"a"], []),
        ([b"\xc3"], []),
        ([b"\xc3", b"", b"x"], []),
    ],
)
def test_tokens_that_share_a_character_are_found(parts: list[bytes], expected: list) -> None:
    assert shared_characters(parts) == expected


def test_split_characters_are_grouped_everywhere(world: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(world / "sft")
    rows = [{"prompt": f"p{i}", "chosen": " ok 👍 ß", "rejected": " नहीं 🏽"} for i in range(3)]
    for row in rows:
        for side in SIDES:
            row[f"{side}_weight"] = [0.1 * t for t in range(len(tokenizer.texts.encode([row[side]])[0]))]
    write_jsonl(tmp_path / "d" / "train.jsonl", rows)
    tokenizer.backend.save_pretrained(tmp_path / "d")
    shown = inspect(tmp_path / "d")
    for side in SIDES:
        body = [token for token in shown["views"][0][side] if token["kind"] == "text"]
        assert bytes.fromhex("".join(token["bytes"] for token in body)).decode() == rows[0][side]
        groups = {token["group"]: token["character"] for token in body if token["group"] is not None}
        assert len(groups) >= 2
        for number, character in groups.items():
            parts = bytes.fromhex("".join(t["bytes"] for t in body if t["group"] == number))
            assert parts.decode() == character
    out = run_here("inspect-weights", tmp_path / "d").out
    assert "f09f" in out.replace("{", "").replace("}", "") or "⟨" in out
    assert "�" not in out


# ---------------------------------------------------------------- the file as a whole


def test_summaries_agree_with_plain_ones(scored) -> None:
    data = scored(wavy, eos=0.25)
    shown = inspect(data)
    rows = read_jsonl(data / "train.jsonl")
    for side, sign in (("chosen", 1), ("rejected", -1)):
        scores = [-x for row in rows for x in [*row[f"{side}_weight"], row[f"{side}_eos_weight"]]]
        weights = [math.exp(sign * min(1.5, max(-0.5, r))) for r in scores]
        got = shown["sides"][side]
        assert got["mean_score"] == pytest.approx(statistics.fmean(scores), abs=1e-5)
        assert got["sd_score"] == pytest.approx(statistics.pstdev(scores), rel=1e-4)
        assert got["mean_weight"] == pytest.approx(statistics.fmean(weights), rel=1e-5)
        assert (got["min_weight"], got["max_weight"]) == pytest.approx((min(weights), max(weights)), rel=1e-5)
        assert sum(shown["scores"]["counts"][side]) == sum(len(row[f"{side}_weight"]) for row in rows)
        assert sum(shown["sizes"]["counts"][side]) == len(rows)


def test_separation_agrees_with_a_plain_count(scored) -> None:
    data = scored(lambda i, side, at, t, n: math.cos(i * 1.7 + t) + (0.03 if side == "chosen" else -0.03), eos=0.1)
    got = inspect(data)["separation"]
    rows = read_jsonl(data / "train.jsonl")
    sums = {s: [-sum(row[f"{s}_weight"]) - row[f"{s}_eos_weight"] for row in rows] for s in SIDES}
    pairs = zip(sums["chosen"], sums["rejected"], strict=True)
    assert got["accuracy"] == pytest.approx(statistics.fmean(c > r for c, r in pairs))
    assert got["auc"] == pytest.approx(statistics.fmean(c > r for c in sums["chosen"] for r in sums["rejected"]))
    assert 0.2 < got["auc"] < 0.98
    assert got["roc"][0] == [0, 0]
    assert got["roc"][-1] == [1, 1]
    assert got["roc"] == sorted(got["roc"])
    # The area under the points, by trapezoids, is the area.
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in zip(got["roc"], got["roc"][1:], strict=False))
    assert area == pytest.approx(got["auc"], abs=1e-6)


def test_equal_sums_count_half(scored) -> None:
    got = inspect(scored(lambda *_: 0.0))["separation"]
    assert (got["accuracy"], got["auc"]) == (0.5, 0.5)


def test_extreme_tokens_have_counts_and_examples(scored, world: Path) -> None:
    tokenizer = load_tokenizer(world / "sft")
    often = tokenizer.texts.encode([" Take care."])[0]
    data = scored(lambda i, side, at, t, n: 2.0 if at == often[-1] else 0.001 * (at % 7))
    shown = inspect(data, "--top", "3", "--min-count", "2")
    best = shown["highest"][0]
    assert best["text"] == tokenizer.pieces([often[-1]])[0]
    rows = read_jsonl(data / "train.jsonl")
    places = [(i, s) for i, row in enumerate(rows) for s in SIDES for x in row[f"{s}_weight"] if x == -2.0]
    assert best["count"] == len(places)
    assert best["mean"] == 2.0
    assert best["share_chosen"] == pytest.approx(sum(s == "chosen" for _, s in places) / len(places))
    assert len(shown["highest"]) == len(shown["lowest"]) == len(shown["heaviest"]) == len(shown["lightest"]) == 3
    for example in best["examples"]:
        text = rows[example["pair"]][example["side"]]
        assert example["before"] + best["text"] + example["after"] in text
    means = [token["mean_weight"] for token in shown["heaviest"]]
    assert means == sorted(means, reverse=True)


def test_mean_ranks_share_ties() -> None:
    assert mean_ranks(torch.tensor([3.0, 1.0, 3.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize("logarithmic", [True, False])
def test_the_colour_scale_is_symmetric_and_ends_at_four(logarithmic: bool) -> None:
    scale = Scale(1.0, 0.5, logarithmic)
    low, high = scale.ends
    assert scale.level(low) == -4
    assert scale.level(high) == 4
    assert scale.level(high * 100) == 4
    assert scale.level(1.0) == 0
    for part in (0.1, 0.3, 0.55, 0.9):
        if logarithmic:
            assert scale.level(high**part) == -scale.level(low**part)
        else:
            assert scale.level(1 + 0.5 * part) == -scale.level(1 - 0.5 * part)


# ---------------------------------------------------------------- order


def test_pairs_come_in_the_requested_order(scored) -> None:
    data = scored(wavy)
    every = {view["index"]: view for view in inspect(data, "--limit", "24", "--sort", "index")["views"]}

    def order(*options: str) -> list[int]:
        return [view["index"] for view in inspect(data, "--limit", "24", *options)["views"]]

    def weights(index: int, side: str) -> list[float]:
        return [token["weight"] for token in every[index][side]]

    highest = order("--sort", "max-weight")
    assert [max(max(weights(i, s)) for s in SIDES) for i in highest] == sorted(
        (max(max(weights(i, s)) for s in SIDES) for i in highest), reverse=True
    )
    lowest = [min(statistics.fmean(weights(i, s)) for s in SIDES) for i in order("--sort", "min-mean")]
    assert lowest == sorted(lowest)
    mixed = order("--sort", "random")
    assert sorted(mixed) == list(range(24))
    assert mixed == order("--sort", "random") != order("--sort", "random", "--seed", "1")
    assert order("--sort", "spread")[0] == inspect(data)["views"][0]["index"]
    assert len(inspect(data, "--limit", "5")["views"]) == 5
    assert [v["index"] for v in inspect(data, "--index", "7", "--limit", "5")["views"]] == [7]
    shown = run_here("inspect-weights", data, "--limit", "3", "--sort", "index").out
    assert re.findall(r"^pair (\d+)\b", shown, re.MULTILINE) == ["0", "1", "2"]


# ---------------------------------------------------------------- comparing


def spearman(a: list[float], b: list[float]) -> float:
    def ranks(values: list[float]) -> list[float]:
        return [statistics.fmean(i for i, w in enumerate(sorted(values), 1) if w == v) for v in values]

    return statistics.correlation(ranks(a), ranks(b))


def test_two_transforms_are_compared(scored) -> None:
    data = scored(wavy)
    spec = "rank_based:min_scale=0.5,max_scale=1.5"
    shown = inspect(data, "--limit", "24", "--sort", "index", "--compare", spec)
    two = shown["comparison"]
    other = inspect(data, "--limit", "24", "--sort", "index", "--transform", "rank_based", "--min-scale", "0.5",
                    "--max-scale", "1.5")  # fmt: skip
    columns = [[token["weight"] for token in view_tokens(s) if token["kind"] == "text"] for s in (shown, other)]
    assert two["tokens"] == len(columns[0])
    assert two["of"] == "weights"
    assert two["rank_correlation"] == pytest.approx(spearman(*columns), abs=1e-6)
    decided = [(a > 1, b > 1) for a, b in zip(*columns, strict=True) if abs(a - 1) > 1e-6 and abs(b - 1) > 1e-6]
    assert two["agreement"] == pytest.approx(statistics.fmean(a == b for a, b in decided))
    assert two["within"] > 0.95, "ranks within a response are those of the scores"
    differences = [abs(row["first_rank"] - row["second_rank"]) for row in two["differing"]]
    assert differences == sorted(differences, reverse=True)
    assert "compared with" in run_here("inspect-weights", data, "--compare", spec).out


def test_a_transform_agrees_with_itself(scored) -> None:
    two = inspect(scored(wavy), "--compare", "exp")["comparison"]
    assert (two["agreement"], two["within"]) == (1.0, pytest.approx(1.0))
    assert two["rank_correlation"] == pytest.approx(1.0)
    assert all(row["first"] == row["second"] for row in two["differing"])


def test_two_datasets_are_compared_on_tokens_scored_in_both(scored) -> None:
    one = scored(wavy, "one")
    two = scored(lambda i, s, at, t, n: None if t == n - 1 else -wavy(i, s, at, t, n), "two", eos=None)
    got = inspect(one, "--compare", str(two), "--eos-weight", "zero")["comparison"]
    rows = read_jsonl(one / "train.jsonl")
    assert got["tokens"] == sum(len(row[f"{s}_weight"]) - 1 for row in rows for s in SIDES)
    assert got["of"] == "scores"
    assert got["rank_correlation"] == pytest.approx(-1.0, abs=1e-9)
    assert got["agreement"] == 0.0


def test_datasets_with_different_responses_are_not_compared(scored, contrast: Path) -> None:
    one = scored(wavy, "one")
    other = read_jsonl(one / "train.jsonl")
    other[4]["chosen"], other[4]["chosen_weight"] = "x", [0.0] * len(other[4]["chosen_weight"])
    tokenizer = load_tokenizer(one)
    other[4]["chosen_weight"] = [0.0] * len(tokenizer.texts.encode(["x"])[0])
    write_jsonl(one.parent / "two" / "train.jsonl", other)
    tokenizer.backend.save_pretrained(one.parent / "two")
    done = run_here("inspect-weights", one, "--compare", one.parent / "two")
    assert done.code == 1
    assert "pair 4 has a different chosen response" in done.error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--compare", "exp:nu=1"), "no parameter nu"),
        (("--compare", "exp:mu"), "param=number"),
        (("--previews", "exp nonsense"), "unknown transform 'nonsense'"),
        (("--compare", "exp", "--weights-are", "final"), "has no scores for another transform"),
        (("--min-spread", "-1"), "greater than or equal to 0"),
    ],
)
def test_an_impossible_comparison_is_a_usage_error(scored, arguments: tuple[str, ...], word: str) -> None:
    done = run_here("inspect-weights", scored(wavy), *arguments)
    assert done.code == 2
    assert word in done.err


# ---------------------------------------------------------------- checks


def failed(shown: dict) -> set[str]:
    return {check["name"] for check in shown["checks"] if not check["passed"]}


@pytest.mark.parametrize(
    ("score", "options", "names"),
    [
        (wavy, (), set()),
        (lambda *_: 0.0, (), {"spread of r", "pairs separated by Σr"}),
        (lambda i, s, at, t, n: 0.001 * wavy(i, s, at, t, n), (), {"spread of r"}),
        (lambda i, s, at, t, n: -wavy(i, s, at, t, n), (), {"pairs separated by Σr"}),
        (lambda i, s, at, t, n: 3.0 * t / n + 0.1 * wavy(i, s, at, t, n), ("--U", "9"), {"drift with position"}),
        (lambda i, s, at, t, n: 1.0 + 0.3 * wavy(i, s, at, t, n), ("--min-count", "2"), {"offset on neutral tokens"}),
        (lambda i, s, at, t, n: 5.0 * wavy(i, s, at, t, n), (), {"clipped scores"}),
        (lambda i, s, at, t, n: None if t > n // 4 else 0.4 * wavy(i, s, at, t, n), (), {"unscored tokens"}),
    ],
    ids=["fine", "zero", "tiny", "swapped", "drift", "offset", "clipped", "cut"],
)
def test_each_problem_fails_its_check_only(scored, score: Score, options: tuple[str, ...], names: set[str]) -> None:
    data = scored(score, eos=None)
    shown = inspect(data, *options)
    assert failed(shown) - {"offset on neutral tokens"} == names - {"offset on neutral tokens"}
    assert ("offset on neutral tokens" in failed(shown)) >= ("offset on neutral tokens" in names)
    for check in shown["checks"]:
        if not check["passed"]:
            assert any(check["says"] in notice and check["fix"] in notice for notice in shown["notices"])
    # For CI: the same as an exit code, after the view.
    done = run_here("inspect-weights", data, "--check", *options)
    assert done.code == (1 if failed(shown) else 0)
    assert "checks: " in done.out
    assert all(name in done.error for name in failed(shown))


def test_bounds_are_settings(scored) -> None:
    data = scored(wavy)
    assert failed(inspect(data, "--min-spread", "5")) == {"spread of r"}
    assert failed(inspect(data, "--max-clipped", "0")) == {"clipped scores"}
    assert run_here("inspect-weights", data, "--check", "--min-separation", "1.01").code == 1


def test_centering_removes_an_offset(scored) -> None:
    data = scored(lambda i, s, at, t, n: 1.0 + 0.3 * wavy(i, s, at, t, n), eos=None)
    found = [
        next(c["value"] for c in inspect(data, "--min-count", "2", *options)["checks"] if "offset" in c["name"])
        for options in ((), ("--center", "dataset"))
    ]
    assert found[0] > 1
    assert found[1] < 0.7


def test_final_weights_have_no_scores_to_check(contrast: Path, scored, tmp_path: Path) -> None:
    data = scored(lambda i, s, at, t, n: -1.0 - 0.1 * (t % 3), eos=None)
    shown = inspect(data, "--weights-are", "final", "--html", tmp_path / "r.html")
    assert {check["name"] for check in shown["checks"]} == {"unscored tokens"}
    assert shown["separation"] is None
    assert list(shown["curves"]) == ["weights"]
    assert {token["score"] for token in view_tokens(shown)} == {None}
    title = "Separation of chosen and rejected"
    assert title not in (tmp_path / "r.html").read_text()
    inspect(data, "--html", tmp_path / "r.html")
    assert title in (tmp_path / "r.html").read_text()


# ---------------------------------------------------------------- table and provenance


def test_the_table_has_every_token_of_every_pair(scored, tmp_path: Path) -> None:
    data = scored(wavy)
    shown = inspect(data, "--sort", "index", "--table", tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    views = shown["views"]
    assert len(views) == 24, "a table is of all pairs, unless a limit is given"
    flat = [(view["index"], side, token) for view in views for side in SIDES for token in view[side]]
    assert len(rows) == len(flat)
    for row, (index, side, token) in zip(rows, flat, strict=True):
        assert (int(row["pair"]), row["side"], int(row["position"])) == (index, side, token["position"])
        assert json.loads(row["text"]) == token["text"]
        assert float(row["weight"]) == token["weight"]
        assert row["logp_forward"] == ""
        assert row["clipped"] == str(token["clipped"])


def test_the_provenance_is_in_every_output(contrast: Path, tmp_path: Path) -> None:
    done = run_here("inspect-weights", contrast / "scored", "--html", tmp_path / "r.html", "--json")
    provenance = json.loads(done.out)["provenance"]
    manifest = json.loads((contrast / "scored" / "estimate.json").read_text())
    assert provenance["models"] == manifest["models"]
    assert provenance["tokenizer in use"] == manifest["tokenizer"]
    assert provenance["command"].startswith("tisdpo inspect-weights ")
    assert provenance["shown by"]["tisdpo"]
    terminal, html = run_here("inspect-weights", contrast / "scored").out, (tmp_path / "r.html").read_text()
    assert "command: tisdpo inspect-weights" in terminal
    run_here("inspect-weights", contrast / "scored", "--table", tmp_path / "t.csv")
    origin = json.loads((tmp_path / "t.csv.json").read_text())
    assert {"models", "dataset", "weights", "tokenizer in use", "command", "shown by"} <= origin.keys()
    assert origin["models"] == manifest["models"]
    for model in manifest["models"].values():
        assert model["sha256"][:12] in terminal
        assert model["sha256"] in html
    assert manifest["tokenizer"][:12] in terminal
    assert manifest["tokenizer"] in html
    assert glyphs("--html").replace("·", " ") in html


@pytest.mark.parametrize("module", [results, tokens_module])
def test_docstrings(module) -> None:
    assert doctest.testmod(module).failed == 0
